-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- Reads both tables and lets everybody read and write meanwhile.
alter table wallet.wallet
  validate constraint wallet_currency_check,
  validate constraint wallet_status_check;
alter table wallet.operation
  validate constraint operation_held_after_check,
  validate constraint operation_operation_type_check;

-- An index that was interrupted while it was built concurrently is there, but not valid. This builds it again; nobody writes
-- meanwhile.
do $$
declare
  v_index regclass;
begin
  for v_index in
    select i.indexrelid
    from pg_index as i
    where i.indexrelid in ('wallet.operation_requested_idx'::regclass, 'wallet.operation_receive_idx'::regclass) and not i.indisvalid
  loop
    execute format('reindex index %s', v_index);
  end loop;
end
$$;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- A session that began to plan a call while the migration before held its locks may have planned it with a function, or a
-- row, that is gone, and would go on with that plan for good. A change of the schema's privileges, here to what they are,
-- makes every session plan again.
select pg_sleep(0.5);
grant usage on schema wallet to wallet_app, wallet_reader;

reset role;
reset search_path;
