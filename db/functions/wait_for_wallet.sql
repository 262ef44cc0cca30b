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
