-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- Nobody waits behind this for longer than 100 ms: it lets go, and tries again. An attempt that fails undoes its grant, too: whoever
-- analyses or vacuums the table waits for that change of its row in pg_class, and keeps the table locked meanwhile.
do $$
begin
  perform set_config('lock_timeout', '100ms', true);

  for v_attempt in 1..100 loop
    begin
      grant update on wallet.operation to wallet_owner; -- to lock it; grants.sql has taken it away
      lock table wallet.wallet in access exclusive mode;
      lock table wallet.operation in access exclusive mode;
      return;
    exception when lock_not_available then
      perform pg_sleep(0.4 * random());
    end;
  end loop;

  raise exception 'wallet.wallet or wallet.operation stays locked by another transaction; nothing was changed: migrate again later';
end
$$;

alter table wallet.wallet
  add column currency text collate "C",
  add column status text collate "C" not null default 'OPEN',
  add constraint wallet_currency_check check (currency ~ '^[A-Z0-9]{3,12}$') not valid,
  add constraint wallet_status_check check (status in ('OPEN', 'FROZEN', 'CLOSED')) not valid;

-- Every statement that inserts reads the checks' expressions from the catalogue, so they are short: one constant where
-- `in` would have seven.
alter table wallet.operation
  add column held_after bigint not null default 0,
  add column counterparty_uuid text collate "C",
  add column hold_uuid uuid,
  add column expires_at timestamptz,
  add column metadata jsonb,
  drop constraint operation_balance_after_check,
  drop constraint operation_operation_type_check,
  add constraint operation_held_after_check check (held_after >= 0 and balance_after >= held_after) not valid,
  add constraint operation_operation_type_check
    check (operation_type = any('{DEPOSIT,WITHDRAW,TRANSFER,RECEIVE,HOLD,RELEASE,EXPIRE}')) not valid;

create view wallet.balance as
select -- noqa: ST06
  w.uuid,
  w.id,
  w.currency,
  w.status,
  coalesce(o.balance_after, 0) as balance,
  coalesce(o.held_after, 0) as held,
  coalesce(o.balance_after - o.held_after, 0) as available,
  coalesce(o.seq, 0) as seq,
  w.created_at,
  coalesce(o.created_at, w.created_at) as updated_at
from wallet.wallet as w
left join lateral (
  select
    l.balance_after,
    l.held_after,
    l.seq,
    l.created_at
  from wallet.operation as l
  where l.wallet_uuid = w.uuid
  order by l.seq desc
  limit 1
) as o on true;

comment on column wallet.wallet.currency is 'What the amounts count, 3 to 12 characters of A-Z and 0-9 (an ISO 4217 code, usually); null where nobody said. It never changes.';
comment on column wallet.wallet.status is 'OPEN; FROZEN (nothing leaves); CLOSED (nothing at all).';

comment on column wallet.operation.operation_type is
  'DEPOSIT adds the amount to the balance, WITHDRAW takes it off. TRANSFER takes it off here, and a RECEIVE of the counterparty, under the same operation_uuid, adds it there.';
comment on column wallet.operation.operation_uuid is
  'The client''s name for the operation, unique over all wallets among the operations that were asked for: applied once, whatever is sent again. A RECEIVE has that of its TRANSFER.';
comment on column wallet.operation.created_at is
  'When the operation was applied; never earlier than the wallet''s operation before it. The same in both rows of a transfer. Order comes from seq.';
comment on column wallet.operation.held_after is 'Minor units: how much of balance_after was held; 0 to balance_after.';
comment on column wallet.operation.counterparty_uuid is 'The other wallet of a TRANSFER or RECEIVE; null for all other types.';
comment on column wallet.operation.hold_uuid is 'Reserved for holds: null.';
comment on column wallet.operation.expires_at is 'Reserved for holds: null.';
comment on column wallet.operation.metadata is 'What the caller wanted to stand with the operation: an object of at most 2,048 octets as text, not empty; null where there is none.';

comment on view wallet.balance is
  'One row per wallet: who it is and what its last operation says. balance, held, available: minor units, available = balance - held; '
  'seq: the number of its operations; updated_at: the created_at of the last one, of the wallet where there is none.';

revoke update on wallet.operation from wallet_owner;

-- It changes nothing but that every session plans its calls again, whose rows have other columns now.
grant usage on schema wallet to wallet_app, wallet_reader;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

grant update on wallet.operation to wallet_owner; -- to lock it; grants.sql has taken it away

set local lock_timeout = '2s';
lock table wallet.wallet in access exclusive mode;
lock table wallet.operation in access exclusive mode;

do $$
begin
  if exists (select from wallet.wallet where currency is not null or status <> 'OPEN')
    or exists (
      select from wallet.operation
      where held_after <> 0 or counterparty_uuid is not null or hold_uuid is not null or expires_at is not null or metadata is not null
        or operation_type not in ('DEPOSIT', 'WITHDRAW')
    ) then
    raise exception 'refused: the columns hold what would be lost; nothing was changed';
  end if;
end
$$;

drop view wallet.balance;

alter table wallet.operation
  drop constraint operation_held_after_check,
  drop constraint operation_operation_type_check,
  add constraint operation_balance_after_check check (balance_after >= 0) not valid,
  add constraint operation_operation_type_check check (operation_type in ('DEPOSIT', 'WITHDRAW')) not valid,
  drop column held_after,
  drop column counterparty_uuid,
  drop column hold_uuid,
  drop column expires_at,
  drop column metadata;
alter table wallet.operation
  validate constraint operation_balance_after_check,
  validate constraint operation_operation_type_check;

alter table wallet.wallet
  drop column currency,
  drop column status;

comment on column wallet.operation.operation_type is 'DEPOSIT adds the amount to the balance, WITHDRAW takes it off.';
comment on column wallet.operation.operation_uuid is 'The client''s name for the operation, unique over all wallets: applied once, whatever is sent again.';
comment on column wallet.operation.created_at is 'When the operation was applied. For people: order comes from seq.';

revoke update on wallet.operation from wallet_owner;

-- It changes nothing but that every session plans its calls again, whose rows have other columns now.
grant usage on schema wallet to wallet_app, wallet_reader;

reset role;
reset search_path;
