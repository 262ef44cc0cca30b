create or replace function wallet.apply_request(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb,
  p_not_after timestamptz
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_sqlstate text;
  v_message text;
  v_operation wallet.operation;
begin
  select
    a.sqlstate, a.message,
    a.wallet_uuid, a.operation_type, a.operation_uuid, a.seq, a.amount, a.balance_after, a.created_at,
    a.held_after, a.counterparty_uuid, a.hold_uuid, a.expires_at, a.metadata
  into
    v_sqlstate, v_message,
    v_operation.wallet_uuid, v_operation.operation_type, v_operation.operation_uuid, v_operation.seq, v_operation.amount,
    v_operation.balance_after, v_operation.created_at, v_operation.held_after, v_operation.counterparty_uuid, v_operation.hold_uuid,
    v_operation.expires_at, v_operation.metadata
  from wallet.apply_operations(
    array[p_wallet_uuid], array[p_operation_uuid], array[p_operation_type], array[p_amount], array[p_counterparty_uuid],
    array[p_hold_uuid], array[p_expires_at], array[p_metadata], p_not_after => p_not_after
  ) as a;

  if v_sqlstate is not null then
    raise exception using errcode = v_sqlstate, message = v_message;
  end if;

  return v_operation;
end
$$;

comment on function wallet.apply_request(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz) is
  'Internal: what apply_operation does, by way of apply_operations, which alone handles holds.';
