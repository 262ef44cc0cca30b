-- The service's login: a member of wallet_app and nothing else, with the password from WALLET_DB_PASSWORD. For psql, as a
-- user who may create roles; run it again for another password.
\set password ''
\getenv password WALLET_DB_PASSWORD
select :'password' = '' as missing \gset

\if :missing
do $$ begin raise exception 'WALLET_DB_PASSWORD is not set'; end $$;
\else
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'wallet_service') then
    create role wallet_service in role wallet_app;
  elsif not pg_catalog.pg_has_role('wallet_service', 'wallet_app', 'member') then
    grant wallet_app to wallet_service;
  end if;
end;
$$;

select format('alter role wallet_service login password %L', :'password') \gexec
\endif
