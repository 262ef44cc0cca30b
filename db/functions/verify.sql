-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence `is distinct from`, which sees nulls, and uniqueness.
-- Sums are numeric, so that no forged row can overflow them.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
  with history as materialized (
    select
      o.*,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
  ),

  summary as (
    select
      w.uuid,
      w.balance,
      w.seq,
      coalesce(h.operations, 0) as operations,
      coalesce(h.last_seq, 0) as last_seq,
      coalesce(h.total, 0) as total,
      coalesce(o.balance_after, 0) as last_balance
    from wallet.wallet as w
    left join (
      select
        h.wallet_uuid,
        count(*) as operations,
        max(h.seq) as last_seq,
        sum(case h.operation_type when 'DEPOSIT' then h.amount::numeric else -h.amount::numeric end) as total
      from history as h
      group by h.wallet_uuid
    ) as h on h.wallet_uuid = w.uuid
    left join wallet.operation as o on o.wallet_uuid = h.wallet_uuid and o.seq = h.last_seq
  )

  select 'wallet has no nulls', w.uuid, w.seq, w::text
  from wallet.wallet as w
  where w.uuid is null or w.id is null or w.balance is null or w.seq is null or w.created_at is null
  union all
  select 'wallet uuid is unique', w.uuid, null::bigint, format('%s wallets have this uuid', count(*))
  from wallet.wallet as w
  group by w.uuid
  having count(*) > 1
  union all
  select 'wallet uuid is well formed', w.uuid, null::bigint, wallet.name_fault(w.uuid)
  from wallet.wallet as w
  where wallet.name_fault(w.uuid) is not null
  union all
  select 'wallet id is unique', min(w.uuid), null::bigint, format('id %s stands %s times', w.id, count(*))
  from wallet.wallet as w
  group by w.id
  having count(*) > 1
  union all
  select 'balance is not negative', s.uuid, s.seq, format('balance %s', s.balance)
  from summary as s
  where s.balance < 0
  union all
  select 'balance is the last balance_after', s.uuid, s.seq, format('balance %s, last balance_after %s', s.balance, s.last_balance)
  from summary as s
  where s.balance is distinct from s.last_balance
  union all
  select 'balance is the sum of the operations', s.uuid, s.seq, format('balance %s, sum %s', s.balance, s.total)
  from summary as s
  where s.balance is distinct from s.total
  union all
  select 'wallet seq counts the operations', s.uuid, s.seq, format('%s operations, last seq %s', s.operations, s.last_seq)
  from summary as s
  where s.seq is distinct from s.operations or s.seq is distinct from s.last_seq
  union all
  select 'operation belongs to a wallet', h.wallet_uuid, h.seq, format('operation %s', h.operation_uuid)
  from history as h
  where not exists (select from wallet.wallet as w where w.uuid = h.wallet_uuid)
  union all
  select 'operation has no nulls', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.wallet_uuid is null or h.operation_type is null or h.operation_uuid is null or h.seq is null
    or h.amount is null or h.balance_after is null or h.created_at is null
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, wallet.argument_fault(h.operation_uuid, h.operation_type, h.amount)
  from history as h
  where wallet.argument_fault(h.operation_uuid, h.operation_type, h.amount) is not null
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid
  having count(*) > 1
  union all
  select 'seq has no gap', h.wallet_uuid, h.seq, format('comes after seq %s', h.seq_before)
  from history as h
  where h.seq is distinct from h.seq_before + 1
  union all
  select
    'balance_after follows from the operation before', h.wallet_uuid, h.seq,
    format('%s of %s on %s gives %s', h.operation_type, h.amount, h.balance_before, h.balance_after)
  from history as h
  where h.balance_after < 0
    or h.balance_after
      is distinct from h.balance_before::numeric + case h.operation_type when 'DEPOSIT' then h.amount::numeric else -h.amount::numeric end
$$;

comment on function wallet.verify() is
  'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); '
  'no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody.';
