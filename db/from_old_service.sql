-- Moves the wallets of the old service (FastAPI, SQLAlchemy, Alembic) into schema wallet: every wallet with its id and
-- balance, every transaction that moved money as an operation. In the old service's database, once the migrations are
-- applied there:
--
--   psql -v ON_ERROR_STOP=1 -f db/from_old_service.sql "$DATABASE_URL"
--
-- as a superuser, or as the user who migrates (a member of wallet_owner) if the old tables are that user's own. Stop the
-- old service first: what it writes later is not moved. What is moved and how: db/README.md, "Moving from the old service".
--
-- It is one transaction, which ends by asking wallet.verify(). The old tables stay as they are; they are read through the
-- two queries below and nowhere else. Whatever cannot be moved as it stands is listed, and nothing is changed, unless psql
-- is told how to go on:
--
--   -v correct=yes     makes the ledger agree with the old balance, by a first deposit and a last withdrawal
--   -v leave_out=yes   leaves out every wallet that cannot be moved, with its transactions

\set ON_ERROR_STOP on
\if :{?correct}
\else
\set correct no
\endif
\if :{?leave_out}
\else
\set leave_out no
\endif

begin;

set local search_path = pg_catalog, pg_temp;

-- Nobody may write into the old tables, nor into the new ones (each operation locks its wallet), until all is moved.
lock table public.wallet, public.wallet_transaction in share mode;
lock table wallet.wallet in exclusive mode;

create temporary table choice on commit drop as
select
  :'correct'::boolean as correct,
  :'leave_out'::boolean as leave_out;

create temporary table old_wallet on commit drop as
select
  w.id::bigint as id,
  w.uuid::text as uuid,
  w.balance::numeric as balance
from public.wallet as w;

create temporary table old_transaction on commit drop as
select
  t.id::bigint as id,
  t.id_wallet::bigint as wallet_id,
  t.uuid::text as old_uuid,
  upper(t.type::text) as operation_type,
  t.amount::numeric as amount
from public.wallet_transaction as t;

-- The UUID of version 3 (RFC 9562, section 5.3) of a text in a namespace of this script's own.
create or replace function pg_temp.name_based_uuid(p_name text)
returns uuid
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
  select encode(set_byte(set_byte(h.octets, 6, get_byte(h.octets, 6) & 15 | 48), 8, get_byte(h.octets, 8) & 63 | 128), 'hex')::uuid
  from (select decode(md5(decode('5e9b3f0a2f5e4c1d9d0b7a6c1e4f8b21', 'hex') || convert_to(p_name, 'UTF8')), 'hex')) as h (octets)
$$;

-- What moved money, with the operation_uuid that it gets: a UUID is itself, any other text has one made from it.
create temporary table old_operation on commit drop as
with named as (
  select
    t.id,
    t.wallet_id,
    t.old_uuid,
    t.operation_type,
    t.amount,
    case
      when t.old_uuid ~* '^([0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$' and t.old_uuid !~ '^[0-]*$'
        then t.old_uuid::uuid
      else pg_temp.name_based_uuid(t.old_uuid)
    end as operation_uuid,
    case t.operation_type when 'DEPOSIT' then t.amount when 'WITHDRAW' then -t.amount end as delta
  from pg_temp.old_transaction as t
  where t.amount is distinct from 0
)

select
  n.*,
  first_value(n.id) over same_uuid as first_id,
  sum(n.delta) over (partition by n.wallet_id order by n.id) as balance_after
from named as n
window same_uuid as (partition by n.operation_uuid order by n.id);

analyze pg_temp.old_wallet;
analyze pg_temp.old_operation;

-- Each wallet's transactions added up, and what its history lacks to begin at 0 and to end at its balance.
create temporary table summary on commit drop as
with total as (
  select
    w.id,
    w.uuid,
    w.balance,
    coalesce(sum(o.delta), 0) as added_up,
    greatest(-min(o.balance_after), 0) as below_zero
  from pg_temp.old_wallet as w
  left join pg_temp.old_operation as o on w.id = o.wallet_id
  group by w.id, w.uuid, w.balance
),

opened as (
  select
    t.*,
    coalesce(t.balance, greatest(t.added_up, 0)) as new_balance,
    greatest(t.balance - t.added_up, 0) as lacking
  from total as t
)

select
  o.*,
  greatest(o.lacking, o.below_zero) as opening,
  greatest(o.lacking, o.below_zero) + o.added_up - o.new_balance as closing
from opened as o;

-- What stands against moving a wallet. correctable: -v correct=yes is a way on. Without a wallet there is none.
create temporary table fault (wallet_id bigint, wallet text, what text, correctable boolean) on commit drop;

insert into pg_temp.fault
select
  s.id as wallet_id,
  coalesce(s.uuid, 'null') as wallet,
  f.what,
  false as correctable
from pg_temp.summary as s
cross join lateral (
  values
  (
    wallet.name_fault(s.uuid) is not null,
    format('wallet id %s: the name must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -', s.id)
  ),
  (coalesce(s.id < 1, true), format('wallet id %s must be from 1', coalesce(s.id::text, 'null'))),
  (
    s.balance not between 0 and 9223372036854775807 or s.balance <> trunc(s.balance),
    format('balance %s must be a whole number from 0 to 9223372036854775807', s.balance)
  )
) as f (stands, what)
where f.stands
union all
select
  w.id as wallet_id,
  w.uuid as wallet,
  format('%s wallets have this id or this name', greatest(w.same_id, w.same_name)) as what,
  false as correctable
from (
  select
    w.*,
    count(*) over (partition by w.id) as same_id,
    count(*) over (partition by w.uuid) as same_name
  from pg_temp.old_wallet as w
) as w
where w.same_id > 1 or w.same_name > 1
union all
select
  o.wallet_id,
  coalesce(w.uuid, '-') as wallet,
  format('transaction id %s: %s', o.id, f.what) as what,
  f.correctable
from pg_temp.old_operation as o
left join pg_temp.old_wallet as w on o.wallet_id = w.id
cross join lateral (
  values
  (w.id is null, format('there is no wallet with id %s', coalesce(o.wallet_id::text, 'null')), false),
  (o.operation_uuid is null, 'it has no uuid', false),
  (
    coalesce(o.operation_type not in ('DEPOSIT', 'WITHDRAW'), true),
    format('type %s must be deposit or withdraw', coalesce(lower(o.operation_type), 'null')),
    false
  ),
  (
    coalesce(o.amount not between 0 and 9223372036854775807 or o.amount <> trunc(o.amount), true),
    format('amount %s must be a whole number from 0 to 9223372036854775807', coalesce(o.amount::text, 'null')),
    false
  ),
  (o.id <> o.first_id, format('its uuid is that of transaction id %s, %s', o.first_id, o.operation_uuid), true)
) as f (stands, what, correctable)
where f.stands;

-- The sums of a wallet mean something where its transactions do.
insert into pg_temp.fault
with meaningful as (
  select s.*
  from pg_temp.summary as s
  where not exists (
    select from pg_temp.fault as f
    where f.wallet_id is not distinct from s.id and not f.correctable
  )
)

select
  m.id as wallet_id,
  m.uuid as wallet,
  format('the balance is null, its transactions add up to %s', m.added_up) as what,
  true as correctable
from meaningful as m
where m.balance is null and m.added_up <> 0
union all
select
  m.id as wallet_id,
  m.uuid as wallet,
  format('the balance is %s less than its transactions add up to', m.added_up - m.balance) as what,
  true as correctable
from meaningful as m
where m.balance < m.added_up
union all
(
  select distinct on (m.id)
    m.id as wallet_id,
    m.uuid as wallet,
    format('transaction id %s leaves a balance of %s', o.id, o.balance_after + coalesce(m.lacking, 0)) as what,
    true as correctable
  from meaningful as m
  inner join pg_temp.old_operation as o on m.id = o.wallet_id
  where o.balance_after + coalesce(m.lacking, 0) < 0
  order by m.id, o.id
)
union all
(
  select distinct on (m.id)
    m.id as wallet_id,
    m.uuid as wallet,
    format('transaction id %s leaves a balance of %s', o.id, o.balance_after + m.opening) as what,
    false as correctable
  from meaningful as m
  inner join pg_temp.old_operation as o on m.id = o.wallet_id
  where o.balance_after + m.opening > 9223372036854775807
  order by m.id, o.id
);

do $$
declare
  v_count bigint;
  v_list text;
begin
  if exists (select from wallet.wallet) then
    raise exception 'nothing was moved: schema wallet holds wallets already'
      using hint = 'This runs once, before the first of them: roll demonstration wallets back.';
  end if;

  select count(*), string_agg(format('%s: %s', f.wallet, f.what), e'\n' order by f.wallet, f.what)
    filter (where f.position <= 100)
  into v_count, v_list
  from (
    select f.*, row_number() over (order by f.wallet, f.what) as position
    from pg_temp.fault as f
    cross join pg_temp.choice as c
    where not c.leave_out and not (c.correct and f.correctable)
  ) as f;

  if v_count > 0 then
    raise exception 'nothing was moved: % faults in the old tables; db/README.md tells the ways on', v_count
      using detail = v_list || case when v_count > 100 then format(e'\nand %s more', v_count - 100) else '' end;
  end if;
end
$$;

create temporary table left_out on commit drop as
select
  f.wallet_id,
  f.wallet,
  f.what
from pg_temp.fault as f
cross join pg_temp.choice as c
where not (c.correct and f.correctable);

create temporary table moved on commit drop as
select
  s.id,
  s.uuid,
  s.new_balance,
  s.opening,
  s.closing
from pg_temp.summary as s
where not exists (
  select from pg_temp.left_out as l
  where l.wallet_id is not distinct from s.id
);

-- The history as it will stand: before a wallet's transactions the deposit that its balance lacks, and behind them what
-- takes a correction back. The names of these two are made from the wallet's, so that every attempt gives them the same.
create temporary table history on commit drop as
with entry as (
  select
    m.uuid as wallet_uuid,
    1 as part,
    null::bigint as id,
    'opening balance of ' || m.uuid as made_from,
    null::uuid as operation_uuid,
    'DEPOSIT' as operation_type,
    m.opening as amount
  from pg_temp.moved as m
  where m.opening > 0
  union all
  select
    m.uuid as wallet_uuid,
    2 as part,
    o.id,
    null as made_from,
    case
      when row_number() over (partition by o.operation_uuid order by o.id) = 1 then o.operation_uuid
      else pg_temp.name_based_uuid(format('%s (transaction %s)', o.old_uuid, o.id))
    end as operation_uuid,
    o.operation_type,
    o.amount
  from pg_temp.moved as m
  inner join pg_temp.old_operation as o on m.id = o.wallet_id
  union all
  select
    m.uuid as wallet_uuid,
    3 as part,
    null as id,
    'closing correction of ' || m.uuid as made_from,
    null as operation_uuid,
    'WITHDRAW' as operation_type,
    m.closing as amount
  from pg_temp.moved as m
  where m.closing > 0
)

select
  e.*,
  coalesce(e.operation_uuid, overlay(overlay(md5(e.made_from) placing '3' from 13) placing '8' from 17)::uuid) as new_uuid,
  row_number() over in_order as seq,
  sum(case e.operation_type when 'DEPOSIT' then e.amount else -e.amount end) over in_order as balance_after
from entry as e
window in_order as (partition by e.wallet_uuid order by e.part, e.id rows unbounded preceding);

insert into wallet.wallet (uuid, id, created_at)
overriding system value
select
  m.uuid,
  m.id,
  now() as created_at
from pg_temp.moved as m
order by m.id;

insert into wallet.operation (wallet_uuid, seq, operation_uuid, operation_type, amount, balance_after, created_at)
select
  h.wallet_uuid,
  h.seq,
  h.new_uuid as operation_uuid,
  h.operation_type,
  h.amount,
  h.balance_after,
  now() as created_at
from pg_temp.history as h
order by h.part, h.id, h.wallet_uuid;

do $$
begin
  if exists (select from wallet.verify()) then
    raise exception 'nothing was moved: wallet.verify() finds faults in what was'
      using detail = (select string_agg(v::text, e'\n') from (select * from wallet.verify() limit 100) as v);
  end if;
end
$$;

\echo 'Transactions of 0, which moved no money, are left out:'
select
  t.id,
  w.uuid as wallet,
  t.old_uuid as uuid
from pg_temp.old_transaction as t
left join pg_temp.old_wallet as w on t.wallet_id = w.id
where t.amount = 0
order by t.id;

\echo 'Wallets that are left out, with all their transactions, and why:'
select
  l.wallet,
  w.balance,
  l.what
from pg_temp.left_out as l
left join pg_temp.old_wallet as w on l.wallet_id = w.id
order by l.wallet, l.what;

\echo 'Corrections, which do not change a balance:'
select
  f.wallet,
  f.what,
  m.opening as first_deposit,
  m.closing as last_withdrawal
from pg_temp.fault as f
inner join pg_temp.moved as m on f.wallet_id = m.id
order by f.wallet, f.what;

select
  (select count(*) from pg_temp.moved) as wallets,
  (select sum(m.new_balance) from pg_temp.moved as m) as balance,
  count(*) as operations,
  count(*) filter (where h.part = 1) as opening_deposits
from pg_temp.history as h;

-- New wallets are numbered from here. (A sequence is not rolled back: hence last.)
select setval(pg_get_serial_sequence('wallet.wallet', 'id'), greatest(max(w.id), 0) + 1, false) as next_wallet_id
from pg_temp.old_wallet as w;

commit;
