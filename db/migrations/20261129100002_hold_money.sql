-- migrate:up

set local search_path = pg_catalog, pg_temp;
set local role wallet_owner;

-- By hand

-- Readers wait behind this for 100 ms at most: it lets go, and tries again.
do $$
begin
  perform set_config('lock_timeout', '100ms', true);

  for v_attempt in 1..100 loop
    begin
      create or replace view wallet.balance as
      select
        w.uuid,
        w.id,
        w.currency,
        w.status,
        coalesce(o.balance_after, 0) as balance,
        coalesce(o.held, 0) as held,
        coalesce(o.balance_after - o.held, 0) as available,
        coalesce(o.seq, 0) as seq,
        w.created_at,
        coalesce(o.created_at, w.created_at) as updated_at
      from wallet.wallet as w
      left join lateral (
        select
          l.balance_after, l.seq, l.created_at,
          case when l.held_after > 0 then l.held_after - wallet.due_amount(l.wallet_uuid, l.created_at) else 0 end as held
        from wallet.operation as l
        where l.wallet_uuid = w.uuid
        order by l.seq desc
        limit 1
      ) as o on true;
      return;
    exception when lock_not_available then
      perform pg_sleep(0.4 * random());
    end;
  end loop;

  raise exception 'wallet.balance stays locked by another transaction; nothing was changed: migrate again later';
end
$$;

comment on view wallet.balance is
  'One row per wallet: who it is and what its last operation says. balance, held, available: minor units, available = balance - held, where a hold that is due '
  'counts no longer; seq: the number of its operations; updated_at: the created_at of the last one, of the wallet where there is none.';

-- Generated

-- The row locks on the wallets come first, in the order of uuid, and are held to the end of the transaction: they put the
-- operations of a wallet in order, so nothing below them can race but the same operation_uuid on another wallet, where
-- the unique index decides. The last rows are read by statements of their own, which see what the lock waited for.
-- The state is checked before the duplicate because that is the order that costs a good operation
-- nothing; an operation that was applied and is sent again must hear that it exists, so the failing paths look for it.
-- Where something is held, or is to be, apply_operations does it.
-- A plain insert whose unique_violation is caught costs less than one that is on conflict do nothing.
-- Sequential scans are off, here and in what reads: a session keeps a plan that it made while the ledger was empty.
create or replace function wallet.apply_operation(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint default null,
  p_counterparty_uuid text default null,
  p_hold_uuid uuid default null,
  p_expires_at timestamptz default null,
  p_metadata jsonb default null,
  p_not_after timestamptz default null
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_fault text := wallet.argument_fault(
    p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata
  );
  v_status text;
  v_balance bigint;
  v_held bigint;
  v_seq bigint;
  v_last timestamptz;
  v_now timestamptz;

  v_currency text;
  v_payee_status text;
  v_payee_currency text;
  v_payee_balance bigint;
  v_payee_held bigint;
  v_payee_seq bigint;
  v_payee_last timestamptz;
  v_missed text[] := '{}';

  v_operation wallet.operation;
  v_constraint text;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  elsif p_operation_type = 'HOLD' or p_hold_uuid is not null then
    return wallet.apply_request(
      p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata, p_not_after
    );
  end if;

  begin
    if p_counterparty_uuid is null then
      select w.status into v_status
      from wallet.wallet as w
      where w.uuid = p_wallet_uuid
      for no key update;
    else
      select
        l.statuses[array_position(l.uuids, p_wallet_uuid)], l.currencies[array_position(l.uuids, p_wallet_uuid)],
        l.statuses[array_position(l.uuids, p_counterparty_uuid)], l.currencies[array_position(l.uuids, p_counterparty_uuid)],
        l.missed
      into v_status, v_currency, v_payee_status, v_payee_currency, v_missed
      from wallet.lock_wallets(array[p_wallet_uuid, p_counterparty_uuid]) as l;

      select o.balance_after, o.held_after, o.seq, o.created_at
      into v_payee_balance, v_payee_held, v_payee_seq, v_payee_last
      from wallet.operation as o
      where o.wallet_uuid = p_counterparty_uuid
      order by o.seq desc
      limit 1;
    end if;

    if (v_status is null and coalesce(p_wallet_uuid <> all(v_missed), true))
      or (p_counterparty_uuid is not null and v_payee_status is null and p_counterparty_uuid <> all(v_missed)) then
      perform wallet.raise_wallet_not_found(p_wallet_uuid, p_counterparty_uuid);
    elsif v_missed <> '{}' then
      raise lock_not_available;
    end if;

    select o.balance_after, o.held_after, o.seq, o.created_at
    into v_balance, v_held, v_seq, v_last
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid
    order by o.seq desc
    limit 1;

    if v_held > 0 or v_payee_held > 0 then
      return wallet.apply_request(
        p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata, p_not_after
      );
    end if;

    v_balance := coalesce(v_balance, 0);
    v_now := greatest(clock_timestamp(), v_last, v_payee_last);
    v_fault := wallet.state_fault(
      p_operation_type, p_amount, v_status, v_balance, v_currency, v_payee_status, coalesce(v_payee_balance, 0), v_payee_currency
    );

    if v_fault is not null then
      if exists (
        select from wallet.operation as o
        where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
      ) then
        v_fault := 'WA409';
      end if;
      raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
    end if;

    insert into wallet.operation
      (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
    values (
      p_wallet_uuid, p_operation_type, p_operation_uuid, coalesce(v_seq, 0) + 1, p_amount,
      v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end,
      v_now, p_counterparty_uuid, nullif(p_metadata, '{}')
    )
    returning * into v_operation;

    if p_counterparty_uuid is not null then
      insert into wallet.operation
        (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
      values (
        p_counterparty_uuid, 'RECEIVE', p_operation_uuid, coalesce(v_payee_seq, 0) + 1, p_amount,
        coalesce(v_payee_balance, 0) + p_amount,
        v_now, p_wallet_uuid, v_operation.metadata
      );
    end if;

    if clock_timestamp() >= p_not_after then
      perform wallet.raise_too_late();
    end if;

    return v_operation;
  exception
    when unique_violation then
      get stacked diagnostics v_constraint = constraint_name;
      if v_constraint <> 'operation_requested_idx' then
        raise;
      end if;
      v_fault := 'WA409';
    when lock_not_available then
      v_fault := case
        when exists (
          select from wallet.operation as o
          where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
        ) then 'WA409'
        else '55P03'
      end;
  end;

  raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
end
$$;

comment on function wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz) is
  'Applies one operation exactly once and returns its row; for a transfer, the payer''s. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE; p_amount: minor units, 1 to 2^63-1, null for RELEASE; p_counterparty_uuid: the payee of a TRANSFER, '
  'else null; p_metadata: an object of at most 2,048 octets as text ({} is null); p_not_after: the last moment of the call by the database''s clock; '
  'p_hold_uuid: the hold, that is the operation_uuid of a HOLD of this wallet, which a RELEASE ends, or from which a WITHDRAW or TRANSFER takes its amount '
  '(a capture: the hold ends, and what is left of it is available again); else null; p_expires_at: of a HOLD, from when on it counts no longer, '
  'in the years 1 to 9999, or null. '
  'Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA424 (this wallet has no such hold), WA410 (the hold is captured, released or expired; a new one is due already), '
  'WA405 (a wallet is closed), WA403 (the wallet is frozen), WA422 (the wallets'' currencies differ), WA402 (not enough money available; a capture of more than is held), '
  'WA416 (a balance would pass 2^63-1); under a lock_timeout also 55P03, after WA409 (another transaction keeps '
  'a wallet locked, or the operation_uuid in flight); 57014 (too late); 0A000 unless the transaction is read committed. '
  'A refused operation leaves nothing behind.';

-- Every wallet of the batch is locked first, and then every insert goes in the order of operation_uuid: two batches that share
-- wallets or operations wait for each other in one direction only. The wallets' last rows are read by a statement of its own,
-- which sees what the locks waited for.
--
-- An attempt is one block, and so one subtransaction: decide, insert. What it meets decides how the next one goes.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a refusal may be a repeat and must then hear that it exists. Whoever held one of the operation_uuids
-- has committed by then, because the insert waited for it, so each look-up that follows such an objection finds more of them
-- than the one before.
--
-- What else the database refuses (a constraint, a trigger, an operation_uuid that stays in flight) it refuses to a single
-- request, and doesn't say to which. Both halves of the batch are then applied by themselves, one after the other, down to
-- that request. All wallets stay locked meanwhile.
--
-- An atomic batch is applied as any other, and all of it is taken back if any request was refused.
--
-- Holds that are due when the wallets are locked count for nobody: they are taken off the state before the first decision, and
-- recorded with the first operation that is applied to their wallet. A hold that the batch names has one entry of state: open
-- with its amount, closed, or unknown; what makes or ends it in the batch changes that entry. Where a wallet's last row is later
-- than the clock, the moments of the requests differ, and with them what is due: they are applied one by one.
--
-- The decisions run in the order of the requests, over arrays: one entry a request for what comes out (by ordinal), one a
-- wallet for the state in between (by number; v_numbers is the dictionary from uuid to number). What is null as a whole in most
-- calls is looked up by ordinal, since each array that is unnested costs every row. The plans are pinned to
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
  v_step text; -- what the attempt is about, when it ends by an error
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
  v_recorded boolean[];
  v_recorded_count bigint;
  v_recorded_before bigint := -1;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken boolean[];
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null then
    raise sqlstate 'WA400' using message = 'arrays must not be null';
  elsif array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
    or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1
    or array_ndims(p_counterparty_uuids) > 1 or array_ndims(p_hold_uuids) > 1
    or array_ndims(p_expires_at) > 1 or array_ndims(p_metadata) > 1 then
    raise sqlstate 'WA400' using message = 'arrays must have one dimension';
  elsif v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
    or v_count <> cardinality(p_amounts)
    or v_count <> cardinality(p_counterparty_uuids) or v_count <> cardinality(p_hold_uuids)
    or v_count <> cardinality(p_expires_at) or v_count <> cardinality(p_metadata) then
    raise sqlstate 'WA400' using message = 'arrays must have the same length';
  elsif p_atomic is null then
    raise sqlstate 'WA400' using message = 'atomic must not be null';
  end if;

  p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1, whatever the array did
  p_operation_uuids := p_operation_uuids[:];
  p_operation_types := p_operation_types[:];
  p_amounts := p_amounts[:];
  p_counterparty_uuids := p_counterparty_uuids[:];
  p_hold_uuids := p_hold_uuids[:];
  p_expires_at := p_expires_at[:];
  p_metadata := p_metadata[:];

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
    from unnest(v_uuids) with ordinality as n (uuid, number)
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
    from unnest(v_uuids, v_last_helds, v_last_seqs, v_last_times) as n (uuid, held, seq, last)
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
          min(r.ordinal) filter (where r.hold_uuid is not null) over (partition by r.wallet_uuid, r.name) as entry
        from (
          select r.wallet_uuid, r.hold_uuid, r.ordinal, case r.operation_type when 'HOLD' then r.operation_uuid else r.hold_uuid end as name
          from unnest(p_wallet_uuids, p_operation_uuids, p_operation_types, p_hold_uuids)
            with ordinality as r (wallet_uuid, operation_uuid, operation_type, hold_uuid, ordinal)
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
          perform set_config('lock_timeout', '1', true); -- what is here is locked, and what is not was waited for
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
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, metadata)
        select
          r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after,
          coalesce(v_moments[r.ordinal], v_now), nullif(p_metadata[r.ordinal], '{}')
        from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after) with ordinality
          as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, ordinal)
        where r.seq is not null
        order by r.operation_uuid;
      elsif not v_holding then
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
        select
          s.wallet_uuid, s.operation_type, r.operation_uuid, s.seq, r.amount, s.balance_after, coalesce(r.moment, v_now),
          s.counterparty_uuid, nullif(r.metadata, '{}')
        from unnest(
          p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after, v_moments, p_metadata,
          p_counterparty_uuids, v_payee_seqs, v_payee_balances_after
        ) as r (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, moment, metadata,
          counterparty_uuid, payee_seq, payee_balance_after
        )
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
        from unnest(
          p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, coalesce(v_held_amounts, p_amounts), v_balances_after, v_moments,
          p_metadata, p_counterparty_uuids, v_payee_seqs, v_payee_balances_after, p_hold_uuids, p_expires_at, v_helds_after, v_payee_helds_after
        ) as r (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, moment,
          metadata, counterparty_uuid, payee_seq, payee_balance_after, hold_uuid, expires_at, held_after, payee_held_after
        )
        cross join lateral (
          values
          (r.wallet_uuid, r.operation_type, r.seq, r.balance_after, r.counterparty_uuid, r.held_after, r.hold_uuid, 1),
          (r.counterparty_uuid, 'RECEIVE', r.payee_seq, r.payee_balance_after, r.wallet_uuid, r.payee_held_after, null, 2)
        ) as s (wallet_uuid, operation_type, seq, balance_after, counterparty_uuid, held_after, hold_uuid, side)
        where s.seq is not null
        order by r.operation_uuid, s.side;
      end if;

      if v_holding then
        if true = any(v_opening) then
          insert into wallet.hold (wallet_uuid, hold_uuid, seq, amount, expires_at, created_at)
          select r.wallet_uuid, r.hold_uuid, r.seq, r.amount, r.expires_at, v_now
          from unnest(p_wallet_uuids, p_operation_uuids, v_seqs, p_amounts, p_expires_at, v_opening)
            as r (wallet_uuid, hold_uuid, seq, amount, expires_at, opening)
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

  if clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  if not v_look_up then
    return query
    select
      r.ordinal::int,
      r.fault,
      coalesce(r.message, wallet.fault_message(r.fault)),
      case when r.seq is not null then true end,
      case when r.seq is not null then r.wallet_uuid end,
      case when r.seq is not null then r.operation_type end,
      case when r.seq is not null then r.operation_uuid end,
      r.seq,
      case when r.seq is not null then r.amount end,
      r.balance_after,
      case when r.seq is not null then coalesce(v_moments[r.ordinal], v_now) end,
      case when r.seq is not null then coalesce(v_helds_after[r.ordinal], 0) end,
      case when r.seq is not null then p_counterparty_uuids[r.ordinal] end,
      case when r.seq is not null then p_hold_uuids[r.ordinal] end,
      case when r.seq is not null then p_expires_at[r.ordinal] end,
      case when r.seq is not null then nullif(p_metadata[r.ordinal], '{}') end
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, coalesce(v_held_amounts, p_amounts), v_balances_after, v_faults, v_messages
    ) with ordinality
      as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, fault, message, ordinal);
    return;
  end if;

  -- With duplicates among the requests, the ledger says what is recorded, whether just now or before.
  return query
  with recorded as materialized (
    select o.*
    from wallet.operation as o
    where o.operation_uuid = any(p_operation_uuids) and o.operation_type not in ('RECEIVE', 'EXPIRE')
  ),

  request as (
    select r.*
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, p_amounts, v_faults, v_messages,
      p_counterparty_uuids, p_hold_uuids, p_expires_at, p_metadata
    ) with ordinality as r (
      wallet_uuid, operation_type, operation_uuid, amount, fault, message,
      counterparty_uuid, hold_uuid, expires_at, metadata, ordinal
    )
  )

  select
    r.ordinal::int, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
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
  'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. '
  'Arrays of one length, with the arguments of apply_operation; those that may be null may be null as a whole. Returns one row per request, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), same_request (whether what is recorded under its operation_uuid is this request: true for an applied one; '
  'null where nothing is recorded), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA424, WA410, WA405, WA403, WA422, WA402, WA416 as in apply_operation. '
  'Also, for requests that were not tried and may be asked again: 55P03, under a lock_timeout, after WA409 (another transaction keeps a wallet '
  'locked, or the operation_uuid in flight); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. '
  'p_atomic: if any request is refused, none is applied, and the outcome of those that would have been is WA425. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension), 57014 (too late), and 0A000 unless the transaction is read committed.';

create or replace function wallet.apply_request(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb,
  p_not_after timestamptz
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_sqlstate text;
  v_message text;
  v_operation wallet.operation;
begin
  select
    a.sqlstate, a.message,
    a.wallet_uuid, a.operation_type, a.operation_uuid, a.seq, a.amount, a.balance_after, a.created_at,
    a.held_after, a.counterparty_uuid, a.hold_uuid, a.expires_at, a.metadata
  into
    v_sqlstate, v_message,
    v_operation.wallet_uuid, v_operation.operation_type, v_operation.operation_uuid, v_operation.seq, v_operation.amount,
    v_operation.balance_after, v_operation.created_at, v_operation.held_after, v_operation.counterparty_uuid, v_operation.hold_uuid,
    v_operation.expires_at, v_operation.metadata
  from wallet.apply_operations(
    array[p_wallet_uuid], array[p_operation_uuid], array[p_operation_type], array[p_amount], array[p_counterparty_uuid],
    array[p_hold_uuid], array[p_expires_at], array[p_metadata], p_not_after => p_not_after
  ) as a;

  if v_sqlstate is not null then
    raise exception using errcode = v_sqlstate, message = v_message;
  end if;

  return v_operation;
end
$$;

comment on function wallet.apply_request(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz) is
  'Internal: what apply_operation does, by way of apply_operations, where all is written that concerns holds.';

create or replace function wallet.expire_holds(p_wallet_uuid text, p_limit int default 1000)
returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_limit is null or p_limit < 1 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 2147483647';
  end if;

  begin
    perform 1
    from wallet.wallet as w
    where w.uuid = p_wallet_uuid
    for no key update;
  exception when lock_not_available then
    raise lock_not_available using message = wallet.fault_message('55P03');
  end;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  return wallet.record_expiries(p_wallet_uuid, clock_timestamp(), p_limit);
end
$$;

comment on function wallet.expire_holds(text, int) is
  'Records an EXPIRE for a wallet''s holds that are due, at most p_limit (1 to 2^31-1), the earliest first, and returns how many. '
  'Never required: a hold that is due counts no longer, recorded or not, and the wallet''s next operation records it. '
  'Raises WA400 (null or bad name, limit out of range), WA404 (no such wallet), 0A000 (another isolation level than read committed); '
  'under a lock_timeout also 55P03.';

create or replace function wallet.fault_message(p_sqlstate text)
returns text
language sql immutable
as $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA403' then 'Wallet is frozen'
    when 'WA404' then 'Wallet not found'
    when 'WA405' then 'Wallet is closed'
    when 'WA409' then 'Transaction already exists'
    when 'WA410' then 'Hold is closed'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA417' then 'Wallet is not empty'
    when 'WA419' then 'Wallet already exists'
    when 'WA422' then 'Currencies differ'
    when 'WA424' then 'Hold not found'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.get_wallet(p_wallet_uuid text, p_at timestamptz default null)
returns wallet.balance
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_wallet wallet.balance;
  v_then wallet.operation;
begin
  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  if v_wallet.seq > 0 and p_at is not null then
    v_wallet.seq := wallet.seq_before(p_wallet_uuid, p_at, p_inclusive => true);

    select o.* into v_then
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid and o.seq = v_wallet.seq;

    v_wallet.balance := coalesce(v_then.balance_after, 0);
    v_wallet.held := coalesce(v_then.held_after, 0);
    if v_wallet.held > 0 then
      v_wallet.held := v_wallet.held - wallet.due_amount(p_wallet_uuid, v_then.created_at, p_at);
    end if;
    v_wallet.available := v_wallet.balance - v_wallet.held;
    v_wallet.updated_at := coalesce(v_then.created_at, v_wallet.created_at);
  end if;

  return v_wallet;
end
$$;

comment on function wallet.get_wallet(text, timestamptz) is
  'Returns the wallet''s row of wallet.balance: uuid, id, currency, status, balance, held and available in minor units, seq, created_at, updated_at. '
  'A hold that is due is no longer held, whether its EXPIRE is recorded or not. '
  'p_at: a moment; balance, held, available, seq and updated_at are then those after the last operation at or before it (balance 0 and seq 0 before '
  'the first), less the holds due by then; currency and status are always today''s. Null: now. '
  'Raises WA400 (null or bad name), WA404 (no such wallet).';

create or replace function wallet.is_same_request(
  p_operation wallet.operation,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns boolean
language sql immutable
as $$
  select p_operation.operation_type = p_operation_type
    and (p_operation.amount = p_amount or p_operation_type = 'RELEASE')
    and p_operation.counterparty_uuid is not distinct from p_counterparty_uuid
    and p_operation.hold_uuid is not distinct from p_hold_uuid
    and p_operation.expires_at is not distinct from p_expires_at
    and p_operation.metadata is not distinct from nullif(p_metadata, '{}')
$$;

comment on function wallet.is_same_request(wallet.operation, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: whether an operation on record is what this request asks for. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.list_holds(p_wallet_uuid text, p_after_seq bigint default null, p_limit int default 100)
returns setof wallet.hold
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_moment timestamptz;
begin
  if p_after_seq < 0 then
    raise sqlstate 'WA400' using message = 'after_seq must be from 0 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  v_moment := greatest(clock_timestamp(), (wallet.get_wallet(p_wallet_uuid)).updated_at);

  return query
  select h.*
  from wallet.hold as h
  where h.wallet_uuid = p_wallet_uuid and h.seq > coalesce(p_after_seq, 0) and h.seq > 0 -- as hold_seq_idx says
    and (h.expires_at > v_moment) is not false
  order by h.seq
  limit p_limit;
end
$$;

comment on function wallet.list_holds(text, bigint, int) is
  'Returns a wallet''s open holds that are not due, oldest first: at most p_limit (1 to 1000) with a seq above p_after_seq (null: from the oldest). '
  'The next page starts after the last row''s seq; after a page with fewer than p_limit rows there is none. '
  'Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';

-- An operation records all holds that are due at its moment, so those that are still open were not due at the moment of the wallet's last
-- row: the search starts there and never meets the dead entries of the holds before.
create or replace function wallet.record_expiries(p_wallet_uuid text, p_moment timestamptz, p_limit int default null)
returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
declare
  v_last wallet.operation;
  v_until timestamptz;
  v_seq bigint := 9223372036854775807;
  v_count int;
begin
  select o.* into v_last
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid
  order by o.seq desc
  limit 1;

  v_until := greatest(p_moment, v_last.created_at);
  if p_limit is not null then
    select h.expires_at, h.seq into v_until, v_seq
    from (
      select h.expires_at, h.seq
      from wallet.hold as h
      where h.wallet_uuid = p_wallet_uuid and h.expires_at >= v_last.created_at and h.expires_at <= v_until
      order by h.expires_at, h.seq
      limit p_limit
    ) as h
    order by h.expires_at desc, h.seq desc
    limit 1;
  end if;

  with due as (
    delete from wallet.hold as h
    where h.wallet_uuid = p_wallet_uuid and h.expires_at >= v_last.created_at and (h.expires_at, h.seq) <= (v_until, v_seq)
    returning h.hold_uuid, h.seq, h.amount, h.expires_at
  )
  insert into wallet.operation
    (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, held_after, hold_uuid)
  select
    p_wallet_uuid, 'EXPIRE', d.hold_uuid, v_last.seq + row_number() over by_time, d.amount, v_last.balance_after, d.expires_at,
    v_last.held_after - sum(d.amount) over by_time, d.hold_uuid
  from due as d
  window by_time as (order by d.expires_at, d.seq);

  get diagnostics v_count = row_count;
  return v_count;
end
$$;

comment on function wallet.record_expiries(text, timestamptz, int) is
  'Internal: records an EXPIRE for each hold of a locked wallet that is due at a moment (the first p_limit of them; null: all) and returns how many.';

create or replace function wallet.state_fault(
  p_operation_type text,
  p_amount bigint,
  p_status text,
  p_balance bigint,
  p_currency text,
  p_payee_status text,
  p_payee_balance bigint,
  p_payee_currency text
)
returns text
language sql immutable
as $$
  select case
    when p_status = 'CLOSED' or p_payee_status = 'CLOSED' then 'WA405'
    when p_status = 'FROZEN' and p_operation_type <> 'DEPOSIT' and p_operation_type <> 'RELEASE' then 'WA403'
    when p_operation_type = 'DEPOSIT' then case when p_amount > 9223372036854775807 - p_balance then 'WA416' end
    when p_operation_type = 'TRANSFER' and p_currency is distinct from p_payee_currency then 'WA422'
    when p_amount > p_balance then 'WA402'
    when p_amount > 9223372036854775807 - p_payee_balance then 'WA416'
  end
$$;

comment on function wallet.state_fault(text, bigint, text, bigint, text, text, bigint, text) is
  'Internal: the SQLSTATE for an operation that the state of its wallets does not allow (the first of WA405, WA403, WA422, WA402, WA416), else null. '
  'p_balance: of a DEPOSIT the balance, of any other what the amount may be taken from. The payee''s state is null but for a TRANSFER. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence `is distinct from`, which sees nulls, and uniqueness.
-- New balances are numeric, so that no forged row can overflow them.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
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
  select 'closed wallet is empty', b.uuid, b.seq, format('balance %s, held %s', b.balance, b.held)
  from wallet.balance as b
  where b.status = 'CLOSED' and (b.balance <> 0 or b.held <> 0)
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
  select
    'an operation records the holds that are due', o.wallet_uuid, o.seq,
    format('hold %s, due at %s, is open; last operation at %s', o.hold_uuid, o.expires_at, h.last)
  from wallet.hold as o
  inner join (
    select h.wallet_uuid, max(h.created_at) as last
    from history as h
    where h.operation_type <> 'EXPIRE'
    group by h.wallet_uuid
  ) as h on h.wallet_uuid = o.wallet_uuid
  where o.expires_at <= h.last
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
  where h.seq is distinct from h.seq_before + 1
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
  'A wallet''s balance is what its last operation says, so it cannot tell that the last operations of a wallet are missing, unless they are transfers or concern holds.';

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

-- A session that has planned its calls before may have held money since.
set local lock_timeout = '2s';
lock table wallet.wallet in exclusive mode;

do $$
begin
  if exists (select from wallet.hold) or exists (select from wallet.operation where operation_type = 'HOLD') then
    raise exception 'refused: the ledger has holds, which would be lost; nothing was changed';
  end if;
end
$$;

create or replace view wallet.balance as
select -- noqa: ST06
  w.uuid,
  w.id,
  w.currency,
  w.status,
  coalesce(o.balance_after, 0) as balance,
  coalesce(o.held_after, 0) as held,
  coalesce(o.balance_after - o.held_after, 0) as available,
  coalesce(o.seq, 0) as seq,
  w.created_at,
  coalesce(o.created_at, w.created_at) as updated_at
from wallet.wallet as w
left join lateral (
  select
    l.balance_after,
    l.held_after,
    l.seq,
    l.created_at
  from wallet.operation as l
  where l.wallet_uuid = w.uuid
  order by l.seq desc
  limit 1
) as o on true;

comment on view wallet.balance is
  'One row per wallet: who it is and what its last operation says. balance, held, available: minor units, available = balance - held; '
  'seq: the number of its operations; updated_at: the created_at of the last one, of the wallet where there is none.';

-- Generated

drop function wallet.apply_request(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz);
drop function wallet.expire_holds(text, int);
drop function wallet.list_holds(text, bigint, int);
drop function wallet.record_expiries(text, timestamptz, int);

-- The row locks on the wallets come first, in the order of uuid, and are held to the end of the transaction: they put the
-- operations of a wallet in order, so nothing below them can race but the same operation_uuid on another wallet, where
-- the unique index decides. The last rows are read by statements of their own, which see what the lock waited for.
-- The state is checked before the duplicate because that is the order that costs a good operation
-- nothing; an operation that was applied and is sent again must hear that it exists, so the failing paths look for it.
-- A plain insert whose unique_violation is caught costs less than one that is on conflict do nothing.
-- Sequential scans are off, here and in what reads: a session keeps a plan that it made while the ledger was empty.
create or replace function wallet.apply_operation(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint default null,
  p_counterparty_uuid text default null,
  p_hold_uuid uuid default null,
  p_expires_at timestamptz default null,
  p_metadata jsonb default null,
  p_not_after timestamptz default null
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_fault text := wallet.argument_fault(
    p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata
  );
  v_status text;
  v_balance bigint;
  v_seq bigint;
  v_last timestamptz;
  v_now timestamptz;

  v_currency text;
  v_payee_status text;
  v_payee_currency text;
  v_payee_balance bigint;
  v_payee_seq bigint;
  v_payee_last timestamptz;
  v_missed text[] := '{}';

  v_operation wallet.operation;
  v_constraint text;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  begin
    if p_counterparty_uuid is null then
      select w.status into v_status
      from wallet.wallet as w
      where w.uuid = p_wallet_uuid
      for no key update;
    else
      select
        l.statuses[array_position(l.uuids, p_wallet_uuid)], l.currencies[array_position(l.uuids, p_wallet_uuid)],
        l.statuses[array_position(l.uuids, p_counterparty_uuid)], l.currencies[array_position(l.uuids, p_counterparty_uuid)],
        l.missed
      into v_status, v_currency, v_payee_status, v_payee_currency, v_missed
      from wallet.lock_wallets(array[p_wallet_uuid, p_counterparty_uuid]) as l;

      select o.balance_after, o.seq, o.created_at
      into v_payee_balance, v_payee_seq, v_payee_last
      from wallet.operation as o
      where o.wallet_uuid = p_counterparty_uuid
      order by o.seq desc
      limit 1;
    end if;

    if (v_status is null and coalesce(p_wallet_uuid <> all(v_missed), true))
      or (p_counterparty_uuid is not null and v_payee_status is null and p_counterparty_uuid <> all(v_missed)) then
      perform wallet.raise_wallet_not_found(p_wallet_uuid, p_counterparty_uuid);
    elsif v_missed <> '{}' then
      raise lock_not_available;
    end if;

    select o.balance_after, o.seq, o.created_at
    into v_balance, v_seq, v_last
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid
    order by o.seq desc
    limit 1;

    v_balance := coalesce(v_balance, 0);
    v_now := greatest(clock_timestamp(), v_last, v_payee_last);
    v_fault := wallet.state_fault(
      p_operation_type, p_amount, v_status, v_balance, v_currency, v_payee_status, coalesce(v_payee_balance, 0), v_payee_currency
    );

    if v_fault is not null then
      if exists (
        select from wallet.operation as o
        where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
      ) then
        v_fault := 'WA409';
      end if;
      raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
    end if;

    insert into wallet.operation
      (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
    values (
      p_wallet_uuid, p_operation_type, p_operation_uuid, coalesce(v_seq, 0) + 1, p_amount,
      v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end,
      v_now, p_counterparty_uuid, nullif(p_metadata, '{}')
    )
    returning * into v_operation;

    if p_counterparty_uuid is not null then
      insert into wallet.operation
        (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
      values (
        p_counterparty_uuid, 'RECEIVE', p_operation_uuid, coalesce(v_payee_seq, 0) + 1, p_amount,
        coalesce(v_payee_balance, 0) + p_amount,
        v_now, p_wallet_uuid, v_operation.metadata
      );
    end if;

    if clock_timestamp() >= p_not_after then
      perform wallet.raise_too_late();
    end if;

    return v_operation;
  exception
    when unique_violation then
      get stacked diagnostics v_constraint = constraint_name;
      if v_constraint <> 'operation_requested_idx' then
        raise;
      end if;
      v_fault := 'WA409';
    when lock_not_available then
      v_fault := case
        when exists (
          select from wallet.operation as o
          where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
        ) then 'WA409'
        else '55P03'
      end;
  end;

  raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
end
$$;

comment on function wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz) is
  'Applies one operation exactly once and returns its row; for a transfer, the payer''s. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT, WITHDRAW or TRANSFER; p_amount: minor units, 1 to 2^63-1; p_counterparty_uuid: the payee of a TRANSFER, '
  'else null; p_metadata: an object of at most 2,048 octets as text ({} is null); p_not_after: the last moment of the call by the database''s clock; '
  'p_hold_uuid, p_expires_at: null. '
  'Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA405 (a wallet is closed), WA403 (the wallet is frozen), WA422 (the wallets'' currencies differ), WA402 (not enough money), '
  'WA416 (a balance would pass 2^63-1); under a lock_timeout also 55P03, after WA409 (another transaction keeps '
  'a wallet locked, or the operation_uuid in flight); 57014 (too late); 0A000 unless the transaction is read committed. '
  'A refused operation leaves nothing behind.';

-- Every wallet of the batch is locked first, and then every insert goes in the order of operation_uuid: two batches that share
-- wallets or operations wait for each other in one direction only. The wallets' last rows are read by a statement of its own,
-- which sees what the locks waited for.
--
-- An attempt is one block, and so one subtransaction: decide, insert. What it meets decides how the next one goes.
--
-- A batch without duplicates pays nothing for them: it inserts, and looks up what is recorded already only when the unique
-- index objects, or when a refusal may be a repeat and must then hear that it exists. Whoever held one of the operation_uuids
-- has committed by then, because the insert waited for it, so each look-up that follows such an objection finds more of them
-- than the one before.
--
-- What else the database refuses (a constraint, a trigger, an operation_uuid that stays in flight) it refuses to a single
-- request, and doesn't say to which. Both halves of the batch are then applied by themselves, one after the other, down to
-- that request. All wallets stay locked meanwhile.
--
-- An atomic batch is applied as any other, and all of it is taken back if any request was refused.
--
-- The decisions run in the order of the requests, over arrays: one entry a request for what comes out (by ordinal), one a
-- wallet for the state in between (by number; v_numbers is the dictionary from uuid to number). What is null as a whole in most
-- calls is looked up by ordinal, since each array that is unnested costs every row. The plans are pinned to
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
  v_step text; -- what the attempt is about, when it ends by an error
  v_halve boolean := false;

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
  v_last_times timestamptz[]; -- null: none is later than the clock
  v_balances bigint[];
  v_wallet_seqs bigint[];
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

  v_careful boolean; -- there is more to do than for deposits and withdrawals that are all good
  v_look_up boolean := false;
  v_recorded boolean[];
  v_recorded_count bigint;
  v_recorded_before bigint := -1;
  v_firsts bigint[]; -- by ordinal: the ordinal of the first request with the same operation_uuid
  v_taken boolean[];
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_wallet_uuids is null or p_operation_uuids is null or p_operation_types is null or p_amounts is null then
    raise sqlstate 'WA400' using message = 'arrays must not be null';
  elsif array_ndims(p_wallet_uuids) > 1 or array_ndims(p_operation_uuids) > 1
    or array_ndims(p_operation_types) > 1 or array_ndims(p_amounts) > 1
    or array_ndims(p_counterparty_uuids) > 1 or array_ndims(p_hold_uuids) > 1
    or array_ndims(p_expires_at) > 1 or array_ndims(p_metadata) > 1 then
    raise sqlstate 'WA400' using message = 'arrays must have one dimension';
  elsif v_count <> cardinality(p_operation_uuids) or v_count <> cardinality(p_operation_types)
    or v_count <> cardinality(p_amounts)
    or v_count <> cardinality(p_counterparty_uuids) or v_count <> cardinality(p_hold_uuids)
    or v_count <> cardinality(p_expires_at) or v_count <> cardinality(p_metadata) then
    raise sqlstate 'WA400' using message = 'arrays must have the same length';
  elsif p_atomic is null then
    raise sqlstate 'WA400' using message = 'atomic must not be null';
  end if;

  p_wallet_uuids := p_wallet_uuids[:]; -- a slice starts at 1, whatever the array did
  p_operation_uuids := p_operation_uuids[:];
  p_operation_types := p_operation_types[:];
  p_amounts := p_amounts[:];
  p_counterparty_uuids := p_counterparty_uuids[:];
  p_hold_uuids := p_hold_uuids[:];
  p_expires_at := p_expires_at[:];
  p_metadata := p_metadata[:];

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
      case when max(o.created_at) > v_now then array_agg(o.created_at) end
    into v_numbers, v_last_balances, v_last_seqs, v_last_times
    from unnest(v_uuids) with ordinality as n (uuid, number)
    left join lateral (
      select l.balance_after, l.seq, l.created_at
      from wallet.operation as l
      where l.wallet_uuid = n.uuid
      order by l.seq desc
      limit 1
    ) as o on true;
  end if;

  <<attempt>>
  while not p_atomic loop
    begin
      if v_halve then
        v_step := 'halves';
        v_half := v_count / 2;
        if v_lock_timeout <> '0' then
          perform set_config('lock_timeout', '1', true); -- what is here is locked, and what is not was waited for
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

        v_careful := v_look_up or p_counterparty_uuids is not null or v_times is not null;

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
            end if;
          end if;

          if v_fault is null then
            v_fault := wallet.state_fault(
              v_type, v_amount, v_statuses[v_number], v_balances[v_number], v_currencies[v_number],
              v_statuses[v_payee], v_balances[v_payee], v_currencies[v_payee]
            );
          end if;

          if v_fault is not null then
            if not v_look_up and v_fault not in ('WA400', 'WA404') then
              v_look_up := true;
              continue decision;
            end if;
            v_faults[v_ordinal] := v_fault;
            continue;
          end if;

          v_balance := v_balances[v_number] + case v_type when 'DEPOSIT' then v_amount else -v_amount end;
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
          end if;
        end loop;

        exit;
      end loop;

      v_step := 'write';
      if v_payee_seqs is null then
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, metadata)
        select
          r.wallet_uuid, r.operation_type, r.operation_uuid, r.seq, r.amount, r.balance_after,
          coalesce(v_moments[r.ordinal], v_now), nullif(p_metadata[r.ordinal], '{}')
        from unnest(p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after) with ordinality
          as r (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, ordinal)
        where r.seq is not null
        order by r.operation_uuid;
      else
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
        select
          s.wallet_uuid, s.operation_type, r.operation_uuid, s.seq, r.amount, s.balance_after, coalesce(r.moment, v_now),
          s.counterparty_uuid, nullif(r.metadata, '{}')
        from unnest(
          p_wallet_uuids, p_operation_types, p_operation_uuids, v_seqs, p_amounts, v_balances_after, v_moments, p_metadata,
          p_counterparty_uuids, v_payee_seqs, v_payee_balances_after
        ) as r (
          wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, moment, metadata,
          counterparty_uuid, payee_seq, payee_balance_after
        )
        cross join lateral (
          values
          (r.wallet_uuid, r.operation_type, r.seq, r.balance_after, r.counterparty_uuid, 1),
          (r.counterparty_uuid, 'RECEIVE', r.payee_seq, r.payee_balance_after, r.wallet_uuid, 2)
        ) as s (wallet_uuid, operation_type, seq, balance_after, counterparty_uuid, side)
        where s.seq is not null
        order by r.operation_uuid, s.side;
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

  if clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  if not v_look_up then
    return query
    select
      r.ordinal::int,
      r.fault,
      coalesce(r.message, wallet.fault_message(r.fault)),
      case when r.seq is not null then true end,
      case when r.seq is not null then r.wallet_uuid end,
      case when r.seq is not null then r.operation_type end,
      case when r.seq is not null then r.operation_uuid end,
      r.seq,
      case when r.seq is not null then r.amount end,
      r.balance_after,
      case when r.seq is not null then coalesce(v_moments[r.ordinal], v_now) end,
      case when r.seq is not null then 0::bigint end,
      case when r.seq is not null then p_counterparty_uuids[r.ordinal] end,
      null::uuid,
      null::timestamptz,
      case when r.seq is not null then nullif(p_metadata[r.ordinal], '{}') end
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
    where o.operation_uuid = any(p_operation_uuids) and o.operation_type not in ('RECEIVE', 'EXPIRE')
  ),

  request as (
    select r.*
    from unnest(
      p_wallet_uuids, p_operation_types, p_operation_uuids, p_amounts, v_faults, v_messages,
      p_counterparty_uuids, p_hold_uuids, p_expires_at, p_metadata
    ) with ordinality as r (
      wallet_uuid, operation_type, operation_uuid, amount, fault, message,
      counterparty_uuid, hold_uuid, expires_at, metadata, ordinal
    )
  )

  select
    r.ordinal::int, r.fault, coalesce(r.message, wallet.fault_message(r.fault)),
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
  'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. '
  'Arrays of one length, with the arguments of apply_operation; those that may be null may be null as a whole. Returns one row per request, in order: ordinal '
  '(from 1), sqlstate and message (null: applied), same_request (whether what is recorded under its operation_uuid is this request: true for an applied one; '
  'null where nothing is recorded), and the row of the applied operation, or of the recorded one where the '
  'sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA405, WA403, WA422, WA402, WA416 as in apply_operation. '
  'Also, for requests that were not tried and may be asked again: 55P03, under a lock_timeout, after WA409 (another transaction keeps a wallet '
  'locked, or the operation_uuid in flight); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. '
  'p_atomic: if any request is refused, none is applied, and the outcome of those that would have been is WA425. '
  'Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension), 57014 (too late), and 0A000 unless the transaction is read committed.';

create or replace function wallet.fault_message(p_sqlstate text)
returns text
language sql immutable
as $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA403' then 'Wallet is frozen'
    when 'WA404' then 'Wallet not found'
    when 'WA405' then 'Wallet is closed'
    when 'WA409' then 'Transaction already exists'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA417' then 'Wallet is not empty'
    when 'WA419' then 'Wallet already exists'
    when 'WA422' then 'Currencies differ'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.get_wallet(p_wallet_uuid text, p_at timestamptz default null)
returns wallet.balance
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_wallet wallet.balance;
  v_seq bigint;
  v_then wallet.operation;
begin
  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  if v_wallet.seq > 0 and p_at < v_wallet.updated_at then
    v_seq := wallet.seq_before(p_wallet_uuid, p_at, p_inclusive => true);

    select o.* into v_then
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid and o.seq = v_seq;

    v_wallet.balance := coalesce(v_then.balance_after, 0);
    v_wallet.held := coalesce(v_then.held_after, 0);
    v_wallet.available := v_wallet.balance - v_wallet.held;
    v_wallet.seq := coalesce(v_then.seq, 0);
    v_wallet.updated_at := coalesce(v_then.created_at, v_wallet.created_at);
  end if;

  return v_wallet;
end
$$;

comment on function wallet.get_wallet(text, timestamptz) is
  'Returns the wallet''s row of wallet.balance: uuid, id, currency, status, balance, held and available in minor units, seq, created_at, updated_at. '
  'p_at: a moment; balance, held, available, seq and updated_at are then those after the last operation at or before it (balance 0 and seq 0 before '
  'the first); currency and status are always today''s. Null: now. '
  'Raises WA400 (null or bad name), WA404 (no such wallet).';

create or replace function wallet.is_same_request(
  p_operation wallet.operation,
  p_operation_type text,
  p_amount bigint,
  p_counterparty_uuid text,
  p_hold_uuid uuid,
  p_expires_at timestamptz,
  p_metadata jsonb
)
returns boolean
language sql immutable
as $$
  select p_operation.operation_type = p_operation_type
    and p_operation.amount = p_amount
    and p_operation.counterparty_uuid is not distinct from p_counterparty_uuid
    and p_operation.hold_uuid is not distinct from p_hold_uuid
    and p_operation.expires_at is not distinct from p_expires_at
    and p_operation.metadata is not distinct from nullif(p_metadata, '{}')
$$;

comment on function wallet.is_same_request(wallet.operation, text, bigint, text, uuid, timestamptz, jsonb) is
  'Internal: whether an operation on record is what this request asks for. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

create or replace function wallet.state_fault(
  p_operation_type text,
  p_amount bigint,
  p_status text,
  p_balance bigint,
  p_currency text,
  p_payee_status text,
  p_payee_balance bigint,
  p_payee_currency text
)
returns text
language sql immutable
as $$
  select case
    when p_status = 'CLOSED' or p_payee_status = 'CLOSED' then 'WA405'
    when p_status = 'FROZEN' and p_operation_type <> 'DEPOSIT' then 'WA403'
    when p_operation_type = 'DEPOSIT' then case when p_amount > 9223372036854775807 - p_balance then 'WA416' end
    when p_operation_type = 'TRANSFER' and p_currency is distinct from p_payee_currency then 'WA422'
    when p_amount > p_balance then 'WA402'
    when p_amount > 9223372036854775807 - p_payee_balance then 'WA416'
  end
$$;

comment on function wallet.state_fault(text, bigint, text, bigint, text, text, bigint, text) is
  'Internal: the SQLSTATE for an operation that the state of its wallets does not allow (the first of WA405, WA403, WA422, WA402, WA416), else null. '
  'The payee''s state is null but for a TRANSFER. '
  'Neither security definer nor pinned, so that it is inlined into its callers, which are.';

-- One statement, so one snapshot: it may run beside any number of writers. What the constraints forbid is checked again,
-- since whoever can tamper with rows can drop constraints too: hence `is distinct from`, which sees nulls, and uniqueness.
-- New balances are numeric, so that no forged row can overflow them.
create or replace function wallet.verify()
returns table (invariant text, wallet_uuid text, seq bigint, detail text)
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
as $$
  with history as materialized (
    select
      o.*,
      case
        when o.operation_type in ('DEPOSIT', 'RECEIVE') then o.amount::numeric
        when o.operation_type in ('WITHDRAW', 'TRANSFER') then -o.amount::numeric
      end as change,
      lag(o.seq, 1, 0::bigint) over by_seq as seq_before,
      lag(o.balance_after, 1, 0::bigint) over by_seq as balance_before,
      lag(o.created_at) over by_seq as time_before
    from wallet.operation as o
    window by_seq as (partition by o.wallet_uuid order by o.seq)
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
  select 'closed wallet is empty', b.uuid, b.seq, format('balance %s, held %s', b.balance, b.held)
  from wallet.balance as b
  where b.status = 'CLOSED' and (b.balance <> 0 or b.held <> 0)
  union all
  select 'operation belongs to a wallet', h.wallet_uuid, h.seq, format('operation %s', h.operation_uuid)
  from history as h
  where not exists (select from wallet.wallet as w where w.uuid = h.wallet_uuid)
  union all
  select 'operation has no nulls', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.wallet_uuid is null or h.operation_type is null or h.operation_uuid is null or h.seq is null
    or h.amount is null or h.balance_after is null or h.held_after is null or h.created_at is null
  union all
  select 'operation is well formed', h.wallet_uuid, h.seq, h::text
  from history as h
  where h.operation_type not in ('DEPOSIT', 'WITHDRAW', 'TRANSFER', 'RECEIVE')
    or h.operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid
    or h.amount <= 0 or h.balance_after < 0
    or jsonb_typeof(h.metadata) <> 'object' or h.metadata = '{}' or octet_length(h.metadata::text) > 2048
  union all
  select 'nothing is held', h.wallet_uuid, h.seq, format('held_after %s, hold %s, expires at %s', h.held_after, h.hold_uuid, h.expires_at)
  from history as h
  where h.held_after <> 0 or h.hold_uuid is not null or h.expires_at is not null
  union all
  select 'a transfer and nothing else has a counterparty', h.wallet_uuid, h.seq, format('%s, counterparty %s', h.operation_type, h.counterparty_uuid)
  from history as h
  where (h.operation_type in ('TRANSFER', 'RECEIVE')) <> (h.counterparty_uuid is not null) or h.counterparty_uuid = h.wallet_uuid
  union all
  select 'operation_uuid is unique', min(h.wallet_uuid), min(h.seq), format('operation %s stands %s times', h.operation_uuid, count(*))
  from history as h
  group by h.operation_uuid, h.operation_type = 'RECEIVE'
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
  'A wallet''s balance is what its last operation says, so it cannot tell that the last operations of a wallet are missing, unless they are transfers.';

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
