-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

create or replace function wallet.any_argument_fault(
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
language plpgsql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' and p_operation_type <> 'TRANSFER'
      and p_operation_type <> 'HOLD' and p_operation_type <> 'RELEASE'
      then 'operation_type must be DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE'
    when p_operation_type = 'RELEASE' and p_amount is not null then 'amount must be null for RELEASE'
    when p_operation_type <> 'RELEASE' and p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
    when p_operation_type = 'RELEASE' and p_hold_uuid is null then 'hold_uuid must not be null for RELEASE'
    when p_hold_uuid is not null and (p_operation_type = 'DEPOSIT' or p_operation_type = 'HOLD')
      then 'hold_uuid must be null but for WITHDRAW, TRANSFER and RELEASE'
    when p_hold_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'hold_uuid must not be the nil UUID'
    when p_operation_type <> 'HOLD' and p_expires_at is not null then 'expires_at must be null but for HOLD'
    when p_expires_at < '0001-01-01 00:00:00+00'::timestamptz or p_expires_at >= '10000-01-01 00:00:00+00'::timestamptz
      then 'expires_at must be in the years 1 to 9999'
    when p_operation_type = 'TRANSFER' and p_counterparty_uuid is null then 'counterparty_uuid must not be null for TRANSFER'
    when p_operation_type <> 'TRANSFER' and p_counterparty_uuid is not null then 'counterparty_uuid must be null but for TRANSFER'
    when p_counterparty_uuid = p_wallet_uuid then 'counterparty_uuid must be another wallet'
    when p_metadata is null then null
    when jsonb_typeof(p_metadata) <> 'object' then 'metadata must be an object'
    when octet_length(p_metadata::text) > 2048 then 'metadata must have at most 2048 octets as text'
  end;
end
$$;

comment on function wallet.any_argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null; wallet names are checked elsewhere, and only if no such wallet was found. '
  'The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. '
  'A function of its own, so that a session prepares its expressions only where it needs them.';

-- Only the caller gets the secret. It is made, hashed and returned by PL/pgSQL expressions, whose values are never logged. A value that
-- is passed to an SQL statement or to a function in SQL may be logged, as a constant of a plan (debug_print_plan) or as a parameter
-- (auto_explain): the insert is given the digest only.
create or replace function wallet.create_key(
  p_name text,
  p_scopes text[],
  p_wallet_prefix text default null,
  p_expires_at timestamptz default null
)
returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fault text := coalesce(
    replace(wallet.name_fault(p_name), 'wallet_uuid', 'name'),
    case when p_wallet_prefix is not null then replace(wallet.name_fault(p_wallet_prefix), 'wallet_uuid', 'wallet_prefix') end
  );
  v_secret text;
  v_digest bytea;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  elsif array_ndims(p_scopes) is distinct from 1 or array_position(p_scopes, null) is not null
    or not p_scopes <@ array['read', 'create', 'deposit', 'withdraw', 'transfer', 'hold', 'admin', 'metrics']
    then
    raise sqlstate 'WA400' using message = 'scopes must be one or more of read, create, deposit, withdraw, transfer, hold, admin and metrics';
  elsif p_expires_at < '0001-01-01 00:00:00+00' or p_expires_at >= '10000-01-01 00:00:00+00' then
    raise sqlstate 'WA400' using message = 'expires_at must be in the years 1 to 9999';
  end if;

  -- 122 random bits in each UUID (RFC 9562, section 5.4), 256 in the hash; base64url without padding (RFC 4648, section 5).
  v_secret := encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64');
  v_secret := 'wk_' || translate(v_secret, '+/=', '-_');
  v_digest := sha256(convert_to(v_secret, 'UTF8'));

  insert into wallet.key (name, digest, scopes, wallet_prefix, expires_at)
  values (p_name, v_digest, array(select distinct s.scope collate "C" from unnest(p_scopes) as s (scope) order by 1), p_wallet_prefix, p_expires_at)
  on conflict do nothing;

  if not found then
    raise sqlstate 'WA420' using message = wallet.fault_message('WA420');
  end if;

  return v_secret;
end
$$;

comment on function wallet.create_key(text, text[], text, timestamptz) is
  'Makes a key for REST callers and returns its secret, which is stored nowhere and never shown again: wk_ and 43 characters of A-Z, a-z, 0-9, _ and -. '
  'p_name: 1 to 64 characters of A-Z, a-z, 0-9, _ and -; it stays taken for good. p_scopes: one or more of read, create, deposit, withdraw, transfer, hold, admin '
  'and metrics. p_wallet_prefix: the key reaches only wallets whose names begin so, byte for byte; null for all. p_expires_at: from when on it is refused, by the database''s '
  'clock; null for never. A past time is accepted: the key is refused from the start. Raises WA400 (bad name, scopes, prefix or expiry), WA420 (the key exists, perhaps revoked or '
  'expired), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';

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
  '0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';

create or replace function wallet.due_amount(p_wallet_uuid text, p_from timestamptz, p_until timestamptz default null)
returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_until timestamptz := greatest(p_from, coalesce(p_until, clock_timestamp()));
begin
  return (
    select coalesce(sum(h.amount), 0)
    from wallet.hold as h
    where h.wallet_uuid = p_wallet_uuid and h.expires_at >= p_from and h.expires_at <= v_until
  );
end
$$;

comment on function wallet.due_amount(text, timestamptz, timestamptz) is
  'Internal: the sum of a wallet''s holds that have expired by p_until (null: now) but have no EXPIRE yet, in minor units. p_from: the created_at of the wallet''s last row. '
  'The view wallet.balance calls it with the rights of whoever reads that.';

-- The row is locked whether it is changed or not: a commit that wrote nothing waits for no synchronous standby, and an earlier
-- revocation must be on the standby before this call is answered.
create or replace function wallet.revoke_key(p_name text)
returns table (name text, scopes text[], wallet_prefix text, created_at timestamptz, expires_at timestamptz, revoked_at timestamptz)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif wallet.name_fault(p_name) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(p_name), 'wallet_uuid', 'name');
  end if;

  update wallet.key as k
  set revoked_at = clock_timestamp()
  where k.name = p_name and k.revoked_at is null;

  return query
  select k.name, k.scopes, k.wallet_prefix, k.created_at, k.expires_at, k.revoked_at
  from wallet.key as k
  where k.name = p_name
  for no key update;

  if not found then
    raise sqlstate 'WA421' using message = wallet.fault_message('WA421');
  end if;
end
$$;

comment on function wallet.revoke_key(text) is
  'Revokes a key for good and returns its row as list_keys does; called again, it returns that row unchanged. Services refuse the key within 5 seconds of the commit. '
  'Raises WA400 (null or bad name), WA421 (no such key), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence the checks for nulls (`is distinct from`) and for duplicates.
-- Expected balances are numeric, so that no forged row can overflow them.
-- Nested loops are off: planned on a ledger whose statistics are old, they compared every hold with every end of a hold.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
as $$
  with history as materialized (
    select
      o.*,
      case
        when o.operation_type in ('DEPOSIT', 'RECEIVE') then o.amount::numeric
        when o.operation_type in ('WITHDRAW', 'TRANSFER') then -o.amount::numeric
        when o.operation_type in ('HOLD', 'RELEASE', 'EXPIRE') then 0
      end as change,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before,
      lag(o.held_after, 1, 0::bigint) over by_seq as held_before,
      lag(o.created_at) over by_seq as time_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  ),

  hold as materialized (
    select h.*
    from history as h
    where h.operation_type = 'HOLD'
  ),

  ending as materialized (
    select h.*
    from history as h
    where h.hold_uuid is not null
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
    or (h.operation_type in ('RELEASE', 'EXPIRE') and h.hold_uuid is null)
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.operation_type not in ('DEPOSIT', 'WITHDRAW', 'TRANSFER', 'RECEIVE', 'HOLD', 'RELEASE', 'EXPIRE')
    or h.operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid
    or h.amount <= 0 or h.balance_after < 0
    or (h.operation_type in ('DEPOSIT', 'RECEIVE', 'HOLD') and h.hold_uuid is not null)
    or (h.operation_type <> 'HOLD' and h.expires_at is not null) or h.expires_at <= h.created_at
    or (h.operation_type = 'EXPIRE' and (h.operation_uuid <> h.hold_uuid or h.metadata is not null))
    or jsonb_typeof(h.metadata) <> 'object' or h.metadata = '{}' or octet_length(h.metadata::text) > 2048
  union all
  select 'available is not negative', h.wallet_uuid, h.seq, format('balance_after %s, held_after %s', h.balance_after, h.held_after)
  from history as h
  where h.held_after < 0 or h.held_after > h.balance_after
  union all
  select 'a hold has one end', e.wallet_uuid, min(e.seq), format('hold %s has %s', e.hold_uuid, count(*))
  from ending as e
  group by e.wallet_uuid, e.hold_uuid
  having count(*) > 1
  union all
  select 'an end belongs to a hold before it', e.wallet_uuid, e.seq, format('%s of %s on hold %s', e.operation_type, e.amount, e.hold_uuid)
  from ending as e
  left join hold as h on h.operation_uuid = e.hold_uuid and h.wallet_uuid = e.wallet_uuid and h.seq < e.seq
  where h.operation_uuid is null or e.amount > h.amount or (e.operation_type in ('RELEASE', 'EXPIRE') and e.amount <> h.amount)
  union all
  select 'a hold ends before it is due, or expires then', e.wallet_uuid, e.seq, format('%s at %s, due at %s', e.operation_type, e.created_at, h.expires_at)
  from ending as e
  inner join hold as h on h.operation_uuid = e.hold_uuid
  where case when e.operation_type = 'EXPIRE' then e.created_at is distinct from h.expires_at else e.created_at >= h.expires_at end
  union all
  select 'open holds are those without an end', coalesce(h.wallet_uuid, o.wallet_uuid), coalesce(h.seq, o.seq), format('ledger: %s; wallet.hold: %s', h, o)
  from (
    select h.wallet_uuid, h.operation_uuid, h.seq, h.amount, h.expires_at, h.created_at
    from hold as h
    where not exists (select from ending as e where e.hold_uuid = h.operation_uuid)
  ) as h
  full join wallet.hold as o on o.hold_uuid = h.operation_uuid
  where (h.wallet_uuid, h.operation_uuid, h.seq, h.amount, h.expires_at, h.created_at)
    is distinct from (o.wallet_uuid, o.hold_uuid, o.seq, o.amount, o.expires_at, o.created_at)
  union all
  select
    'an operation records the holds that are due', o.wallet_uuid, o.seq,
    format('hold %s, due at %s, is open; last operation at %s', o.hold_uuid, o.expires_at, h.last)
  from wallet.hold as o
  inner join (
    select h.wallet_uuid, max(h.created_at) as last
    from history as h
    where h.operation_type <> 'EXPIRE'
    group by h.wallet_uuid
  ) as h on h.wallet_uuid = o.wallet_uuid
  where o.expires_at <= h.last
  union all
  select
    'held_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s held gives %s', h.operation_type, h.amount, h.held_before, h.held_after)
  from history as h
  left join hold as o on o.operation_uuid = h.hold_uuid
  where h.held_after is distinct from h.held_before::numeric + case when h.operation_type = 'HOLD' then h.amount else 0 end - coalesce(o.amount, 0)
  union all
  select 'a transfer and nothing else has a counterparty', h.wallet_uuid, h.seq, format('%s, counterparty %s', h.operation_type, h.counterparty_uuid)
  from history as h
  where (h.operation_type in ('TRANSFER', 'RECEIVE')) <> (h.counterparty_uuid is not null) or h.counterparty_uuid = h.wallet_uuid
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid, case when h.operation_type in ('RECEIVE', 'EXPIRE') then h.operation_type end
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
  'A wallet''s balance is what its last operation says, so this audit cannot tell that a wallet''s last operations are missing, unless one was a transfer or concerned a hold.';

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader, wallet_admin;
revoke all on all functions in schema wallet from wallet_app, wallet_reader, wallet_admin;

-- wallet_app calls functions and touches no table; wallet_reader reads the books and changes nothing;
-- wallet_admin is a member of wallet_app that manages keys, too. PUBLIC has nothing.
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
  wallet.expire_holds(text, int),
  wallet.live_keys(),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.create_key(text, text[], text, timestamptz),
  wallet.revoke_key(text),
  wallet.list_keys()
to wallet_admin;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.list_holds(text, bigint, int),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.hold, wallet.balance to wallet_reader;
grant execute on function wallet.due_amount(text, timestamptz, timestamptz) to wallet_reader; -- the view wallet.balance calls it

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

create or replace function wallet.any_argument_fault(
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
language plpgsql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' and p_operation_type <> 'TRANSFER'
      and p_operation_type <> 'HOLD' and p_operation_type <> 'RELEASE'
      then 'operation_type must be DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE'
    when p_operation_type = 'RELEASE' and p_amount is not null then 'amount must be null for RELEASE'
    when p_operation_type <> 'RELEASE' and p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
    when p_operation_type = 'RELEASE' and p_hold_uuid is null then 'hold_uuid must not be null for RELEASE'
    when p_hold_uuid is not null and (p_operation_type = 'DEPOSIT' or p_operation_type = 'HOLD')
      then 'hold_uuid must be null but for WITHDRAW, TRANSFER and RELEASE'
    when p_hold_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'hold_uuid must not be the nil UUID'
    when p_operation_type <> 'HOLD' and p_expires_at is not null then 'expires_at must be null but for HOLD'
    when p_expires_at < '0001-01-01 00:00:00+00'::timestamptz or p_expires_at >= '10000-01-01 00:00:00+00'::timestamptz
      then 'expires_at must be in the years 1 to 9999'
    when p_operation_type = 'TRANSFER' and p_counterparty_uuid is null then 'counterparty_uuid must not be null for TRANSFER'
    when p_operation_type <> 'TRANSFER' and p_counterparty_uuid is not null then 'counterparty_uuid must be null but for TRANSFER'
    when p_counterparty_uuid = p_wallet_uuid then 'counterparty_uuid must be another wallet'
    when p_metadata is null then null
    when jsonb_typeof(p_metadata) <> 'object' then 'metadata must be an object'
    when octet_length(p_metadata::text) > 2048 then 'metadata must have at most 2048 octets as text'
  end;
end
$$;

comment on function wallet.any_argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null; wallet names are not checked here, but where no wallet of that name was found. '
  'The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. '
  'A function of its own, so that a session prepares its expressions only where it needs them.';

-- Only the caller gets the secret. It is made, hashed and returned by PL/pgSQL expressions, whose values are never logged. A value that
-- is passed to an SQL statement or to a function in SQL may be logged, as a constant of a plan (debug_print_plan) or as a parameter
-- (auto_explain): the insert is given the digest only.
create or replace function wallet.create_key(
  p_name text,
  p_scopes text[],
  p_wallet_prefix text default null,
  p_expires_at timestamptz default null
)
returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fault text := coalesce(
    replace(wallet.name_fault(p_name), 'wallet_uuid', 'name'),
    case when p_wallet_prefix is not null then replace(wallet.name_fault(p_wallet_prefix), 'wallet_uuid', 'wallet_prefix') end
  );
  v_secret text;
  v_digest bytea;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  elsif array_ndims(p_scopes) is distinct from 1 or array_position(p_scopes, null) is not null
    or not p_scopes <@ array['read', 'create', 'deposit', 'withdraw', 'transfer', 'hold', 'admin', 'metrics']
    then
    raise sqlstate 'WA400' using message = 'scopes must be one or more of read, create, deposit, withdraw, transfer, hold, admin and metrics';
  elsif p_expires_at < '0001-01-01 00:00:00+00' or p_expires_at >= '10000-01-01 00:00:00+00' then
    raise sqlstate 'WA400' using message = 'expires_at must be in the years 1 to 9999';
  end if;

  -- 122 random bits in each UUID (RFC 9562, section 5.4), 256 in the hash; base64url without padding (RFC 4648, section 5).
  v_secret := encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64');
  v_secret := 'wk_' || translate(v_secret, '+/=', '-_');
  v_digest := sha256(convert_to(v_secret, 'UTF8'));

  insert into wallet.key (name, digest, scopes, wallet_prefix, expires_at)
  values (p_name, v_digest, array(select distinct s.scope collate "C" from unnest(p_scopes) as s (scope) order by 1), p_wallet_prefix, p_expires_at)
  on conflict do nothing;

  if not found then
    raise sqlstate 'WA420' using message = wallet.fault_message('WA420');
  end if;

  return v_secret;
end
$$;

comment on function wallet.create_key(text, text[], text, timestamptz) is
  'Makes a key for REST callers and returns its secret, which is stored nowhere and never shown again: wk_ and 43 characters of A-Z, a-z, 0-9, _ and -. '
  'p_name: 1 to 64 characters of A-Z, a-z, 0-9, _ and -; it stays taken for good. p_scopes: one or more of read, create, deposit, withdraw, transfer, hold, admin '
  'and metrics. p_wallet_prefix: the key reaches only wallets whose names begin so, byte for byte; null for all. p_expires_at: from when on it is refused, by the database''s '
  'clock; null for never. A past time is accepted: the key is refused from the start. Raises WA400 (bad name, scopes, prefix or expiry), WA420 (the key exists, perhaps revoked or '
  'expired), 0A000 (another isolation level than read committed).';

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

create or replace function wallet.due_amount(p_wallet_uuid text, p_from timestamptz, p_until timestamptz default null)
returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_until timestamptz := greatest(p_from, coalesce(p_until, clock_timestamp()));
begin
  return (
    select coalesce(sum(h.amount), 0)
    from wallet.hold as h
    where h.wallet_uuid = p_wallet_uuid and h.expires_at >= p_from and h.expires_at <= v_until
  );
end
$$;

comment on function wallet.due_amount(text, timestamptz, timestamptz) is
  'Internal: the part of held_after in a wallet''s last row whose holds have expired by p_until (null: now), in minor units; their EXPIRE is not recorded yet. p_from: the created_at of that row. '
  'The view wallet.balance calls it with the rights of whoever reads that.';

-- The row is locked whether it is changed or not: a commit that wrote nothing waits for no synchronous standby, and an earlier
-- revocation must be on the standby before this call is answered.
create or replace function wallet.revoke_key(p_name text)
returns table (name text, scopes text[], wallet_prefix text, created_at timestamptz, expires_at timestamptz, revoked_at timestamptz)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif wallet.name_fault(p_name) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(p_name), 'wallet_uuid', 'name');
  end if;

  update wallet.key as k
  set revoked_at = clock_timestamp()
  where k.name = p_name and k.revoked_at is null;

  return query
  select k.name, k.scopes, k.wallet_prefix, k.created_at, k.expires_at, k.revoked_at
  from wallet.key as k
  where k.name = p_name
  for no key update;

  if not found then
    raise sqlstate 'WA421' using message = wallet.fault_message('WA421');
  end if;
end
$$;

comment on function wallet.revoke_key(text) is
  'Revokes a key for good and returns its row as list_keys does; called again, it returns that row unchanged. Services refuse the key within 5 seconds of the commit. '
  'Raises WA400 (null or bad name), WA421 (no such key), 0A000 (another isolation level than read committed).';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence the checks for nulls (`is distinct from`) and for duplicates.
-- Expected balances are numeric, so that no forged row can overflow them.
-- Nested loops are off: planned on a ledger whose statistics are old, they compared every hold with every end of a hold.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
as $$
  with history as materialized (
    select
      o.*,
      case
        when o.operation_type in ('DEPOSIT', 'RECEIVE') then o.amount::numeric
        when o.operation_type in ('WITHDRAW', 'TRANSFER') then -o.amount::numeric
        when o.operation_type in ('HOLD', 'RELEASE', 'EXPIRE') then 0
      end as change,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before,
      lag(o.held_after, 1, 0::bigint) over by_seq as held_before,
      lag(o.created_at) over by_seq as time_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  ),

  hold as materialized (
    select h.*
    from history as h
    where h.operation_type = 'HOLD'
  ),

  ending as materialized (
    select h.*
    from history as h
    where h.hold_uuid is not null
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
    or (h.operation_type in ('RELEASE', 'EXPIRE') and h.hold_uuid is null)
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.operation_type not in ('DEPOSIT', 'WITHDRAW', 'TRANSFER', 'RECEIVE', 'HOLD', 'RELEASE', 'EXPIRE')
    or h.operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid
    or h.amount <= 0 or h.balance_after < 0
    or (h.operation_type in ('DEPOSIT', 'RECEIVE', 'HOLD') and h.hold_uuid is not null)
    or (h.operation_type <> 'HOLD' and h.expires_at is not null) or h.expires_at <= h.created_at
    or (h.operation_type = 'EXPIRE' and (h.operation_uuid <> h.hold_uuid or h.metadata is not null))
    or jsonb_typeof(h.metadata) <> 'object' or h.metadata = '{}' or octet_length(h.metadata::text) > 2048
  union all
  select 'available is not negative', h.wallet_uuid, h.seq, format('balance_after %s, held_after %s', h.balance_after, h.held_after)
  from history as h
  where h.held_after < 0 or h.held_after > h.balance_after
  union all
  select 'a hold has one end', e.wallet_uuid, min(e.seq), format('hold %s has %s', e.hold_uuid, count(*))
  from ending as e
  group by e.wallet_uuid, e.hold_uuid
  having count(*) > 1
  union all
  select 'an end belongs to a hold before it', e.wallet_uuid, e.seq, format('%s of %s on hold %s', e.operation_type, e.amount, e.hold_uuid)
  from ending as e
  left join hold as h on h.operation_uuid = e.hold_uuid and h.wallet_uuid = e.wallet_uuid and h.seq < e.seq
  where h.operation_uuid is null or e.amount > h.amount or (e.operation_type in ('RELEASE', 'EXPIRE') and e.amount <> h.amount)
  union all
  select 'a hold ends before it is due, or expires then', e.wallet_uuid, e.seq, format('%s at %s, due at %s', e.operation_type, e.created_at, h.expires_at)
  from ending as e
  inner join hold as h on h.operation_uuid = e.hold_uuid
  where case when e.operation_type = 'EXPIRE' then e.created_at is distinct from h.expires_at else e.created_at >= h.expires_at end
  union all
  select 'open holds are those without an end', coalesce(h.wallet_uuid, o.wallet_uuid), coalesce(h.seq, o.seq), format('ledger: %s; wallet.hold: %s', h, o)
  from (
    select h.wallet_uuid, h.operation_uuid, h.seq, h.amount, h.expires_at, h.created_at
    from hold as h
    where not exists (select from ending as e where e.hold_uuid = h.operation_uuid)
  ) as h
  full join wallet.hold as o on o.hold_uuid = h.operation_uuid
  where (h.wallet_uuid, h.operation_uuid, h.seq, h.amount, h.expires_at, h.created_at)
    is distinct from (o.wallet_uuid, o.hold_uuid, o.seq, o.amount, o.expires_at, o.created_at)
  union all
  select
    'an operation records the holds that are due', o.wallet_uuid, o.seq,
    format('hold %s, due at %s, is open; last operation at %s', o.hold_uuid, o.expires_at, h.last)
  from wallet.hold as o
  inner join (
    select h.wallet_uuid, max(h.created_at) as last
    from history as h
    where h.operation_type <> 'EXPIRE'
    group by h.wallet_uuid
  ) as h on h.wallet_uuid = o.wallet_uuid
  where o.expires_at <= h.last
  union all
  select
    'held_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s held gives %s', h.operation_type, h.amount, h.held_before, h.held_after)
  from history as h
  left join hold as o on o.operation_uuid = h.hold_uuid
  where h.held_after is distinct from h.held_before::numeric + case when h.operation_type = 'HOLD' then h.amount else 0 end - coalesce(o.amount, 0)
  union all
  select 'a transfer and nothing else has a counterparty', h.wallet_uuid, h.seq, format('%s, counterparty %s', h.operation_type, h.counterparty_uuid)
  from history as h
  where (h.operation_type in ('TRANSFER', 'RECEIVE')) <> (h.counterparty_uuid is not null) or h.counterparty_uuid = h.wallet_uuid
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid, case when h.operation_type in ('RECEIVE', 'EXPIRE') then h.operation_type end
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
  'A wallet''s balance is what its last operation says, so it cannot tell that the last operations of a wallet are missing, unless they are transfers or concern holds.';

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader, wallet_admin;
revoke all on all functions in schema wallet from wallet_app, wallet_reader, wallet_admin;

-- wallet_app calls functions and touches no table; wallet_reader reads the books and changes nothing;
-- wallet_admin is a member of wallet_app that manages keys, too. PUBLIC has nothing.
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
  wallet.expire_holds(text, int),
  wallet.live_keys(),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.create_key(text, text[], text, timestamptz),
  wallet.revoke_key(text),
  wallet.list_keys()
to wallet_admin;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.list_holds(text, bigint, int),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.hold, wallet.balance to wallet_reader;
grant execute on function wallet.due_amount(text, timestamptz, timestamptz) to wallet_reader; -- the view wallet.balance calls it

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;
