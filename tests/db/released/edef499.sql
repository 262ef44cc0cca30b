--
-- PostgreSQL database dump
--



SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

--
-- Name: wallet; Type: SCHEMA; Schema: -; Owner: wallet_owner
--

CREATE SCHEMA wallet;


ALTER SCHEMA wallet OWNER TO wallet_owner;

--
-- Name: SCHEMA wallet; Type: COMMENT; Schema: -; Owner: wallet_owner
--

COMMENT ON SCHEMA wallet IS 'Wallets and their operations. Money moves only through the functions of this schema; amounts are whole minor units.';


SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: operation; Type: TABLE; Schema: wallet; Owner: wallet_owner
--

CREATE TABLE wallet.operation (
    wallet_uuid text NOT NULL COLLATE pg_catalog."C",
    operation_type text NOT NULL COLLATE pg_catalog."C",
    operation_uuid uuid NOT NULL,
    seq bigint NOT NULL,
    amount bigint NOT NULL,
    balance_after bigint NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT operation_amount_check CHECK ((amount > 0)),
    CONSTRAINT operation_balance_after_check CHECK ((balance_after >= 0)),
    CONSTRAINT operation_operation_type_check CHECK ((operation_type = ANY (ARRAY['DEPOSIT'::text, 'WITHDRAW'::text]))),
    CONSTRAINT operation_seq_check CHECK ((seq > 0))
);


ALTER TABLE wallet.operation OWNER TO wallet_owner;

--
-- Name: TABLE operation; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON TABLE wallet.operation IS 'The ledger: one row per applied operation, append-only. A rejected operation leaves nothing here.';


--
-- Name: COLUMN operation.wallet_uuid; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.wallet_uuid IS 'The wallet whose balance changed.';


--
-- Name: COLUMN operation.operation_type; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.operation_type IS 'DEPOSIT adds the amount to the balance, WITHDRAW takes it off.';


--
-- Name: COLUMN operation.operation_uuid; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.operation_uuid IS 'The client''s name for the operation, unique over all wallets: applied once, whatever is sent again.';


--
-- Name: COLUMN operation.seq; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.seq IS 'Position in the wallet''s history: 1, 2, 3 ... without gaps.';


--
-- Name: COLUMN operation.amount; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.amount IS 'Minor units, 1 to 2^63-1.';


--
-- Name: COLUMN operation.balance_after; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.balance_after IS 'Minor units: the wallet''s balance once the operation was applied.';


--
-- Name: COLUMN operation.created_at; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.operation.created_at IS 'When the operation was applied. For people: order comes from seq.';


--
-- Name: apply_operation(text, uuid, text, bigint); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint) RETURNS wallet.operation
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_fault text := wallet.argument_fault(p_operation_uuid, p_operation_type, p_amount);
  v_balance bigint;
  v_seq bigint;
  v_operation wallet.operation;
  v_constraint text;
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  begin
    select w.balance, w.seq into v_balance, v_seq
    from wallet.wallet as w
    where w.uuid = p_wallet_uuid
    for no key update;

    if not found then
      perform wallet.raise_wallet_not_found(p_wallet_uuid);
    end if;

    v_fault := wallet.funds_fault(p_operation_type, p_amount, v_balance);
    if v_fault is not null then
      if exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then
        v_fault := 'WA409';
      end if;
      raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
    end if;

    v_balance := v_balance + case p_operation_type when 'DEPOSIT' then p_amount else -p_amount end;
    v_seq := v_seq + 1;

    insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
    values (p_wallet_uuid, p_operation_type, p_operation_uuid, v_seq, p_amount, v_balance)
    returning * into v_operation;

    update wallet.wallet as w
    set balance = v_balance, seq = v_seq
    where w.uuid = p_wallet_uuid;

    return v_operation;
  exception
    when unique_violation then
      get stacked diagnostics v_constraint = constraint_name;
      if v_constraint <> 'operation_operation_uuid_key' then
        raise;
      elsif not exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then
        raise serialization_failure using
          message = 'the operation was recorded by a transaction that this snapshot cannot see',
          hint = 'Start the transaction again.';
      end if;
      v_fault := 'WA409';
    when lock_not_available then
      v_fault := case
        when exists (select from wallet.operation as o where o.operation_uuid = p_operation_uuid) then 'WA409'
        else '55P03'
      end;
  end;

  raise exception using errcode = v_fault, message = wallet.fault_message(v_fault);
end
$$;


ALTER FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint) OWNER TO wallet_owner;

--
-- Name: FUNCTION apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint) IS 'Applies one operation to one wallet exactly once and returns its row. p_operation_uuid: the caller''s name for the operation, not the nil UUID; p_operation_type: DEPOSIT or WITHDRAW; p_amount: minor units, 1 to 2^63-1. Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), WA402 (not enough money), WA416 (the balance would pass 2^63-1); under a lock_timeout also 55P03, after WA409 (another transaction keeps the wallet locked, or the operation_uuid in flight); under repeatable read or serializable also 40001. A refused operation leaves nothing behind.';


--
-- Name: apply_operations(text[], uuid[], text[], bigint[]); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]) RETURNS TABLE(ordinal integer, sqlstate text, message text, wallet_uuid text, operation_type text, operation_uuid uuid, seq bigint, amount bigint, balance_after bigint, created_at timestamp with time zone)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_nestloop TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
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


ALTER FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]) OWNER TO wallet_owner;

--
-- Name: FUNCTION apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]) IS 'Applies a batch of operations as apply_operation would one after another in the order given, and commits those that succeed together. Four arrays of one length: wallet, operation_uuid, DEPOSIT or WITHDRAW, amount in minor units. Returns one row per request, in order: ordinal (from 1), sqlstate and message (null: applied), and the row of the applied operation, or of the recorded one where the sqlstate is WA409 and it belongs to the same wallet. Outcomes per request: WA400, WA404, WA409, WA402, WA416 as in apply_operation. Also, for requests that were not tried and may be asked again: 55P03, under a lock_timeout, after WA409 (another transaction keeps the wallet locked, or the operation_uuid in flight); and the SQLSTATE of whatever else the database refuses (a constraint, a trigger), its message in a WARNING. Raises WA400 only for the arrays themselves (null, different lengths, more than one dimension) and, under repeatable read or serializable, 40001.';


--
-- Name: argument_fault(uuid, text, bigint); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
  select case
    when p_operation_uuid is null then 'operation_uuid must not be null'
    when p_operation_uuid = '00000000-0000-0000-0000-000000000000'::uuid then 'operation_uuid must not be the nil UUID'
    when p_operation_type is null then 'operation_type must not be null'
    when p_operation_type <> 'DEPOSIT' and p_operation_type <> 'WITHDRAW' then 'operation_type must be DEPOSIT or WITHDRAW'
    when p_amount is null then 'amount must not be null'
    when p_amount <= 0 then 'amount must be from 1 to 9223372036854775807'
  end
$$;


ALTER FUNCTION wallet.argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint) OWNER TO wallet_owner;

--
-- Name: FUNCTION argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint) IS 'Internal: the message of WA400 for an operation that no wallet can accept, else null. The nil UUID (RFC 9562, section 5.9) is what an unset field looks like, so it names no operation. Neither security definer nor pinned, so that it is inlined into its callers, which are.';


--
-- Name: contract_version(); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.contract_version() RETURNS integer
    LANGUAGE sql IMMUTABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
  select 2
$$;


ALTER FUNCTION wallet.contract_version() OWNER TO wallet_owner;

--
-- Name: FUNCTION contract_version(); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.contract_version() IS 'Returns the version of the contract that these functions keep: it grows with each migration that callers could notice. A caller that needs version N works with any that is not below N. Commit b046021 had no such function; it counts as 1.';


--
-- Name: wallet; Type: TABLE; Schema: wallet; Owner: wallet_owner
--

CREATE TABLE wallet.wallet (
    uuid text NOT NULL COLLATE pg_catalog."C",
    id bigint NOT NULL,
    balance bigint DEFAULT 0 NOT NULL,
    seq bigint DEFAULT 0 NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT wallet_balance_check CHECK ((balance >= 0)),
    CONSTRAINT wallet_seq_check CHECK ((seq >= 0)),
    CONSTRAINT wallet_uuid_check CHECK (((octet_length(uuid) >= 1) AND (octet_length(uuid) <= 64)))
)
WITH (fillfactor='50');


ALTER TABLE wallet.wallet OWNER TO wallet_owner;

--
-- Name: TABLE wallet; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON TABLE wallet.wallet IS 'One row per wallet: its balance and how many operations led to it.';


--
-- Name: COLUMN wallet.uuid; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.wallet.uuid IS 'The wallet''s name: 1 to 64 characters of A-Z, a-z, 0-9, _ and -; a UUID unless its creator chose otherwise.';


--
-- Name: COLUMN wallet.id; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.wallet.id IS 'A number for people, in the order of creation; gaps are normal and nothing refers to it.';


--
-- Name: COLUMN wallet.balance; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.wallet.balance IS 'Minor units, 0 to 2^63-1; always the balance_after of the wallet''s last operation, 0 before the first.';


--
-- Name: COLUMN wallet.seq; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.wallet.seq IS 'Number of operations so far: the seq of the last one.';


--
-- Name: COLUMN wallet.created_at; Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON COLUMN wallet.wallet.created_at IS 'When the wallet was created.';


--
-- Name: create_wallet(text); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.create_wallet(p_wallet_uuid text DEFAULT NULL::text) RETURNS wallet.wallet
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_uuid text := coalesce(p_wallet_uuid, gen_random_uuid()::text);
  v_fault text := wallet.name_fault(v_uuid);
  v_wallet wallet.wallet;
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  insert into wallet.wallet (uuid)
  values (v_uuid)
  on conflict do nothing
  returning * into v_wallet;

  if not found then
    raise sqlstate 'WA419' using message = wallet.fault_message('WA419');
  end if;

  return v_wallet;
end
$$;


ALTER FUNCTION wallet.create_wallet(p_wallet_uuid text) OWNER TO wallet_owner;

--
-- Name: FUNCTION create_wallet(p_wallet_uuid text); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.create_wallet(p_wallet_uuid text) IS 'Creates a wallet with balance 0 and returns its row. p_wallet_uuid: its name, 1 to 64 characters of A-Z, a-z, 0-9, _ and -; null for a random UUID. Raises WA400 (bad name), WA419 (the wallet exists).';


--
-- Name: fault_message(text); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.fault_message(p_sqlstate text) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA404' then 'Wallet not found'
    when 'WA409' then 'Transaction already exists'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA419' then 'Wallet already exists'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;


ALTER FUNCTION wallet.fault_message(p_sqlstate text) OWNER TO wallet_owner;

--
-- Name: FUNCTION fault_message(p_sqlstate text); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.fault_message(p_sqlstate text) IS 'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. Neither security definer nor pinned, so that it is inlined into its callers, which are.';


--
-- Name: funds_fault(text, bigint, bigint); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.funds_fault(p_operation_type text, p_amount bigint, p_balance bigint) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
  select case
    when p_operation_type = 'WITHDRAW' and p_amount > p_balance then 'WA402'
    when p_operation_type = 'DEPOSIT' and p_amount > 9223372036854775807 - p_balance then 'WA416'
  end
$$;


ALTER FUNCTION wallet.funds_fault(p_operation_type text, p_amount bigint, p_balance bigint) OWNER TO wallet_owner;

--
-- Name: FUNCTION funds_fault(p_operation_type text, p_amount bigint, p_balance bigint); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.funds_fault(p_operation_type text, p_amount bigint, p_balance bigint) IS 'Internal: the SQLSTATE for an operation that the balance does not allow (WA402, WA416), else null. Neither security definer nor pinned, so that it is inlined into its callers, which are.';


--
-- Name: get_operation(text, uuid); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) RETURNS wallet.operation
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_operation wallet.operation;
begin
  if p_operation_uuid is null then
    raise sqlstate 'WA400' using message = 'operation_uuid must not be null';
  end if;

  select o.* into v_operation
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.operation_uuid = p_operation_uuid;

  if not found then
    perform wallet.get_wallet(p_wallet_uuid);
    raise sqlstate 'WA414' using message = wallet.fault_message('WA414');
  end if;

  return v_operation;
end
$$;


ALTER FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) OWNER TO wallet_owner;

--
-- Name: FUNCTION get_operation(p_wallet_uuid text, p_operation_uuid uuid); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) IS 'Returns the row of an operation applied to this wallet. Raises WA400 (null, or bad wallet name), WA404 (no such wallet), WA414 (this wallet has no such operation).';


--
-- Name: get_wallet(text); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.get_wallet(p_wallet_uuid text) RETURNS wallet.wallet
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_wallet wallet.wallet;
begin
  select w.* into v_wallet
  from wallet.wallet as w
  where w.uuid = p_wallet_uuid;

  if not found then
    perform wallet.raise_wallet_not_found(p_wallet_uuid);
  end if;

  return v_wallet;
end
$$;


ALTER FUNCTION wallet.get_wallet(p_wallet_uuid text) OWNER TO wallet_owner;

--
-- Name: FUNCTION get_wallet(p_wallet_uuid text); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.get_wallet(p_wallet_uuid text) IS 'Returns the wallet''s row: uuid, id, balance in minor units, seq, created_at. Raises WA400 (null or bad name), WA404 (no such wallet).';


--
-- Name: list_operations(text, bigint, integer); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint DEFAULT NULL::bigint, p_limit integer DEFAULT 100) RETURNS SETOF wallet.operation
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if p_before_seq < 1 then
    raise sqlstate 'WA400' using message = 'before_seq must be from 1 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  perform wallet.get_wallet(p_wallet_uuid);

  return query
  select o.*
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.seq < coalesce(p_before_seq, 9223372036854775807)
  order by o.seq desc
  limit p_limit;
end
$$;


ALTER FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer) OWNER TO wallet_owner;

--
-- Name: FUNCTION list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer) IS 'Returns a wallet''s operations, newest first: at most p_limit (1 to 1000) with a seq below p_before_seq (null: from the newest). The next page starts before the last row''s seq; after seq 1 there is none. Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';


--
-- Name: name_fault(text); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.name_fault(p_wallet_uuid text) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $_$
  select case
    when p_wallet_uuid is null then 'wallet_uuid must not be null'
    when p_wallet_uuid !~ '^[A-Za-z0-9_-]{1,64}$' then 'wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -'
  end
$_$;


ALTER FUNCTION wallet.name_fault(p_wallet_uuid text) OWNER TO wallet_owner;

--
-- Name: FUNCTION name_fault(p_wallet_uuid text); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.name_fault(p_wallet_uuid text) IS 'Internal: the message of WA400 for a wallet uuid that no wallet can have, else null. Neither security definer nor pinned, so that it is inlined into its callers, which are.';


--
-- Name: raise_too_late(); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.raise_too_late() RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise query_canceled using message = 'the deadline of this call has passed';
end
$$;


ALTER FUNCTION wallet.raise_too_late() OWNER TO wallet_owner;

--
-- Name: FUNCTION raise_too_late(); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.raise_too_late() IS 'Takes back the statement that calls it, because its last moment has passed: select ... from wallet.apply_operations(...) where case when clock_timestamp() < $5 then true else wallet.raise_too_late() end. The clock is looked at when the function has run, however long it waited for a lock, and a call that is in time holds its locks until it is committed. Raises 57014 (query_canceled), always.';


--
-- Name: raise_wallet_not_found(text); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.raise_wallet_not_found(p_wallet_uuid text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_fault text := wallet.name_fault(p_wallet_uuid);
begin
  if v_fault is not null then
    raise sqlstate 'WA400' using message = v_fault;
  end if;

  raise sqlstate 'WA404' using message = wallet.fault_message('WA404');
end
$$;


ALTER FUNCTION wallet.raise_wallet_not_found(p_wallet_uuid text) OWNER TO wallet_owner;

--
-- Name: FUNCTION raise_wallet_not_found(p_wallet_uuid text); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.raise_wallet_not_found(p_wallet_uuid text) IS 'Internal: says why no wallet was found under this name. A wallet that exists has a good name, so names are looked at only here. Raises WA400 (null or bad name) or WA404, always one of them.';


--
-- Name: verify(); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
--

CREATE FUNCTION wallet.verify() RETURNS TABLE(invariant text, wallet_uuid text, seq bigint, detail text)
    LANGUAGE sql STABLE SECURITY DEFINER PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION wallet.verify() OWNER TO wallet_owner;

--
-- Name: FUNCTION verify(); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.verify() IS 'Audits the books: one row per broken invariant (its name, the wallet, the seq where it shows, what was found); no rows means that the books are right. Reads the whole ledger in one snapshot and blocks nobody.';


--
-- Name: wait_for_wallet(text, interval); Type: FUNCTION; Schema: wallet; Owner: wallet_owner
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


ALTER FUNCTION wallet.wait_for_wallet(p_wallet_uuid text, p_patience interval) OWNER TO wallet_owner;

--
-- Name: FUNCTION wait_for_wallet(p_wallet_uuid text, p_patience interval); Type: COMMENT; Schema: wallet; Owner: wallet_owner
--

COMMENT ON FUNCTION wallet.wait_for_wallet(p_wallet_uuid text, p_patience interval) IS 'Internal: locks a wallet to the end of the transaction. Raises 55P03 if that takes longer than p_patience.';


--
-- Name: schema_migrations; Type: TABLE; Schema: public; Owner: postgres
--

CREATE TABLE public.schema_migrations (
    version character varying NOT NULL
);


ALTER TABLE public.schema_migrations OWNER TO postgres;

--
-- Name: wallet_testdata_migrations; Type: TABLE; Schema: public; Owner: postgres
--

CREATE TABLE public.wallet_testdata_migrations (
    version character varying NOT NULL
);


ALTER TABLE public.wallet_testdata_migrations OWNER TO postgres;

--
-- Name: wallet_id_seq; Type: SEQUENCE; Schema: wallet; Owner: wallet_owner
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
-- Data for Name: schema_migrations; Type: TABLE DATA; Schema: public; Owner: postgres
--

COPY public.schema_migrations (version) FROM stdin;
20261124000001
20261124000002
20261125000001
20261125000002
\.


--
-- Data for Name: wallet_testdata_migrations; Type: TABLE DATA; Schema: public; Owner: postgres
--

COPY public.wallet_testdata_migrations (version) FROM stdin;
20261124000001
\.


--
-- Data for Name: operation; Type: TABLE DATA; Schema: wallet; Owner: wallet_owner
--

COPY wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at) FROM stdin;
1111111111	DEPOSIT	00000000-0000-4000-8000-001111111111	1	1500	1500	2026-11-29 03:56:44.506315+00
2222222222	DEPOSIT	00000000-0000-4000-8000-002222222222	1	1500	1500	2026-11-29 03:56:44.506883+00
3333333333	DEPOSIT	00000000-0000-4000-8000-003333333333	1	1500	1500	2026-11-29 03:56:44.507059+00
4444444444	DEPOSIT	00000000-0000-4000-8000-004444444444	1	1500	1500	2026-11-29 03:56:44.507295+00
5555555555	DEPOSIT	00000000-0000-4000-8000-005555555555	1	1500	1500	2026-11-29 03:56:44.507415+00
full	DEPOSIT	8a6e0000-0000-4000-8000-000000000001	1	9223372036854775807	9223372036854775807	2026-11-29 03:56:44.520946+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000002	1	50	50	2026-11-29 03:56:44.521653+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000003	2	51	101	2026-11-29 03:56:44.522003+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000004	3	52	153	2026-11-29 03:56:44.522303+00
savings	WITHDRAW	8a6e0000-0000-4000-8000-000000000005	4	53	100	2026-11-29 03:56:44.522675+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000006	5	54	154	2026-11-29 03:56:44.522947+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000007	6	55	209	2026-11-29 03:56:44.523291+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000008	7	56	265	2026-11-29 03:56:44.52353+00
savings	WITHDRAW	8a6e0000-0000-4000-8000-000000000009	8	57	208	2026-11-29 03:56:44.523689+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000010	9	58	266	2026-11-29 03:56:44.523821+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000011	10	59	325	2026-11-29 03:56:44.523946+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000012	11	60	385	2026-11-29 03:56:44.52407+00
savings	WITHDRAW	8a6e0000-0000-4000-8000-000000000013	12	61	324	2026-11-29 03:56:44.524188+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000014	13	100	424	2026-11-29 03:56:44.528754+00
1111111111	WITHDRAW	8a6e0000-0000-4000-8000-000000000015	2	101	1399	2026-11-29 03:56:44.528754+00
savings	WITHDRAW	8a6e0000-0000-4000-8000-000000000017	14	103	321	2026-11-29 03:56:44.528754+00
1111111111	DEPOSIT	8a6e0000-0000-4000-8000-000000000018	3	104	1503	2026-11-29 03:56:44.528754+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000020	15	106	427	2026-11-29 03:56:44.528754+00
1111111111	WITHDRAW	8a6e0000-0000-4000-8000-000000000021	4	107	1396	2026-11-29 03:56:44.528754+00
savings	WITHDRAW	8a6e0000-0000-4000-8000-000000000023	16	109	318	2026-11-29 03:56:44.528754+00
1111111111	DEPOSIT	8a6e0000-0000-4000-8000-000000000024	5	110	1506	2026-11-29 03:56:44.528754+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000026	17	112	430	2026-11-29 03:56:44.528754+00
1111111111	WITHDRAW	8a6e0000-0000-4000-8000-000000000027	6	113	1393	2026-11-29 03:56:44.528754+00
savings	WITHDRAW	8a6e0000-0000-4000-8000-000000000029	18	115	315	2026-11-29 03:56:44.528754+00
1111111111	DEPOSIT	8a6e0000-0000-4000-8000-000000000030	7	116	1509	2026-11-29 03:56:44.528754+00
savings	DEPOSIT	8a6e0000-0000-4000-8000-000000000032	19	118	433	2026-11-29 03:56:44.528754+00
1111111111	WITHDRAW	8a6e0000-0000-4000-8000-000000000033	8	119	1390	2026-11-29 03:56:44.528754+00
\.


--
-- Data for Name: wallet; Type: TABLE DATA; Schema: wallet; Owner: wallet_owner
--

COPY wallet.wallet (uuid, id, balance, seq, created_at) FROM stdin;
2222222222	2	1500	1	2026-11-29 03:56:44.504877+00
3333333333	3	1500	1	2026-11-29 03:56:44.504944+00
4444444444	4	1500	1	2026-11-29 03:56:44.504989+00
5555555555	5	1500	1	2026-11-29 03:56:44.505028+00
empty	6	0	0	2026-11-29 03:56:44.518307+00
full	7	9223372036854775807	1	2026-11-29 03:56:44.519048+00
1111111111	1	1390	8	2026-11-29 03:56:44.504556+00
savings	8	433	19	2026-11-29 03:56:44.51958+00
\.


--
-- Name: wallet_id_seq; Type: SEQUENCE SET; Schema: wallet; Owner: wallet_owner
--

SELECT pg_catalog.setval('wallet.wallet_id_seq', 8, true);


--
-- Name: schema_migrations schema_migrations_pkey; Type: CONSTRAINT; Schema: public; Owner: postgres
--

ALTER TABLE ONLY public.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (version);


--
-- Name: wallet_testdata_migrations wallet_testdata_migrations_pkey; Type: CONSTRAINT; Schema: public; Owner: postgres
--

ALTER TABLE ONLY public.wallet_testdata_migrations
    ADD CONSTRAINT wallet_testdata_migrations_pkey PRIMARY KEY (version);


--
-- Name: operation operation_operation_uuid_key; Type: CONSTRAINT; Schema: wallet; Owner: wallet_owner
--

ALTER TABLE ONLY wallet.operation
    ADD CONSTRAINT operation_operation_uuid_key UNIQUE (operation_uuid);


--
-- Name: operation operation_pkey; Type: CONSTRAINT; Schema: wallet; Owner: wallet_owner
--

ALTER TABLE ONLY wallet.operation
    ADD CONSTRAINT operation_pkey PRIMARY KEY (wallet_uuid, seq);


--
-- Name: wallet wallet_pkey; Type: CONSTRAINT; Schema: wallet; Owner: wallet_owner
--

ALTER TABLE ONLY wallet.wallet
    ADD CONSTRAINT wallet_pkey PRIMARY KEY (uuid);


--
-- Name: SCHEMA wallet; Type: ACL; Schema: -; Owner: wallet_owner
--

GRANT USAGE ON SCHEMA wallet TO wallet_app;
GRANT USAGE ON SCHEMA wallet TO wallet_reader;


--
-- Name: TABLE operation; Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON TABLE wallet.operation FROM wallet_owner;
GRANT SELECT,INSERT,REFERENCES,TRIGGER ON TABLE wallet.operation TO wallet_owner;
GRANT SELECT ON TABLE wallet.operation TO wallet_reader;


--
-- Name: FUNCTION apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.apply_operation(p_wallet_uuid text, p_operation_uuid uuid, p_operation_type text, p_amount bigint) TO wallet_app;


--
-- Name: FUNCTION apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]) FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.apply_operations(p_wallet_uuids text[], p_operation_uuids uuid[], p_operation_types text[], p_amounts bigint[]) TO wallet_app;


--
-- Name: FUNCTION argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.argument_fault(p_operation_uuid uuid, p_operation_type text, p_amount bigint) FROM PUBLIC;


--
-- Name: FUNCTION contract_version(); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.contract_version() FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.contract_version() TO wallet_app;
GRANT ALL ON FUNCTION wallet.contract_version() TO wallet_reader;


--
-- Name: TABLE wallet; Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON TABLE wallet.wallet FROM wallet_owner;
GRANT SELECT,INSERT,REFERENCES,TRIGGER,UPDATE ON TABLE wallet.wallet TO wallet_owner;
GRANT SELECT ON TABLE wallet.wallet TO wallet_reader;


--
-- Name: FUNCTION create_wallet(p_wallet_uuid text); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.create_wallet(p_wallet_uuid text) FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.create_wallet(p_wallet_uuid text) TO wallet_app;


--
-- Name: FUNCTION fault_message(p_sqlstate text); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.fault_message(p_sqlstate text) FROM PUBLIC;


--
-- Name: FUNCTION funds_fault(p_operation_type text, p_amount bigint, p_balance bigint); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.funds_fault(p_operation_type text, p_amount bigint, p_balance bigint) FROM PUBLIC;


--
-- Name: FUNCTION get_operation(p_wallet_uuid text, p_operation_uuid uuid); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) TO wallet_app;
GRANT ALL ON FUNCTION wallet.get_operation(p_wallet_uuid text, p_operation_uuid uuid) TO wallet_reader;


--
-- Name: FUNCTION get_wallet(p_wallet_uuid text); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.get_wallet(p_wallet_uuid text) FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.get_wallet(p_wallet_uuid text) TO wallet_app;
GRANT ALL ON FUNCTION wallet.get_wallet(p_wallet_uuid text) TO wallet_reader;


--
-- Name: FUNCTION list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer) FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer) TO wallet_app;
GRANT ALL ON FUNCTION wallet.list_operations(p_wallet_uuid text, p_before_seq bigint, p_limit integer) TO wallet_reader;


--
-- Name: FUNCTION name_fault(p_wallet_uuid text); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.name_fault(p_wallet_uuid text) FROM PUBLIC;


--
-- Name: FUNCTION raise_too_late(); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.raise_too_late() FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.raise_too_late() TO wallet_app;


--
-- Name: FUNCTION raise_wallet_not_found(p_wallet_uuid text); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.raise_wallet_not_found(p_wallet_uuid text) FROM PUBLIC;


--
-- Name: FUNCTION verify(); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.verify() FROM PUBLIC;
GRANT ALL ON FUNCTION wallet.verify() TO wallet_app;
GRANT ALL ON FUNCTION wallet.verify() TO wallet_reader;


--
-- Name: FUNCTION wait_for_wallet(p_wallet_uuid text, p_patience interval); Type: ACL; Schema: wallet; Owner: wallet_owner
--

REVOKE ALL ON FUNCTION wallet.wait_for_wallet(p_wallet_uuid text, p_patience interval) FROM PUBLIC;


--
-- PostgreSQL database dump complete
--


