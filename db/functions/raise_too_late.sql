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
  'Takes back the statement that calls it, because its deadline has passed. A query from wallet.apply_operations or '
  'wallet.apply_operation calls it where clock_timestamp() is past a deadline: that is looked at after the function has run and '
  'while it holds its locks, so nothing of the statement is applied after the deadline, however long it waited for a lock. '
  'Raises 57014 (query_canceled), always.';
