create or replace function wallet.expire_holds(p_wallet_uuid text, p_limit int default 1000)
returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_limit is null or p_limit < 1 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 2147483647';
  end if;

  begin
    perform 1
    from wallet.wallet as w
    where w.uuid = p_wallet_uuid
    for no key update;
  exception when lock_not_available then
    raise lock_not_available using message = wallet.fault_message('55P03');
  end;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  return wallet.record_expiries(p_wallet_uuid, clock_timestamp(), p_limit);
end
$$;

comment on function wallet.expire_holds(text, int) is
  'Records an EXPIRE for a wallet''s holds that have expired, at most p_limit (1 to 2^31-1), the earliest first, and returns how many. '
  'Never required: an expired hold no longer counts, whether its EXPIRE is recorded or not, and the wallet''s next operation records it. '
  'Raises WA400 (null or bad name, limit out of range), WA404 (no such wallet), 0A000 (another isolation level than read committed); '
  'under a lock_timeout also 55P03.';
