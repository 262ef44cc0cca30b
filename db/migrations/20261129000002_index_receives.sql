-- migrate:up transaction:false
create unique index concurrently if not exists operation_receive_idx on wallet.operation (operation_uuid)
where operation_type = 'RECEIVE';

-- migrate:down transaction:false
drop index concurrently if exists wallet.operation_receive_idx;
