-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- The next two migrations build these indexes concurrently, which waits for every transaction that is open: with those of
-- other deployments, which wait for this one (`--migration-lock`), that is a deadlock. A ledger of 16 MB is indexed in some
-- 100 ms, so it need not come to that.
do $$
begin
  perform set_config('lock_timeout', '100ms', true);

  if pg_relation_size('wallet.operation') <= 16 * 1024 * 1024 then
    create unique index if not exists operation_requested_idx on wallet.operation (operation_uuid)
    where operation_type not in ('RECEIVE', 'EXPIRE');
    create unique index if not exists operation_receive_idx on wallet.operation (operation_uuid)
    where operation_type = 'RECEIVE';
  end if;
exception when lock_not_available then
  null; -- they are built concurrently, then
end
$$;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
reset search_path;
