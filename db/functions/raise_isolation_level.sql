create or replace function wallet.raise_isolation_level()
returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  raise feature_not_supported using
    message = format('wallets and keys cannot be changed under isolation level %s', current_setting('transaction_isolation')),
    hint = 'Use read committed: an older snapshot would be taken for the state.';
end
$$;

comment on function wallet.raise_isolation_level() is
  'Internal: says why a function that changes something refuses the transaction''s isolation level. Raises 0A000, always.';
