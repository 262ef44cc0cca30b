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
