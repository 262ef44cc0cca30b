-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 5
$$;

comment on function wallet.contract_version() is
  'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. '
  'A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';

-- The secret must reach nobody but the caller. So it stands in assignments of PL/pgSQL only: what a statement or a function
-- in SQL is given may end in the server's log, as a constant of its plan or as a parameter (debug_print_plan, auto_explain).
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
  'clock; null for never. One that is past makes a key that is refused. Raises WA400 (bad name, scopes, prefix or expiry), WA420 (the key exists, perhaps revoked or '
  'expired), 0A000 (another isolation level than read committed).';

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
    when 'WA410' then 'Hold is closed'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA417' then 'Wallet is not empty'
    when 'WA419' then 'Wallet already exists'
    when 'WA420' then 'Key already exists'
    when 'WA421' then 'Key not found'
    when 'WA422' then 'Currencies differ'
    when 'WA424' then 'Hold not found'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.list_keys()
returns table (name text, scopes text[], wallet_prefix text, created_at timestamptz, expires_at timestamptz, revoked_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select k.name, k.scopes, k.wallet_prefix, k.created_at, k.expires_at, k.revoked_at
  from wallet.key as k
  order by k.name
$$;

comment on function wallet.list_keys() is
  'Returns all keys, revoked and expired ones too, in the order of name byte for byte; no secrets and no digests. wallet_prefix null: all wallets; '
  'expires_at null: never; revoked_at null: not revoked.';

create or replace function wallet.live_keys()
returns table (name text, digest bytea, scopes text[], wallet_prefix text, expires_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select k.name, k.digest, k.scopes, k.wallet_prefix, k.expires_at
  from wallet.key as k
  where k.revoked_at is null and (k.expires_at > clock_timestamp()) is not false
  order by k.name
$$;

comment on function wallet.live_keys() is
  'Returns the keys that are neither revoked nor, by the database''s clock, expired, for services that check them. digest: SHA-256 of the secret''s text, 32 octets. '
  'wallet_prefix null: all wallets; expires_at null: never.';

create or replace function wallet.raise_isolation_level()
returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  raise feature_not_supported using
    message = format('wallets and keys cannot be changed under isolation level %s', current_setting('transaction_isolation')),
    hint = 'Use read committed: an older snapshot would be taken for the state.';
end
$$;

comment on function wallet.raise_isolation_level() is
  'Internal: says why a function that changes something refuses the transaction''s isolation level. Raises 0A000, always.';

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
  where k.name = p_name;

  if not found then
    raise sqlstate 'WA421' using message = wallet.fault_message('WA421');
  end if;
end
$$;

comment on function wallet.revoke_key(text) is
  'Revokes a key for good and returns it as list_keys does; again: the same row. Services refuse it within 5 seconds of the commit. '
  'Raises WA400 (null or bad name), WA421 (no such key), 0A000 (another isolation level than read committed).';

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

drop function wallet.create_key(text, text[], text, timestamptz);
drop function wallet.list_keys();
drop function wallet.live_keys();
drop function wallet.revoke_key(text);

create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 4
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
    when 'WA403' then 'Wallet is frozen'
    when 'WA404' then 'Wallet not found'
    when 'WA405' then 'Wallet is closed'
    when 'WA409' then 'Transaction already exists'
    when 'WA410' then 'Hold is closed'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA417' then 'Wallet is not empty'
    when 'WA419' then 'Wallet already exists'
    when 'WA422' then 'Currencies differ'
    when 'WA424' then 'Hold not found'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
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

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader, wallet_admin;
revoke all on all functions in schema wallet from wallet_app, wallet_reader, wallet_admin;

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
  wallet.expire_holds(text, int),
  wallet.raise_too_late()
to wallet_app;

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
