create or replace function wallet.funds_fault(p_operation_type text, p_amount bigint, p_balance bigint)
returns text
language sql immutable
as $$
  select case
    when p_operation_type = 'WITHDRAW' and p_amount > p_balance then 'WA402'
    when p_operation_type = 'DEPOSIT' and p_amount > 9223372036854775807 - p_balance then 'WA416'
  end
$$;

comment on function wallet.funds_fault(text, bigint, bigint) is
  'Internal: the SQLSTATE for an operation that the balance does not allow (WA402, WA416), else null. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';
