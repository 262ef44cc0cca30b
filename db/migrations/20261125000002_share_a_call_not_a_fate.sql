-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- The row lock on the wallet comes first and is held to the end of the transaction: it puts the operations of one
-- wallet in order, so nothing below it can race but the same operation_uuid on another wallet, where the unique
-- index decides. The balance is checked before the duplicate because that is the order that costs a good operation
-- nothing; an operation that was applied and is sent again must hear that it exists, so the failing paths look for it.
-- A plain insert whose unique_violation is caught costs less than one that is on conflict do nothing. Lock, insert and
-- update stand in one block, and so in one subtransaction: an update of a row that another one locked needs a multixact.
create or replace function wallet.apply_operation(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fault text := wallet.argument_fault(p_operation_uuid, p_operation_type, p_amount);
  v_balance bigint;
  v_seq bigint;
  v_operation wallet.operation;
  v_constraint text;
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  begin
    select w.balance, w.seq into v_balance, v_seq
    from wallet.wallet as w
    where w.uuid = p_wallet_uuid
    for no key update;

    if not found then
      perform wallet.raise_wallet_not_found(p_wallet_uuid);
    end if;

    v_fault := wallet.funds_fault(p_operation_type, p_amount, v_balance);
    if v_fault is not null then
      if exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then
        v_fault := 'WA409';
      end if;
      raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
    end if;

    v_balance := v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end;
    v_seq := v_seq + 1;

    insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
    values (p_wallet_uuid, p_operation_type, p_operation_uuid, v_seq, p_amount, v_balance)
    returning * into v_operation;

    update wallet.wallet as w
    set balance = v_balance, seq = v_seq
    where w.uuid = p_wallet_uuid;

    return v_operation;
  exception
    when unique_violation then
      get stacked diagnostics v_constraint = constraint_name;
      if v_constraint <> 'operation_operation_uuid_key' then
        raise;
      elsif not exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then
        raise serialization_failure using
          message = 'the operation was recorded by a transaction that this snapshot cannot see',
          hint = 'Start the transaction again.';
      end if;
      v_fault := 'WA409';
    when lock_not_available then
      v_fault := case
        when exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then 'WA409'
        else '55P03'
      end;
  end;

  raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
end
$$;

comment on function wallet.apply_operation(text, uuid, text, bigint) is
  'Applies one operation to one wallet exactly once and returns its row. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT or WITHDRAW; p_amount: minor units, 1 to 2^63-1. '
  'Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA402 (not enough money), WA416 (the balance would pass 2^63-1); under a lock_timeout also 55P03, after WA409 (another transaction keeps '
  'the wallet locked, or the operation_uuid in flight); under repeatable read or serializable also 40001. '
  'A refused operation leaves nothing behind.';

-- Every wallet of the batch is locked first, in the order of uuid, and every insert goes in the order of
-- operation_uuid: two batches that share wallets or operations wait for each other in one direction only.
--
-- An attempt is one block, and so one subtransaction: lock, decide, insert, update. What it meets decides how the next one
-- goes; it starts without locks, and looks again.
--
-- Under a lock_timeout a call holds nothing while it waits for a wallet, so that nobody waits in vain for its other wallets:
-- it takes what is free, and if anything is missed it lets go of all, waits for the missed wallet alone and, once it has
-- that one, takes the rest. Each wait has half of what is left of the lock_timeout, so that a wallet that
-- stays locked leaves some time for those that are merely busy. A call for one wallet waits as any statement does.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a refusal may be a repeat and must then hear that it exists. Whoever held one of the operation_uuids
-- has committed by then, because the insert waited for it, so each look-up that follows such an objection finds more of them
-- than the one before. Only under a snapshot older than that commit (repeatable read, serializable) does it find no more:
-- then the caller's transaction must start again.
--
-- What else the database refuses (a constraint, a trigger, an operation_uuid that stays in flight) it refuses to a single
-- request, and doesn't say to which. Both halves of the batch are then applied by themselves, one after the other, down to
-- that request. All wallets stay locked meanwhile.
--
-- The decisions run in the order of the requests, over arrays: one entry a request for what comes out (by ordinal), one a
-- wallet for the state in between (by number; v_numbers is the dictionary from uuid to number). The plans are pinned to
-- what fits any length and any ledger: hash joins between arrays, index scans on tables, nothing planned while a table was small.
create or replace function wallet.apply_operations(
  p_wallet_uuids text[],
  p_operation_uuids uuid[],
  p_operation_types text[],
  p_amounts bigint[]
)
returns table (
  ordinal int,
  sqlstate text,
  message text,
  wallet_uuid text,
  operation_type text,
  operation_uuid uuid,
  seq bigint,
  amount bigint,
  balance_after bigint,
  created_at timestamptz
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_nestloop = off
set enable_mergejoin = off
as $$
declare
  v_count int := cardinality(p_wallet_uuids);
  v_half int;
  v_now timestamptz;

  v_lock_timeout text := current_setting('lock_timeout');
  v_patience interval := v_lock_timeout::interval; -- 0: without end
  v_until timestamptz;
  v_step text; -- what the attempt is about, when it ends by an error
  v_skip_locked bool;
  v_awaited text;
  v_stuck text[] := '{}'; -- wallets that were waited for in vain
  v_missed text[]; -- wallets that exist and could not be locked; null: nothing was missed yet
  v_halve bool := false;

  v_sqlstate text;
  v_constraint text;
  v_objection text;

  v_numbers jsonb;
  v_uuids text[];
  v_balances bigint[];
  v_wallet_seqs bigint[];
  v_locked_balances bigint[];
  v_locked_seqs bigint[];

  v_ordinal int;
  v_number int;
  v_fault text;
  v_balance bigint;
  v_faults text[];
  v_messages text[];
  v_seqs bigint[];
  v_balances_after bigint[];

  v_look_up bool := false;
  v_recorded bool[];
  v_recorded_count bigint;
  v_recorded_before bigint;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken bool[];
begin
  if p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null then
    raise sqlstate 'WA400' using message = 'arrays must not be null';
  elsif array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
    or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1 then
    raise sqlstate 'WA400' using message = 'arrays must have one dimension';
  elsif v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
    or v_count <> cardinality(p_amounts) then
    raise sqlstate 'WA400' using message = 'arrays must have the same length';
  end if;

  p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1, whatever the array did
  p_operation_uuids := p_operation_uuids[:];
  p_operation_types := p_operation_types[:];
  p_amounts := p_amounts[:];

  v_skip_locked := v_patience > '0' and p_wallet_uuids <> array_fill(p_wallet_uuids[1], array[v_count]);

  <<attempt>>
  loop
    begin
      if v_awaited is not null then
        v_step := 'wait';
        perform wallet.wait_for_wallet(v_awaited, 0.5 * (v_until - clock_timestamp()));
      end if;

      v_step := 'lock';
      v_missed := null;
      if not v_skip_locked then
        select jsonb_object_agg(n.uuid, n.number), array_agg(n.uuid), array_agg(n.balance), array_agg(n.seq)
        into v_numbers, v_uuids, v_locked_balances, v_locked_seqs
        from (
          select l.*, row_number() over () as number
          from (
            select w.uuid, w.balance, w.seq
            from wallet.wallet as w
            where w.uuid = any(p_wallet_uuids)
            order by w.uuid
            for no key update
          ) as l
        ) as n;
      else
        select jsonb_object_agg(n.uuid, n.number), array_agg(n.uuid), array_agg(n.balance), array_agg(n.seq)
        into v_numbers, v_uuids, v_locked_balances, v_locked_seqs
        from (
          select l.*, row_number() over () as number
          from (
            select w.uuid, w.balance, w.seq
            from wallet.wallet as w
            where w.uuid = any(p_wallet_uuids)
            order by w.uuid
            for no key update skip locked
          ) as l
        ) as n;
      end if;

      if v_halve then
        v_step := 'halves';
        v_half := v_count / 2;
        if v_patience > '0' then
          perform set_config('lock_timeout', '1', true); -- what is here is locked, and what is not was waited for
        end if;

        return query
        select * from wallet.apply_operations(
          p_wallet_uuids[:v_half], p_operation_uuids[:v_half], p_operation_types[:v_half], p_amounts[:v_half]
        );

        return query
        select (a.ordinal + v_half), a.sqlstate, a.message, a.wallet_uuid, a.operation_type, a.operation_uuid, a.seq, a.amount,
          a.balance_after, a.created_at
        from wallet.apply_operations(
          p_wallet_uuids[v_half + 1:], p_operation_uuids[v_half + 1:], p_operation_types[v_half + 1:], p_amounts[v_half + 1:]
        ) as a;

        perform set_config('lock_timeout', v_lock_timeout, true);
        return;
      end if;

      <<decision>>
      loop
        v_step := 'decide';
        v_balances := v_locked_balances;
        v_wallet_seqs := v_locked_seqs;
        v_faults := array_fill(null::text, array[v_count]);
        v_messages := v_faults;
        v_seqs := array_fill(null::bigint, array[v_count]);
        v_balances_after := v_seqs;

        if v_look_up then
          v_taken := array_fill(false, array[v_count]);

          with known as materialized (
            select o.operation_uuid
            from wallet.operation as o
            where o.operation_uuid = any(p_operation_uuids)
          )
          select array_agg(q.recorded order by q.ordinal), array_agg(q.first order by q.ordinal), count(*) filter (where q.recorded)
          into v_recorded, v_firsts, v_recorded_count
          from (
            select
              r.ordinal,
              k.operation_uuid is not null as recorded,
              min(r.ordinal) over (partition by r.operation_uuid) as first
            from unnest(p_operation_uuids) with ordinality as r (operation_uuid, ordinal)
            left join known as k on k.operation_uuid = r.operation_uuid
          ) as q;

          if v_recorded_count <= v_recorded_before then
            raise serialization_failure using
              message = 'an operation of this batch was recorded by a transaction that this snapshot cannot see',
              hint = 'Start the transaction again.';
          end if;
        end if;

        for v_ordinal in 1..v_count loop
          v_fault := wallet.argument_fault(p_operation_uuids[v_ordinal], p_operation_types[v_ordinal], p_amounts[v_ordinal]);
          v_number := (v_numbers ->> p_wallet_uuids[v_ordinal])::int;

          if v_number is null then
            v_fault := coalesce(wallet.name_fault(p_wallet_uuids[v_ordinal]), v_fault);

            if v_missed is null then
              v_missed := array(
                select w.uuid
                from wallet.wallet as w
                where v_skip_locked and w.uuid = any(p_wallet_uuids) and not coalesce(v_numbers ? w.uuid, false)
                order by w.uuid
              );
              v_until := coalesce(v_until, clock_timestamp() + v_patience);
              select m.uuid into v_awaited from unnest(v_missed) as m (uuid) where m.uuid <> all(v_stuck) limit 1;

              if v_awaited is not null and clock_timestamp() < v_until then
                v_step := 'miss';
                raise lock_not_available;
              end if;
            end if;
          end if;

          if v_fault is not null then
            v_messages[v_ordinal] := v_fault;
            v_fault := 'WA400';
          elsif v_number is null and p_wallet_uuids[v_ordinal] <> all(v_missed) then
            v_fault := 'WA404';
          elsif v_look_up and (v_recorded[v_ordinal] or v_taken[v_firsts[v_ordinal]]) then
            v_fault := 'WA409';
          else
            if v_number is null then
              v_fault := '55P03';
            else
              v_balance := v_balances[v_number];
              v_fault := wallet.funds_fault(p_operation_types[v_ordinal], p_amounts[v_ordinal], v_balance);
            end if;

            if v_fault is not null and not v_look_up then
              v_look_up := true;
              continue decision;
            end if;
          end if;

          if v_fault is not null then
            v_faults[v_ordinal] := v_fault;
            continue;
          end if;

          v_balance := v_balance + case p_operation_types[v_ordinal] when 'DEPOSIT' then p_amounts[v_ordinal] else -p_amounts[v_ordinal] end;
          v_balances[v_number] := v_balance;
          v_balances_after[v_ordinal] := v_balance;
          v_wallet_seqs[v_number] := v_wallet_seqs[v_number] + 1;
          v_seqs[v_ordinal] := v_wallet_seqs[v_number];
          if v_look_up then
            v_taken[v_firsts[v_ordinal]] := true;
          end if;
        end loop;

        exit;
      end loop;

      v_step := 'write';
      v_now := clock_timestamp();

      insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at)
      select r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after, v_now
      from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after)
        as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
      where r.seq is not null
      order by r.operation_uuid;

      update wallet.wallet as w
      set balance = l.balance, seq = l.seq
      from unnest(v_uuids, v_balances, v_wallet_seqs) as l (uuid, balance, seq)
      where w.uuid = any(v_uuids) and w.uuid = l.uuid and w.seq < l.seq;

      exit;
    exception when others then
      get stacked diagnostics
        v_sqlstate = returned_sqlstate, v_constraint = constraint_name, v_objection = message_text;
      v_recorded_before := null;

      if v_step = 'miss' then
        null; -- the next attempt waits for v_awaited
      elsif v_step = 'wait' and v_sqlstate = '55P03' then
        v_stuck := v_stuck || v_awaited;
        v_awaited := null;
      elsif v_step = 'lock' and v_sqlstate = '55P03' and not v_skip_locked then
        v_stuck := p_wallet_uuids[:1];
        v_skip_locked := true;
      elsif v_step <> 'write' or v_sqlstate ~ '^(08|25|40|53|57|58|XX)' then
        raise; -- not about a single request
      elsif v_sqlstate = '23505' and v_constraint = 'operation_operation_uuid_key' then
        v_recorded_before := case when v_look_up then v_recorded_count end;
        v_look_up := true;
      elsif v_count > 1 then
        v_halve := true;
      else
        if v_sqlstate <> '55P03' then
          raise warning using errcode = v_sqlstate, message = v_objection;
        end if;
        v_faults := array[v_sqlstate];
        v_seqs := array[null::bigint];
        v_balances_after := v_seqs;
        exit;
      end if;
    end;
  end loop;

  if not v_look_up then
    return query
    select
      r.ordinal::int,
      r.fault,
      coalesce(r.message, wallet.fault_message(r.fault)),
      case when r.seq is not null then r.wallet_uuid end,
      case when r.seq is not null then r.operation_type end,
      case when r.seq is not null then r.operation_uuid end,
      r.seq,
      case when r.seq is not null then r.amount end,
      r.balance_after,
      case when r.seq is not null then v_now end
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after, v_faults, v_messages
    ) with ordinality
      as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, fault, message, ordinal);
    return;
  end if;

  -- With duplicates among the requests, the ledger says what is recorded, whether just now or before.
  return query
  with recorded as materialized (
    select o.*
    from wallet.operation as o
    where o.operation_uuid = any(p_operation_uuids)
  )
  select
    r.ordinal::int, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
    o.wallet_uuid, o.operation_type, o.operation_uuid, o.seq, o.amount, o.balance_after, o.created_at
  from unnest(p_wallet_uuids, p_operation_uuids, v_faults, v_messages) with ordinality
    as r (wallet_uuid, operation_uuid, fault, message, ordinal)
  left join recorded as o
    on o.operation_uuid = r.operation_uuid and o.wallet_uuid = r.wallet_uuid and coalesce(r.fault, 'WA409') = 'WA409'
  order by r.ordinal;
end
$$;

comment on function wallet.apply_operations(text[], uuid[], text[], bigint[]) is
  'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. '
  'Four arrays of one length: wallet, operation_uuid, DEPOSIT or WITHDRAW, amount in minor units. Returns one row per request, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA402, WA416 as in apply_operation. '
  'Also, for requests that were not tried and may be asked again: 55P03, under a lock_timeout, after WA409 (another transaction keeps the wallet '
  'locked, or the operation_uuid in flight); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and, under repeatable read or serializable, 40001.';

create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 2
$$;

comment on function wallet.contract_version() is
  'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. '
  'A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';

create or replace function wallet.fault_message(p_sqlstate text)
returns text
language sql immutable
as $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA404' then 'Wallet not found'
    when 'WA409' then 'Transaction already exists'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA419' then 'Wallet already exists'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence `is distinct from`, which sees nulls, and uniqueness.
-- Sums are numeric, so that no forged row can overflow them.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
  with history as materialized (
    select
      o.*,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  ),

  summary as (
    select
      w.uuid,
      w.balance,
      w.seq,
      coalesce(h.operations, 0) as operations,
      coalesce(h.last_seq, 0) as last_seq,
      coalesce(h.total, 0) as total,
      coalesce(o.balance_after, 0) as last_balance
    from wallet.wallet as w
    left join (
      select
        h.wallet_uuid,
        count(*) as operations,
        max(h.seq) as last_seq,
        sum(case h.operation_type when 'DEPOSIT' then h.amount::numeric else -h.amount::numeric end) as total
      from history as h
      group by h.wallet_uuid
    ) as h on h.wallet_uuid = w.uuid
    left join wallet.operation as o on o.wallet_uuid = h.wallet_uuid and o.seq = h.last_seq
  )

  select 'wallet has no nulls', w.uuid, w.seq, w::text
  from wallet.wallet as w
  where w.uuid is null or w.id is null or w.balance is null or w.seq is null or w.created_at is null
  union all
  select 'wallet uuid is unique', w.uuid, null::bigint, format('%s wallets have this uuid', count(*))
  from wallet.wallet as w
  group by w.uuid
  having count(*) > 1
  union all
  select 'wallet uuid is well formed', w.uuid, null::bigint, wallet.name_fault(w.uuid)
  from wallet.wallet as w
  where wallet.name_fault(w.uuid) is not null
  union all
  select 'wallet id is unique', min(w.uuid), null::bigint, format('id %s stands %s times', w.id, count(*))
  from wallet.wallet as w
  group by w.id
  having count(*) > 1
  union all
  select 'balance is not negative', s.uuid, s.seq, format('balance %s', s.balance)
  from summary as s
  where s.balance < 0
  union all
  select 'balance is the last balance_after', s.uuid, s.seq, format('balance %s, last balance_after %s', s.balance, s.last_balance)
  from summary as s
  where s.balance is distinct from s.last_balance
  union all
  select 'balance is the sum of the operations', s.uuid, s.seq, format('balance %s, sum %s', s.balance, s.total)
  from summary as s
  where s.balance is distinct from s.total
  union all
  select 'wallet seq counts the operations', s.uuid, s.seq, format('%s operations, last seq %s', s.operations, s.last_seq)
  from summary as s
  where s.seq is distinct from s.operations or s.seq is distinct from s.last_seq
  union all
  select 'operation belongs to a wallet', h.wallet_uuid, h.seq, format('operation %s', h.operation_uuid)
  from history as h
  where not exists (select from wallet.wallet as w where w.uuid = h.wallet_uuid)
  union all
  select 'operation has no nulls', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.wallet_uuid is null or h.operation_type is null or h.operation_uuid is null or h.seq is null
    or h.amount is null or h.balance_after is null or h.created_at is null
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, wallet.argument_fault(h.operation_uuid, h.operation_type, h.amount)
  from history as h
  where wallet.argument_fault(h.operation_uuid, h.operation_type, h.amount) is not null
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid
  having count(*) > 1
  union all
  select 'seq has no gap', h.wallet_uuid, h.seq, format('comes after seq %s', h.seq_before)
  from history as h
  where h.seq is distinct from h.seq_before + 1
  union all
  select
    'balance_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s gives %s', h.operation_type, h.amount, h.balance_before, h.balance_after)
  from history as h
  where h.balance_after < 0
    or h.balance_after
      is distinct from h.balance_before::numeric + case h.operation_type when 'DEPOSIT' then h.amount::numeric else -h.amount::numeric end
$$;

comment on function wallet.verify() is
  'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); '
  'no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody.';

-- Its own lock_timeout ends with the function (PostgreSQL manual, SET): the caller's is back afterwards.
create or replace function wallet.wait_for_wallet(p_wallet_uuid text, p_patience interval)
returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = 0
as $$
begin
  perform set_config('lock_timeout', greatest(1, ceil(1000 * extract(epoch from p_patience)))::text, true);

  perform 1
  from wallet.wallet as w
  where w.uuid = p_wallet_uuid
  for no key update;
end
$$;

comment on function wallet.wait_for_wallet(text, interval) is
  'Internal: locks a wallet to the end of the transaction. Raises 55P03 if that takes longer than p_patience.';

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader;
revoke all on all functions in schema wallet from wallet_app, wallet_reader;

-- wallet_app calls functions and touches no table; wallet_reader reads and changes nothing; PUBLIC has nothing.
-- Functions that are granted to nobody are internal: they run as part of the others, with the owner's rights.
revoke all on schema wallet from public;
revoke all on all tables in schema wallet from public;
revoke all on all functions in schema wallet from public;

grant usage on schema wallet to wallet_app, wallet_reader;

grant execute on function
  wallet.create_wallet(text),
  wallet.apply_operation(text, uuid, text, bigint),
  wallet.apply_operations(text[], uuid[], text[], bigint[]),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation to wallet_reader;

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

drop function wallet.contract_version();
drop function wallet.wait_for_wallet(text, interval);

-- The row lock on the wallet comes first and is held to the end of the transaction: it puts the operations of one
-- wallet in order, so nothing below it can race but the same operation_uuid on another wallet, where the unique
-- index decides. The balance is checked before the duplicate because that is the order that costs a good operation
-- nothing; an operation that was applied and is sent again must hear that it exists, so the failing path looks for it.
-- A plain insert whose unique_violation is caught costs less than one that is on conflict do nothing.
create or replace function wallet.apply_operation(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fault text := wallet.argument_fault(p_operation_uuid, p_operation_type, p_amount);
  v_balance bigint;
  v_seq bigint;
  v_operation wallet.operation;
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  select w.balance, w.seq into v_balance, v_seq
  from wallet.wallet as w
  where w.uuid = p_wallet_uuid
  for no key update;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  v_fault := wallet.funds_fault(p_operation_type, p_amount, v_balance);
  if v_fault is not null then
    if exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then
      v_fault := 'WA409';
    end if;
    raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
  end if;

  v_balance := v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end;
  v_seq := v_seq + 1;

  begin
    insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
    values (p_wallet_uuid, p_operation_type, p_operation_uuid, v_seq, p_amount, v_balance)
    returning * into v_operation;
  exception when unique_violation then
    if not exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then
      raise serialization_failure using
        message = 'the operation was recorded by a transaction that this snapshot cannot see',
        hint = 'Start the transaction again.';
    end if;
    raise sqlstate 'WA409' using message = wallet.fault_message('WA409');
  end;

  update wallet.wallet as w
  set balance = v_balance, seq = v_seq
  where w.uuid = p_wallet_uuid;

  return v_operation;
end
$$;

comment on function wallet.apply_operation(text, uuid, text, bigint) is
  'Applies one operation to one wallet exactly once and returns its row. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT or WITHDRAW; p_amount: minor units, 1 to 2^63-1. '
  'Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA402 (not enough money), WA416 (the balance would pass 2^63-1); under repeatable read or serializable also 40001. '
  'A refused operation leaves nothing behind.';

-- Every wallet of the batch is locked first, in the order of uuid, and every insert goes in the order of
-- operation_uuid: two batches that share wallets or operations wait for each other in one direction only.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a balance refuses what may be a repeat and must then hear that it exists. It decides again and
-- inserts the rest. Whoever held one of the operation_uuids has committed by then, because the insert waited for it, so each
-- look-up after the first finds more of them than the one before. Only under a snapshot older than that commit (repeatable
-- read, serializable) does it find no more: then the caller's transaction must start again.
--
-- The decisions run in the order of the requests, over arrays: one entry a request for what comes out (by ordinal), one a
-- wallet for the state in between (by number; v_numbers is the dictionary from uuid to number). The plans are pinned to
-- what fits any length and any ledger: hash joins between arrays, index scans on tables, nothing planned while a table was small.
create or replace function wallet.apply_operations(
  p_wallet_uuids text[],
  p_operation_uuids uuid[],
  p_operation_types text[],
  p_amounts bigint[]
)
returns table (
  ordinal int,
  sqlstate text,
  message text,
  wallet_uuid text,
  operation_type text,
  operation_uuid uuid,
  seq bigint,
  amount bigint,
  balance_after bigint,
  created_at timestamptz
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_nestloop = off
set enable_mergejoin = off
as $$
declare
  v_count int := cardinality(p_wallet_uuids);
  v_now timestamptz;

  v_numbers jsonb;
  v_uuids text[];
  v_balances bigint[];
  v_wallet_seqs bigint[];
  v_locked_balances bigint[];
  v_locked_seqs bigint[];

  v_ordinal int;
  v_number int;
  v_fault text;
  v_balance bigint;
  v_faults text[];
  v_messages text[];
  v_seqs bigint[];
  v_balances_after bigint[];

  v_look_up bool := false;
  v_recorded bool[];
  v_recorded_count bigint := -1;
  v_recorded_before bigint;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken bool[];
begin
  if p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null then
    raise sqlstate 'WA400' using message = 'arrays must not be null';
  elsif array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
    or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1 then
    raise sqlstate 'WA400' using message = 'arrays must have one dimension';
  elsif v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
    or v_count <> cardinality(p_amounts) then
    raise sqlstate 'WA400' using message = 'arrays must have the same length';
  end if;

  p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1, whatever the array did
  p_operation_uuids := p_operation_uuids[:];
  p_operation_types := p_operation_types[:];
  p_amounts := p_amounts[:];

  select jsonb_object_agg(n.uuid, n.number), array_agg(n.uuid), array_agg(n.balance), array_agg(n.seq)
  into v_numbers, v_uuids, v_locked_balances, v_locked_seqs
  from (
    select l.*, row_number() over () as number
    from (
      select w.uuid, w.balance, w.seq
      from wallet.wallet as w
      where w.uuid = any(p_wallet_uuids)
      order by w.uuid
      for no key update
    ) as l
  ) as n;

  <<attempt>>
  loop
    v_balances := v_locked_balances;
    v_wallet_seqs := v_locked_seqs;
    v_faults := array_fill(null::text, array[v_count]);
    v_messages := v_faults;
    v_seqs := array_fill(null::bigint, array[v_count]);
    v_balances_after := v_seqs;

    if v_look_up then
      v_recorded_before := v_recorded_count;
      v_taken := array_fill(false, array[v_count]);

      with known as materialized (
        select o.operation_uuid
        from wallet.operation as o
        where o.operation_uuid = any(p_operation_uuids)
      )
      select array_agg(q.recorded order by q.ordinal), array_agg(q.first order by q.ordinal), count(*) filter (where q.recorded)
      into v_recorded, v_firsts, v_recorded_count
      from (
        select
          r.ordinal,
          k.operation_uuid is not null as recorded,
          min(r.ordinal) over (partition by r.operation_uuid) as first
        from unnest(p_operation_uuids) with ordinality as r (operation_uuid, ordinal)
        left join known as k on k.operation_uuid = r.operation_uuid
      ) as q;

      if v_recorded_count <= v_recorded_before then
        raise serialization_failure using
          message = 'an operation of this batch was recorded by a transaction that this snapshot cannot see',
          hint = 'Start the transaction again.';
      end if;
    end if;

    for v_ordinal in 1..v_count loop
      v_fault := wallet.argument_fault(p_operation_uuids[v_ordinal], p_operation_types[v_ordinal], p_amounts[v_ordinal]);
      v_number := (v_numbers ->> p_wallet_uuids[v_ordinal])::int;

      if v_number is null then
        v_fault := coalesce(wallet.name_fault(p_wallet_uuids[v_ordinal]), v_fault);
      end if;

      if v_fault is not null then
        v_messages[v_ordinal] := v_fault;
        v_fault := 'WA400';
      elsif v_number is null then
        v_fault := 'WA404';
      elsif v_look_up and (v_recorded[v_ordinal] or v_taken[v_firsts[v_ordinal]]) then
        v_fault := 'WA409';
      else
        v_balance := v_balances[v_number];
        v_fault := wallet.funds_fault(p_operation_types[v_ordinal], p_amounts[v_ordinal], v_balance);
        if v_fault is not null and not v_look_up then
          v_look_up := true;
          continue attempt;
        end if;
      end if;

      if v_fault is not null then
        v_faults[v_ordinal] := v_fault;
        continue;
      end if;

      v_balance := v_balance + case p_operation_types[v_ordinal] when 'DEPOSIT' then p_amounts[v_ordinal] else -p_amounts[v_ordinal] end;
      v_balances[v_number] := v_balance;
      v_balances_after[v_ordinal] := v_balance;
      v_wallet_seqs[v_number] := v_wallet_seqs[v_number] + 1;
      v_seqs[v_ordinal] := v_wallet_seqs[v_number];
      if v_look_up then
        v_taken[v_firsts[v_ordinal]] := true;
      end if;
    end loop;

    v_now := clock_timestamp();

    begin
      insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at)
      select r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after, v_now
      from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after)
        as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
      where r.seq is not null
      order by r.operation_uuid;

      exit;
    exception when unique_violation then
      v_look_up := true;
    end;
  end loop;

  update wallet.wallet as w
  set balance = l.balance, seq = l.seq
  from unnest(v_uuids, v_balances, v_wallet_seqs) as l (uuid, balance, seq)
  where w.uuid = any(v_uuids) and w.uuid = l.uuid and w.seq < l.seq;

  if not v_look_up then
    return query
    select
      r.ordinal::int,
      r.fault,
      coalesce(r.message, wallet.fault_message(r.fault)),
      case when r.seq is not null then r.wallet_uuid end,
      case when r.seq is not null then r.operation_type end,
      case when r.seq is not null then r.operation_uuid end,
      r.seq,
      case when r.seq is not null then r.amount end,
      r.balance_after,
      case when r.seq is not null then v_now end
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after, v_faults, v_messages
    ) with ordinality
      as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, fault, message, ordinal);
    return;
  end if;

  -- With duplicates among the requests, the ledger says what is recorded, whether just now or before.
  return query
  with recorded as materialized (
    select o.*
    from wallet.operation as o
    where o.operation_uuid = any(p_operation_uuids)
  )
  select
    r.ordinal::int, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
    o.wallet_uuid, o.operation_type, o.operation_uuid, o.seq, o.amount, o.balance_after, o.created_at
  from unnest(p_wallet_uuids, p_operation_uuids, v_faults, v_messages) with ordinality
    as r (wallet_uuid, operation_uuid, fault, message, ordinal)
  left join recorded as o
    on o.operation_uuid = r.operation_uuid and o.wallet_uuid = r.wallet_uuid and coalesce(r.fault, 'WA409') = 'WA409'
  order by r.ordinal;
end
$$;

comment on function wallet.apply_operations(text[], uuid[], text[], bigint[]) is
  'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. '
  'Four arrays of one length: wallet, operation_uuid, DEPOSIT or WITHDRAW, amount in minor units. Returns one row per request, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA402, WA416 as in apply_operation. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and, under repeatable read or serializable, 40001.';

create or replace function wallet.fault_message(p_sqlstate text)
returns text
language sql immutable
as $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA404' then 'Wallet not found'
    when 'WA409' then 'Transaction already exists'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA419' then 'Wallet already exists'
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too. Sums are numeric, so that no forged row can overflow them.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  with history as materialized (
    select
      o.*,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  ),

  summary as (
    select
      w.uuid,
      w.balance,
      w.seq,
      coalesce(h.operations, 0) as operations,
      coalesce(h.last_seq, 0) as last_seq,
      coalesce(h.total, 0) as total,
      coalesce(o.balance_after, 0) as last_balance
    from wallet.wallet as w
    left join (
      select
        h.wallet_uuid,
        count(*) as operations,
        max(h.seq) as last_seq,
        sum(case h.operation_type when 'DEPOSIT' then h.amount::numeric else -h.amount::numeric end) as total
      from history as h
      group by h.wallet_uuid
    ) as h on h.wallet_uuid = w.uuid
    left join wallet.operation as o on o.wallet_uuid = h.wallet_uuid and o.seq = h.last_seq
  )

  select 'wallet uuid is well formed', w.uuid, null::bigint, wallet.name_fault(w.uuid)
  from wallet.wallet as w
  where wallet.name_fault(w.uuid) is not null
  union all
  select 'wallet id is unique', min(w.uuid), null::bigint, format('id %s stands %s times', w.id, count(*))
  from wallet.wallet as w
  group by w.id
  having count(*) > 1
  union all
  select 'balance is not negative', s.uuid, s.seq, format('balance %s', s.balance)
  from summary as s
  where s.balance < 0
  union all
  select 'balance is the last balance_after', s.uuid, s.seq, format('balance %s, last balance_after %s', s.balance, s.last_balance)
  from summary as s
  where s.balance <> s.last_balance
  union all
  select 'balance is the sum of the operations', s.uuid, s.seq, format('balance %s, sum %s', s.balance, s.total)
  from summary as s
  where s.balance <> s.total
  union all
  select 'wallet seq counts the operations', s.uuid, s.seq, format('%s operations, last seq %s', s.operations, s.last_seq)
  from summary as s
  where s.seq <> s.operations or s.seq <> s.last_seq
  union all
  select 'operation belongs to a wallet', h.wallet_uuid, h.seq, format('operation %s', h.operation_uuid)
  from history as h
  where not exists (select from wallet.wallet as w where w.uuid = h.wallet_uuid)
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, wallet.argument_fault(h.operation_uuid, h.operation_type, h.amount)
  from history as h
  where wallet.argument_fault(h.operation_uuid, h.operation_type, h.amount) is not null
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid
  having count(*) > 1
  union all
  select 'seq has no gap', h.wallet_uuid, h.seq, format('comes after seq %s', h.seq_before)
  from history as h
  where h.seq <> h.seq_before + 1
  union all
  select
    'balance_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s gives %s', h.operation_type, h.amount, h.balance_before, h.balance_after)
  from history as h
  where h.balance_after < 0
    or h.balance_after
      <> h.balance_before::numeric + case h.operation_type when 'DEPOSIT' then h.amount::numeric else -h.amount::numeric end
$$;

comment on function wallet.verify() is
  'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); '
  'no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody.';

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader;
revoke all on all functions in schema wallet from wallet_app, wallet_reader;

-- wallet_app calls functions and touches no table; wallet_reader reads and changes nothing; PUBLIC has nothing.
-- Functions named *_fault and raise_wallet_not_found are internal: they run as part of the others, with the owner's
-- rights.
revoke all on schema wallet from public;
revoke all on all tables in schema wallet from public;
revoke all on all functions in schema wallet from public;

grant usage on schema wallet to wallet_app, wallet_reader;

grant execute on function
  wallet.create_wallet(text),
  wallet.apply_operation(text, uuid, text, bigint),
  wallet.apply_operations(text[], uuid[], text[], bigint[]),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation to wallet_reader;

reset role;
reset search_path;
