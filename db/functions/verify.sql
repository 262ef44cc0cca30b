-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence the checks for nulls (`is distinct from`) and for duplicates.
-- Expected balances are numeric, so that no forged row can overflow them.
-- Nested loops are off: planned on a ledger whose statistics are old, they compared every hold with every end of a hold.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set jit = off
as $$
  with history as materialized (
    select
      o.*,
      case
        when o.operation_type in ('DEPOSIT', 'RECEIVE') then o.amount::numeric
        when o.operation_type in ('WITHDRAW', 'TRANSFER') then -o.amount::numeric
        when o.operation_type in ('HOLD', 'RELEASE', 'EXPIRE') then 0
      end as change,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before,
      lag(o.held_after, 1, 0::bigint) over by_seq as held_before,
      lag(o.created_at) over by_seq as time_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  ),

  hold as materialized (
    select h.*
    from history as h
    where h.operation_type = 'HOLD'
  ),

  ending as materialized (
    select h.*
    from history as h
    where h.hold_uuid is not null
  )

  select 'wallet has no nulls', w.uuid, null::bigint, w::text
  from wallet.wallet as w
  where w.uuid is null or w.id is null or w.status is null or w.created_at is null
  union all
  select 'wallet uuid is unique', w.uuid, null::bigint, format('%s wallets have this uuid', count(*))
  from wallet.wallet as w
  group by w.uuid
  having count(*) > 1
  union all
  select 'wallet is well formed', w.uuid, null::bigint, w::text
  from wallet.wallet as w
  where wallet.name_fault(w.uuid) is not null or w.status not in ('OPEN', 'FROZEN', 'CLOSED') or w.currency !~ '^[A-Z0-9]{3,12}$'
  union all
  select 'wallet id is unique', min(w.uuid), null::bigint, format('id %s stands %s times', w.id, count(*))
  from wallet.wallet as w
  group by w.id
  having count(*) > 1
  union all
  select 'closed wallet is empty', b.uuid, b.seq, format('balance %s', b.balance)
  from wallet.balance as b
  where b.status = 'CLOSED' and b.balance <> 0
  union all
  select 'operation belongs to a wallet', h.wallet_uuid, h.seq, format('operation %s', h.operation_uuid)
  from history as h
  where not exists (select from wallet.wallet as w where w.uuid = h.wallet_uuid)
  union all
  select 'operation has no nulls', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.wallet_uuid is null or h.operation_type is null or h.operation_uuid is null or h.seq is null
    or h.amount is null or h.balance_after is null or h.held_after is null or h.created_at is null
    or (h.operation_type in ('RELEASE', 'EXPIRE') and h.hold_uuid is null)
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.operation_type not in ('DEPOSIT', 'WITHDRAW', 'TRANSFER', 'RECEIVE', 'HOLD', 'RELEASE', 'EXPIRE')
    or h.operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid
    or h.amount <= 0 or h.balance_after < 0
    or (h.operation_type in ('DEPOSIT', 'RECEIVE', 'HOLD') and h.hold_uuid is not null)
    or (h.operation_type <> 'HOLD' and h.expires_at is not null) or h.expires_at <= h.created_at
    or h.expires_at >= '10000-01-01 00:00:00+00'
    or (h.operation_type = 'EXPIRE' and (h.operation_uuid <> h.hold_uuid or h.metadata is not null))
    or jsonb_typeof(h.metadata) <> 'object' or h.metadata = '{}' or octet_length(h.metadata::text) > 2048
  union all
  select 'available is not negative', h.wallet_uuid, h.seq, format('balance_after %s, held_after %s', h.balance_after, h.held_after)
  from history as h
  where h.held_after < 0 or h.held_after > h.balance_after
  union all
  select 'a hold has one end', e.wallet_uuid, min(e.seq), format('hold %s has %s', e.hold_uuid, count(*))
  from ending as e
  group by e.wallet_uuid, e.hold_uuid
  having count(*) > 1
  union all
  select 'an end belongs to a hold before it', e.wallet_uuid, e.seq, format('%s of %s on hold %s', e.operation_type, e.amount, e.hold_uuid)
  from ending as e
  left join hold as h on h.operation_uuid = e.hold_uuid and h.wallet_uuid = e.wallet_uuid and h.seq < e.seq
  where h.operation_uuid is null or e.amount > h.amount or (e.operation_type in ('RELEASE', 'EXPIRE') and e.amount <> h.amount)
  union all
  select 'a hold ends before it is due, or expires then', e.wallet_uuid, e.seq, format('%s at %s, due at %s', e.operation_type, e.created_at, h.expires_at)
  from ending as e
  inner join hold as h on h.operation_uuid = e.hold_uuid
  where case when e.operation_type = 'EXPIRE' then e.created_at is distinct from h.expires_at else e.created_at >= h.expires_at end
  union all
  select 'open holds are those without an end', coalesce(h.wallet_uuid, o.wallet_uuid), coalesce(h.seq, o.seq), format('ledger: %s; wallet.hold: %s', h, o)
  from (
    select h.wallet_uuid, h.operation_uuid, h.seq, h.amount, h.expires_at, h.created_at
    from hold as h
    where not exists (select from ending as e where e.hold_uuid = h.operation_uuid)
  ) as h
  full join wallet.hold as o on o.hold_uuid = h.operation_uuid
  where (h.wallet_uuid, h.operation_uuid, h.seq, h.amount, h.expires_at, h.created_at)
    is distinct from (o.wallet_uuid, o.hold_uuid, o.seq, o.amount, o.expires_at, o.created_at)
  union all
  select 'an open hold stands once', min(o.wallet_uuid), min(o.seq), format('hold %s stands %s times', o.hold_uuid, count(*))
  from wallet.hold as o
  group by o.hold_uuid
  having count(*) > 1
  union all
  select
    'an operation records the holds that are due', o.wallet_uuid, o.seq,
    format('hold %s, due at %s, is open; last operation at %s', o.hold_uuid, o.expires_at, h.last)
  from wallet.hold as o
  inner join (
    select h.wallet_uuid, max(h.created_at) as last, max(h.created_at) filter (where h.operation_type <> 'EXPIRE') as last_asked
    from history as h
    group by h.wallet_uuid
  ) as h on h.wallet_uuid = o.wallet_uuid
  where o.expires_at <= h.last_asked or o.expires_at < h.last -- of holds due at one moment some may be recorded by hand
  union all
  select
    'held_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s held gives %s', h.operation_type, h.amount, h.held_before, h.held_after)
  from history as h
  left join hold as o on o.operation_uuid = h.hold_uuid
  where h.held_after is distinct from h.held_before::numeric + case when h.operation_type = 'HOLD' then h.amount else 0 end - coalesce(o.amount, 0)
  union all
  select 'a transfer and nothing else has a counterparty', h.wallet_uuid, h.seq, format('%s, counterparty %s', h.operation_type, h.counterparty_uuid)
  from history as h
  where (h.operation_type in ('TRANSFER', 'RECEIVE')) <> (h.counterparty_uuid is not null) or h.counterparty_uuid = h.wallet_uuid
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid, case when h.operation_type in ('RECEIVE', 'EXPIRE') then h.operation_type end
  having count(*) > 1
  union all
  select 'seq has no gap', h.wallet_uuid, h.seq, format('comes after seq %s', h.seq_before)
  from history as h
  where h.seq is distinct from h.seq_before::numeric + 1
  union all
  select
    'balance_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s gives %s', h.operation_type, h.amount, h.balance_before, h.balance_after)
  from history as h
  where h.balance_after is distinct from h.balance_before::numeric + h.change
  union all
  select 'created_at never goes back', h.wallet_uuid, h.seq, format('%s comes after %s', h.created_at, h.time_before)
  from history as h
  where h.created_at < h.time_before
  union all
  select
    'both sides of a transfer agree', coalesce(t.wallet_uuid, r.wallet_uuid), coalesce(t.seq, r.seq),
    format(
      'operation %s: TRANSFER of %s from %s to %s at %s, RECEIVE of %s from %s at %s at %s', coalesce(t.operation_uuid, r.operation_uuid),
      t.amount, t.wallet_uuid, t.counterparty_uuid, t.created_at, r.amount, r.counterparty_uuid, r.wallet_uuid, r.created_at
    )
  from (select h.* from history as h where h.operation_type = 'TRANSFER') as t
  full join (select h.* from history as h where h.operation_type = 'RECEIVE') as r on r.operation_uuid = t.operation_uuid
  where (t.wallet_uuid, t.counterparty_uuid, t.amount, t.created_at, t.metadata)
    is distinct from (r.counterparty_uuid, r.wallet_uuid, r.amount, r.created_at, r.metadata)
  union all
  select
    'both sides of a transfer have one currency', h.wallet_uuid, h.seq,
    format('%s of operation %s, counterparty %s: %s', payer.currency, h.operation_uuid, payee.uuid, payee.currency)
  from history as h
  inner join wallet.wallet as payer on payer.uuid = h.wallet_uuid
  inner join wallet.wallet as payee on payee.uuid = h.counterparty_uuid
  where h.operation_type = 'TRANSFER' and payer.currency is distinct from payee.currency
$$;

comment on function wallet.verify() is
  'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); '
  'no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody. '
  'A wallet''s balance is what its last operation says, so this audit cannot tell that a wallet''s last operations are missing, unless one was a transfer or concerned a hold.';
