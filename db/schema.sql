\restrict dbmate

-- Dumped from database version 18.4
-- Dumped by pg_dump version 18.4

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

--
-- Name: wallet; Type: SCHEMA; Schema: -; Owner: -
--

CREATE SCHEMA wallet;


--
-- Name: SCHEMA wallet; Type: COMMENT; Schema: -; Owner: -
--

COMMENT ON SCHEMA wallet IS 'Wallets and their operations. Money moves only through the functions of this schema; amounts are whole minor units.';


--
-- Name: any_argument_fault(text, uuid, text, bigint, text, uuid, timestamp with time zone, jsonb); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.any_argument_fault(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb) RETURNS text
    LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return case
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
  end;
end
$$;


--
-- Name: FUNCTION any_argument_fault(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.any_argument_fault(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb) IS 'Internal: the message of WA400 for an operation that no wallet can accept, else null; wallet names are checked elsewhere, and only if no such wallet was found. The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. A function of its own, so that a session prepares its expressions only where it needs them.';


SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: operation; Type: TABLE; Schema: wallet; Owner: -
--

CREATE TABLE wallet.operation (
    wallet_uuid text NOT NULL COLLATE pg_catalog."C",
    operation_type text NOT NULL COLLATE pg_catalog."C",
    operation_uuid uuid NOT NULL,
    seq bigint NOT NULL,
    amount bigint NOT NULL,
    balance_after bigint NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    held_after bigint DEFAULT 0 NOT NULL,
    counterparty_uuid text COLLATE pg_catalog."C",
    hold_uuid uuid,
    expires_at timestamp with time zone,
    metadata jsonb,
    CONSTRAINT operation_amount_check CHECK ((amount > 0)),
    CONSTRAINT operation_held_after_check CHECK (((held_after >= 0) AND (balance_after >= held_after))),
    CONSTRAINT operation_operation_type_check CHECK ((operation_type = ANY ('{DEPOSIT,WITHDRAW,TRANSFER,RECEIVE,HOLD,RELEASE,EXPIRE}'::text[]))),
    CONSTRAINT operation_seq_check CHECK ((seq > 0))
);


--
-- Name: TABLE operation; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON TABLE wallet.operation IS 'The ledger, and the state: one row per applied operation, append-only; a wallet''s balance is the balance_after of its last row. A rejected operation leaves nothing here.';


--
-- Name: COLUMN operation.wallet_uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.wallet_uuid IS 'The wallet that the operation was applied to.';


--
-- Name: COLUMN operation.operation_type; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.operation_type IS 'DEPOSIT adds the amount to the balance, WITHDRAW takes it off. TRANSFER takes it off here, and a RECEIVE of the counterparty, under the same operation_uuid, adds it there. HOLD holds the amount; a WITHDRAW, TRANSFER, RELEASE or EXPIRE ends the whole hold, even if it takes only a part of it.';


--
-- Name: COLUMN operation.operation_uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.operation_uuid IS 'The client''s name for the operation, unique over all wallets among the operations that were asked for: applied once, whatever is sent again. A RECEIVE has that of its TRANSFER, an EXPIRE that of its HOLD.';


--
-- Name: COLUMN operation.seq; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.seq IS 'Position in the wallet''s history: 1, 2, 3 ... without gaps.';


--
-- Name: COLUMN operation.amount; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.amount IS 'Minor units, 1 to 2^63-1.';


--
-- Name: COLUMN operation.balance_after; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.balance_after IS 'Minor units: the wallet''s balance once the operation was applied.';


--
-- Name: COLUMN operation.created_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.created_at IS 'When the operation was applied; never earlier than the wallet''s operation before it. The same in both rows of a transfer. Of an EXPIRE: when the hold expired. Order comes from seq.';


--
-- Name: COLUMN operation.held_after; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.held_after IS 'Minor units: how much of balance_after was held; 0 to balance_after.';


--
-- Name: COLUMN operation.counterparty_uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.counterparty_uuid IS 'The other wallet of a TRANSFER or RECEIVE; null for all other types.';


--
-- Name: COLUMN operation.hold_uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.hold_uuid IS 'The hold that this operation ended: the operation_uuid of its HOLD; null where it ended none.';


--
-- Name: COLUMN operation.expires_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.expires_at IS 'Of a HOLD: from when on it counts no longer and cannot be captured; null where it stays until it is ended.';


--
-- Name: COLUMN operation.metadata; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.operation.metadata IS 'What the caller wanted to stand with the operation: an object of at most 2,048 octets as text, not empty; null where there is none.';


--
-- Name: apply_operation(text, uuid, text, bigint, text, uuid, timestamp with time zone, jsonb, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint DEFAULT NULL::bigint, p_counterparty_uuid text DEFAULT NULL::text, p_hold_uuid uuid DEFAULT NULL::uuid, p_expires_at timestamp with time zone DEFAULT NULL::timestamp with time zone, p_metadata jsonb DEFAULT NULL::jsonb, p_not_after timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS wallet.operation
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_fault text := wallet.argument_fault(
    p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata
  );
  v_status text;
  v_balance bigint;
  v_held bigint;
  v_seq bigint;
  v_last timestamptz;

  v_currency text;
  v_payee_status text;
  v_payee_currency text;
  v_payee_balance bigint;
  v_payee_held bigint;
  v_payee_seq bigint;
  v_payee_last timestamptz;
  v_missed text[];

  v_operation wallet.operation;
  v_constraint text;
begin
  if v_fault is not null or p_operation_type = 'HOLD' or p_hold_uuid is not null
    or current_setting('transaction_isolation') <> 'read committed' then
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
      perform wallet.raise_isolation_level();
    elsif v_fault is not null then
      raise sqlstate 'WA400' using message = v_fault;
    elsif p_operation_type = 'HOLD' or p_hold_uuid is not null then
      return wallet.apply_request(
        p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata, p_not_after
      );
    end if;
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

    if v_status is null or (p_counterparty_uuid is not null and v_payee_status is null) then
      if (v_status is null and coalesce(p_wallet_uuid <> all(v_missed), true))
        or (p_counterparty_uuid is not null and v_payee_status is null and p_counterparty_uuid <> all(v_missed)) then
        perform wallet.raise_wallet_not_found(p_wallet_uuid, p_counterparty_uuid);
      end if;
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

    v_fault := wallet.state_fault(
      p_operation_type, p_amount, v_status, coalesce(v_balance, 0), v_currency, v_payee_status, coalesce(v_payee_balance, 0), v_payee_currency
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
      coalesce(v_balance, 0) + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end,
      greatest(clock_timestamp(), v_last, v_payee_last), p_counterparty_uuid, nullif(p_metadata, '{}')
    )
    returning * into v_operation;

    if p_counterparty_uuid is not null then
      insert into wallet.operation
        (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at, counterparty_uuid, metadata)
      values (
        p_counterparty_uuid, 'RECEIVE', p_operation_uuid, coalesce(v_payee_seq, 0) + 1, p_amount,
        coalesce(v_payee_balance, 0) + p_amount,
        v_operation.created_at, p_wallet_uuid, v_operation.metadata
      );
    end if;

    if clock_timestamp() >= p_not_after then
      perform wallet.raise_too_late();
    end if;

    return v_operation;
  exception
    when lock_not_available then
      v_fault := case
        when exists (
          select from wallet.operation as o
          where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
        ) then 'WA409'
        else '55P03'
      end;
    when others then -- a repeat may meet other constraints and triggers before the unique index
      get stacked diagnostics v_fault = returned_sqlstate, v_constraint = constraint_name;
      if v_fault ~ '^(WA|08|25|40|53|57|58|XX)' or (
        v_constraint <> 'operation_requested_idx' and not exists (
          select from wallet.operation as o
          where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE')
        )
      ) then
        raise;
      end if;
      v_fault := 'WA409';
  end;

  raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
end
$$;


--
-- Name: FUNCTION apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb, p_not_after timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb, p_not_after timestamp with time zone) IS 'Applies one operation exactly once and returns its row; for a transfer, the payer''s. p_operation_uuid: the caller''s name for the operation, not the nil UUID; p_operation_type: DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE; p_amount: minor units, 1 to 2^63-1, null for RELEASE; p_counterparty_uuid: the payee of a TRANSFER, else null; p_hold_uuid: the hold, that is the operation_uuid of a HOLD of this wallet, which a RELEASE ends, or from which a WITHDRAW or TRANSFER takes its amount (a capture: the hold ends, and what is left of it is available again); else null; p_expires_at: of a HOLD, from when on it counts no longer, in the years 1 to 9999, or null; p_metadata: an object of at most 2,048 octets as text ({} is null); p_not_after: the caller''s deadline by the database''s clock. Raises, the first that applies: 0A000 (the transaction is not read committed), WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), WA424 (this wallet has no such hold), WA410 (the hold is captured, released or expired, or a new HOLD''s p_expires_at has passed), WA405 (a wallet is closed), WA403 (the wallet is frozen), WA422 (the wallets'' currencies differ), WA402 (not enough money available; a capture of more than is held), WA416 (a balance would pass 2^63-1); under a lock_timeout also 55P03, which ranks after WA409 (another transaction keeps a wallet locked, or is applying the same operation_uuid); 57014 (too late). A refused operation leaves nothing behind.';


--
-- Name: apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamp with time zone[], jsonb[], boolean, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[], p_counterparty_uuids text[] DEFAULT NULL::text[], p_hold_uuids uuid[] DEFAULT NULL::uuid[], p_expires_at timestamp with time zone[] DEFAULT NULL::timestamp with time zone[], p_metadata jsonb[] DEFAULT NULL::jsonb[], p_atomic boolean DEFAULT false, p_not_after timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS TABLE(ordinal integer, sqlstate text, message text, same_request boolean, wallet_uuid text, operation_type text, operation_uuid uuid, seq bigint, amount bigint, balance_after bigint, created_at timestamp with time zone, held_after bigint, counterparty_uuid text, hold_uuid uuid, expires_at timestamp with time zone, metadata jsonb)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    SET enable_nestloop TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
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


--
-- Name: FUNCTION apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[], p_counterparty_uuids text[], p_hold_uuids uuid[], p_expires_at timestamp with time zone[], p_metadata jsonb[], p_atomic boolean, p_not_after timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[], p_counterparty_uuids text[], p_hold_uuids uuid[], p_expires_at timestamp with time zone[], p_metadata jsonb[], p_atomic boolean, p_not_after timestamp with time zone) IS 'Applies a batch of operations as apply_operation would, one after another in the order given, in one transaction: the good ones stay, the others are refused. Arrays of one length, with the arguments of apply_operation; those that may be null may be null as a whole. Returns one row per operation, in order: ordinal (from 1), sqlstate and message (null: applied), same_request (whether what is recorded under its operation_uuid is this request: true for an applied one; null where nothing is recorded), and the row of the applied operation, or of the recorded one where the sqlstate is WA409 and it belongs to the same wallet. Outcomes per operation: WA400, WA404, WA409, WA424, WA410, WA405, WA403, WA422, WA402, WA416 as in apply_operation. Also, for requests that were not applied and may be asked again: 55P03, under a lock_timeout, which ranks after WA409 (another transaction keeps a wallet locked, or is applying the same operation_uuid); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. p_atomic: if any operation is refused, none is applied, and the outcome of those that would have been is WA425. Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and a null p_atomic, 57014 (too late), 0A000 unless the transaction is read committed, under a lock_timeout 55P03 if a table is locked, and 40P01 (nothing was applied: call again) if another batch names the same operation_uuids, and one of the two is applied in parts, because the database refused one of its operations or the database''s clock was set back; not if either has a lock_timeout below deadlock_timeout.';


--
-- Name: apply_request(text, uuid, text, bigint, text, uuid, timestamp with time zone, jsonb, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.apply_request(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb, p_not_after timestamp with time zone) RETURNS wallet.operation
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


--
-- Name: FUNCTION apply_request(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb, p_not_after timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.apply_request(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb, p_not_after timestamp with time zone) IS 'Internal: what apply_operation does, by way of apply_operations, which alone handles holds.';


--
-- Name: argument_fault(text, uuid, text, bigint, text, uuid, timestamp with time zone, jsonb); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.argument_fault(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
  select case
    when p_amount > 0 and p_operation_uuid <> '00000000-0000-0000-0000-000000000000'::uuid
      and p_hold_uuid is null and p_expires_at is null and p_metadata is null
      and case
        when p_counterparty_uuid is null then p_operation_type = 'DEPOSIT' or p_operation_type = 'WITHDRAW'
        else p_operation_type = 'TRANSFER' and p_counterparty_uuid <> p_wallet_uuid
      end
      then null
    else wallet.any_argument_fault(
      p_wallet_uuid, p_operation_uuid, p_operation_type, p_amount, p_counterparty_uuid, p_hold_uuid, p_expires_at, p_metadata
    )
  end
$$;


--
-- Name: FUNCTION argument_fault(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.argument_fault(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb) IS 'Internal: returns what any_argument_fault returns, but does not call it for a well-formed deposit, withdrawal or transfer without metadata and without a hold. No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';


--
-- Name: contract_version(); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.contract_version() RETURNS integer
    LANGUAGE sql IMMUTABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
  select 5
$$;


--
-- Name: FUNCTION contract_version(); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.contract_version() IS 'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';


--
-- Name: create_key(text, text[], text, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.create_key(p_name text, p_scopes text[], p_wallet_prefix text DEFAULT NULL::text, p_expires_at timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_fault text := coalesce(
    replace(wallet.name_fault(p_name), 'wallet_uuid', 'name'),
    case when p_wallet_prefix is not null then replace(wallet.name_fault(p_wallet_prefix), 'wallet_uuid', 'wallet_prefix') end
  );
  v_secret text;
  v_digest bytea;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  elsif array_ndims(p_scopes) is distinct from 1 or array_position(p_scopes, null) is not null
    or not p_scopes <@ array['read', 'create', 'deposit', 'withdraw', 'transfer', 'hold', 'admin', 'metrics']
    then
    raise sqlstate 'WA400' using message = 'scopes must be one or more of read, create, deposit, withdraw, transfer, hold, admin and metrics';
  elsif p_expires_at < '0001-01-01 00:00:00+00' or p_expires_at >= '10000-01-01 00:00:00+00' then
    raise sqlstate 'WA400' using message = 'expires_at must be in the years 1 to 9999';
  end if;

  -- 122 random bits in each UUID (RFC 9562, section 5.4), 256 in the hash; base64url without padding (RFC 4648, section 5).
  v_secret := encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64');
  v_secret := 'wk_' || translate(v_secret, '+/=', '-_');
  v_digest := sha256(convert_to(v_secret, 'UTF8'));

  insert into wallet.key (name, digest, scopes, wallet_prefix, expires_at)
  values (p_name, v_digest, array(select distinct s.scope collate "C" from unnest(p_scopes) as s (scope) order by 1), p_wallet_prefix, p_expires_at)
  on conflict do nothing;

  if not found then
    raise sqlstate 'WA420' using message = wallet.fault_message('WA420');
  end if;

  return v_secret;
end
$$;


--
-- Name: FUNCTION create_key(p_name text, p_scopes text[], p_wallet_prefix text, p_expires_at timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.create_key(p_name text, p_scopes text[], p_wallet_prefix text, p_expires_at timestamp with time zone) IS 'Makes a key for REST callers and returns its secret, which is stored nowhere and never shown again: wk_ and 43 characters of A-Z, a-z, 0-9, _ and -. p_name: 1 to 64 characters of A-Z, a-z, 0-9, _ and -; it stays taken for good. p_scopes: one or more of read, create, deposit, withdraw, transfer, hold, admin and metrics. p_wallet_prefix: the key reaches only wallets whose names begin so, byte for byte; null for all. p_expires_at: from when on it is refused, by the database''s clock; null for never. A past time is accepted: the key is refused from the start. Raises WA400 (bad name, scopes, prefix or expiry), WA420 (the key exists, perhaps revoked or expired), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';


--
-- Name: due_amount(text, timestamp with time zone, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.due_amount(p_wallet_uuid text, p_from timestamp with time zone, p_until timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS bigint
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_until timestamptz := greatest(p_from, coalesce(p_until, clock_timestamp()));
begin
  return (
    select coalesce(sum(h.amount), 0)
    from wallet.hold as h
    where h.wallet_uuid = p_wallet_uuid and h.expires_at >= p_from and h.expires_at <= v_until
  );
end
$$;


--
-- Name: FUNCTION due_amount(p_wallet_uuid text, p_from timestamp with time zone, p_until timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.due_amount(p_wallet_uuid text, p_from timestamp with time zone, p_until timestamp with time zone) IS 'Internal: the sum of a wallet''s holds that have expired by p_until (null: now) but have no EXPIRE yet, in minor units. p_from: the created_at of the wallet''s last row. The view wallet.balance calls it with the rights of whoever reads that.';


--
-- Name: wallet; Type: TABLE; Schema: wallet; Owner: -
--

CREATE TABLE wallet.wallet (
    uuid text NOT NULL COLLATE pg_catalog."C",
    id bigint NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    currency text COLLATE pg_catalog."C",
    status text DEFAULT 'OPEN'::text NOT NULL COLLATE pg_catalog."C",
    CONSTRAINT wallet_currency_check CHECK ((currency ~ '^[A-Z0-9]{3,12}$'::text)),
    CONSTRAINT wallet_status_check CHECK ((status = ANY (ARRAY['OPEN'::text, 'FROZEN'::text, 'CLOSED'::text]))),
    CONSTRAINT wallet_uuid_check CHECK (((octet_length(uuid) >= 1) AND (octet_length(uuid) <= 64)))
);


--
-- Name: TABLE wallet; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON TABLE wallet.wallet IS 'One row per wallet: who it is, and the lock of its operations. Its balance is what its last operation says: see the view wallet.balance.';


--
-- Name: COLUMN wallet.uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.wallet.uuid IS 'The wallet''s name: 1 to 64 characters of A-Z, a-z, 0-9, _ and -; a UUID unless its creator chose otherwise.';


--
-- Name: COLUMN wallet.id; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.wallet.id IS 'A number for people, in the order of creation; gaps are normal and nothing refers to it.';


--
-- Name: COLUMN wallet.created_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.wallet.created_at IS 'When the wallet was created.';


--
-- Name: COLUMN wallet.currency; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.wallet.currency IS 'What the amounts count, 3 to 12 characters of A-Z and 0-9 (an ISO 4217 code, usually); null where nobody said. It never changes.';


--
-- Name: COLUMN wallet.status; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.wallet.status IS 'OPEN; FROZEN (nothing leaves); CLOSED (nothing at all).';


--
-- Name: balance; Type: VIEW; Schema: wallet; Owner: -
--

CREATE VIEW wallet.balance AS
 SELECT w.uuid,
    w.id,
    w.currency,
    w.status,
    COALESCE(o.balance_after, (0)::bigint) AS balance,
    COALESCE(o.held, (0)::bigint) AS held,
    COALESCE((o.balance_after - o.held), (0)::bigint) AS available,
    COALESCE(o.seq, (0)::bigint) AS seq,
    w.created_at,
    COALESCE(o.created_at, w.created_at) AS updated_at
   FROM (wallet.wallet w
     LEFT JOIN LATERAL ( SELECT l.balance_after,
            l.seq,
            l.created_at,
                CASE
                    WHEN (l.held_after > 0) THEN (l.held_after - wallet.due_amount(l.wallet_uuid, l.created_at))
                    ELSE (0)::bigint
                END AS held
           FROM wallet.operation l
          WHERE (l.wallet_uuid = w.uuid)
          ORDER BY l.seq DESC
         LIMIT 1) o ON (true));


--
-- Name: VIEW balance; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON VIEW wallet.balance IS 'One row per wallet: who it is and what its last operation says. balance, held, available: minor units, available = balance - held, where an expired hold counts no longer; seq: the number of its operations; updated_at: the created_at of the last one, of the wallet where there is none.';


--
-- Name: create_wallet(text, text, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.create_wallet(p_wallet_uuid text DEFAULT NULL::text, p_currency text DEFAULT NULL::text, p_not_after timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS wallet.balance
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $_$
declare
  v_uuid text := coalesce(p_wallet_uuid, gen_random_uuid()::text);
  v_fault text := wallet.name_fault(v_uuid);
  v_wallet wallet.balance;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  elsif p_currency !~ '^[A-Z0-9]{3,12}$' then
    raise sqlstate 'WA400' using message = 'currency must be 3 to 12 characters of A-Z and 0-9';
  end if;

  insert into wallet.wallet (uuid, currency)
  select v_uuid, p_currency
  where not exists (select from wallet.wallet as w where w.uuid = v_uuid) -- constraints and triggers would be asked before the index
  on conflict do nothing;

  if not found then
    raise sqlstate 'WA419' using message = wallet.fault_message('WA419');
  elsif clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = v_uuid;

  return v_wallet;
end
$_$;


--
-- Name: FUNCTION create_wallet(p_wallet_uuid text, p_currency text, p_not_after timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.create_wallet(p_wallet_uuid text, p_currency text, p_not_after timestamp with time zone) IS 'Creates a wallet with balance 0 and returns its row of wallet.balance. p_wallet_uuid: its name, 1 to 64 characters of A-Z, a-z, 0-9, _ and -; null for a random UUID. p_currency: 3 to 12 characters of A-Z and 0-9, or null; it never changes. p_not_after: the last moment of this call by the database''s clock, or null. Raises WA400 (bad name or currency), WA419 (the wallet exists), 57014 (too late: nothing was created), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';


--
-- Name: expire_holds(text, integer); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.expire_holds(p_wallet_uuid text, p_limit integer DEFAULT 1000) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


--
-- Name: FUNCTION expire_holds(p_wallet_uuid text, p_limit integer); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.expire_holds(p_wallet_uuid text, p_limit integer) IS 'Records an EXPIRE for a wallet''s holds that have expired, at most p_limit (1 to 2^31-1), the earliest first, and returns how many. Never required: an expired hold no longer counts, whether its EXPIRE is recorded or not, and the wallet''s next operation records it. Raises WA400 (null or bad name, limit out of range), WA404 (no such wallet), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';


--
-- Name: fault_message(text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.fault_message(p_sqlstate text) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
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
    when 'WA420' then 'Key already exists'
    when 'WA421' then 'Key not found'
    when 'WA422' then 'Currencies differ'
    when 'WA424' then 'Hold not found'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;


--
-- Name: FUNCTION fault_message(p_sqlstate text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.fault_message(p_sqlstate text) IS 'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';


--
-- Name: get_operation(text, uuid); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) RETURNS wallet.operation
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_operation wallet.operation;
begin
  if p_operation_uuid is null then
    raise sqlstate 'WA400' using message = 'operation_uuid must not be null';
  end if;

  select o.* into v_operation
  from wallet.operation as o
  where o.operation_uuid = p_operation_uuid and o.operation_type not in ('RECEIVE', 'EXPIRE');

  if v_operation.counterparty_uuid = p_wallet_uuid then
    select o.* into v_operation
    from wallet.operation as o
    where o.operation_uuid = p_operation_uuid and o.operation_type = 'RECEIVE';
  end if;

  if (v_operation.wallet_uuid = p_wallet_uuid) is not true then
    perform wallet.get_wallet(p_wallet_uuid);
    raise sqlstate 'WA414' using message = wallet.fault_message('WA414');
  end if;

  return v_operation;
end
$$;


--
-- Name: FUNCTION get_operation(p_wallet_uuid text, p_operation_uuid uuid); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) IS 'Returns the row of an operation applied to this wallet; for the payee of a transfer that is its RECEIVE, for a hold''s uuid its HOLD, not its EXPIRE. Raises WA400 (null, or bad wallet name), WA404 (no such wallet), WA414 (this wallet has no such operation).';


--
-- Name: get_wallet(text, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.get_wallet(p_wallet_uuid text, p_at timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS wallet.balance
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
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


--
-- Name: FUNCTION get_wallet(p_wallet_uuid text, p_at timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.get_wallet(p_wallet_uuid text, p_at timestamp with time zone) IS 'Returns the wallet''s row of wallet.balance: uuid, id, currency, status, balance, held and available in minor units, seq, created_at, updated_at. An expired hold is no longer held, whether its EXPIRE is recorded or not. p_at: a moment; balance, held, available, seq and updated_at are then those after the last operation at or before it (balance 0 and seq 0 before the first), and held without the holds that had expired by then; currency and status are always today''s. Null: now. Raises WA400 (null or bad name), WA404 (no such wallet).';


--
-- Name: is_same_request(wallet.operation, text, bigint, text, uuid, timestamp with time zone, jsonb); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.is_same_request(p_operation wallet.operation, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE
    AS $$
  select p_operation.operation_type = p_operation_type
    and (p_operation.amount = p_amount or p_operation_type = 'RELEASE')
    and p_operation.counterparty_uuid is not distinct from p_counterparty_uuid
    and p_operation.hold_uuid is not distinct from p_hold_uuid
    and p_operation.expires_at is not distinct from p_expires_at
    and p_operation.metadata is not distinct from nullif(p_metadata, '{}')
$$;


--
-- Name: FUNCTION is_same_request(p_operation wallet.operation, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.is_same_request(p_operation wallet.operation, p_operation_type text, p_amount bigint, p_counterparty_uuid text, p_hold_uuid uuid, p_expires_at timestamp with time zone, p_metadata jsonb) IS 'Internal: whether an operation on record is what this request asks for. No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';


--
-- Name: hold; Type: TABLE; Schema: wallet; Owner: -
--

CREATE TABLE wallet.hold (
    wallet_uuid text NOT NULL COLLATE pg_catalog."C",
    hold_uuid uuid NOT NULL,
    seq bigint NOT NULL,
    amount bigint NOT NULL,
    expires_at timestamp with time zone,
    created_at timestamp with time zone NOT NULL,
    CONSTRAINT hold_amount_check CHECK ((amount > 0)),
    CONSTRAINT hold_expires_at_check CHECK ((expires_at > created_at))
);


--
-- Name: TABLE hold; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON TABLE wallet.hold IS 'The HOLDs of the ledger that no capture, RELEASE or EXPIRE has ended yet, and nothing else. An expired one stays here until its EXPIRE is recorded; to callers it is closed.';


--
-- Name: COLUMN hold.wallet_uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.hold.wallet_uuid IS 'The wallet whose money is held.';


--
-- Name: COLUMN hold.hold_uuid; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.hold.hold_uuid IS 'The hold''s name: the operation_uuid of its HOLD.';


--
-- Name: COLUMN hold.seq; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.hold.seq IS 'The seq of its HOLD.';


--
-- Name: COLUMN hold.amount; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.hold.amount IS 'Minor units, 1 to 2^63-1.';


--
-- Name: COLUMN hold.expires_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.hold.expires_at IS 'From this moment on it counts no longer and cannot be captured. Null: never.';


--
-- Name: COLUMN hold.created_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.hold.created_at IS 'The created_at of its HOLD.';


--
-- Name: list_holds(text, bigint, integer); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.list_holds(p_wallet_uuid text, p_after_seq bigint DEFAULT NULL::bigint, p_limit integer DEFAULT 100) RETURNS SETOF wallet.hold
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
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


--
-- Name: FUNCTION list_holds(p_wallet_uuid text, p_after_seq bigint, p_limit integer); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.list_holds(p_wallet_uuid text, p_after_seq bigint, p_limit integer) IS 'Returns a wallet''s open holds that have not expired, oldest first: at most p_limit (1 to 1000) with a seq above p_after_seq (null: from the oldest). The next page starts after the last row''s seq; after a page with fewer than p_limit rows there is none. Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';


--
-- Name: list_keys(); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.list_keys() RETURNS TABLE(name text, scopes text[], wallet_prefix text, created_at timestamp with time zone, expires_at timestamp with time zone, revoked_at timestamp with time zone)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
  select k.name, k.scopes, k.wallet_prefix, k.created_at, k.expires_at, k.revoked_at
  from wallet.key as k
  order by k.name
$$;


--
-- Name: FUNCTION list_keys(); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.list_keys() IS 'Returns all keys, revoked and expired ones too, in the order of name byte for byte; no secrets and no digests. wallet_prefix null: all wallets; expires_at null: never; revoked_at null: not revoked.';


--
-- Name: list_operations(text, bigint, integer, timestamp with time zone, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint DEFAULT NULL::bigint, p_limit integer DEFAULT 100, p_from timestamp with time zone DEFAULT NULL::timestamp with time zone, p_to timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS SETOF wallet.operation
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_after bigint := 0;
  v_before bigint := coalesce(p_before_seq, 9223372036854775807);
begin
  if p_before_seq < 1 then
    raise sqlstate 'WA400' using message = 'before_seq must be from 1 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  perform wallet.get_wallet(p_wallet_uuid);

  if p_from is not null then
    v_after := wallet.seq_before(p_wallet_uuid, p_from);
  end if;
  if p_to is not null then
    v_before := least(v_before, wallet.seq_before(p_wallet_uuid, p_to) + 1);
  end if;

  return query
  select o.*
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.seq > v_after and o.seq < v_before
  order by o.seq desc
  limit p_limit;
end
$$;


--
-- Name: FUNCTION list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer, p_from timestamp with time zone, p_to timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer, p_from timestamp with time zone, p_to timestamp with time zone) IS 'Returns a wallet''s operations, newest first: at most p_limit (1 to 1000) with a seq below p_before_seq (null: from the newest) and a created_at from p_from, which is included, to p_to, which is not (null: without bound). What lies outside does not add to the cost. The next page starts before the last row''s seq; after a page with fewer than p_limit rows there is none. Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';


--
-- Name: list_wallets(text, integer, text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.list_wallets(p_after text DEFAULT NULL::text, p_limit integer DEFAULT 100, p_prefix text DEFAULT NULL::text) RETURNS SETOF wallet.balance
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_prefix text := coalesce(p_prefix, '');
begin
  if p_after is not null and wallet.name_fault(p_after) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(p_after), 'wallet_uuid', 'after');
  elsif v_prefix <> '' and wallet.name_fault(v_prefix) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(v_prefix), 'wallet_uuid', 'prefix');
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  return query
  select b.*
  from wallet.balance as b
  where b.uuid > coalesce(p_after, '') and b.uuid >= v_prefix and b.uuid < v_prefix || '~'
  order by b.uuid
  limit p_limit;
end
$$;


--
-- Name: FUNCTION list_wallets(p_after text, p_limit integer, p_prefix text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.list_wallets(p_after text, p_limit integer, p_prefix text) IS 'Returns wallets as rows of wallet.balance, in the order of uuid byte for byte: at most p_limit (1 to 1000), with a uuid after p_after (which need not exist; null: from the first) that begins with p_prefix (null or empty: any). The next page starts after the last row''s uuid; after a page with fewer than p_limit rows there is none. Raises WA400 (bad name or prefix, limit out of range).';


--
-- Name: live_keys(); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.live_keys() RETURNS TABLE(name text, digest bytea, scopes text[], wallet_prefix text, expires_at timestamp with time zone)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
  select k.name, k.digest, k.scopes, k.wallet_prefix, k.expires_at
  from wallet.key as k
  where k.revoked_at is null and (k.expires_at > clock_timestamp()) is not false
  order by k.name
$$;


--
-- Name: FUNCTION live_keys(); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.live_keys() IS 'Returns the keys that are neither revoked nor, by the database''s clock, expired, for services that check them. digest: SHA-256 of the secret''s text, 32 octets. wallet_prefix null: all wallets; expires_at null: never.';


--
-- Name: lock_wallets(text[]); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.lock_wallets(p_wallet_uuids text[], OUT uuids text[], OUT statuses text[], OUT currencies text[], OUT missed text[]) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_patience interval := current_setting('lock_timeout')::interval; -- 0: without end
  v_names text[];
  v_until timestamptz;
  v_awaited text;
  v_waiting boolean := false;
  v_stuck text[] := '{}'; -- waited for in vain
begin
  if v_patience = '0' then
    missed := '{}';
    select array_agg(l.uuid), array_agg(l.status), array_agg(l.currency)
    into uuids, statuses, currencies
    from (
      select w.uuid, w.status, w.currency
      from wallet.wallet as w
      where w.uuid = any(p_wallet_uuids)
      order by w.uuid
      for no key update
    ) as l;
    return;
  end if;

  if p_wallet_uuids = array_fill(p_wallet_uuids[1], array[cardinality(p_wallet_uuids)]) then
    v_names := p_wallet_uuids[:1];
  else
    v_names := array(select distinct n.name from unnest(p_wallet_uuids) as n (name) where n.name is not null);
  end if;

  loop
    begin
      if v_awaited is not null then
        v_waiting := true;
        perform wallet.wait_for_wallet(
          v_awaited, (v_until - clock_timestamp()) * case when cardinality(v_names) = 1 then 1 else 0.5 end
        );
        v_waiting := false;
      end if;

      missed := '{}';
      select array_agg(l.uuid), array_agg(l.status), array_agg(l.currency)
      into uuids, statuses, currencies
      from (
        select w.uuid, w.status, w.currency
        from wallet.wallet as w
        where w.uuid = any(v_names)
        order by w.uuid
        for no key update skip locked
      ) as l;

      exit when cardinality(uuids) = cardinality(v_names);

      missed := array(
        select w.uuid
        from wallet.wallet as w
        where w.uuid = any(array(select unnest(v_names) except select unnest(uuids)))
        order by w.uuid
      );
      v_until := coalesce(v_until, clock_timestamp() + v_patience);
      v_awaited := (select m.name from unnest(missed) as m (name) where m.name <> all(v_stuck) limit 1);

      exit when v_awaited is null or clock_timestamp() >= v_until;
      raise lock_not_available; -- lets go of all
    exception when lock_not_available then
      if v_waiting then
        v_stuck := v_stuck || v_awaited;
        v_awaited := null;
        v_waiting := false;
      elsif v_awaited is null then
        raise; -- it is the table that is locked
      end if;
    end;
  end loop;
end
$$;


--
-- Name: FUNCTION lock_wallets(p_wallet_uuids text[], OUT uuids text[], OUT statuses text[], OUT currencies text[], OUT missed text[]); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.lock_wallets(p_wallet_uuids text[], OUT uuids text[], OUT statuses text[], OUT currencies text[], OUT missed text[]) IS 'Internal: locks wallets to the end of the transaction. Returns those that it has locked, in the order of uuid (null: none), with their status and currency, and in missed those that exist and, under a lock_timeout, stayed locked by another transaction. Names may repeat, be null, or name no wallet. Raises 55P03 if the table stays locked.';


--
-- Name: name_fault(text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.name_fault(p_wallet_uuid text) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $_$
  select case
    when p_wallet_uuid is null then 'wallet_uuid must not be null'
    when p_wallet_uuid !~ '^[A-Za-z0-9_-]{1,64}$' then 'wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -'
  end
$_$;


--
-- Name: FUNCTION name_fault(p_wallet_uuid text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.name_fault(p_wallet_uuid text) IS 'Internal: the message of WA400 for a wallet uuid that no wallet can have, else null. No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';


--
-- Name: names_fault(text, text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.names_fault(p_wallet_uuid text, p_counterparty_uuid text) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
  select coalesce(
    wallet.name_fault(p_wallet_uuid),
    case when p_counterparty_uuid is not null then replace(wallet.name_fault(p_counterparty_uuid), 'wallet_uuid', 'counterparty_uuid') end
  )
$$;


--
-- Name: FUNCTION names_fault(p_wallet_uuid text, p_counterparty_uuid text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.names_fault(p_wallet_uuid text, p_counterparty_uuid text) IS 'Internal: the message of WA400 for the names of an operation''s wallets, of which the second may be null; else null. No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';


--
-- Name: raise_isolation_level(); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.raise_isolation_level() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise feature_not_supported using
    message = format('wallets and keys cannot be changed under isolation level %s', current_setting('transaction_isolation')),
    hint = 'Use read committed: an older snapshot would be taken for the state.';
end
$$;


--
-- Name: FUNCTION raise_isolation_level(); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.raise_isolation_level() IS 'Internal: says why a function that changes something refuses the transaction''s isolation level. Raises 0A000, always.';


--
-- Name: raise_too_late(); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.raise_too_late() RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise query_canceled using message = 'the deadline of this call has passed';
end
$$;


--
-- Name: FUNCTION raise_too_late(); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.raise_too_late() IS 'For services older than p_not_after: makes the statement that calls it fail, and so be rolled back, because its deadline has passed: select ... from wallet.apply_operations(...) where case when clock_timestamp() < $5 then true else wallet.raise_too_late() end. The clock is read after apply_operations has run, however long it waited for a lock, and a call that is in time holds its locks until it is committed. Raises 57014 (query_canceled), always.';


--
-- Name: raise_wallet_not_found(text, text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.raise_wallet_not_found(p_wallet_uuid text, p_counterparty_uuid text DEFAULT NULL::text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_fault text := wallet.names_fault(p_wallet_uuid, p_counterparty_uuid);
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  raise sqlstate 'WA404' using message = wallet.fault_message('WA404');
end
$$;


--
-- Name: FUNCTION raise_wallet_not_found(p_wallet_uuid text, p_counterparty_uuid text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.raise_wallet_not_found(p_wallet_uuid text, p_counterparty_uuid text) IS 'Internal: says why no wallet was found under this name, or under one of these two. Existing wallets have valid names, so names are validated only here. Raises WA400 (null or bad name) or WA404, always one of them.';


--
-- Name: record_expiries(text, timestamp with time zone, integer); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.record_expiries(p_wallet_uuid text, p_moment timestamp with time zone, p_limit integer DEFAULT NULL::integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
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


--
-- Name: FUNCTION record_expiries(p_wallet_uuid text, p_moment timestamp with time zone, p_limit integer); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.record_expiries(p_wallet_uuid text, p_moment timestamp with time zone, p_limit integer) IS 'Internal: records an EXPIRE for each hold of a locked wallet that is due at a moment (the first p_limit of them; null: all) and returns how many.';


--
-- Name: revoke_key(text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.revoke_key(p_name text) RETURNS TABLE(name text, scopes text[], wallet_prefix text, created_at timestamp with time zone, expires_at timestamp with time zone, revoked_at timestamp with time zone)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif wallet.name_fault(p_name) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(p_name), 'wallet_uuid', 'name');
  end if;

  update wallet.key as k
  set revoked_at = clock_timestamp()
  where k.name = p_name and k.revoked_at is null;

  return query
  select k.name, k.scopes, k.wallet_prefix, k.created_at, k.expires_at, k.revoked_at
  from wallet.key as k
  where k.name = p_name
  for no key update;

  if not found then
    raise sqlstate 'WA421' using message = wallet.fault_message('WA421');
  end if;
end
$$;


--
-- Name: FUNCTION revoke_key(p_name text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.revoke_key(p_name text) IS 'Revokes a key for good and returns its row as list_keys does; called again, it returns that row unchanged. Services refuse the key within 5 seconds of the commit. Raises WA400 (null or bad name), WA421 (no such key), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';


--
-- Name: seq_before(text, timestamp with time zone, boolean); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.seq_before(p_wallet_uuid text, p_moment timestamp with time zone, p_inclusive boolean DEFAULT false) RETURNS bigint
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_before bigint := 0; -- this seq is before the moment, and v_after is not
  v_after bigint;
  v_seq bigint;
  v_created_at timestamptz;
begin
  select o.seq, o.created_at into v_seq, v_created_at
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid
  order by o.seq desc
  limit 1;

  if not found then
    return 0;
  elsif v_created_at < p_moment or p_inclusive and v_created_at = p_moment then
    return v_seq;
  end if;

  v_after := v_seq;
  while v_after - v_before > 1 loop
    v_seq := (v_before + v_after) / 2;

    select o.created_at into v_created_at
    from wallet.operation as o
    where o.wallet_uuid = p_wallet_uuid and o.seq = v_seq;

    if v_created_at < p_moment or p_inclusive and v_created_at = p_moment then
      v_before := v_seq;
    else
      v_after := v_seq;
    end if;
  end loop;

  return v_before;
end
$$;


--
-- Name: FUNCTION seq_before(p_wallet_uuid text, p_moment timestamp with time zone, p_inclusive boolean); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.seq_before(p_wallet_uuid text, p_moment timestamp with time zone, p_inclusive boolean) IS 'Internal: the seq of a wallet''s last operation before a moment, 0 if there is none. p_inclusive: or at the moment itself. Reads a number of rows that is logarithmic in the length of the wallet''s history.';


--
-- Name: set_status(text, text, timestamp with time zone); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.set_status(p_wallet_uuid text, p_status text, p_not_after timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS wallet.balance
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET jit TO 'off'
    AS $$
declare
  v_wallet wallet.balance;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    perform wallet.raise_isolation_level();
  elsif p_status is null then
    raise sqlstate 'WA400' using message = 'status must not be null';
  elsif p_status not in ('OPEN', 'FROZEN', 'CLOSED') then
    raise sqlstate 'WA400' using message = 'status must be OPEN, FROZEN or CLOSED';
  end if;

  begin
    perform 1
    from wallet.wallet as w
    where w.uuid = p_wallet_uuid
    for no key update;
  exception when lock_not_available then
    raise lock_not_available using message = wallet.fault_message('55P03');
  end;

  select b.* into v_wallet
  from wallet.balance as b
  where b.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  elsif p_status = 'CLOSED' and (v_wallet.balance <> 0 or v_wallet.held <> 0) then
    raise sqlstate 'WA417' using message = wallet.fault_message('WA417');
  end if;

  if v_wallet.status <> p_status then
    update wallet.wallet as w
    set status = p_status
    where w.uuid = p_wallet_uuid;

    v_wallet.status := p_status;
  end if;

  if clock_timestamp() >= p_not_after then
    perform wallet.raise_too_late();
  end if;

  return v_wallet;
end
$$;


--
-- Name: FUNCTION set_status(p_wallet_uuid text, p_status text, p_not_after timestamp with time zone); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.set_status(p_wallet_uuid text, p_status text, p_not_after timestamp with time zone) IS 'Sets a wallet''s status and returns its row of wallet.balance. OPEN: everything is allowed. FROZEN: money comes in, and none leaves or is held anew. CLOSED: no operation is applied; only an empty wallet can be closed. Every change between the three is allowed; the same status again changes nothing. p_not_after: the last moment of this call by the database''s clock, or null. Raises WA400 (bad name or status), WA404 (no such wallet), WA417 (not empty), 57014 (too late: nothing was changed), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';


--
-- Name: state_fault(text, bigint, text, bigint, text, text, bigint, text); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.state_fault(p_operation_type text, p_amount bigint, p_status text, p_balance bigint, p_currency text, p_payee_status text, p_payee_balance bigint, p_payee_currency text) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
  select case
    when p_status = 'CLOSED' or p_payee_status = 'CLOSED' then 'WA405'
    when p_status = 'FROZEN' and p_operation_type <> 'DEPOSIT' and p_operation_type <> 'RELEASE' then 'WA403'
    when p_operation_type = 'DEPOSIT' then case when p_amount > 9223372036854775807 - p_balance then 'WA416' end
    when p_operation_type = 'TRANSFER' and p_currency is distinct from p_payee_currency then 'WA422'
    when p_amount > p_balance then 'WA402'
    when p_amount > 9223372036854775807 - p_payee_balance then 'WA416'
  end
$$;


--
-- Name: FUNCTION state_fault(p_operation_type text, p_amount bigint, p_status text, p_balance bigint, p_currency text, p_payee_status text, p_payee_balance bigint, p_payee_currency text); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.state_fault(p_operation_type text, p_amount bigint, p_status text, p_balance bigint, p_currency text, p_payee_status text, p_payee_balance bigint, p_payee_currency text) IS 'Internal: the SQLSTATE for an operation that the state of its wallets does not allow (the first of WA405, WA403, WA422, WA402, WA416), else null. p_balance: for a DEPOSIT the balance; for the other types what is available, for a capture the amount of its hold. The payee''s state is null except for a TRANSFER. No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';


--
-- Name: verify(); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.verify() RETURNS TABLE(invariant text, wallet_uuid text, seq bigint, detail text)
    LANGUAGE sql STABLE SECURITY DEFINER PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_nestloop TO 'off'
    SET jit TO 'off'
    AS $_$
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
$_$;


--
-- Name: FUNCTION verify(); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.verify() IS 'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody. A wallet''s balance is what its last operation says, so this audit cannot tell that a wallet''s last operations are missing, unless one was a transfer or concerned a hold.';


--
-- Name: wait_for_wallet(text, interval); Type: FUNCTION; Schema: wallet; Owner: -
--

CREATE FUNCTION wallet.wait_for_wallet(p_wallet_uuid text, p_patience interval) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '0'
    AS $$
begin
  perform set_config('lock_timeout', greatest(1, ceil(1000 * extract(epoch from p_patience)))::text, true);

  perform 1
  from wallet.wallet as w
  where w.uuid = p_wallet_uuid
  for no key update;
end
$$;


--
-- Name: FUNCTION wait_for_wallet(p_wallet_uuid text, p_patience interval); Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON FUNCTION wallet.wait_for_wallet(p_wallet_uuid text, p_patience interval) IS 'Internal: locks a wallet to the end of the transaction. Raises 55P03 if that takes longer than p_patience.';


--
-- Name: schema_migrations; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.schema_migrations (
    version character varying NOT NULL
);


--
-- Name: key; Type: TABLE; Schema: wallet; Owner: -
--

CREATE TABLE wallet.key (
    name text NOT NULL COLLATE pg_catalog."C",
    digest bytea NOT NULL,
    scopes text[] NOT NULL COLLATE pg_catalog."C",
    wallet_prefix text COLLATE pg_catalog."C",
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    CONSTRAINT key_digest_check CHECK ((octet_length(digest) = 32)),
    CONSTRAINT key_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 64)))
);


--
-- Name: TABLE key; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON TABLE wallet.key IS 'What REST callers show to be let in: one row per key, revoked and expired ones too. The secret is not here.';


--
-- Name: COLUMN key.name; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.name IS 'What logs call it: 1 to 64 characters of A-Z, a-z, 0-9, _ and -.';


--
-- Name: COLUMN key.digest; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.digest IS 'SHA-256 of the secret''s text in UTF-8. The secret has 256 random bits, so nobody finds it from here.';


--
-- Name: COLUMN key.scopes; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.scopes IS 'What it may do: one or more of admin, create, deposit, hold, metrics, read, transfer and withdraw, in this order.';


--
-- Name: COLUMN key.wallet_prefix; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.wallet_prefix IS 'It reaches only wallets whose names begin so, byte for byte; null: all.';


--
-- Name: COLUMN key.created_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.created_at IS 'When it was made.';


--
-- Name: COLUMN key.expires_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.expires_at IS 'From when on it is refused, by the database''s clock; null: never.';


--
-- Name: COLUMN key.revoked_at; Type: COMMENT; Schema: wallet; Owner: -
--

COMMENT ON COLUMN wallet.key.revoked_at IS 'When it was revoked; null: it was not.';


--
-- Name: wallet_id_seq; Type: SEQUENCE; Schema: wallet; Owner: -
--

ALTER TABLE wallet.wallet ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME wallet.wallet_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: schema_migrations schema_migrations_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (version);


--
-- Name: hold hold_pkey; Type: CONSTRAINT; Schema: wallet; Owner: -
--

ALTER TABLE ONLY wallet.hold
    ADD CONSTRAINT hold_pkey PRIMARY KEY (hold_uuid, wallet_uuid);


--
-- Name: key key_pkey; Type: CONSTRAINT; Schema: wallet; Owner: -
--

ALTER TABLE ONLY wallet.key
    ADD CONSTRAINT key_pkey PRIMARY KEY (name);


--
-- Name: operation operation_pkey; Type: CONSTRAINT; Schema: wallet; Owner: -
--

ALTER TABLE ONLY wallet.operation
    ADD CONSTRAINT operation_pkey PRIMARY KEY (wallet_uuid, seq);


--
-- Name: wallet wallet_pkey; Type: CONSTRAINT; Schema: wallet; Owner: -
--

ALTER TABLE ONLY wallet.wallet
    ADD CONSTRAINT wallet_pkey PRIMARY KEY (uuid);


--
-- Name: hold_expires_at_idx; Type: INDEX; Schema: wallet; Owner: -
--

CREATE INDEX hold_expires_at_idx ON wallet.hold USING btree (wallet_uuid, expires_at, seq) WHERE (expires_at IS NOT NULL);


--
-- Name: hold_seq_idx; Type: INDEX; Schema: wallet; Owner: -
--

CREATE UNIQUE INDEX hold_seq_idx ON wallet.hold USING btree (wallet_uuid, seq) WHERE (seq > 0);


--
-- Name: operation_receive_idx; Type: INDEX; Schema: wallet; Owner: -
--

CREATE UNIQUE INDEX operation_receive_idx ON wallet.operation USING btree (operation_uuid) WHERE (operation_type = 'RECEIVE'::text);


--
-- Name: operation_requested_idx; Type: INDEX; Schema: wallet; Owner: -
--

CREATE UNIQUE INDEX operation_requested_idx ON wallet.operation USING btree (operation_uuid) WHERE (operation_type <> ALL (ARRAY['RECEIVE'::text, 'EXPIRE'::text]));


--
-- PostgreSQL database dump complete
--

\unrestrict dbmate


--
-- Dbmate schema migrations
--

INSERT INTO public.schema_migrations (version) VALUES
    ('20261124000001'),
    ('20261124000002'),
    ('20261125000001'),
    ('20261125000002'),
    ('20261129000000'),
    ('20261129000001'),
    ('20261129000002'),
    ('20261129000003'),
    ('20261129000004'),
    ('20261129000005'),
    ('20261129000006'),
    ('20261129100001'),
    ('20261129100002'),
    ('20261129100003'),
    ('20261129100004'),
    ('20261130000001'),
    ('20261130000002'),
    ('20261130000003'),
    ('20261130080934'),
    ('20261130134402'),
    ('20261201105359');
