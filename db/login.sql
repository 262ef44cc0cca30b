-- The service's login: a member of wallet_app and nothing else, with the password from WALLET_DB_PASSWORD. For psql, as a
-- user who may create roles; run it again for another password.
\getenv password WALLET_DB_PASSWORD

do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'wallet_service') then
    create role wallet_service in role wallet_app;
  end if;
end;
$$;

select format('alter role wallet_service login password %L', :'password') \gexec
