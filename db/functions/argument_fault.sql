create or replace function wallet.argument_fault(
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
language sql immutable
as $$
  select case
    when p_amount > 0 and p_operation_uuid <> '00000000-0000-0000-0000-000000000000'::uuid
      and p_hold_uuid is null and p_expires_at is null and p_metadata is null
      and case
        when p_counterparty_uuid is null then p_operation_type = 'DEPOSIT' or p_operation_type = 'WITHDRAW'
        else p_operation_type = 'TRANSFER' and p_counterparty_uuid <> p_wallet_uuid
      end
      then null
    else wallet.any_argument_fault(
      p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata
    )
  end
$$;

comment on function wallet.argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: returns what any_argument_fault returns, but does not call it for a well-formed deposit, withdrawal or transfer without metadata and without a hold. '
  'No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';
