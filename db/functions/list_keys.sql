create or replace function wallet.list_keys()
returns table (name text, scopes text[], wallet_prefix text, created_at timestamptz, expires_at timestamptz, revoked_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select k.name, k.scopes, k.wallet_prefix, k.created_at, k.expires_at, k.revoked_at
  from wallet.key as k
  order by k.name
$$;

comment on function wallet.list_keys() is
  'Returns all keys, revoked and expired ones too, in the order of name byte for byte; no secrets and no digests. wallet_prefix null: all wallets; '
  'expires_at null: never; revoked_at null: not revoked.';
