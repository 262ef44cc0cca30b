create or replace function wallet.any_argument_fault(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns text
language plpgsql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' and p_operation_type <> 'TRANSFER'
      and p_operation_type <> 'HOLD' and p_operation_type <> 'RELEASE'
      then 'operation_type must be DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE'
    when p_operation_type = 'RELEASE' and p_amount is not null then 'amount must be null for RELEASE'
    when p_operation_type <> 'RELEASE' and p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
    when p_operation_type = 'RELEASE' and p_hold_uuid is null then 'hold_uuid must not be null for RELEASE'
    when p_hold_uuid is not null and (p_operation_type = 'DEPOSIT' or p_operation_type = 'HOLD')
      then 'hold_uuid must be null but for WITHDRAW, TRANSFER and RELEASE'
    when p_hold_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'hold_uuid must not be the nil UUID'
    when p_operation_type <> 'HOLD' and p_expires_at is not null then 'expires_at must be null but for HOLD'
    when p_expires_at < '0001-01-01 00:00:00+00'::timestamptz or p_expires_at >= '10000-01-01 00:00:00+00'::timestamptz
      then 'expires_at must be in the years 1 to 9999'
    when p_operation_type = 'TRANSFER' and p_counterparty_uuid is null then 'counterparty_uuid must not be null for TRANSFER'
    when p_operation_type <> 'TRANSFER' and p_counterparty_uuid is not null then 'counterparty_uuid must be null but for TRANSFER'
    when p_counterparty_uuid = p_wallet_uuid then 'counterparty_uuid must be another wallet'
    when p_metadata is null then null
    when jsonb_typeof(p_metadata) <> 'object' then 'metadata must be an object'
    when octet_length(p_metadata::text) > 2048 then 'metadata must have at most 2048 octets as text'
  end;
end
$$;

comment on function wallet.any_argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null; wallet names are checked elsewhere, and only if no such wallet was found. '
  'The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. '
  'A function of its own, so that a session prepares its expressions only where it needs them.';
