create or replace function wallet.argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint)
returns text
language sql immutable
as $$
  select case
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' then 'operation_type must be DEPOSIT or WITHDRAW'
    when p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
  end
$$;

comment on function wallet.argument_fault(uuid, text, bigint) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null. The nil UUID (RFC 9562, section 5.9) is '
  'what an unset field looks like, so it names no operation. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';
