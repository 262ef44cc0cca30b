-- migrate:up transaction:false
create unique index concurrently if not exists operation_requested_idx on wallet.operation (operation_uuid)
where operation_type not in ('RECEIVE', 'EXPIRE');

-- migrate:down transaction:false
drop index concurrently if exists wallet.operation_requested_idx;
