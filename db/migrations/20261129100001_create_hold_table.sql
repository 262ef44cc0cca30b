-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- By hand

-- There is no foreign key to wallet.wallet, for the reasons that wallet.operation gives.
create table wallet.hold (
  wallet_uuid text collate "C" not null,
  hold_uuid uuid not null,
  seq bigint not null,
  amount bigint not null,
  expires_at timestamptz,
  created_at timestamptz not null,
  constraint hold_pkey primary key (hold_uuid, wallet_uuid),
  constraint hold_amount_check check (amount > 0),
  constraint hold_expires_at_check check (expires_at > created_at)
);

-- Of an empty table every index costs the same, and plans are kept. So each search has one index only: no other begins with
-- hold_uuid, the primary key doesn't begin with wallet_uuid, and the other two have conditions.
create unique index hold_seq_idx on wallet.hold (wallet_uuid, seq) where seq > 0;
create index hold_expires_at_idx on wallet.hold (wallet_uuid, expires_at, seq) where expires_at is not null;

comment on table wallet.hold is
  'The open holds, and nothing else: the HOLDs of the ledger that no capture, RELEASE or EXPIRE has ended. One that is due stays here until its EXPIRE is recorded, and counts no longer.';
comment on column wallet.hold.wallet_uuid is 'The wallet whose money is held.';
comment on column wallet.hold.hold_uuid is 'The hold''s name: the operation_uuid of its HOLD.';
comment on column wallet.hold.seq is 'The seq of its HOLD.';
comment on column wallet.hold.amount is 'Minor units, 1 to 2^63-1.';
comment on column wallet.hold.created_at is 'The created_at of its HOLD.';
comment on column wallet.hold.expires_at is 'From when on it is due: it counts no longer and cannot be captured. Null: never.';

comment on column wallet.operation.operation_type is
  'DEPOSIT adds the amount to the balance, WITHDRAW takes it off. TRANSFER takes it off here, and a RECEIVE of the counterparty, under the same operation_uuid, adds it there. '
  'HOLD holds the amount; one of WITHDRAW, TRANSFER, RELEASE and EXPIRE ends that, whole.';
comment on column wallet.operation.operation_uuid is
  'The client''s name for the operation, unique over all wallets among the operations that were asked for: applied once, whatever is sent again. '
  'A RECEIVE has that of its TRANSFER, an EXPIRE that of its HOLD.';
comment on column wallet.operation.created_at is
  'When the operation was applied; never earlier than the wallet''s operation before it. The same in both rows of a transfer. Of an EXPIRE: when the hold was due. Order comes from seq.';
comment on column wallet.operation.hold_uuid is 'The hold that this operation ended: the operation_uuid of its HOLD; null where it ended none.';
comment on column wallet.operation.expires_at is 'Of a HOLD: from when on it counts no longer and cannot be captured; null where it stays until it is ended.';

-- Generated

create or replace function wallet.due_amount(p_wallet_uuid text, p_from timestamptz, p_until timestamptz default null)
returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_until timestamptz := greatest(p_from, coalesce(p_until, clock_timestamp()));
begin
  return (
    select coalesce(sum(h.amount), 0)
    from wallet.hold as h
    where h.wallet_uuid = p_wallet_uuid and h.expires_at >= p_from and h.expires_at <= v_until
  );
end
$$;

comment on function wallet.due_amount(text, timestamptz, timestamptz) is
  'Internal: minor units, how much of what a wallet''s last row holds is due at a moment (null: now), though no EXPIRE says so yet. p_from: the created_at of that row. '
  'The view wallet.balance calls it with the rights of whoever reads that.';

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader;
revoke all on all functions in schema wallet from wallet_app, wallet_reader;

-- wallet_app calls functions and touches no table; wallet_reader reads and changes nothing; PUBLIC has nothing.
-- Functions that are granted to nobody are internal: they run as part of the others, with the owner's rights.
revoke all on schema wallet from public;
revoke all on all tables in schema wallet from public;
revoke all on all functions in schema wallet from public;

grant usage on schema wallet to wallet_app, wallet_reader;

grant execute on function
  wallet.create_wallet(text, text, timestamptz),
  wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz),
  wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz),
  wallet.set_status(text, text, timestamptz),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.balance to wallet_reader;

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- By hand

set local lock_timeout = '2s';
lock table wallet.hold in access exclusive mode;

do $$
begin
  if exists (select from wallet.hold) or exists (select from wallet.operation where operation_type = 'HOLD') then
    raise exception 'refused: the ledger has holds, which would be lost; nothing was changed';
  end if;
end
$$;

drop table wallet.hold;

comment on column wallet.operation.operation_type is
  'DEPOSIT adds the amount to the balance, WITHDRAW takes it off. TRANSFER takes it off here, and a RECEIVE of the counterparty, under the same operation_uuid, adds it there.';
comment on column wallet.operation.operation_uuid is
  'The client''s name for the operation, unique over all wallets among the operations that were asked for: applied once, whatever is sent again. A RECEIVE has that of its TRANSFER.';
comment on column wallet.operation.created_at is
  'When the operation was applied; never earlier than the wallet''s operation before it. The same in both rows of a transfer. Order comes from seq.';
comment on column wallet.operation.hold_uuid is 'Reserved for holds: null.';
comment on column wallet.operation.expires_at is 'Reserved for holds: null.';

-- Generated

drop function wallet.due_amount(text, timestamptz, timestamptz);

grant all on all tables in schema wallet to wallet_owner;
revoke all on all tables in schema wallet from wallet_app, wallet_reader;
revoke all on all functions in schema wallet from wallet_app, wallet_reader;

-- wallet_app calls functions and touches no table; wallet_reader reads and changes nothing; PUBLIC has nothing.
-- Functions that are granted to nobody are internal: they run as part of the others, with the owner's rights.
revoke all on schema wallet from public;
revoke all on all tables in schema wallet from public;
revoke all on all functions in schema wallet from public;

grant usage on schema wallet to wallet_app, wallet_reader;

grant execute on function
  wallet.create_wallet(text, text, timestamptz),
  wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz),
  wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz),
  wallet.set_status(text, text, timestamptz),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.balance to wallet_reader;

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;
