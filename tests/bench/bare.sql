-- The least that could be called applying an operation: lock, check, insert, update, return; nothing of what makes it safe to call.
create function public.bare(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint)
returns wallet.operation
language plpgsql
as $$
declare
  v_balance bigint;
  v_seq bigint;
  v_operation wallet.operation;
begin
  select balance, seq into v_balance, v_seq from wallet.wallet where uuid = p_wallet_uuid for update;

  v_balance := v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end;
  if v_balance < 0 then
    raise exception 'not enough money';
  end if;

  insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
  values (p_wallet_uuid, p_operation_type, p_operation_uuid, v_seq + 1, p_amount, v_balance)
  returning * into v_operation;

  update wallet.wallet set balance = v_balance, seq = v_seq + 1 where uuid = p_wallet_uuid;

  return v_operation;
end
$$;
