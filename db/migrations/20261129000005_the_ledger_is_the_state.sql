-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- By hand

-- From here on a wallet's balance is what its last operation says. Where somebody has changed the table by hand, it would change.
do $$
declare
  v_different text;
begin
  select string_agg(d.uuid, ', ' order by d.uuid) into v_different
  from (
    select w.uuid
    from wallet.wallet as w
    left join lateral (
      select l.balance_after, l.seq
      from wallet.operation as l
      where l.wallet_uuid = w.uuid
      order by l.seq desc
      limit 1
    ) as o on true
    where w.balance <> coalesce(o.balance_after, 0) or w.seq <> coalesce(o.seq, 0)
    order by w.uuid
    limit 10
  ) as d;
  if v_different is not null then
    raise exception 'refused: wallets whose balance or seq is not that of their last operation: %; nothing was changed', v_different
      using hint = 'select * from wallet.verify() tells of all. Make them agree, and migrate again.';
  end if;
end
$$;

-- Nobody waits behind this for longer than 100 ms: it lets go, and tries again. An attempt that fails undoes its grant, too: whoever
-- analyses or vacuums the table waits for that change of its row in pg_class, and keeps the table locked meanwhile.
do $$
begin
  perform set_config('lock_timeout', '100ms', true);

  for v_attempt in 1..100 loop
    begin
      grant update on wallet.operation to wallet_owner; -- to lock it; grants.sql has taken it away
      lock table wallet.wallet in access exclusive mode;
      lock table wallet.operation in access exclusive mode;
      return;
    exception when lock_not_available then
      perform pg_sleep(0.4 * random());
    end;
  end loop;

  raise exception 'wallet.wallet or wallet.operation stays locked by another transaction; nothing was changed: migrate again later';
end
$$;

alter table wallet.wallet
  drop column balance,
  drop column seq,
  reset (fillfactor);

alter table wallet.operation drop constraint operation_operation_uuid_key;

comment on table wallet.wallet is 'One row per wallet: who it is, and the lock of its operations. Its balance is what its last operation says: see the view wallet.balance.';
comment on table wallet.operation is
  'The ledger, and the state: one row per applied operation, append-only; a wallet''s balance is the balance_after of its last row. A rejected operation leaves nothing here.';

-- Generated

drop function wallet.apply_operation(text, uuid, text, bigint);
drop function wallet.apply_operations(text[], uuid[], text[], bigint[]);
drop function wallet.argument_fault(uuid, text, bigint);
drop function wallet.create_wallet(text);
drop function wallet.funds_fault(text, bigint, bigint);
drop function wallet.get_wallet(text);
drop function wallet.list_operations(text, bigint, int);
drop function wallet.raise_wallet_not_found(text);

-- The row locks on the wallets come first, in the order of uuid, and are held to the end of the transaction: they put the
-- operations of a wallet in order, so nothing below them can race but the same operation_uuid on another wallet, where
-- the unique index decides. The last rows are read by statements of their own, which see what the lock waited for.
-- The state is checked before the duplicate because that is the order that costs a good operation
-- nothing; an operation that was applied and is sent again must hear that it exists, so the failing paths look for it.
-- A plain insert whose unique_violation is caught costs less than one that is on conflict do nothing.
-- Sequential scans are off, here and in what reads: a session keeps a plan that it made while the ledger was empty.
create or replace function wallet.apply_operation(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint default null,
  p_counterparty_uuid text default null,
  p_hold_uuid uuid default null,
  p_expires_at timestamptz default null,
  p_metadata jsonb default null,
  p_not_after timestamptz default null
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_fault text := wallet.argument_fault(
    p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata
  );
  v_status text;
  v_balance bigint;
  v_seq bigint;
  v_last timestamptz;
  v_now timestamptz;

  v_currency text;
  v_payee_status text;
  v_payee_currency text;
  v_payee_balance bigint;
  v_payee_seq bigint;
  v_payee_last timestamptz;
  v_missed text[] := '{}';

  v_operation wallet.operation;
  v_constraint text;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  begin
    if p_counterparty_uuid is null then
      select w.status into v_status
      from wallet.wallet as w
      where w.uuid = p_wallet_uuid
      for no key update;
    else
      select
        l.statuses[array_position(l.uuids, p_wallet_uuid)], l.currencies[array_position(l.uuids, p_wallet_uuid)],
        l.statuses[array_position(l.uuids, p_counterparty_uuid)], l.currencies[array_position(l.uuids, p_counterparty_uuid)],
        l.missed
      into v_status, v_currency, v_payee_status, v_payee_currency, v_missed
      from wallet.lock_wallets(array[p_wallet_uuid, p_counterparty_uuid]) as l;

      select o.balance_after, o.seq, o.created_at
      into v_payee_balance, v_payee_seq, v_payee_last
      from wallet.operation as o
      where o.wallet_uuid = p_counterparty_uuid
      order by o.seq desc
      limit 1;
    end if;

    if (v_status is null and coalesce(p_wallet_uuid <> all(v_missed), true))
      or (p_counterparty_uuid is not null and v_payee_status is null and p_counterparty_uuid <> all(v_missed)) then
      perform wallet.raise_wallet_not_found(p_wallet_uuid, p_counterparty_uuid);
    elsif v_missed <> '{}' then
      raise lock_not_available;
    end if;

    select o.balance_after, o.seq, o.created_at
    into v_balance, v_seq, v_last
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid
    order by o.seq desc
    limit 1;

    v_balance := coalesce(v_balance, 0);
    v_now := greatest(clock_timestamp(), v_last, v_payee_last);
    v_fault := wallet.state_fault(
      p_operation_type, p_amount, v_status, v_balance, v_currency, v_payee_status, coalesce(v_payee_balance, 0), v_payee_currency
    );

    if v_fault is not null then
      if exists (
        select from wallet.operation as o
        where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
      ) then
        v_fault := 'WA409';
      end if;
      raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
    end if;

    insert into wallet.operation
      (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
    values (
      p_wallet_uuid, p_operation_type, p_operation_uuid, coalesce(v_seq, 0) + 1, p_amount,
      v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end,
      v_now, p_counterparty_uuid, nullif(p_metadata, '{}')
    )
    returning * into v_operation;

    if p_counterparty_uuid is not null then
      insert into wallet.operation
        (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
      values (
        p_counterparty_uuid, 'RECEIVE', p_operation_uuid, coalesce(v_payee_seq, 0) + 1, p_amount,
        coalesce(v_payee_balance, 0) + p_amount,
        v_now, p_wallet_uuid, v_operation.metadata
      );
    end if;

    if clock_timestamp() >= p_not_after then
      perform wallet.raise_too_late();
    end if;

    return v_operation;
  exception
    when unique_violation then
      get stacked diagnostics v_constraint = constraint_name;
      if v_constraint <> 'operation_requested_idx' then
        raise;
      end if;
      v_fault := 'WA409';
    when lock_not_available then
      v_fault := case
        when exists (
          select from wallet.operation as o
          where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
        ) then 'WA409'
        else '55P03'
      end;
  end;

  raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
end
$$;

comment on function wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz) is
  'Applies one operation exactly once and returns its row; for a transfer, the payer''s. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT, WITHDRAW or TRANSFER; p_amount: minor units, 1 to 2^63-1; p_counterparty_uuid: the payee of a TRANSFER, '
  'else null; p_metadata: an object of at most 2,048 octets as text ({} is null); p_not_after: the last moment of the call by the database''s clock; '
  'p_hold_uuid, p_expires_at: null. '
  'Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA405 (a wallet is closed), WA403 (the wallet is frozen), WA422 (the wallets'' currencies differ), WA402 (not enough money), '
  'WA416 (a balance would pass 2^63-1); under a lock_timeout also 55P03, after WA409 (another transaction keeps '
  'a wallet locked, or the operation_uuid in flight); 57014 (too late); 0A000 unless the transaction is read committed. '
  'A refused operation leaves nothing behind.';

-- Every wallet of the batch is locked first, and then every insert goes in the order of operation_uuid: two batches that share
-- wallets or operations wait for each other in one direction only. The wallets' last rows are read by a statement of its own,
-- which sees what the locks waited for.
--
-- An attempt is one block, and so one subtransaction: decide, insert. What it meets decides how the next one goes.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a refusal may be a repeat and must then hear that it exists. Whoever held one of the operation_uuids
-- has committed by then, because the insert waited for it, so each look-up that follows such an objection finds more of them
-- than the one before.
--
-- What else the database refuses (a constraint, a trigger, an operation_uuid that stays in flight) it refuses to a single
-- request, and doesn't say to which. Both halves of the batch are then applied by themselves, one after the other, down to
-- that request. All wallets stay locked meanwhile.
--
-- An atomic batch is applied as any other, and all of it is taken back if any request was refused.
--
-- The decisions run in the order of the requests, over arrays: one entry a request for what comes out (by ordinal), one a
-- wallet for the state in between (by number; v_numbers is the dictionary from uuid to number). What is null as a whole in most
-- calls is looked up by ordinal, since each array that is unnested costs every row. The plans are pinned to
-- what fits any length and any ledger: hash joins between arrays, index scans on tables, nothing planned while a table was small.
create or replace function wallet.apply_operations(
  p_wallet_uuids text[],
  p_operation_uuids uuid[],
  p_operation_types text[],
  p_amounts bigint[],
  p_counterparty_uuids text[] default null,
  p_hold_uuids uuid[] default null,
  p_expires_at timestamptz[] default null,
  p_metadata jsonb[] default null,
  p_atomic boolean default false,
  p_not_after timestamptz default null
)
returns table (
  ordinal int,
  sqlstate text,
  message text,
  same_request boolean,
  wallet_uuid text,
  operation_type text,
  operation_uuid uuid,
  seq bigint,
  amount bigint,
  balance_after bigint,
  created_at timestamptz,
  held_after bigint,
  counterparty_uuid text,
  hold_uuid uuid,
  expires_at timestamptz,
  metadata jsonb
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_nestloop = off
set enable_mergejoin = off
as $$
declare
  v_count int := cardinality(p_wallet_uuids);
  v_half int;
  v_lock_timeout text := current_setting('lock_timeout');
  v_now timestamptz;
  v_step text; -- what the attempt is about, when it ends by an error
  v_halve boolean := false;

  v_sqlstate text;
  v_constraint text;
  v_objection text;

  v_uuids text[];
  v_statuses text[];
  v_currencies text[];
  v_missed text[]; -- wallets that exist and could not be locked
  v_numbers jsonb;
  v_last_balances bigint[];
  v_last_seqs bigint[];
  v_last_times timestamptz[]; -- null: none is later than the clock
  v_balances bigint[];
  v_wallet_seqs bigint[];
  v_times timestamptz[];

  v_ordinal int;
  v_number int;
  v_payee int;
  v_missing boolean;
  v_type text;
  v_amount bigint;
  v_fault text;
  v_balance bigint;
  v_seq bigint;
  v_faults text[];
  v_messages text[];
  v_seqs bigint[];
  v_balances_after bigint[];
  v_payee_seqs bigint[];
  v_payee_balances_after bigint[];
  v_moments timestamptz[]; -- where it is not v_now

  v_careful boolean; -- there is more to do than for deposits and withdrawals that are all good
  v_look_up boolean := false;
  v_recorded boolean[];
  v_recorded_count bigint;
  v_recorded_before bigint := -1;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken boolean[];
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null then
    raise sqlstate 'WA400' using message = 'arrays must not be null';
  elsif array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
    or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1
    or array_ndims(p_counterparty_uuids) > 1 or array_ndims(p_hold_uuids) > 1
    or array_ndims(p_expires_at) > 1 or array_ndims(p_metadata) > 1 then
    raise sqlstate 'WA400' using message = 'arrays must have one dimension';
  elsif v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
    or v_count <> cardinality(p_amounts)
    or v_count <> cardinality(p_counterparty_uuids) or v_count <> cardinality(p_hold_uuids)
    or v_count <> cardinality(p_expires_at) or v_count <> cardinality(p_metadata) then
    raise sqlstate 'WA400' using message = 'arrays must have the same length';
  elsif p_atomic is null then
    raise sqlstate 'WA400' using message = 'atomic must not be null';
  end if;

  p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1, whatever the array did
  p_operation_uuids := p_operation_uuids[:];
  p_operation_types := p_operation_types[:];
  p_amounts := p_amounts[:];
  p_counterparty_uuids := p_counterparty_uuids[:];
  p_hold_uuids := p_hold_uuids[:];
  p_expires_at := p_expires_at[:];
  p_metadata := p_metadata[:];

  if p_atomic then
    begin
      select array_agg(a.sqlstate order by a.ordinal), array_agg(a.message order by a.ordinal)
      into v_faults, v_messages
      from wallet.apply_operations(
        p_wallet_uuids, p_operation_uuids, p_operation_types, p_amounts,
        p_counterparty_uuids, p_hold_uuids, p_expires_at, p_metadata
      ) as a;

      if v_faults <> array_fill(null::text, array[v_count]) then
        raise sqlstate 'WA425'; -- takes back what was applied
      end if;
    exception when sqlstate 'WA425' then
      v_faults := array(
        select coalesce(f.fault, 'WA425') from unnest(v_faults) with ordinality as f (fault, ordinal) order by f.ordinal
      );
    end;

    v_look_up := true;
  else
    select l.uuids, l.statuses, l.currencies, l.missed
    into v_uuids, v_statuses, v_currencies, v_missed
    from wallet.lock_wallets(p_wallet_uuids || p_counterparty_uuids) as l;
    v_now := clock_timestamp();

    select
      jsonb_object_agg(n.uuid, n.number), array_agg(coalesce(o.balance_after, 0)), array_agg(coalesce(o.seq, 0)),
      case when max(o.created_at) > v_now then array_agg(o.created_at) end
    into v_numbers, v_last_balances, v_last_seqs, v_last_times
    from unnest(v_uuids) with ordinality as n (uuid, number)
    left join lateral (
      select l.balance_after, l.seq, l.created_at
      from wallet.operation as l
      where l.wallet_uuid = n.uuid
      order by l.seq desc
      limit 1
    ) as o on true;
  end if;

  <<attempt>>
  while not p_atomic loop
    begin
      if v_halve then
        v_step := 'halves';
        v_half := v_count / 2;
        if v_lock_timeout <> '0' then
          perform set_config('lock_timeout', '1', true); -- what is here is locked, and what is not was waited for
        end if;

        return query
        select *
        from wallet.apply_operations(
          p_wallet_uuids[:v_half], p_operation_uuids[:v_half], p_operation_types[:v_half], p_amounts[:v_half],
          p_counterparty_uuids[:v_half], p_hold_uuids[:v_half], p_expires_at[:v_half], p_metadata[:v_half]
        );

        return query
        select
          a.ordinal + v_half, a.sqlstate, a.message, a.same_request, a.wallet_uuid, a.operation_type, a.operation_uuid, a.seq, a.amount,
          a.balance_after, a.created_at, a.held_after, a.counterparty_uuid, a.hold_uuid, a.expires_at, a.metadata
        from wallet.apply_operations(
          p_wallet_uuids[v_half + 1:], p_operation_uuids[v_half + 1:], p_operation_types[v_half + 1:], p_amounts[v_half + 1:],
          p_counterparty_uuids[v_half + 1:], p_hold_uuids[v_half + 1:], p_expires_at[v_half + 1:], p_metadata[v_half + 1:]
        ) as a;

        perform set_config('lock_timeout', v_lock_timeout, true);
        if clock_timestamp() >= p_not_after then
          perform wallet.raise_too_late();
        end if;
        return;
      end if;

      <<decision>>
      loop
        v_step := 'decide';
        v_balances := v_last_balances;
        v_wallet_seqs := v_last_seqs;
        v_times := v_last_times;
        v_faults := array_fill(null::text, array[v_count]);
        v_messages := v_faults;
        v_seqs := array_fill(null::bigint, array[v_count]);
        v_balances_after := v_seqs;
        if p_counterparty_uuids is not null then
          v_payee_seqs := v_seqs;
          v_payee_balances_after := v_seqs;
        end if;
        if v_times is not null then
          v_moments := array_fill(null::timestamptz, array[v_count]);
        end if;

        if v_look_up then
          v_taken := array_fill(false, array[v_count]);

          with known as materialized (
            select o.operation_uuid
            from wallet.operation as o
            where o.operation_uuid = any(p_operation_uuids) and o.operation_type not in ('RECEIVE', 'EXPIRE')
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
        end if;

        v_careful := v_look_up or p_counterparty_uuids is not null or v_times is not null;

        for v_ordinal in 1..v_count loop
          v_type := p_operation_types[v_ordinal];
          v_amount := p_amounts[v_ordinal];
          v_number := (v_numbers ->> p_wallet_uuids[v_ordinal])::int;
          v_fault := wallet.argument_fault(
            p_wallet_uuids[v_ordinal], p_operation_uuids[v_ordinal], v_type, v_amount,
            p_counterparty_uuids[v_ordinal], p_hold_uuids[v_ordinal], p_expires_at[v_ordinal], p_metadata[v_ordinal]
          );

          if v_careful or v_fault is not null or v_number is null then
            v_payee := (v_numbers ->> p_counterparty_uuids[v_ordinal])::int;
            v_missing := v_number is null or (v_payee is null and p_counterparty_uuids[v_ordinal] is not null);

            if v_missing and v_fault is null then
              v_fault := wallet.names_fault(p_wallet_uuids[v_ordinal], p_counterparty_uuids[v_ordinal]);
            end if;

            if v_fault is not null then
              v_messages[v_ordinal] := v_fault;
              v_fault := 'WA400';
            elsif v_missing and (
              (v_number is null and p_wallet_uuids[v_ordinal] <> all(v_missed))
              or (v_payee is null and p_counterparty_uuids[v_ordinal] <> all(v_missed))
            ) then
              v_fault := 'WA404';
            elsif v_look_up and (v_recorded[v_ordinal] or v_taken[v_firsts[v_ordinal]]) then
              v_fault := 'WA409';
            elsif v_missing then
              v_fault := '55P03';
            end if;
          end if;

          if v_fault is null then
            v_fault := wallet.state_fault(
              v_type, v_amount, v_statuses[v_number], v_balances[v_number], v_currencies[v_number],
              v_statuses[v_payee], v_balances[v_payee], v_currencies[v_payee]
            );
          end if;

          if v_fault is not null then
            if not v_look_up and v_fault not in ('WA400', 'WA404') then
              v_look_up := true;
              continue decision;
            end if;
            v_faults[v_ordinal] := v_fault;
            continue;
          end if;

          v_balance := v_balances[v_number] + case v_type when 'DEPOSIT' then v_amount else -v_amount end;
          v_balances[v_number] := v_balance;
          v_balances_after[v_ordinal] := v_balance;
          v_seq := v_wallet_seqs[v_number] + 1;
          v_wallet_seqs[v_number] := v_seq;
          v_seqs[v_ordinal] := v_seq;

          if v_careful then
            if v_payee is not null then
              v_balance := v_balances[v_payee] + v_amount;
              v_balances[v_payee] := v_balance;
              v_payee_balances_after[v_ordinal] := v_balance;
              v_seq := v_wallet_seqs[v_payee] + 1;
              v_wallet_seqs[v_payee] := v_seq;
              v_payee_seqs[v_ordinal] := v_seq;
            end if;
            if v_times is not null then
              v_moments[v_ordinal] := greatest(v_now, v_times[v_number], v_times[v_payee]);
              v_times[v_number] := v_moments[v_ordinal];
              if v_payee is not null then
                v_times[v_payee] := v_moments[v_ordinal];
              end if;
            end if;
            if v_look_up then
              v_taken[v_firsts[v_ordinal]] := true;
            end if;
          end if;
        end loop;

        exit;
      end loop;

      v_step := 'write';
      if v_payee_seqs is null then
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, metadata)
        select
          r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after,
          coalesce(v_moments[r.ordinal], v_now), nullif(p_metadata[r.ordinal], '{}')
        from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after) with ordinality
          as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, ordinal)
        where r.seq is not null
        order by r.operation_uuid;
      else
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
        select
          s.wallet_uuid, s.operation_type, r.operation_uuid, s.seq, r.amount, s.balance_after, coalesce(r.moment, v_now),
          s.counterparty_uuid, nullif(r.metadata, '{}')
        from unnest(
          p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after, v_moments, p_metadata,
          p_counterparty_uuids, v_payee_seqs, v_payee_balances_after
        ) as r (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, moment, metadata,
          counterparty_uuid, payee_seq, payee_balance_after
        )
        cross join lateral (
          values
          (r.wallet_uuid, r.operation_type, r.seq, r.balance_after, r.counterparty_uuid, 1),
          (r.counterparty_uuid, 'RECEIVE', r.payee_seq, r.payee_balance_after, r.wallet_uuid, 2)
        ) as s (wallet_uuid, operation_type, seq, balance_after, counterparty_uuid, side)
        where s.seq is not null
        order by r.operation_uuid, s.side;
      end if;

      exit;
    exception when others then
      get stacked diagnostics
        v_sqlstate = returned_sqlstate, v_constraint = constraint_name, v_objection = message_text;

      if v_step <> 'write' or v_sqlstate ~ '^(08|25|40|53|57|58|XX)' then
        raise; -- not about a single request
      elsif v_sqlstate = '23505' and v_constraint = 'operation_requested_idx' and v_recorded_count is distinct from v_recorded_before then
        v_recorded_before := v_recorded_count;
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

  if clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  if not v_look_up then
    return query
    select
      r.ordinal::int,
      r.fault,
      coalesce(r.message, wallet.fault_message(r.fault)),
      case when r.seq is not null then true end,
      case when r.seq is not null then r.wallet_uuid end,
      case when r.seq is not null then r.operation_type end,
      case when r.seq is not null then r.operation_uuid end,
      r.seq,
      case when r.seq is not null then r.amount end,
      r.balance_after,
      case when r.seq is not null then coalesce(v_moments[r.ordinal], v_now) end,
      case when r.seq is not null then 0::bigint end,
      case when r.seq is not null then p_counterparty_uuids[r.ordinal] end,
      null::uuid,
      null::timestamptz,
      case when r.seq is not null then nullif(p_metadata[r.ordinal], '{}') end
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
    where o.operation_uuid = any(p_operation_uuids) and o.operation_type not in ('RECEIVE', 'EXPIRE')
  ),

  request as (
    select r.*
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, p_amounts, v_faults, v_messages,
      p_counterparty_uuids, p_hold_uuids, p_expires_at, p_metadata
    ) with ordinality as r (
      wallet_uuid, operation_type, operation_uuid, amount, fault, message,
      counterparty_uuid, hold_uuid, expires_at, metadata, ordinal
    )
  )

  select
    r.ordinal::int, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
    case
      when o.operation_uuid is not null
        then wallet.is_same_request(o, r.operation_type, r.amount, r.counterparty_uuid, r.hold_uuid, r.expires_at, r.metadata)
      when k.operation_uuid is not null then false
    end,
    o.wallet_uuid, o.operation_type, o.operation_uuid, o.seq, o.amount, o.balance_after, o.created_at,
    o.held_after, o.counterparty_uuid, o.hold_uuid, o.expires_at, o.metadata
  from request as r
  left join recorded as k on k.operation_uuid = r.operation_uuid and coalesce(r.fault, 'WA409') = 'WA409'
  left join recorded as o on o.operation_uuid = k.operation_uuid and o.wallet_uuid = r.wallet_uuid
  order by r.ordinal;
end
$$;

comment on function wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz) is
  'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. '
  'Arrays of one length, with the arguments of apply_operation; those that may be null may be null as a whole. Returns one row per request, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), same_request (whether what is recorded under its operation_uuid is this request: true for an applied one; '
  'null where nothing is recorded), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA405, WA403, WA422, WA402, WA416 as in apply_operation. '
  'Also, for requests that were not tried and may be asked again: 55P03, under a lock_timeout, after WA409 (another transaction keeps a wallet '
  'locked, or the operation_uuid in flight); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. '
  'p_atomic: if any request is refused, none is applied, and the outcome of those that would have been is WA425. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension), 57014 (too late), and 0A000 unless the transaction is read committed.';

create or replace function wallet.argument_fault(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns text
language sql immutable
as $$
  select case
    when (p_operation_type = 'DEPOSIT' or p_operation_type = 'WITHDRAW') and p_amount > 0
      and p_operation_uuid <> '00000000-0000-0000-0000-000000000000'::uuid
      and p_counterparty_uuid is null and p_hold_uuid is null and p_expires_at is null and p_metadata is null
      then null
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' and p_operation_type <> 'TRANSFER'
      then 'operation_type must be DEPOSIT, WITHDRAW or TRANSFER'
    when p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
    when p_hold_uuid is not null then 'hold_uuid must be null'
    when p_expires_at is not null then 'expires_at must be null'
    when p_operation_type = 'TRANSFER' and p_counterparty_uuid is null then 'counterparty_uuid must not be null for TRANSFER'
    when p_operation_type <> 'TRANSFER' and p_counterparty_uuid is not null then 'counterparty_uuid must be null but for TRANSFER'
    when p_counterparty_uuid = p_wallet_uuid then 'counterparty_uuid must be another wallet'
    when p_metadata is null then null
    when jsonb_typeof(p_metadata) <> 'object' then 'metadata must be an object'
    when octet_length(p_metadata::text) > 2048 then 'metadata must have at most 2048 octets as text'
  end
$$;

comment on function wallet.argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null; names of wallets are looked at only where none is found. '
  'The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 3
$$;

comment on function wallet.contract_version() is
  'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. '
  'A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';

create or replace function wallet.create_wallet(
  p_wallet_uuid text default null,
  p_currency text default null,
  p_not_after timestamptz default null
)
returns wallet.balance
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_uuid text := coalesce(p_wallet_uuid, gen_random_uuid()::text);
  v_fault text := wallet.name_fault(v_uuid);
  v_wallet wallet.balance;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  elsif p_currency !~ '^[A-Z0-9]{3,12}$' then
    raise sqlstate 'WA400' using message = 'currency must be 3 to 12 characters of A-Z and 0-9';
  end if;

  insert into wallet.wallet (uuid, currency)
  values (v_uuid, p_currency)
  on conflict do nothing;

  if not found then
    raise sqlstate 'WA419' using message = wallet.fault_message('WA419');
  elsif clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = v_uuid;

  return v_wallet;
end
$$;

comment on function wallet.create_wallet(text, text, timestamptz) is
  'Creates a wallet with balance 0 and returns its row of wallet.balance. p_wallet_uuid: its name, 1 to 64 characters of A-Z, a-z, 0-9, _ and -; '
  'null for a random UUID. p_currency: 3 to 12 characters of A-Z and 0-9, or null; it never changes. p_not_after: the last moment of this call by the '
  'database''s clock, or null. Raises WA400 (bad name or currency), WA419 (the wallet exists), 57014 (too late: nothing was created), '
  '0A000 (another isolation level than read committed).';

create or replace function wallet.fault_message(p_sqlstate text)
returns text
language sql immutable
as $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA403' then 'Wallet is frozen'
    when 'WA404' then 'Wallet not found'
    when 'WA405' then 'Wallet is closed'
    when 'WA409' then 'Transaction already exists'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA417' then 'Wallet is not empty'
    when 'WA419' then 'Wallet already exists'
    when 'WA422' then 'Currencies differ'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid)
returns wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_operation wallet.operation;
begin
  if p_operation_uuid is null then
    raise sqlstate 'WA400' using message = 'operation_uuid must not be null';
  end if;

  select o.* into v_operation
  from wallet.operation as o
  where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE');

  if v_operation.counterparty_uuid = p_wallet_uuid then
    select o.* into v_operation
    from wallet.operation as o
    where o.operation_uuid = p_operation_uuid and o.operation_type = 'RECEIVE';
  end if;

  if (v_operation.wallet_uuid = p_wallet_uuid) is not true then
    perform wallet.get_wallet(p_wallet_uuid);
    raise sqlstate 'WA414' using message = wallet.fault_message('WA414');
  end if;

  return v_operation;
end
$$;

comment on function wallet.get_operation(text, uuid) is
  'Returns the row of an operation applied to this wallet; for the payee of a transfer that is its RECEIVE, under a hold''s name the HOLD. '
  'Raises WA400 (null, or bad wallet name), WA404 (no such wallet), WA414 (this wallet has no such operation).';

create or replace function wallet.get_wallet(p_wallet_uuid text, p_at timestamptz default null)
returns wallet.balance
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_wallet wallet.balance;
  v_seq bigint;
  v_then wallet.operation;
begin
  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  if v_wallet.seq > 0 and p_at < v_wallet.updated_at then
    v_seq := wallet.seq_before(p_wallet_uuid, p_at, p_inclusive => true);

    select o.* into v_then
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid and o.seq = v_seq;

    v_wallet.balance := coalesce(v_then.balance_after, 0);
    v_wallet.held := coalesce(v_then.held_after, 0);
    v_wallet.available := v_wallet.balance - v_wallet.held;
    v_wallet.seq := coalesce(v_then.seq, 0);
    v_wallet.updated_at := coalesce(v_then.created_at, v_wallet.created_at);
  end if;

  return v_wallet;
end
$$;

comment on function wallet.get_wallet(text, timestamptz) is
  'Returns the wallet''s row of wallet.balance: uuid, id, currency, status, balance, held and available in minor units, seq, created_at, updated_at. '
  'p_at: a moment; balance, held, available, seq and updated_at are then those after the last operation at or before it (balance 0 and seq 0 before '
  'the first); currency and status are always today''s. Null: now. '
  'Raises WA400 (null or bad name), WA404 (no such wallet).';

create or replace function wallet.is_same_request(
  p_operation wallet.operation,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns boolean
language sql immutable
as $$
  select p_operation.operation_type = p_operation_type
    and p_operation.amount = p_amount
    and p_operation.counterparty_uuid is not distinct from p_counterparty_uuid
    and p_operation.hold_uuid is not distinct from p_hold_uuid
    and p_operation.expires_at is not distinct from p_expires_at
    and p_operation.metadata is not distinct from nullif(p_metadata, '{}')
$$;

comment on function wallet.is_same_request(wallet.operation, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: whether an operation on record is what this request asks for. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.list_operations(
  p_wallet_uuid text,
  p_before_seq bigint default null,
  p_limit int default 100,
  p_from timestamptz default null,
  p_to timestamptz default null
)
returns setof wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_after bigint := 0;
  v_before bigint := coalesce(p_before_seq, 9223372036854775807);
begin
  if p_before_seq < 1 then
    raise sqlstate 'WA400' using message = 'before_seq must be from 1 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  perform wallet.get_wallet(p_wallet_uuid);

  if p_from is not null then
    v_after := wallet.seq_before(p_wallet_uuid, p_from);
  end if;
  if p_to is not null then
    v_before := least(v_before, wallet.seq_before(p_wallet_uuid, p_to) + 1);
  end if;

  return query
  select o.*
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.seq > v_after and o.seq < v_before
  order by o.seq desc
  limit p_limit;
end
$$;

comment on function wallet.list_operations(text, bigint, int, timestamptz, timestamptz) is
  'Returns a wallet''s operations, newest first: at most p_limit (1 to 1000) with a seq below p_before_seq (null: from the newest) and a created_at '
  'from p_from, which is included, to p_to, which is not (null: without bound). What lies outside does not add to the cost. '
  'The next page starts before the last row''s seq; after a page with fewer than p_limit rows there is none. '
  'Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';

-- Names are compared byte for byte (collation "C"), and every byte of a name is below '~': so the names that begin with a
-- prefix are those from the prefix up to the prefix with a '~', one range of the primary key.
create or replace function wallet.list_wallets(
  p_after text default null,
  p_limit int default 100,
  p_prefix text default null
)
returns setof wallet.balance
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_prefix text := coalesce(p_prefix, '');
begin
  if p_after is not null and wallet.name_fault(p_after) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(p_after), 'wallet_uuid', 'after');
  elsif v_prefix <> '' and wallet.name_fault(v_prefix) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(v_prefix), 'wallet_uuid', 'prefix');
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  return query
  select b.*
  from wallet.balance as b
  where b.uuid > coalesce(p_after, '') and b.uuid >= v_prefix and b.uuid < v_prefix || '~'
  order by b.uuid
  limit p_limit;
end
$$;

comment on function wallet.list_wallets(text, int, text) is
  'Returns wallets as rows of wallet.balance, in the order of uuid byte for byte: at most p_limit (1 to 1000), with a uuid after p_after (which need not '
  'exist; null: from the first) that begins with p_prefix (null or empty: any). The next page starts after the last row''s uuid; '
  'after a page with fewer than p_limit rows there is none. Raises WA400 (bad name or prefix, limit out of range).';

-- Without a lock_timeout the wallets are locked in the order of uuid, each waited for, so two calls that share wallets wait for each other
-- in one direction only.
--
-- Under a lock_timeout a call holds none of its wallets while it waits for one, so that nobody waits in vain for the others:
-- it takes what is free, and if anything is missed it lets go of all, waits for the missed wallet alone and, once it has
-- that one, takes the rest. Each wait has half of what is left of the lock_timeout, so that a wallet that
-- stays locked leaves some time for those that are merely busy; who wants a single wallet waits for it as any statement does.
create or replace function wallet.lock_wallets(
  p_wallet_uuids text[],
  out uuids text[],
  out statuses text[],
  out currencies text[],
  out missed text[]
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_patience interval := current_setting('lock_timeout')::interval; -- 0: without end
  v_names text[];
  v_until timestamptz;
  v_awaited text;
  v_waiting boolean := false;
  v_stuck text[] := '{}'; -- waited for in vain
begin
  if v_patience = '0' then
    missed := '{}';
    select array_agg(l.uuid), array_agg(l.status), array_agg(l.currency)
    into uuids, statuses, currencies
    from (
      select w.uuid, w.status, w.currency
      from wallet.wallet as w
      where w.uuid = any(p_wallet_uuids)
      order by w.uuid
      for no key update
    ) as l;
    return;
  end if;

  if p_wallet_uuids = array_fill(p_wallet_uuids[1], array[cardinality(p_wallet_uuids)]) then
    v_names := p_wallet_uuids[:1];
  else
    v_names := array(select distinct n.name from unnest(p_wallet_uuids) as n (name) where n.name is not null);
  end if;

  loop
    begin
      if v_awaited is not null then
        v_waiting := true;
        perform wallet.wait_for_wallet(
          v_awaited, (v_until - clock_timestamp()) * case when cardinality(v_names) = 1 then 1 else 0.5 end
        );
        v_waiting := false;
      end if;

      missed := '{}';
      select array_agg(l.uuid), array_agg(l.status), array_agg(l.currency)
      into uuids, statuses, currencies
      from (
        select w.uuid, w.status, w.currency
        from wallet.wallet as w
        where w.uuid = any(v_names)
        order by w.uuid
        for no key update skip locked
      ) as l;

      exit when cardinality(uuids) = cardinality(v_names);

      missed := array(
        select w.uuid
        from wallet.wallet as w
        where w.uuid = any(array(select unnest(v_names) except select unnest(uuids)))
        order by w.uuid
      );
      v_until := coalesce(v_until, clock_timestamp() + v_patience);
      v_awaited := (select m.name from unnest(missed) as m (name) where m.name <> all(v_stuck) limit 1);

      exit when v_awaited is null or clock_timestamp() >= v_until;
      raise lock_not_available; -- lets go of all
    exception when lock_not_available then
      if v_waiting then
        v_stuck := v_stuck || v_awaited;
        v_awaited := null;
        v_waiting := false;
      end if;
    end;
  end loop;
end
$$;

comment on function wallet.lock_wallets(text[]) is
  'Internal: locks wallets to the end of the transaction. Returns those that it has locked, in the order of uuid (null: none), with their status and currency, '
  'and in missed those that exist and, under a lock_timeout, stayed locked by another transaction. Names may repeat, be null, or name no wallet.';

create or replace function wallet.names_fault(p_wallet_uuid text, p_counterparty_uuid text)
returns text
language sql immutable
as $$
  select coalesce(
    wallet.name_fault(p_wallet_uuid),
    case when p_counterparty_uuid is not null then replace(wallet.name_fault(p_counterparty_uuid), 'wallet_uuid', 'counterparty_uuid') end
  )
$$;

comment on function wallet.names_fault(text, text) is
  'Internal: the message of WA400 for the names of an operation''s wallets, of which the second may be null; else null. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.raise_isolation_level()
returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  raise feature_not_supported using
    message = format('wallets cannot be changed under isolation level %s', current_setting('transaction_isolation')),
    hint = 'Use read committed: an older snapshot would be taken for the state.';
end
$$;

comment on function wallet.raise_isolation_level() is
  'Internal: says why a function that changes wallets refuses the transaction''s isolation level. Raises 0A000, always.';

create or replace function wallet.raise_wallet_not_found(p_wallet_uuid text, p_counterparty_uuid text default null)
returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fault text := wallet.names_fault(p_wallet_uuid, p_counterparty_uuid);
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  raise sqlstate 'WA404' using message = wallet.fault_message('WA404');
end
$$;

comment on function wallet.raise_wallet_not_found(text, text) is
  'Internal: says why no wallet was found under this name, or under one of these two. A wallet that exists has a good name, so names are looked '
  'at only here. Raises WA400 (null or bad name) or WA404, always one of them.';

-- A wallet's created_at never goes back, so its history is in the order of time as well as of seq: a binary search, which
-- reads one row for each power of two in the length of the history. The newest row is looked at first, because most
-- moments that people ask for are after it or not long ago.
create or replace function wallet.seq_before(p_wallet_uuid text, p_moment timestamptz, p_inclusive boolean default false)
returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_before bigint := 0; -- this seq is before the moment, and v_after is not
  v_after bigint;
  v_seq bigint;
  v_created_at timestamptz;
begin
  select o.seq, o.created_at into v_seq, v_created_at
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid
  order by o.seq desc
  limit 1;

  if not found then
    return 0;
  elsif v_created_at < p_moment or p_inclusive and v_created_at = p_moment then
    return v_seq;
  end if;

  v_after := v_seq;
  while v_after - v_before > 1 loop
    v_seq := (v_before + v_after) / 2;

    select o.created_at into v_created_at
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid and o.seq = v_seq;

    if v_created_at < p_moment or p_inclusive and v_created_at = p_moment then
      v_before := v_seq;
    else
      v_after := v_seq;
    end if;
  end loop;

  return v_before;
end
$$;

comment on function wallet.seq_before(text, timestamptz, boolean) is
  'Internal: the seq of a wallet''s last operation before a moment, 0 if there is none. p_inclusive: or at the moment itself. '
  'Reads a number of rows that is logarithmic in the length of the wallet''s history.';

-- The lock comes first: an operation that is under way ends before the balance is read, and none begins before the commit.
create or replace function wallet.set_status(p_wallet_uuid text, p_status text, p_not_after timestamptz default null)
returns wallet.balance
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_wallet wallet.balance;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_status is null then
    raise sqlstate 'WA400' using message = 'status must not be null';
  elsif p_status not in ('OPEN', 'FROZEN', 'CLOSED') then
    raise sqlstate 'WA400' using message = 'status must be OPEN, FROZEN or CLOSED';
  end if;

  begin
    perform 1
    from wallet.wallet as w
    where w.uuid = p_wallet_uuid
    for no key update;
  exception when lock_not_available then
    raise lock_not_available using message = wallet.fault_message('55P03');
  end;

  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  elsif p_status = 'CLOSED' and (v_wallet.balance <> 0 or v_wallet.held <> 0) then
    raise sqlstate 'WA417' using message = wallet.fault_message('WA417');
  end if;

  if v_wallet.status <> p_status then
    update wallet.wallet as w
    set status = p_status
    where w.uuid = p_wallet_uuid;

    v_wallet.status := p_status;
  end if;

  if clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  return v_wallet;
end
$$;

comment on function wallet.set_status(text, text, timestamptz) is
  'Sets a wallet''s status and returns its row of wallet.balance. OPEN: everything is allowed. FROZEN: money comes in, and none leaves or is held anew. '
  'CLOSED: no operation is applied; only an empty wallet can be closed. Every change between the three is allowed; the same status again changes nothing. '
  'p_not_after: the last moment of this call by the database''s clock, or null. Raises WA400 (bad name or status), WA404 (no such wallet), '
  'WA417 (not empty), 57014 (too late: nothing was changed), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';

create or replace function wallet.state_fault(
  p_operation_type text,
  p_amount bigint,
  p_status text,
  p_balance bigint,
  p_currency text,
  p_payee_status text,
  p_payee_balance bigint,
  p_payee_currency text
)
returns text
language sql immutable
as $$
  select case
    when p_status = 'CLOSED' or p_payee_status = 'CLOSED' then 'WA405'
    when p_status = 'FROZEN' and p_operation_type <> 'DEPOSIT' then 'WA403'
    when p_operation_type = 'DEPOSIT' then case when p_amount > 9223372036854775807 - p_balance then 'WA416' end
    when p_operation_type = 'TRANSFER' and p_currency is distinct from p_payee_currency then 'WA422'
    when p_amount > p_balance then 'WA402'
    when p_amount > 9223372036854775807 - p_payee_balance then 'WA416'
  end
$$;

comment on function wallet.state_fault(text, bigint, text, bigint, text, text, bigint, text) is
  'Internal: the SQLSTATE for an operation that the state of its wallets does not allow (the first of WA405, WA403, WA422, WA402, WA416), else null. '
  'The payee''s state is null but for a TRANSFER. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence `is distinct from`, which sees nulls, and uniqueness.
-- New balances are numeric, so that no forged row can overflow them.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
  with history as materialized (
    select
      o.*,
      case
        when o.operation_type in ('DEPOSIT', 'RECEIVE') then o.amount::numeric
        when o.operation_type in ('WITHDRAW', 'TRANSFER') then -o.amount::numeric
      end as change,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before,
      lag(o.created_at) over by_seq as time_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  )

  select 'wallet has no nulls', w.uuid, null::bigint, w::text
  from wallet.wallet as w
  where w.uuid is null or w.id is null or w.status is null or w.created_at is null
  union all
  select 'wallet uuid is unique', w.uuid, null::bigint, format('%s wallets have this uuid', count(*))
  from wallet.wallet as w
  group by w.uuid
  having count(*) > 1
  union all
  select 'wallet is well formed', w.uuid, null::bigint, w::text
  from wallet.wallet as w
  where wallet.name_fault(w.uuid) is not null or w.status not in ('OPEN', 'FROZEN', 'CLOSED') or w.currency !~ '^[A-Z0-9]{3,12}$'
  union all
  select 'wallet id is unique', min(w.uuid), null::bigint, format('id %s stands %s times', w.id, count(*))
  from wallet.wallet as w
  group by w.id
  having count(*) > 1
  union all
  select 'closed wallet is empty', b.uuid, b.seq, format('balance %s, held %s', b.balance, b.held)
  from wallet.balance as b
  where b.status = 'CLOSED' and (b.balance <> 0 or b.held <> 0)
  union all
  select 'operation belongs to a wallet', h.wallet_uuid, h.seq, format('operation %s', h.operation_uuid)
  from history as h
  where not exists (select from wallet.wallet as w where w.uuid = h.wallet_uuid)
  union all
  select 'operation has no nulls', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.wallet_uuid is null or h.operation_type is null or h.operation_uuid is null or h.seq is null
    or h.amount is null or h.balance_after is null or h.held_after is null or h.created_at is null
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.operation_type not in ('DEPOSIT', 'WITHDRAW', 'TRANSFER', 'RECEIVE')
    or h.operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid
    or h.amount <= 0 or h.balance_after < 0
    or jsonb_typeof(h.metadata) <> 'object' or h.metadata = '{}' or octet_length(h.metadata::text) > 2048
  union all
  select 'nothing is held', h.wallet_uuid, h.seq, format('held_after %s, hold %s, expires at %s', h.held_after, h.hold_uuid, h.expires_at)
  from history as h
  where h.held_after <> 0 or h.hold_uuid is not null or h.expires_at is not null
  union all
  select 'a transfer and nothing else has a counterparty', h.wallet_uuid, h.seq, format('%s, counterparty %s', h.operation_type, h.counterparty_uuid)
  from history as h
  where (h.operation_type in ('TRANSFER', 'RECEIVE')) <> (h.counterparty_uuid is not null) or h.counterparty_uuid = h.wallet_uuid
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid, h.operation_type = 'RECEIVE'
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
  where h.balance_after is distinct from h.balance_before::numeric + h.change
  union all
  select 'created_at never goes back', h.wallet_uuid, h.seq, format('%s comes after %s', h.created_at, h.time_before)
  from history as h
  where h.created_at < h.time_before
  union all
  select
    'both sides of a transfer agree', coalesce(t.wallet_uuid, r.wallet_uuid), coalesce(t.seq, r.seq),
    format(
      'operation %s: TRANSFER of %s from %s to %s at %s, RECEIVE of %s from %s at %s at %s', coalesce(t.operation_uuid, r.operation_uuid),
      t.amount, t.wallet_uuid, t.counterparty_uuid, t.created_at, r.amount, r.counterparty_uuid, r.wallet_uuid, r.created_at
    )
  from (select h.* from history as h where h.operation_type = 'TRANSFER') as t
  full join (select h.* from history as h where h.operation_type = 'RECEIVE') as r on r.operation_uuid = t.operation_uuid
  where (t.wallet_uuid, t.counterparty_uuid, t.amount, t.created_at, t.metadata)
    is distinct from (r.counterparty_uuid, r.wallet_uuid, r.amount, r.created_at, r.metadata)
  union all
  select
    'both sides of a transfer have one currency', h.wallet_uuid, h.seq,
    format('%s of operation %s, counterparty %s: %s', payer.currency, h.operation_uuid, payee.uuid, payee.currency)
  from history as h
  inner join wallet.wallet as payer on payer.uuid = h.wallet_uuid
  inner join wallet.wallet as payee on payee.uuid = h.counterparty_uuid
  where h.operation_type = 'TRANSFER' and payer.currency is distinct from payee.currency
$$;

comment on function wallet.verify() is
  'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); '
  'no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody. '
  'A wallet''s balance is what its last operation says, so it cannot tell that the last operations of a wallet are missing, unless they are transfers.';

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
  wallet.create_wallet(text, text, timestamptz),
  wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz),
  wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz),
  wallet.set_status(text, text, timestamptz),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.balance to wallet_reader;

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- By hand

grant update on wallet.operation to wallet_owner; -- to lock it; grants.sql has taken it away

set local lock_timeout = '2s';
lock table wallet.wallet in access exclusive mode;
lock table wallet.operation in access exclusive mode;

do $$
begin
  if exists (select from wallet.operation where operation_type not in ('DEPOSIT', 'WITHDRAW') or metadata is not null) then
    raise exception 'refused: the ledger holds transfers or metadata, which the schema before cannot hold; nothing was changed';
  elsif exists (select from wallet.wallet where currency is not null or status <> 'OPEN') then
    raise exception 'refused: wallets have a currency or a status other than OPEN, which the schema before cannot hold; nothing was changed';
  end if;
end
$$;

alter table wallet.wallet
  add column balance bigint not null default 0,
  add column seq bigint not null default 0,
  set (fillfactor = 50); -- a balance changes in place (a HOT update) while its page has room

update wallet.wallet as w
set balance = b.balance, seq = b.seq
from wallet.balance as b
where b.uuid = w.uuid and b.seq > 0;

alter table wallet.wallet
  add constraint wallet_balance_check check (balance >= 0),
  add constraint wallet_seq_check check (seq >= 0);

-- Of two unique indexes the older one reports a duplicate, and the functions know it by the name of the constraint.
drop index wallet.operation_requested_idx;
alter table wallet.operation add constraint operation_operation_uuid_key unique (operation_uuid);
create unique index operation_requested_idx on wallet.operation (operation_uuid) where operation_type not in ('RECEIVE', 'EXPIRE');

comment on table wallet.wallet is 'One row per wallet: its balance and how many operations led to it.';
comment on column wallet.wallet.balance is 'Minor units, 0 to 2^63-1; always the balance_after of the wallet''s last operation, 0 before the first.';
comment on column wallet.wallet.seq is 'Number of operations so far: the seq of the last one.';
comment on table wallet.operation is 'The ledger: one row per applied operation, append-only. A rejected operation leaves nothing here.';

-- Generated

drop function wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz);
drop function wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz);
drop function wallet.argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb);
drop function wallet.create_wallet(text, text, timestamptz);
drop function wallet.get_wallet(text, timestamptz);
drop function wallet.is_same_request(wallet.operation, text, bigint, text, uuid, timestamptz, jsonb);
drop function wallet.list_operations(text, bigint, int, timestamptz, timestamptz);
drop function wallet.list_wallets(text, int, text);
drop function wallet.lock_wallets(text[]);
drop function wallet.names_fault(text, text);
drop function wallet.raise_isolation_level();
drop function wallet.raise_wallet_not_found(text, text);
drop function wallet.seq_before(text, timestamptz, boolean);
drop function wallet.set_status(text, text, timestamptz);
drop function wallet.state_fault(text, bigint, text, bigint, text, text, bigint, text);

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

create or replace function wallet.argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint)
returns text
language sql immutable
as $$
  select case
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' then 'operation_type must be DEPOSIT or WITHDRAW'
    when p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
  end
$$;

comment on function wallet.argument_fault(uuid, text, bigint) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null. The nil UUID (RFC 9562, section 5.9) is '
  'what an unset field looks like, so it names no operation. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

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

create or replace function wallet.create_wallet(p_wallet_uuid text default null)
returns wallet.wallet
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_uuid text := coalesce(p_wallet_uuid, gen_random_uuid()::text);
  v_fault text := wallet.name_fault(v_uuid);
  v_wallet wallet.wallet;
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  insert into wallet.wallet (uuid)
  values (v_uuid)
  on conflict do nothing
  returning * into v_wallet;

  if not found then
    raise sqlstate 'WA419' using message = wallet.fault_message('WA419');
  end if;

  return v_wallet;
end
$$;

comment on function wallet.create_wallet(text) is
  'Creates a wallet with balance 0 and returns its row. p_wallet_uuid: its name, 1 to 64 characters of A-Z, a-z, 0-9, _ and -; '
  'null for a random UUID. Raises WA400 (bad name), WA419 (the wallet exists).';

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

create or replace function wallet.funds_fault(p_operation_type text, p_amount bigint, p_balance bigint)
returns text
language sql immutable
as $$
  select case
    when p_operation_type = 'WITHDRAW' and p_amount > p_balance then 'WA402'
    when p_operation_type = 'DEPOSIT' and p_amount > 9223372036854775807 - p_balance then 'WA416'
  end
$$;

comment on function wallet.funds_fault(text, bigint, bigint) is
  'Internal: the SQLSTATE for an operation that the balance does not allow (WA402, WA416), else null. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid)
returns wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_operation wallet.operation;
begin
  if p_operation_uuid is null then
    raise sqlstate 'WA400' using message = 'operation_uuid must not be null';
  end if;

  select o.* into v_operation
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.operation_uuid = p_operation_uuid;

  if not found then
    perform wallet.get_wallet(p_wallet_uuid);
    raise sqlstate 'WA414' using message = wallet.fault_message('WA414');
  end if;

  return v_operation;
end
$$;

comment on function wallet.get_operation(text, uuid) is
  'Returns the row of an operation applied to this wallet. '
  'Raises WA400 (null, or bad wallet name), WA404 (no such wallet), WA414 (this wallet has no such operation).';

create or replace function wallet.get_wallet(p_wallet_uuid text)
returns wallet.wallet
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_wallet wallet.wallet;
begin
  select w.* into v_wallet
  from wallet.wallet as w
  where w.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  return v_wallet;
end
$$;

comment on function wallet.get_wallet(text) is
  'Returns the wallet''s row: uuid, id, balance in minor units, seq, created_at. '
  'Raises WA400 (null or bad name), WA404 (no such wallet).';

create or replace function wallet.list_operations(
  p_wallet_uuid text,
  p_before_seq bigint default null,
  p_limit int default 100
)
returns setof wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_before_seq < 1 then
    raise sqlstate 'WA400' using message = 'before_seq must be from 1 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  perform wallet.get_wallet(p_wallet_uuid);

  return query
  select o.*
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.seq < coalesce(p_before_seq, 9223372036854775807)
  order by o.seq desc
  limit p_limit;
end
$$;

comment on function wallet.list_operations(text, bigint, int) is
  'Returns a wallet''s operations, newest first: at most p_limit (1 to 1000) with a seq below p_before_seq (null: from the newest). '
  'The next page starts before the last row''s seq; after seq 1 there is none. '
  'Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';

create or replace function wallet.raise_wallet_not_found(p_wallet_uuid text)
returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fault text := wallet.name_fault(p_wallet_uuid);
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  raise sqlstate 'WA404' using message = wallet.fault_message('WA404');
end
$$;

comment on function wallet.raise_wallet_not_found(text) is
  'Internal: says why no wallet was found under this name. A wallet that exists has a good name, so names are looked at only here. '
  'Raises WA400 (null or bad name) or WA404, always one of them.';

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
