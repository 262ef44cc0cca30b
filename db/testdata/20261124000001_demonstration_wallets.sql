-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

select wallet.create_wallet(n::text) from unnest(array[1111111111, 2222222222, 3333333333, 4444444444, 5555555555]) as n;

select wallet.apply_operation(w.uuid, format('00000000-0000-4000-8000-%s', lpad(w.uuid, 12, '0'))::uuid, 'DEPOSIT', 1500)
from wallet.wallet as w
where w.uuid in ('1111111111', '2222222222', '3333333333', '4444444444', '5555555555')
order by w.uuid;

reset role;
reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- Exclusive mode waits for whoever has locked a wallet's row, and lets nobody lock one: an operation that is under way
-- ends before its wallet is deleted. Nor can a wallet be created before the numbers start again behind the highest id.
lock table wallet.wallet in exclusive mode;

do $$
declare
  v_wallets text[] := array['1111111111', '2222222222', '3333333333', '4444444444', '5555555555'];
begin
  if exists (
    select from wallet.operation as o
    inner join wallet.operation as side on side.operation_uuid = o.operation_uuid
    where o.wallet_uuid = any(v_wallets) and side.wallet_uuid <> all(v_wallets)
  ) then
    raise exception 'refused: money was transferred between the demonstration wallets and others, whose books would no longer agree; nothing was changed';
  end if;
end
$$;

grant delete on wallet.wallet, wallet.operation to wallet_owner; -- grants.sql has taken it away

do $$
begin
  if to_regclass('wallet.hold') is not null then
    execute 'delete from wallet.hold where wallet_uuid in (''1111111111'', ''2222222222'', ''3333333333'', ''4444444444'', ''5555555555'')';
  end if;
end
$$;

delete from wallet.operation
where wallet_uuid in ('1111111111', '2222222222', '3333333333', '4444444444', '5555555555');

delete from wallet.wallet
where uuid in ('1111111111', '2222222222', '3333333333', '4444444444', '5555555555');

select setval(pg_get_serial_sequence('wallet.wallet', 'id'), coalesce(max(id), 0) + 1, false)
from wallet.wallet;

revoke delete on wallet.wallet, wallet.operation from wallet_owner;

reset role;
reset search_path;
