-- Every wallet of the batch is locked first, and then every insert goes in the order of operation_uuid: two batches that share
-- wallets or operations wait for each other in one direction only. The wallets' last rows are read by a statement of its own,
-- which sees what the locks waited for.
--
-- An attempt is one block, and so one subtransaction: decide, insert. What it meets decides how the next one goes.
--
-- A batch without duplicates pays nothing for them: it looks up recorded operations only after a unique violation, or when a
-- refusal may be a repeat, which must get WA409. Whoever held one of the operation_uuids has committed by then, because the
-- insert waited for it, so each look-up after a unique violation finds more of the recorded operation_uuids than the one before.
--
-- Any other refusal (a constraint, a trigger, an operation_uuid that stays in flight) is caused by one request, and the database
-- doesn't say by which. Both halves of the batch are then applied by themselves, one after the other, down to
-- that request. All wallets stay locked meanwhile. The second half inserts after the first, whatever its operation_uuids are: so
-- without a lock_timeout a batch in halves can deadlock (40P01) with another that names the same operations for other wallets. Under
-- a lock_timeout a half waits for another transaction for 1 ms, which is less than deadlock_timeout, and the request that had to
-- wait gets 55P03.
--
-- An atomic batch is applied as any other, and all of it is taken back if any request was refused.
--
-- Holds that are due when the wallets are locked count for nobody: they are taken off the state before the first decision, and
-- recorded with the first operation that is applied to their wallet. A hold that the batch names has one entry of state: open
-- with its amount, closed, or unknown; what makes or ends it in the batch changes that entry. If the
-- clock was set back, requests may have different moments, and so different holds due: they are applied one by one.
--
-- The decisions run in the order of the requests, over arrays: results are indexed by request (its ordinal), state by wallet
-- (its number; v_numbers maps uuid to number). Arrays are unnested side by side in the select list, row by row; in the from
-- clause each of them would first be copied as a whole. Arguments that are mostly null as a whole are indexed, not unnested:
-- each unnested array costs time on every row. The plans are pinned to
-- what fits any length and any ledger: hash joins between arrays, index scans on tables, nothing planned while a table was small.
create or replace function wallet.apply_operations(
  p_wallet_uuids text[],
  p_operation_uuids uuid[],
  p_operation_types text[],
  p_amounts bigint[],
  p_counterparty_uuids text[] default null,
  p_hold_uuids uuid[] default null,
  p_expires_at timestamptz[] default null,
  p_metadata jsonb[] default null,
  p_atomic boolean default false,
  p_not_after timestamptz default null
)
returns table (
  ordinal int,
  sqlstate text,
  message text,
  same_request boolean,
  wallet_uuid text,
  operation_type text,
  operation_uuid uuid,
  seq bigint,
  amount bigint,
  balance_after bigint,
  created_at timestamptz,
  held_after bigint,
  counterparty_uuid text,
  hold_uuid uuid,
  expires_at timestamptz,
  metadata jsonb
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_nestloop = off
set enable_mergejoin = off
as $$
declare
  v_count int := cardinality(p_wallet_uuids);
  v_half int;
  v_lock_timeout text := current_setting('lock_timeout');
  v_now timestamptz;
  v_step text; -- what the attempt was doing when it failed
  v_halve boolean := false;

  v_last timestamptz;

  v_sqlstate text;
  v_constraint text;
  v_objection text;

  v_uuids text[];
  v_statuses text[];
  v_currencies text[];
  v_missed text[]; -- wallets that exist and could not be locked
  v_numbers jsonb;
  v_last_balances bigint[];
  v_last_seqs bigint[];
  v_last_times timestamptz[]; -- null: none is later than the clock, and nothing is held
  v_last_helds bigint[]; -- null: nothing is held
  v_balances bigint[];
  v_wallet_seqs bigint[];
  v_helds bigint[];
  v_times timestamptz[];

  v_ordinal int;
  v_number int;
  v_payee int;
  v_missing boolean;
  v_type text;
  v_amount bigint;
  v_fault text;
  v_balance bigint;
  v_seq bigint;
  v_faults text[];
  v_messages text[];
  v_seqs bigint[];
  v_balances_after bigint[];
  v_payee_seqs bigint[];
  v_payee_balances_after bigint[];
  v_moments timestamptz[]; -- where it is not v_now

  v_holding boolean; -- something is held, or is to be
  v_due_counts int[]; -- by number; null: nothing is due
  v_entries int[]; -- by ordinal: the ordinal of the first request that captures or releases the same hold; null: none does
  v_known_holds boolean[]; -- by entry, as are the next five
  v_known boolean[];
  v_open_holds bigint[]; -- what is held; null: no longer
  v_open bigint[];
  v_makers int[]; -- the ordinal of the HOLD, where it is in this batch
  v_entry int;
  v_available bigint; -- what the amount may be taken from, where that is not the balance
  v_held_amounts bigint[]; -- by ordinal, as are the next four: p_amounts, with those of RELEASE
  v_helds_after bigint[];
  v_payee_helds_after bigint[];
  v_opening boolean[];
  v_closing uuid[];

  v_careful boolean; -- there is more to do than for deposits and withdrawals that are all good
  v_look_up boolean := false;
  v_refused boolean := false;
  v_recorded boolean[];
  v_recorded_count bigint;
  v_recorded_before bigint := -1;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken boolean[];
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  end if;

  v_fault := case
    when p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null
      then 'arrays must not be null'
    when array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
      or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1
      or array_ndims(p_counterparty_uuids) > 1 or array_ndims(p_hold_uuids) > 1
      or array_ndims(p_expires_at) > 1 or array_ndims(p_metadata) > 1
      then 'arrays must have one dimension'
    when v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
      or v_count <> cardinality(p_amounts)
      or v_count <> cardinality(p_counterparty_uuids) or v_count <> cardinality(p_hold_uuids)
      or v_count <> cardinality(p_expires_at) or v_count <> cardinality(p_metadata)
      then 'arrays must have the same length'
    when p_atomic is null then 'atomic must not be null'
  end;
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  if array_lower(p_wallet_uuids, 1) <> 1 or array_lower(p_operation_uuids, 1) <> 1
    or array_lower(p_operation_types, 1) <> 1 or array_lower(p_amounts, 1) <> 1
    or array_lower(p_counterparty_uuids, 1) <> 1 or array_lower(p_hold_uuids, 1) <> 1
    or array_lower(p_expires_at, 1) <> 1 or array_lower(p_metadata, 1) <> 1 then
    p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1
    p_operation_uuids := p_operation_uuids[:];
    p_operation_types := p_operation_types[:];
    p_amounts := p_amounts[:];
    p_counterparty_uuids := p_counterparty_uuids[:];
    p_hold_uuids := p_hold_uuids[:];
    p_expires_at := p_expires_at[:];
    p_metadata := p_metadata[:];
  end if;

  if p_atomic then
    begin
      select array_agg(a.sqlstate order by a.ordinal), array_agg(a.message order by a.ordinal)
      into v_faults, v_messages
      from wallet.apply_operations(
        p_wallet_uuids, p_operation_uuids, p_operation_types, p_amounts,
        p_counterparty_uuids, p_hold_uuids, p_expires_at, p_metadata
      ) as a;

      if v_faults <> array_fill(null::text, array[v_count]) then
        raise sqlstate 'WA425'; -- takes back what was applied
      end if;
    exception when sqlstate 'WA425' then
      v_faults := array(
        select coalesce(f.fault, 'WA425') from unnest(v_faults) with ordinality as f (fault, ordinal) order by f.ordinal
      );
    end;

    v_look_up := true;
  else
    select l.uuids, l.statuses, l.currencies, l.missed
    into v_uuids, v_statuses, v_currencies, v_missed
    from wallet.lock_wallets(p_wallet_uuids || p_counterparty_uuids) as l;
    v_now := clock_timestamp();

    select
      jsonb_object_agg(n.uuid, n.number), array_agg(coalesce(o.balance_after, 0)), array_agg(coalesce(o.seq, 0)),
      case when max(o.created_at) > v_now or max(o.held_after) > 0 then array_agg(o.created_at) end,
      case when max(o.held_after) > 0 then array_agg(coalesce(o.held_after, 0)) end
    into v_numbers, v_last_balances, v_last_seqs, v_last_times, v_last_helds
    from (select unnest(v_uuids) as uuid, generate_series(1, cardinality(v_uuids)) as number) as n
    left join lateral (
      select l.balance_after, l.held_after, l.seq, l.created_at
      from wallet.operation as l
      where l.wallet_uuid = n.uuid
      order by l.seq desc
      limit 1
    ) as o on true;

    v_holding := v_last_helds is not null or p_hold_uuids is not null or coalesce('HOLD' = any(p_operation_types), false);
  end if;

  if v_holding then
    v_last := (select max(t.moment) from unnest(v_last_times) as t (moment));
    if v_last > v_now then
      v_halve := v_count > 1;
      v_now := v_last;
    end if;

    select array_agg(coalesce(n.held, 0) - d.amount), array_agg(n.seq + d.holds), case when max(d.holds) > 0 then array_agg(d.holds::int) end
    into v_last_helds, v_last_seqs, v_due_counts
    from (select unnest(v_uuids) as uuid, unnest(v_last_helds) as held, unnest(v_last_seqs) as seq, unnest(v_last_times) as last) as n
    cross join lateral (
      select coalesce(sum(h.amount), 0)::bigint as amount, count(*) as holds
      from wallet.hold as h
      where n.held > 0 and h.wallet_uuid = n.uuid and h.expires_at >= n.last and h.expires_at <= v_now
    ) as d;
    v_last_times := null;

    if p_hold_uuids is not null then
      select
        array_agg(r.entry order by r.ordinal),
        array_agg(h.hold_uuid is not null or coalesce(o.wallet_uuid = r.wallet_uuid and o.operation_type = 'HOLD', false) order by r.ordinal),
        array_agg(case when (h.expires_at <= v_now) is not true then h.amount end order by r.ordinal)
      into v_entries, v_known_holds, v_open_holds
      from (
        select
          r.wallet_uuid, r.hold_uuid, r.ordinal,
          min(r.ordinal) filter (where r.hold_uuid = r.name) over (partition by r.wallet_uuid, r.name) as entry
        from (
          select r.wallet_uuid, r.hold_uuid, r.ordinal, case r.operation_type when 'HOLD' then r.operation_uuid else r.hold_uuid end as name
          from (
            select
              unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_uuids) as operation_uuid, unnest(p_operation_types) as operation_type,
              unnest(p_hold_uuids) as hold_uuid, generate_series(1, v_count) as ordinal
          ) as r
        ) as r
      ) as r
      left join lateral (
        select h.hold_uuid, h.amount, h.expires_at
        from wallet.hold as h
        where h.wallet_uuid = r.wallet_uuid and h.hold_uuid = r.hold_uuid
        limit 1
      ) as h on true
      left join lateral (
        select o.wallet_uuid, o.operation_type
        from wallet.operation as o
        where h.hold_uuid is null and o.operation_uuid = r.hold_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
        limit 1
      ) as o on true;
    end if;
  end if;

  <<attempt>>
  while not p_atomic loop
    begin
      if v_halve then
        v_step := 'halves';
        v_half := v_count / 2;
        if v_lock_timeout <> '0' then
          perform set_config('lock_timeout', '1', true); -- wallets found are locked, the others were waited for
        end if;

        return query
        select *
        from wallet.apply_operations(
          p_wallet_uuids[:v_half], p_operation_uuids[:v_half], p_operation_types[:v_half], p_amounts[:v_half],
          p_counterparty_uuids[:v_half], p_hold_uuids[:v_half], p_expires_at[:v_half], p_metadata[:v_half]
        );

        return query
        select
          a.ordinal + v_half, a.sqlstate, a.message, a.same_request, a.wallet_uuid, a.operation_type, a.operation_uuid, a.seq, a.amount,
          a.balance_after, a.created_at, a.held_after, a.counterparty_uuid, a.hold_uuid, a.expires_at, a.metadata
        from wallet.apply_operations(
          p_wallet_uuids[v_half + 1:], p_operation_uuids[v_half + 1:], p_operation_types[v_half + 1:], p_amounts[v_half + 1:],
          p_counterparty_uuids[v_half + 1:], p_hold_uuids[v_half + 1:], p_expires_at[v_half + 1:], p_metadata[v_half + 1:]
        ) as a;

        perform set_config('lock_timeout', v_lock_timeout, true);
        if clock_timestamp() >= p_not_after then
          perform wallet.raise_too_late();
        end if;
        return;
      end if;

      <<decision>>
      loop
        v_step := 'decide';
        v_balances := v_last_balances;
        v_wallet_seqs := v_last_seqs;
        v_times := v_last_times;
        v_faults := array_fill(null::text, array[v_count]);
        v_messages := v_faults;
        v_seqs := array_fill(null::bigint, array[v_count]);
        v_balances_after := v_seqs;
        if p_counterparty_uuids is not null then
          v_payee_seqs := v_seqs;
          v_payee_balances_after := v_seqs;
        end if;
        if v_times is not null then
          v_moments := array_fill(null::timestamptz, array[v_count]);
        end if;
        if v_holding then
          v_helds := v_last_helds;
          v_known := v_known_holds;
          v_open := v_open_holds;
          v_makers := array_fill(null::int, array[v_count]);
          v_held_amounts := p_amounts;
          v_helds_after := v_seqs;
          v_payee_helds_after := v_seqs;
          v_opening := array_fill(false, array[v_count]);
          v_closing := array_fill(null::uuid, array[v_count]);
        end if;

        if v_look_up then
          v_taken := array_fill(false, array[v_count]);

          with known as materialized (
            select o.operation_uuid
            from wallet.operation as o
            where o.operation_uuid = any(p_operation_uuids) and o.operation_type not in ('RECEIVE', 'EXPIRE')
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
        end if;

        v_careful := v_look_up or v_holding or p_counterparty_uuids is not null or v_times is not null;

        for v_ordinal in 1..v_count loop
          v_type := p_operation_types[v_ordinal];
          v_amount := p_amounts[v_ordinal];
          v_number := (v_numbers ->> p_wallet_uuids[v_ordinal])::int;
          v_fault := wallet.argument_fault(
            p_wallet_uuids[v_ordinal], p_operation_uuids[v_ordinal], v_type, v_amount,
            p_counterparty_uuids[v_ordinal], p_hold_uuids[v_ordinal], p_expires_at[v_ordinal], p_metadata[v_ordinal]
          );

          if v_careful or v_fault is not null or v_number is null then
            v_payee := (v_numbers ->> p_counterparty_uuids[v_ordinal])::int;
            v_missing := v_number is null or (v_payee is null and p_counterparty_uuids[v_ordinal] is not null);

            if v_missing and v_fault is null then
              v_fault := wallet.names_fault(p_wallet_uuids[v_ordinal], p_counterparty_uuids[v_ordinal]);
            end if;

            if v_fault is not null then
              v_messages[v_ordinal] := v_fault;
              v_fault := 'WA400';
            elsif v_missing and (
              (v_number is null and p_wallet_uuids[v_ordinal] <> all(v_missed))
              or (v_payee is null and p_counterparty_uuids[v_ordinal] <> all(v_missed))
            ) then
              v_fault := 'WA404';
            elsif v_look_up and (v_recorded[v_ordinal] or v_taken[v_firsts[v_ordinal]]) then
              v_fault := 'WA409';
            elsif v_missing then
              v_fault := '55P03';
            elsif v_holding then
              v_entry := coalesce(v_entries[v_ordinal], v_ordinal);
              v_available := case
                when p_hold_uuids[v_ordinal] is not null then v_open[v_entry]
                when v_type <> 'DEPOSIT' then v_balances[v_number] - v_helds[v_number]
              end;

              if p_hold_uuids[v_ordinal] is not null and not v_known[v_entry] then
                v_fault := 'WA424';
              elsif (p_hold_uuids[v_ordinal] is not null and v_available is null) or p_expires_at[v_ordinal] <= v_now then
                v_fault := 'WA410';
              end if;
            end if;
          end if;

          if v_fault is null then
            v_fault := wallet.state_fault(
              v_type, v_amount, v_statuses[v_number], coalesce(v_available, v_balances[v_number]), v_currencies[v_number],
              v_statuses[v_payee], v_balances[v_payee], v_currencies[v_payee]
            );
          end if;

          if v_fault is not null then
            if not v_look_up and v_fault not in ('WA400', 'WA404') then
              v_look_up := true;
              continue decision;
            end if;
            v_faults[v_ordinal] := v_fault;
            v_refused := true;
            continue;
          end if;

          v_balance := v_balances[v_number]
            + case v_type when 'DEPOSIT' then v_amount when 'WITHDRAW' then -v_amount when 'TRANSFER' then -v_amount else 0 end;
          v_balances[v_number] := v_balance;
          v_balances_after[v_ordinal] := v_balance;
          v_seq := v_wallet_seqs[v_number] + 1;
          v_wallet_seqs[v_number] := v_seq;
          v_seqs[v_ordinal] := v_seq;

          if v_careful then
            if v_payee is not null then
              v_balance := v_balances[v_payee] + v_amount;
              v_balances[v_payee] := v_balance;
              v_payee_balances_after[v_ordinal] := v_balance;
              v_seq := v_wallet_seqs[v_payee] + 1;
              v_wallet_seqs[v_payee] := v_seq;
              v_payee_seqs[v_ordinal] := v_seq;
            end if;
            if v_times is not null then
              v_moments[v_ordinal] := greatest(v_now, v_times[v_number], v_times[v_payee]);
              v_times[v_number] := v_moments[v_ordinal];
              if v_payee is not null then
                v_times[v_payee] := v_moments[v_ordinal];
              end if;
            end if;
            if v_look_up then
              v_taken[v_firsts[v_ordinal]] := true;
            end if;
            if v_holding then
              if v_type = 'HOLD' then
                v_helds[v_number] := v_helds[v_number] + v_amount;
                v_opening[v_ordinal] := true;
                if v_entries is not null then
                  v_known[v_entry] := true;
                  v_open[v_entry] := v_amount;
                  v_makers[v_entry] := v_ordinal;
                end if;
              elsif p_hold_uuids[v_ordinal] is not null then
                v_helds[v_number] := v_helds[v_number] - v_available;
                v_open[v_entry] := null;
                if v_type = 'RELEASE' then
                  v_held_amounts[v_ordinal] := v_available;
                end if;
                if v_makers[v_entry] is null then
                  v_closing[v_ordinal] := p_hold_uuids[v_ordinal];
                else
                  v_opening[v_makers[v_entry]] := false;
                end if;
              end if;
              v_helds_after[v_ordinal] := v_helds[v_number];
              if v_payee is not null then
                v_payee_helds_after[v_ordinal] := v_helds[v_payee];
              end if;
            end if;
          end if;
        end loop;

        exit;
      end loop;

      v_step := 'write';
      for v_due in 1..coalesce(cardinality(v_due_counts), 0) loop
        if v_due_counts[v_due] > 0 and v_wallet_seqs[v_due] > v_last_seqs[v_due] then
          perform wallet.record_expiries(v_uuids[v_due], v_now);
        end if;
      end loop;

      if v_payee_seqs is null and not v_holding then
        insert into wallet.operation (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, held_after, counterparty_uuid,
          hold_uuid, expires_at, metadata
        )
        select
          r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after,
          coalesce(v_moments[r.ordinal], v_now), 0::bigint, null::text collate "C", null::uuid, null::timestamptz,
          nullif(p_metadata[r.ordinal], '{}')
        from (
          select
            unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_types) as operation_type, unnest(p_operation_uuids) as operation_uuid,
            unnest(v_seqs) as seq, unnest(p_amounts) as amount, unnest(v_balances_after) as balance_after, generate_series(1, v_count) as ordinal
        ) as r
        where r.seq is not null
        order by r.operation_uuid;
      elsif not v_holding then
        insert into wallet.operation (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, held_after, counterparty_uuid,
          hold_uuid, expires_at, metadata
        )
        select
          s.wallet_uuid, s.operation_type, r.operation_uuid, s.seq, r.amount, s.balance_after, coalesce(r.moment, v_now), 0::bigint,
          s.counterparty_uuid, null::uuid, null::timestamptz, nullif(r.metadata, '{}')
        from (
          select
            unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_types) as operation_type, unnest(p_operation_uuids) as operation_uuid,
            unnest(v_seqs) as seq, unnest(p_amounts) as amount, unnest(v_balances_after) as balance_after, unnest(v_moments) as moment,
            unnest(p_metadata) as metadata, unnest(p_counterparty_uuids) as counterparty_uuid, unnest(v_payee_seqs) as payee_seq,
            unnest(v_payee_balances_after) as payee_balance_after
        ) as r
        cross join lateral (
          values
          (r.wallet_uuid, r.operation_type, r.seq, r.balance_after, r.counterparty_uuid, 1),
          (r.counterparty_uuid, 'RECEIVE', r.payee_seq, r.payee_balance_after, r.wallet_uuid, 2)
        ) as s (wallet_uuid, operation_type, seq, balance_after, counterparty_uuid, side)
        where s.seq is not null
        order by r.operation_uuid, s.side;
      else
        insert into wallet.operation (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, held_after, counterparty_uuid,
          hold_uuid, expires_at, metadata
        )
        select
          s.wallet_uuid, s.operation_type, r.operation_uuid, s.seq, r.amount, s.balance_after, coalesce(r.moment, v_now), coalesce(s.held_after, 0),
          s.counterparty_uuid, s.hold_uuid, r.expires_at, nullif(r.metadata, '{}')
        from (
          select
            unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_types) as operation_type, unnest(p_operation_uuids) as operation_uuid,
            unnest(v_seqs) as seq, unnest(coalesce(v_held_amounts, p_amounts)) as amount, unnest(v_balances_after) as balance_after,
            unnest(v_moments) as moment, unnest(p_metadata) as metadata, unnest(p_counterparty_uuids) as counterparty_uuid,
            unnest(v_payee_seqs) as payee_seq, unnest(v_payee_balances_after) as payee_balance_after, unnest(p_hold_uuids) as hold_uuid,
            unnest(p_expires_at) as expires_at, unnest(v_helds_after) as held_after, unnest(v_payee_helds_after) as payee_held_after
        ) as r
        cross join lateral (
          values
          (r.wallet_uuid, r.operation_type, r.seq, r.balance_after, r.counterparty_uuid, r.held_after, r.hold_uuid, 1),
          (r.counterparty_uuid, 'RECEIVE', r.payee_seq, r.payee_balance_after, r.wallet_uuid, r.payee_held_after, null::uuid, 2)
        ) as s (wallet_uuid, operation_type, seq, balance_after, counterparty_uuid, held_after, hold_uuid, side)
        where s.seq is not null
        order by r.operation_uuid, s.side;
      end if;

      if v_holding then
        if true = any(v_opening) then
          insert into wallet.hold (wallet_uuid, hold_uuid, seq, amount, expires_at, created_at)
          select r.wallet_uuid, r.hold_uuid, r.seq, r.amount, r.expires_at, v_now
          from (
            select
              unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_uuids) as hold_uuid, unnest(v_seqs) as seq,
              unnest(p_amounts) as amount, unnest(p_expires_at) as expires_at, unnest(v_opening) as opening
          ) as r
          where r.opening;
        end if;
        if p_hold_uuids is not null then
          delete from wallet.hold as h
          where h.hold_uuid = any(v_closing) and h.wallet_uuid = any(v_uuids);
        end if;
      end if;

      exit;
    exception when others then
      get stacked diagnostics
        v_sqlstate = returned_sqlstate, v_constraint = constraint_name, v_objection = message_text;

      if v_step <> 'write' or v_sqlstate ~ '^(08|25|40|53|57|58|XX)' then
        raise; -- not about a single request
      elsif v_sqlstate = '23505' and v_constraint = 'operation_requested_idx' and v_recorded_count is distinct from v_recorded_before then
        v_recorded_before := v_recorded_count;
        v_look_up := true;
      elsif v_count > 1 then
        v_halve := true;
      elsif v_sqlstate <> '55P03' and not v_look_up then
        v_look_up := true; -- constraints and triggers come before the unique index: they may have refused a repeat
      else
        if v_sqlstate <> '55P03' then
          raise warning using errcode = v_sqlstate, message = v_objection;
        end if;
        v_faults := array[v_sqlstate];
        v_seqs := array[null::bigint];
        v_balances_after := v_seqs;
        v_refused := true;
        exit;
      end if;
    end;
  end loop;

  if clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  if not v_look_up and not v_refused then
    return query
    select
      r.ordinal, null::text, null::text, true, r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after,
      coalesce(v_moments[r.ordinal], v_now), coalesce(v_helds_after[r.ordinal], 0), p_counterparty_uuids[r.ordinal],
      p_hold_uuids[r.ordinal], p_expires_at[r.ordinal], nullif(p_metadata[r.ordinal], '{}')
    from (
      select
        unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_types) as operation_type, unnest(p_operation_uuids) as operation_uuid,
        unnest(v_seqs) as seq, unnest(coalesce(v_held_amounts, p_amounts)) as amount, unnest(v_balances_after) as balance_after,
        generate_series(1, v_count) as ordinal
    ) as r;
    return;
  end if;

  -- What was found recorded under a wallet that stays locked is answered without a lock of our own, and a commit that wrote nothing
  -- waits for no synchronous standby.
  if v_missed <> '{}' and current_setting('synchronous_standby_names') <> '' then
    perform pg_logical_emit_message(true, 'wallet', ''::text);
  end if;

  -- Where any was refused or is a duplicate, the ledger says what is recorded, whether just now or before.
  return query
  with recorded as materialized (
    select o.*
    from wallet.operation as o
    where o.operation_uuid = any(p_operation_uuids) and o.operation_type not in ('RECEIVE', 'EXPIRE')
  ),

  request as (
    select
      unnest(p_wallet_uuids) as wallet_uuid, unnest(p_operation_types) as operation_type, unnest(p_operation_uuids) as operation_uuid,
      unnest(p_amounts) as amount, unnest(v_faults) as fault, unnest(v_messages) as message,
      unnest(p_counterparty_uuids) as counterparty_uuid, unnest(p_hold_uuids) as hold_uuid, unnest(p_expires_at) as expires_at,
      unnest(p_metadata) as metadata, generate_series(1, v_count) as ordinal
  )

  select
    r.ordinal, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
    case
      when o.operation_uuid is not null
        then wallet.is_same_request(o, r.operation_type, r.amount, r.counterparty_uuid, r.hold_uuid, r.expires_at, r.metadata)
      when k.operation_uuid is not null then false
    end,
    o.wallet_uuid, o.operation_type, o.operation_uuid, o.seq, o.amount, o.balance_after, o.created_at,
    o.held_after, o.counterparty_uuid, o.hold_uuid, o.expires_at, o.metadata
  from request as r
  left join recorded as k on k.operation_uuid = r.operation_uuid and coalesce(r.fault, 'WA409') = 'WA409'
  left join recorded as o on o.operation_uuid = k.operation_uuid and o.wallet_uuid = r.wallet_uuid
  order by r.ordinal;
end
$$;

comment on function wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz) is
  'Applies a batch of operations as apply_operation would, one after another in the order given, in one transaction: the good ones stay, the others are refused. '
  'Arrays of one length, with the arguments of apply_operation; those that may be null may be null as a whole. Returns one row per operation, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), same_request (whether what is recorded under its operation_uuid is this request: true for an applied one; '
  'null where nothing is recorded), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per operation: WA400, WA404, WA409, WA424, WA410, WA405, WA403, WA422, WA402, WA416 as in apply_operation. '
  'Also, for requests that were not applied and may be asked again: 55P03, under a lock_timeout, which ranks after WA409 (another transaction keeps a wallet '
  'locked, or is applying the same operation_uuid); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. '
  'p_atomic: if any operation is refused, none is applied, and the outcome of those that would have been is WA425. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and a null p_atomic, 57014 (too late), 0A000 unless the transaction is read committed, '
  'under a lock_timeout 55P03 if a table is locked, and 40P01 (nothing was applied: call again) if another batch names the same operation_uuids, and one of the two is applied in '
  'parts, because the database refused one of its operations or the database''s clock was set back; not if either has a lock_timeout below deadlock_timeout.';
