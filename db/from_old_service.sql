-- Moves the wallets of the old service (FastAPI, SQLAlchemy, Alembic) into schema wallet: every wallet with its id and
-- balance, every transaction as an operation. In the old service's database, once the migrations are applied there:
--
--   psql -v ON_ERROR_STOP=1 -f db/from_old_service.sql "$DATABASE_URL"
--
-- as a superuser, or as the user who migrates (a member of wallet_owner) if the old tables are that user's own. Stop the
-- old service first: what it writes later is not moved.
--
-- The old tables are read through the two queries below and nowhere else. They assume
--
--   public.wallet:             id, uuid, balance
--   public.wallet_transaction: id, uuid (the operation_uuid), wallet_id, operation_type (DEPOSIT or WITHDRAW), amount, created_at
--
-- of whichever types; a created_at without time zone is taken for UTC. Where your columns are named otherwise, change the
-- two queries. Operations keep the order of created_at, then of id.
--
-- A balance that is more than its transactions add up to was set without one: the difference becomes the wallet's first
-- deposit. Whatever cannot be moved without inventing or losing money stops the script with a list, and nothing is changed.
-- It is one transaction, which ends by asking wallet.verify(). The old tables stay as they are.

begin;

set local time zone 'UTC';

-- Nobody may write into the old tables, nor into the new ones, until all is moved.
lock table public.wallet, public.wallet_transaction in share mode;
lock table wallet.wallet, wallet.operation in share row exclusive mode;

create temporary table old_wallet on commit drop as
select
  w.id::bigint as id,
  w.uuid::text as uuid,
  w.balance::numeric as balance
from public.wallet as w;

create temporary table old_operation on commit drop as
select
  t.id::bigint as id,
  w.uuid as wallet_uuid,
  t.wallet_id::bigint as wallet_id,
  t.uuid::text as operation_uuid,
  upper(t.operation_type::text) as operation_type,
  t.amount::numeric as amount,
  t.created_at::timestamptz as created_at
from public.wallet_transaction as t
left join old_wallet as w on t.wallet_id = w.id;

create temporary table fault (wallet text, what text) on commit drop;

-- What must be right before anything can be reckoned with

insert into fault
select
  null as wallet,
  'schema wallet holds wallets already: this runs once, before the first of them (roll demonstration wallets back)' as what
where exists (select from wallet.wallet)
union all
select
  w.uuid as wallet,
  format('wallet id %s: the name must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -', w.id) as what
from old_wallet as w
where wallet.name_fault(w.uuid) is not null
union all
select
  w.uuid as wallet,
  format('%s wallets have this name', count(*)) as what
from old_wallet as w
group by w.uuid
having count(*) > 1
union all
select
  min(w.uuid) as wallet,
  format('wallet id %s stands %s times', coalesce(w.id::text, 'null'), count(*)) as what
from old_wallet as w
group by w.id
having count(*) > 1
union all
select
  w.uuid as wallet,
  format('wallet id %s must be from 1', coalesce(w.id::text, 'null')) as what
from old_wallet as w
where coalesce(w.id < 1, true)
union all
select
  w.uuid as wallet,
  format('balance %s must be a whole number from 0 to 9223372036854775807', coalesce(w.balance::text, 'null')) as what
from old_wallet as w
where coalesce(w.balance not between 0 and 9223372036854775807 or w.balance <> trunc(w.balance), true)
union all
select
  null as wallet,
  format('transactions id %s have one uuid, %s', string_agg(o.id::text, ', ' order by o.id), min(o.operation_uuid)) as what
from old_operation as o
where o.operation_uuid is not null
group by lower(replace(o.operation_uuid, '-', ''))
having count(*) > 1
union all
select
  o.wallet_uuid as wallet,
  format('transaction id %s: %s', o.id, f.what) as what
from old_operation as o
cross join lateral (
  values
  (
    o.wallet_uuid is null,
    format('there is no wallet with wallet_id %s', coalesce(o.wallet_id::text, 'null'))
  ),
  (
    coalesce(
      o.operation_uuid !~* '^([0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$'
      or o.operation_uuid ~ '^[0-]*$', true
    ),
    format('%s is no operation_uuid', coalesce(o.operation_uuid, 'null'))
  ),
  (
    coalesce(o.operation_type not in ('DEPOSIT', 'WITHDRAW'), true),
    format('operation_type %s must be DEPOSIT or WITHDRAW', coalesce(o.operation_type, 'null'))
  ),
  (
    coalesce(o.amount not between 1 and 9223372036854775807 or o.amount <> trunc(o.amount), true),
    format('amount %s must be a whole number from 1 to 9223372036854775807', coalesce(o.amount::text, 'null'))
  ),
  (o.created_at is null, 'it has no created_at')
) as f (stands, what)
where f.stands;

-- The history as it will stand: before a wallet's transactions, the deposit that its balance lacks. That deposit's name
-- is made from the wallet's (a UUID of version 3), so that every attempt gives it the same one.

create temporary table history on commit drop as
with total as (
  select
    w.uuid,
    w.balance - coalesce(sum(case o.operation_type when 'DEPOSIT' then o.amount else -o.amount end), 0) as lacking,
    coalesce(min(o.created_at), now()) as created_at
  from old_wallet as w
  left join old_operation as o on w.uuid = o.wallet_uuid
  group by w.uuid, w.balance
),

entry as (
  select
    t.uuid as wallet_uuid,
    null::bigint as id,
    overlay(overlay(md5('opening balance of ' || t.uuid) placing '3' from 13) placing '8' from 17) as operation_uuid,
    'DEPOSIT' as operation_type,
    t.lacking as amount,
    t.created_at
  from total as t
  where t.lacking <> 0
  union all
  select
    o.wallet_uuid,
    o.id,
    o.operation_uuid,
    o.operation_type,
    o.amount,
    o.created_at
  from old_operation as o
)

select
  e.*,
  row_number() over by_time as seq,
  sum(case e.operation_type when 'DEPOSIT' then e.amount else -e.amount end) over by_time as balance_after
from entry as e
window by_time as (partition by e.wallet_uuid order by e.id is not null, e.created_at, e.id rows unbounded preceding);

insert into fault
select
  h.wallet_uuid as wallet,
  format('the balance is %s less than its transactions add up to', -h.amount) as what
from history as h
where h.id is null and h.amount < 0 and not exists (
  select from fault as f
  where f.wallet = h.wallet_uuid
)
union all
(
  select distinct on (h.wallet_uuid)
    h.wallet_uuid as wallet,
    format('transaction id %s leaves a balance of %s', h.id, h.balance_after) as what
  from history as h
  where h.id is not null and h.balance_after not between 0 and 9223372036854775807 and not exists (
    select from fault as f
    where f.wallet = h.wallet_uuid
  )
  order by h.wallet_uuid, h.seq
);

do $$
declare
  v_count bigint;
  v_list text;
begin
  select count(*), string_agg(format('%s: %s', coalesce(f.wallet, '-'), f.what), e'\n' order by f.wallet, f.what)
    filter (where f.position <= 100)
  into v_count, v_list
  from (select fault.*, row_number() over (order by wallet, what) as position from fault) as f;

  if v_count > 0 then
    raise exception 'nothing was moved: % faults in the old tables', v_count
      using detail = v_list || case when v_count > 100 then format(e'\nand %s more', v_count - 100) else '' end;
  end if;
end
$$;

insert into wallet.wallet (uuid, id, balance, seq, created_at)
overriding system value
select
  w.uuid,
  w.id,
  w.balance,
  count(h.seq) as seq,
  coalesce(min(h.created_at), now()) as created_at
from old_wallet as w
left join history as h on w.uuid = h.wallet_uuid
group by w.uuid, w.id, w.balance
order by w.id;

insert into wallet.operation (wallet_uuid, seq, operation_uuid, operation_type, amount, balance_after, created_at)
select
  h.wallet_uuid,
  h.seq,
  h.operation_uuid::uuid,
  h.operation_type,
  h.amount,
  h.balance_after,
  h.created_at
from history as h
order by h.created_at, h.id;

do $$
begin
  if exists (select from wallet.verify()) then
    raise exception 'nothing was moved: wallet.verify() finds faults in what was'
      using detail = (select string_agg(v::text, e'\n') from (select * from wallet.verify() limit 100) as v);
  end if;
end
$$;

-- New wallets are numbered from here. (A sequence is not rolled back: hence last.)
select setval(pg_get_serial_sequence('wallet.wallet', 'id'), coalesce(max(w.id), 0) + 1, false) as next_wallet_id
from wallet.wallet as w;

select
  count(*) as operations,
  count(*) filter (where h.id is null) as opening_deposits
from history as h;

commit;
