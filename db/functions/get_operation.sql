create or replace function wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid)
returns wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_operation wallet.operation;
begin
  if p_operation_uuid is null then
    raise sqlstate 'WA400' using message = 'operation_uuid must not be null';
  end if;

  select o.* into v_operation
  from wallet.operation as o
  where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE');

  if v_operation.counterparty_uuid = p_wallet_uuid then
    select o.* into v_operation
    from wallet.operation as o
    where o.operation_uuid = p_operation_uuid and o.operation_type = 'RECEIVE';
  end if;

  if (v_operation.wallet_uuid = p_wallet_uuid) is not true then
    perform wallet.get_wallet(p_wallet_uuid);
    raise sqlstate 'WA414' using message = wallet.fault_message('WA414');
  end if;

  return v_operation;
end
$$;

comment on function wallet.get_operation(text, uuid) is
  'Returns the row of an operation applied to this wallet; for the payee of a transfer that is its RECEIVE, for a hold''s uuid its HOLD, not its EXPIRE. '
  'Raises WA400 (null, or bad wallet name), WA404 (no such wallet), WA414 (this wallet has no such operation).';
