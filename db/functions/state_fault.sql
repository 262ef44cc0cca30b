create or replace function wallet.state_fault(
  p_operation_type text,
  p_amount bigint,
  p_status text,
  p_balance bigint,
  p_currency text,
  p_payee_status text,
  p_payee_balance bigint,
  p_payee_currency text
)
returns text
language sql immutable
as $$
  select case
    when p_status = 'CLOSED' or p_payee_status = 'CLOSED' then 'WA405'
    when p_status = 'FROZEN' and p_operation_type <> 'DEPOSIT' and p_operation_type <> 'RELEASE' then 'WA403'
    when p_operation_type = 'DEPOSIT' then case when p_amount > 9223372036854775807 - p_balance then 'WA416' end
    when p_operation_type = 'TRANSFER' and p_currency is distinct from p_payee_currency then 'WA422'
    when p_amount > p_balance then 'WA402'
    when p_amount > 9223372036854775807 - p_payee_balance then 'WA416'
  end
$$;

comment on function wallet.state_fault(text, bigint, text, bigint, text, text, bigint, text) is
  'Internal: the SQLSTATE for an operation that the state of its wallets does not allow (the first of WA405, WA403, WA422, WA402, WA416), else null. '
  'p_balance: for a DEPOSIT the balance; for the other types what is available, for a capture the amount of its hold. The payee''s state is null except for a TRANSFER. '
  'No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';
