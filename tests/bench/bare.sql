-- The least that could be called applying an operation: lock, read, check, insert, return; nothing of what makes it safe to call.
create function public.bare(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint)
returns wallet.operation
language plpgsql
as $$
declare
  v_balance bigint;
  v_seq bigint;
  v_operation wallet.operation;
begin
  perform from wallet.wallet where uuid = p_wallet_uuid for update;

  select balance_after, seq into v_balance, v_seq
  from wallet.operation
  where wallet_uuid = p_wallet_uuid
  order by seq desc
  limit 1;

  v_balance := coalesce(v_balance, 0) + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end;
  if v_balance < 0 then
    raise exception 'not enough money';
  end if;

  insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
  values (p_wallet_uuid, p_operation_type, p_operation_uuid, coalesce(v_seq, 0) + 1, p_amount, v_balance)
  returning * into v_operation;

  return v_operation;
end
$$;
