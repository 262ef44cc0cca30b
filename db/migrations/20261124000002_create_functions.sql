-- migrate:up

set local search_path = pg_catalog, pg_temp;

set local role wallet_owner;

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

create or replace function wallet.name_fault(p_wallet_uuid text)
returns text
language sql immutable
as $$
  select case
    when p_wallet_uuid is null then 'wallet_uuid must not be null'
    when p_wallet_uuid !~ '^[A-Za-z0-9_-]{1,64}$' then 'wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -'
  end
$$;

comment on function wallet.name_fault(text) is
  'Internal: the message of WA400 for a wallet uuid that no wallet can have, else null. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.raise_too_late()
returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  raise query_canceled using message = 'the deadline of this call has passed';
end
$$;

comment on function wallet.raise_too_late() is
  'Takes back the statement that calls it, because its last moment has passed: '
  'select ... from wallet.apply_operations(...) where case when clock_timestamp() < $5 then true else wallet.raise_too_late() end. '
  'The clock is looked at when the function has run, however long it waited for a lock, and a call that is in time holds its locks '
  'until it is committed. Raises 57014 (query_canceled), always.';

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

-- migrate:down

set local search_path = pg_catalog, pg_temp;

set local role wallet_owner;

revoke all on all tables in schema wallet from wallet_app, wallet_reader;
revoke all on schema wallet from wallet_app, wallet_reader;

drop function wallet.apply_operation(text, uuid, text, bigint);
drop function wallet.apply_operations(text[], uuid[], text[], bigint[]);
drop function wallet.argument_fault(uuid, text, bigint);
drop function wallet.create_wallet(text);
drop function wallet.fault_message(text);
drop function wallet.funds_fault(text, bigint, bigint);
drop function wallet.get_operation(text, uuid);
drop function wallet.get_wallet(text);
drop function wallet.list_operations(text, bigint, int);
drop function wallet.name_fault(text);
drop function wallet.raise_too_late();
drop function wallet.raise_wallet_not_found(text);
drop function wallet.verify();

reset role;
reset search_path;
