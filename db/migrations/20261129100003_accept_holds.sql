-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

create or replace function wallet.argument_fault(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns text
language sql immutable
as $$
  select case
    when p_amount > 0 and p_operation_uuid <> '00000000-0000-0000-0000-000000000000'::uuid
      and p_hold_uuid is null and p_expires_at is null and p_metadata is null
      and case
        when p_counterparty_uuid is null then p_operation_type = 'DEPOSIT' or p_operation_type = 'WITHDRAW'
        else p_operation_type = 'TRANSFER' and p_counterparty_uuid <> p_wallet_uuid
      end
      then null
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' and p_operation_type <> 'TRANSFER'
      and p_operation_type <> 'HOLD' and p_operation_type <> 'RELEASE'
      then 'operation_type must be DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE'
    when p_operation_type = 'RELEASE' and p_amount is not null then 'amount must be null for RELEASE'
    when p_operation_type <> 'RELEASE' and p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
    when p_operation_type = 'RELEASE' and p_hold_uuid is null then 'hold_uuid must not be null for RELEASE'
    when p_hold_uuid is not null and (p_operation_type = 'DEPOSIT' or p_operation_type = 'HOLD')
      then 'hold_uuid must be null but for WITHDRAW, TRANSFER and RELEASE'
    when p_hold_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'hold_uuid must not be the nil UUID'
    when p_operation_type <> 'HOLD' and p_expires_at is not null then 'expires_at must be null but for HOLD'
    when p_expires_at < '0001-01-01 00:00:00+00'::timestamptz or p_expires_at >= '10000-01-01 00:00:00+00'::timestamptz
      then 'expires_at must be in the years 1 to 9999'
    when p_operation_type = 'TRANSFER' and p_counterparty_uuid is null then 'counterparty_uuid must not be null for TRANSFER'
    when p_operation_type <> 'TRANSFER' and p_counterparty_uuid is not null then 'counterparty_uuid must be null but for TRANSFER'
    when p_counterparty_uuid = p_wallet_uuid then 'counterparty_uuid must be another wallet'
    when p_metadata is null then null
    when jsonb_typeof(p_metadata) <> 'object' then 'metadata must be an object'
    when octet_length(p_metadata::text) > 2048 then 'metadata must have at most 2048 octets as text'
  end
$$;

comment on function wallet.argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null; names of wallets are looked at only where none is found. '
  'The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 4
$$;

comment on function wallet.contract_version() is
  'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. '
  'A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';

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
  wallet.expire_holds(text, int),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.list_holds(text, bigint, int),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.hold, wallet.balance to wallet_reader;
grant execute on function wallet.due_amount(text, timestamptz, timestamptz) to wallet_reader; -- the view wallet.balance calls it

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- By hand

-- Waits for those who are holding money now: otherwise their holds would not be seen, and would count no longer.
set local lock_timeout = '2s';
lock table wallet.wallet in exclusive mode;

do $$
begin
  if exists (select from wallet.hold) or exists (select from wallet.operation where operation_type = 'HOLD') then
    raise exception 'refused: the ledger has holds, which would be lost; nothing was changed';
  end if;
end
$$;

-- Generated

create or replace function wallet.argument_fault(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns text
language sql immutable
as $$
  select case
    when (p_operation_type = 'DEPOSIT' or p_operation_type = 'WITHDRAW') and p_amount > 0
      and p_operation_uuid <> '00000000-0000-0000-0000-000000000000'::uuid
      and p_counterparty_uuid is null and p_hold_uuid is null and p_expires_at is null and p_metadata is null
      then null
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' and p_operation_type <> 'TRANSFER'
      then 'operation_type must be DEPOSIT, WITHDRAW or TRANSFER'
    when p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
    when p_hold_uuid is not null then 'hold_uuid must be null'
    when p_expires_at is not null then 'expires_at must be null'
    when p_operation_type = 'TRANSFER' and p_counterparty_uuid is null then 'counterparty_uuid must not be null for TRANSFER'
    when p_operation_type <> 'TRANSFER' and p_counterparty_uuid is not null then 'counterparty_uuid must be null but for TRANSFER'
    when p_counterparty_uuid = p_wallet_uuid then 'counterparty_uuid must be another wallet'
    when p_metadata is null then null
    when jsonb_typeof(p_metadata) <> 'object' then 'metadata must be an object'
    when octet_length(p_metadata::text) > 2048 then 'metadata must have at most 2048 octets as text'
  end
$$;

comment on function wallet.argument_fault(text, uuid, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: the message of WA400 for an operation that no wallet can accept, else null; names of wallets are looked at only where none is found. '
  'The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.contract_version()
returns int
language sql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
  select 3
$$;

comment on function wallet.contract_version() is
  'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. '
  'A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';

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
  wallet.expire_holds(text, int),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.list_holds(text, bigint, int),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.hold, wallet.balance to wallet_reader;
grant execute on function wallet.due_amount(text, timestamptz, timestamptz) to wallet_reader; -- the view wallet.balance calls it

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;

reset role;
reset search_path;
