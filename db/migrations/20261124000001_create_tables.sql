-- migrate:up

set local search_path = pg_catalog, pg_temp;

-- Roles belong to the cluster, not to this database, so another database may have made them already,
-- or be making them at this moment.
do $$
declare
  v_role text;
begin
  foreach v_role in array array['wallet_owner', 'wallet_app', 'wallet_reader'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = v_role) then
      begin
        execute format('create role %I nologin', v_role);
      exception when duplicate_object or unique_violation then
        null;
      end;
    end if;
  end loop;

  -- From PostgreSQL 16 on, whoever creates a role may administer it but not yet act as it.
  if not pg_has_role(current_user, 'wallet_owner', 'usage') then
    grant wallet_owner to current_user;
  end if;
end
$$;

create schema wallet authorization wallet_owner;

set local role wallet_owner;

comment on schema wallet is
  'Wallets and their operations. Money moves only through the functions of this schema; amounts are whole minor units.';

create table wallet.wallet (
  uuid text collate "C" not null,
  id bigint generated always as identity not null,
  balance bigint not null default 0,
  seq bigint not null default 0,
  created_at timestamptz not null default clock_timestamp(),
  constraint wallet_pkey primary key (uuid),
  constraint wallet_uuid_check check (octet_length(uuid) between 1 and 64),
  constraint wallet_balance_check check (balance >= 0),
  constraint wallet_seq_check check (seq >= 0)
) with (fillfactor = 50); -- a balance changes in place (a HOT update) while its page has room

comment on table wallet.wallet is 'One row per wallet: its balance and how many operations led to it.';
comment on column wallet.wallet.uuid is 'The wallet''s name: 1 to 64 characters of A-Z, a-z, 0-9, _ and -; a UUID unless its creator chose otherwise.';
comment on column wallet.wallet.id is 'A number for people, in the order of creation; gaps are normal and nothing refers to it.';
comment on column wallet.wallet.balance is 'Minor units, 0 to 2^63-1; always the balance_after of the wallet''s last operation, 0 before the first.';
comment on column wallet.wallet.seq is 'Number of operations so far: the seq of the last one.';
comment on column wallet.wallet.created_at is 'When the wallet was created.';

-- wallet_uuid and operation_type stand side by side because short texts need no padding between them:
-- 8 bytes less in every row. There is no foreign key to wallet.wallet: its trigger would run for every row, and
-- nobody but the owner can delete a wallet. wallet.verify() finds orphans.
create table wallet.operation (
  wallet_uuid text collate "C" not null,
  operation_type text collate "C" not null,
  operation_uuid uuid not null,
  seq bigint not null,
  amount bigint not null,
  balance_after bigint not null,
  created_at timestamptz not null default clock_timestamp(),
  constraint operation_pkey primary key (wallet_uuid, seq),
  constraint operation_operation_uuid_key unique (operation_uuid),
  constraint operation_operation_type_check check (operation_type in ('DEPOSIT', 'WITHDRAW')),
  constraint operation_seq_check check (seq > 0),
  constraint operation_amount_check check (amount > 0),
  constraint operation_balance_after_check check (balance_after >= 0)
);

comment on table wallet.operation is 'The ledger: one row per applied operation, append-only. A rejected operation leaves nothing here.';
comment on column wallet.operation.wallet_uuid is 'The wallet whose balance changed.';
comment on column wallet.operation.operation_type is 'DEPOSIT adds the amount to the balance, WITHDRAW takes it off.';
comment on column wallet.operation.operation_uuid is 'The client''s name for the operation, unique over all wallets: applied once, whatever is sent again.';
comment on column wallet.operation.seq is 'Position in the wallet''s history: 1, 2, 3 ... without gaps.';
comment on column wallet.operation.amount is 'Minor units, 1 to 2^63-1.';
comment on column wallet.operation.balance_after is 'Minor units: the wallet''s balance once the operation was applied.';
comment on column wallet.operation.created_at is 'When the operation was applied. For people: order comes from seq.';

reset role;

reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;

set local role wallet_owner;

-- In this order, in which everybody takes them.
lock table wallet.wallet in access exclusive mode;
lock table wallet.operation in access exclusive mode;

do $$
begin
  if exists (select from wallet.operation) then
    raise exception 'refused: this would destroy the ledger, and with it all money; nothing was changed';
  end if;
end
$$;

drop table wallet.operation;
drop table wallet.wallet;

reset role;

drop schema wallet;

reset search_path;
