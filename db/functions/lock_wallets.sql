-- Without a lock_timeout the wallets are locked in the order of uuid, each waited for, so two calls that share wallets wait for each other
-- in one direction only.
--
-- Under a lock_timeout a call holds no lock while it waits for one, so that nobody waits in vain for its other wallets. It locks
-- what is free; if a wallet is missing, it releases all, waits for the missing one alone and, once it has that one, locks the
-- rest. Each wait has half of what is left of the lock_timeout, so that a wallet that stays locked leaves some time for
-- those that are merely busy. A call for a single wallet simply waits for it.
create or replace function wallet.lock_wallets(
  p_wallet_uuids text[],
  out uuids text[],
  out statuses text[],
  out currencies text[],
  out missed text[]
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
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

comment on function wallet.lock_wallets(text[]) is
  'Internal: locks wallets to the end of the transaction. Returns those that it has locked, in the order of uuid (null: none), with their status and currency, '
  'and in missed those that exist and, under a lock_timeout, stayed locked by another transaction. Names may repeat, be null, or name no wallet. '
  'Raises 55P03 if the table stays locked.';
