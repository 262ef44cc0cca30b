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
