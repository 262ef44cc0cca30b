-- Every wallet of the batch is locked first, in the order of uuid, and every insert goes in the order of
-- operation_uuid: two batches that share wallets or operations wait for each other in one direction only.
--
-- An attempt is one block, and so one subtransaction: lock, decide, insert, update. What it meets decides how the next one
-- goes; it starts without locks, and looks again.
--
-- Under a lock_timeout a call holds nothing while it waits for a wallet, so that nobody waits in vain for its other wallets:
-- it takes what is free, and if anything is missed it lets go of all, waits for the missed wallet alone and, once it has
-- that one, takes the rest. Each wait has half of what is left of the lock_timeout, so that a wallet that
-- stays locked leaves some time for those that are merely busy. A call for one wallet waits as any statement does.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a refusal may be a repeat and must then hear that it exists. Whoever held one of the operation_uuids
-- has committed by then, because the insert waited for it, so each look-up that follows such an objection finds more of them
-- than the one before. Only under a snapshot older than that commit (repeatable read, serializable) does it find no more:
-- then the caller's transaction must start again.
--
-- What else the database refuses (a constraint, a trigger, an operation_uuid that stays in flight) it refuses to a single
-- request, and doesn't say to which. Both halves of the batch are then applied by themselves, one after the other, down to
-- that request. All wallets stay locked meanwhile.
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
  v_half int;
  v_now timestamptz;

  v_lock_timeout text := current_setting('lock_timeout');
  v_patience interval := v_lock_timeout::interval; -- 0: without end
  v_until timestamptz;
  v_step text; -- what the attempt is about, when it ends by an error
  v_skip_locked bool;
  v_awaited text;
  v_stuck text[] := '{}'; -- wallets that were waited for in vain
  v_missed text[]; -- wallets that exist and could not be locked; null: nothing was missed yet
  v_halve bool := false;

  v_sqlstate text;
  v_constraint text;
  v_objection text;

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
  v_recorded_count bigint;
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

  v_skip_locked := v_patience > '0' and p_wallet_uuids <> array_fill(p_wallet_uuids[1], array[v_count]);

  <<attempt>>
  loop
    begin
      if v_awaited is not null then
        v_step := 'wait';
        perform wallet.wait_for_wallet(v_awaited, 0.5 * (v_until - clock_timestamp()));
      end if;

      v_step := 'lock';
      v_missed := null;
      if not v_skip_locked then
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
      else
        select jsonb_object_agg(n.uuid, n.number), array_agg(n.uuid), array_agg(n.balance), array_agg(n.seq)
        into v_numbers, v_uuids, v_locked_balances, v_locked_seqs
        from (
          select l.*, row_number() over () as number
          from (
            select w.uuid, w.balance, w.seq
            from wallet.wallet as w
            where w.uuid = any(p_wallet_uuids)
            order by w.uuid
            for no key update skip locked
          ) as l
        ) as n;
      end if;

      if v_halve then
        v_step := 'halves';
        v_half := v_count / 2;
        if v_patience > '0' then
          perform set_config('lock_timeout', '1', true); -- what is here is locked, and what is not was waited for
        end if;

        return query
        select * from wallet.apply_operations(
          p_wallet_uuids[:v_half], p_operation_uuids[:v_half], p_operation_types[:v_half], p_amounts[:v_half]
        );

        return query
        select (a.ordinal + v_half), a.sqlstate, a.message, a.wallet_uuid, a.operation_type, a.operation_uuid, a.seq, a.amount,
          a.balance_after, a.created_at
        from wallet.apply_operations(
          p_wallet_uuids[v_half + 1:], p_operation_uuids[v_half + 1:], p_operation_types[v_half + 1:], p_amounts[v_half + 1:]
        ) as a;

        perform set_config('lock_timeout', v_lock_timeout, true);
        return;
      end if;

      <<decision>>
      loop
        v_step := 'decide';
        v_balances := v_locked_balances;
        v_wallet_seqs := v_locked_seqs;
        v_faults := array_fill(null::text, array[v_count]);
        v_messages := v_faults;
        v_seqs := array_fill(null::bigint, array[v_count]);
        v_balances_after := v_seqs;

        if v_look_up then
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

            if v_missed is null then
              v_missed := array(
                select w.uuid
                from wallet.wallet as w
                where v_skip_locked and w.uuid = any(p_wallet_uuids) and not coalesce(v_numbers ? w.uuid, false)
                order by w.uuid
              );
              v_until := coalesce(v_until, clock_timestamp() + v_patience);
              select m.uuid into v_awaited from unnest(v_missed) as m (uuid) where m.uuid <> all(v_stuck) limit 1;

              if v_awaited is not null and clock_timestamp() < v_until then
                v_step := 'miss';
                raise lock_not_available;
              end if;
            end if;
          end if;

          if v_fault is not null then
            v_messages[v_ordinal] := v_fault;
            v_fault := 'WA400';
          elsif v_number is null and p_wallet_uuids[v_ordinal] <> all(v_missed) then
            v_fault := 'WA404';
          elsif v_look_up and (v_recorded[v_ordinal] or v_taken[v_firsts[v_ordinal]]) then
            v_fault := 'WA409';
          else
            if v_number is null then
              v_fault := '55P03';
            else
              v_balance := v_balances[v_number];
              v_fault := wallet.funds_fault(p_operation_types[v_ordinal], p_amounts[v_ordinal], v_balance);
            end if;

            if v_fault is not null and not v_look_up then
              v_look_up := true;
              continue decision;
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

        exit;
      end loop;

      v_step := 'write';
      v_now := clock_timestamp();

      insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at)
      select r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after, v_now
      from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after)
        as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
      where r.seq is not null
      order by r.operation_uuid;

      update wallet.wallet as w
      set balance = l.balance, seq = l.seq
      from unnest(v_uuids, v_balances, v_wallet_seqs) as l (uuid, balance, seq)
      where w.uuid = any(v_uuids) and w.uuid = l.uuid and w.seq < l.seq;

      exit;
    exception when others then
      get stacked diagnostics
        v_sqlstate = returned_sqlstate, v_constraint = constraint_name, v_objection = message_text;
      v_recorded_before := null;

      if v_step = 'miss' then
        null; -- the next attempt waits for v_awaited
      elsif v_step = 'wait' and v_sqlstate = '55P03' then
        v_stuck := v_stuck || v_awaited;
        v_awaited := null;
      elsif v_step = 'lock' and v_sqlstate = '55P03' and not v_skip_locked then
        v_stuck := p_wallet_uuids[:1];
        v_skip_locked := true;
      elsif v_step <> 'write' or v_sqlstate ~ '^(08|25|40|53|57|58|XX)' then
        raise; -- not about a single request
      elsif v_sqlstate = '23505' and v_constraint = 'operation_operation_uuid_key' then
        v_recorded_before := case when v_look_up then v_recorded_count end;
        v_look_up := true;
      elsif v_count > 1 then
        v_halve := true;
      else
        if v_sqlstate <> '55P03' then
          raise warning using errcode = v_sqlstate, message = v_objection;
        end if;
        v_faults := array[v_sqlstate];
        v_seqs := array[null::bigint];
        v_balances_after := v_seqs;
        exit;
      end if;
    end;
  end loop;

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
  'Also, for requests that were not tried and may be asked again: 55P03, under a lock_timeout, after WA409 (another transaction keeps the wallet '
  'locked, or the operation_uuid in flight); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and, under repeatable read or serializable, 40001.';
