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
  'Internal: says why no wallet was found under this name, or under one of these two. Existing wallets have valid names, so names are '
  'validated only here. Raises WA400 (null or bad name) or WA404, always one of them.';
