create or replace function wallet.is_same_request(
  p_operation wallet.operation,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns boolean
language sql immutable
as $$
  select p_operation.operation_type = p_operation_type
    and (p_operation.amount = p_amount or p_operation_type = 'RELEASE')
    and p_operation.counterparty_uuid is not distinct from p_counterparty_uuid
    and p_operation.hold_uuid is not distinct from p_hold_uuid
    and p_operation.expires_at is not distinct from p_expires_at
    and p_operation.metadata is not distinct from nullif(p_metadata, '{}')
$$;

comment on function wallet.is_same_request(wallet.operation, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: whether an operation on record is what this request asks for. '
  'No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';
