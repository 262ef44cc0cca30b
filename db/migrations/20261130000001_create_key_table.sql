-- migrate:up

set local search_path = pg_catalog, pg_temp;

-- As the first migration makes the other roles. Who could not have granted wallet_app finds wallet_admin made by who could.
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'wallet_admin') then
    begin
      create role wallet_admin nologin;
    exception when duplicate_object or unique_violation then
      null;
    end;
  end if;

  if not pg_has_role('wallet_admin', 'wallet_app', 'member') then
    grant wallet_app to wallet_admin;
  end if;
end
$$;

set local role wallet_owner;

create table wallet.key (
  name text collate "C" not null,
  digest bytea not null,
  scopes text[] collate "C" not null,
  wallet_prefix text collate "C",
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz,
  revoked_at timestamptz,
  constraint key_pkey primary key (name),
  constraint key_name_check check (octet_length(name) between 1 and 64),
  constraint key_digest_check check (octet_length(digest) = 32)
);

comment on table wallet.key is 'What REST callers show to be let in: one row per key, revoked and expired ones too. The secret is not here.';
comment on column wallet.key.name is 'What logs call it: 1 to 64 characters of A-Z, a-z, 0-9, _ and -.';
comment on column wallet.key.digest is 'SHA-256 of the secret''s text in UTF-8. The secret has 256 random bits, so nobody finds it from here.';
comment on column wallet.key.scopes is 'What it may do: one or more of admin, create, deposit, hold, metrics, read, transfer and withdraw, in this order.';
comment on column wallet.key.wallet_prefix is 'It reaches only wallets whose names begin so, byte for byte; null: all.';
comment on column wallet.key.created_at is 'When it was made.';
comment on column wallet.key.expires_at is 'From when on it is refused, by the database''s clock; null: never.';
comment on column wallet.key.revoked_at is 'When it was revoked; null: it was not.';

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

drop table wallet.key;

reset role;
reset search_path;
