create or replace function wallet.names_fault(p_wallet_uuid text, p_counterparty_uuid text)
returns text
language sql immutable
as $$
  select coalesce(
    wallet.name_fault(p_wallet_uuid),
    case when p_counterparty_uuid is not null then replace(wallet.name_fault(p_counterparty_uuid), 'wallet_uuid', 'counterparty_uuid') end
  )
$$;

comment on function wallet.names_fault(text, text) is
  'Internal: the message of WA400 for the names of an operation''s wallets, of which the second may be null; else null. '
  'No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';
