create or replace function wallet.raise_too_late()
returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  raise query_canceled using message = 'the deadline of this call has passed';
end
$$;

comment on function wallet.raise_too_late() is
  'For services older than p_not_after: makes the statement that calls it fail, and so be rolled back, because its deadline has passed: '
  'select ... from wallet.apply_operations(...) where case when clock_timestamp() < $5 then true else wallet.raise_too_late() end. '
  'The clock is read after apply_operations has run, however long it waited for a lock, and a call that is in time holds its locks '
  'until it is committed. Raises 57014 (query_canceled), always.';
