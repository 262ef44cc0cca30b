-- Every wallet of the batch is locked first, in the order of uuid, and every insert goes in the order of
-- operation_uuid: two batches that share wallets or operations wait for each other in one direction only.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a balance refuses what may be a repeat and must then hear that it exists. It decides again and
-- inserts the rest. Whoever held one of the operation_uuids has committed by then, because the insert waited for it, so each
-- look-up after the first finds more of them than the one before. Only under a snapshot older than that commit (repeatable
-- read, serializable) does it find no more: then the caller's transaction must start again.
--
-- The decisions run in the order of the requests, over arrays: one entry a request for what comes out (by ordinal), one a
-- wallet for the state in between (by number; v_numbers is the dictionary from uuid to number). The plans are pinned to
-- what fits any length and any ledger: hash joins between arrays, index scans on tables, nothing planned while a table was small.
create or replace function wallet.apply_operations(
  p_wallet_uuids text[],
  p_operation_uuids uuid[],
  p_operation_types text[],
  p_amounts bigint[]
)
returns table (
  ordinal int,
  sqlstate text,
  message text,
  wallet_uuid text,
  operation_type text,
  operation_uuid uuid,
  seq bigint,
  amount bigint,
  balance_after bigint,
  created_at timestamptz
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_nestloop = off
set enable_mergejoin = off
as $$
declare
  v_count int := cardinality(p_wallet_uuids);
  v_now timestamptz;

  v_numbers jsonb;
  v_uuids text[];
  v_balances bigint[];
  v_wallet_seqs bigint[];
  v_locked_balances bigint[];
  v_locked_seqs bigint[];

  v_ordinal int;
  v_number int;
  v_fault text;
  v_balance bigint;
  v_faults text[];
  v_messages text[];
  v_seqs bigint[];
  v_balances_after bigint[];

  v_look_up bool := false;
  v_recorded bool[];
  v_recorded_count bigint := -1;
  v_recorded_before bigint;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken bool[];
begin
  if p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null then
    raise sqlstate 'WA400' using message = 'arrays must not be null';
  elsif array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
    or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1 then
    raise sqlstate 'WA400' using message = 'arrays must have one dimension';
  elsif v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
    or v_count <> cardinality(p_amounts) then
    raise sqlstate 'WA400' using message = 'arrays must have the same length';
  end if;

  p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1, whatever the array did
  p_operation_uuids := p_operation_uuids[:];
  p_operation_types := p_operation_types[:];
  p_amounts := p_amounts[:];

  select jsonb_object_agg(n.uuid, n.number), array_agg(n.uuid), array_agg(n.balance), array_agg(n.seq)
  into v_numbers, v_uuids, v_locked_balances, v_locked_seqs
  from (
    select l.*, row_number() over () as number
    from (
      select w.uuid, w.balance, w.seq
      from wallet.wallet as w
      where w.uuid = any(p_wallet_uuids)
      order by w.uuid
      for no key update
    ) as l
  ) as n;

  <<attempt>>
  loop
    v_balances := v_locked_balances;
    v_wallet_seqs := v_locked_seqs;
    v_faults := array_fill(null::text, array[v_count]);
    v_messages := v_faults;
    v_seqs := array_fill(null::bigint, array[v_count]);
    v_balances_after := v_seqs;

    if v_look_up then
      v_recorded_before := v_recorded_count;
      v_taken := array_fill(false, array[v_count]);

      with known as materialized (
        select o.operation_uuid
        from wallet.operation as o
        where o.operation_uuid = any(p_operation_uuids)
      )
      select array_agg(q.recorded order by q.ordinal), array_agg(q.first order by q.ordinal), count(*) filter (where q.recorded)
      into v_recorded, v_firsts, v_recorded_count
      from (
        select
          r.ordinal,
          k.operation_uuid is not null as recorded,
          min(r.ordinal) over (partition by r.operation_uuid) as first
        from unnest(p_operation_uuids) with ordinality as r (operation_uuid, ordinal)
        left join known as k on k.operation_uuid = r.operation_uuid
      ) as q;

      if v_recorded_count <= v_recorded_before then
        raise serialization_failure using
          message = 'an operation of this batch was recorded by a transaction that this snapshot cannot see',
          hint = 'Start the transaction again.';
      end if;
    end if;

    for v_ordinal in 1..v_count loop
      v_fault := wallet.argument_fault(p_operation_uuids[v_ordinal], p_operation_types[v_ordinal], p_amounts[v_ordinal]);
      v_number := (v_numbers ->> p_wallet_uuids[v_ordinal])::int;

      if v_number is null then
        v_fault := coalesce(wallet.name_fault(p_wallet_uuids[v_ordinal]), v_fault);
      end if;

      if v_fault is not null then
        v_messages[v_ordinal] := v_fault;
        v_fault := 'WA400';
      elsif v_number is null then
        v_fault := 'WA404';
      elsif v_look_up and (v_recorded[v_ordinal] or v_taken[v_firsts[v_ordinal]]) then
        v_fault := 'WA409';
      else
        v_balance := v_balances[v_number];
        v_fault := wallet.funds_fault(p_operation_types[v_ordinal], p_amounts[v_ordinal], v_balance);
        if v_fault is not null and not v_look_up then
          v_look_up := true;
          continue attempt;
        end if;
      end if;

      if v_fault is not null then
        v_faults[v_ordinal] := v_fault;
        continue;
      end if;

      v_balance := v_balance + case p_operation_types[v_ordinal] when 'DEPOSIT' then p_amounts[v_ordinal] else -p_amounts[v_ordinal] end;
      v_balances[v_number] := v_balance;
      v_balances_after[v_ordinal] := v_balance;
      v_wallet_seqs[v_number] := v_wallet_seqs[v_number] + 1;
      v_seqs[v_ordinal] := v_wallet_seqs[v_number];
      if v_look_up then
        v_taken[v_firsts[v_ordinal]] := true;
      end if;
    end loop;

    v_now := clock_timestamp();

    begin
      insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at)
      select r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after, v_now
      from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after)
        as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
      where r.seq is not null
      order by r.operation_uuid;

      exit;
    exception when unique_violation then
      v_look_up := true;
    end;
  end loop;

  update wallet.wallet as w
  set balance = l.balance, seq = l.seq
  from unnest(v_uuids, v_balances, v_wallet_seqs) as l (uuid, balance, seq)
  where w.uuid = any(v_uuids) and w.uuid = l.uuid and w.seq < l.seq;

  if not v_look_up then
    return query
    select
      r.ordinal::int,
      r.fault,
      coalesce(r.message, wallet.fault_message(r.fault)),
      case when r.seq is not null then r.wallet_uuid end,
      case when r.seq is not null then r.operation_type end,
      case when r.seq is not null then r.operation_uuid end,
      r.seq,
      case when r.seq is not null then r.amount end,
      r.balance_after,
      case when r.seq is not null then v_now end
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after, v_faults, v_messages
    ) with ordinality
      as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, fault, message, ordinal);
    return;
  end if;

  -- With duplicates among the requests, the ledger says what is recorded, whether just now or before.
  return query
  with recorded as materialized (
    select o.*
    from wallet.operation as o
    where o.operation_uuid = any(p_operation_uuids)
  )
  select
    r.ordinal::int, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
    o.wallet_uuid, o.operation_type, o.operation_uuid, o.seq, o.amount, o.balance_after, o.created_at
  from unnest(p_wallet_uuids, p_operation_uuids, v_faults, v_messages) with ordinality
    as r (wallet_uuid, operation_uuid, fault, message, ordinal)
  left join recorded as o
    on o.operation_uuid = r.operation_uuid and o.wallet_uuid = r.wallet_uuid and coalesce(r.fault, 'WA409') = 'WA409'
  order by r.ordinal;
end
$$;

comment on function wallet.apply_operations(text[], uuid[], text[], bigint[]) is
  'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. '
  'Four arrays of one length: wallet, operation_uuid, DEPOSIT or WITHDRAW, amount in minor units. Returns one row per request, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA402, WA416 as in apply_operation. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and, under repeatable read or serializable, 40001.';
