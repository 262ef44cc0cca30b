create or replace function wallet.name_fault(p_wallet_uuid text)
returns text
language sql immutable
as $$
  select case
    when p_wallet_uuid is null then 'wallet_uuid must not be null'
    when p_wallet_uuid !~ '^[A-Za-z0-9_-]{1,64}$' then 'wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -'
  end
$$;

comment on function wallet.name_fault(text) is
  'Internal: the message of WA400 for a wallet uuid that no wallet can have, else null. '
  'No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';
