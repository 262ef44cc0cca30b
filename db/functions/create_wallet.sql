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
