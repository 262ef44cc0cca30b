create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 5
$$;

comment on function wallet.contract_version() is
  'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. '
  'A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';
