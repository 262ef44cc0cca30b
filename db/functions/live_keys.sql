create or replace function wallet.live_keys()
returns table (name text, digest bytea, scopes text[], wallet_prefix text, expires_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select k.name, k.digest, k.scopes, k.wallet_prefix, k.expires_at
  from wallet.key as k
  where k.revoked_at is null and (k.expires_at > clock_timestamp()) is not false
  order by k.name
$$;

comment on function wallet.live_keys() is
  'Returns the keys that are neither revoked nor, by the database''s clock, expired, for services that check them. digest: SHA-256 of the secret''s text, 32 octets. '
  'wallet_prefix null: all wallets; expires_at null: never.';
