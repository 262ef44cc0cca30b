-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- A session that planned a call while the migration before was under way may have planned it with the functions from before, and
-- would go on with that plan for good. A change of the schema's privileges, here to what they are, makes every session plan again.
select pg_sleep(0.5);
grant usage on schema wallet to wallet_app, wallet_reader;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- A session that planned a call while the migration before was under way may have planned it with the functions from before, and
-- would go on with that plan for good. A change of the schema's privileges, here to what they are, makes every session plan again.
select pg_sleep(0.5);
grant usage on schema wallet to wallet_app, wallet_reader;

reset role;
reset search_path;
