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
