-- The row locks on the wallets come first (see lock_wallets) and are held to the end of the transaction: they put the
-- operations of a wallet in order, so nothing below them can race but the same operation_uuid on another wallet, where
-- the unique index decides. The last rows are read by statements of their own, which see what the lock waited for.
-- The state is checked first, so that a valid operation does not pay for a search for duplicates. A refused one is looked up: a
-- repeat must get WA409.
-- Whatever involves holds goes to apply_operations.
-- A plain insert whose unique_violation is caught costs less than `insert ... on conflict do nothing`.
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

comment on function wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz) is
  'Applies one operation exactly once and returns its row; for a transfer, the payer''s. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE; p_amount: minor units, 1 to 2^63-1, null for RELEASE; p_counterparty_uuid: the payee of a TRANSFER, '
  'else null; p_hold_uuid: the hold, that is the operation_uuid of a HOLD of this wallet, which a RELEASE ends, or from which a WITHDRAW or TRANSFER takes its amount '
  '(a capture: the hold ends, and what is left of it is available again); else null; p_expires_at: of a HOLD, from when on it counts no longer, '
  'in the years 1 to 9999, or null; p_metadata: an object of at most 2,048 octets as text ({} is null); p_not_after: the caller''s deadline by the database''s clock. '
  'Raises, the first that applies: 0A000 (the transaction is not read committed), WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA424 (this wallet has no such hold), WA410 (the hold is captured, released or expired, or a new HOLD''s p_expires_at has passed), '
  'WA405 (a wallet is closed), WA403 (the wallet is frozen), WA422 (the wallets'' currencies differ), WA402 (not enough money available; a capture of more than is held), '
  'WA416 (a balance would pass 2^63-1); under a lock_timeout also 55P03, which ranks after WA409 (another transaction keeps '
  'a wallet locked, or is applying the same operation_uuid); 57014 (too late). '
  'A refused operation leaves nothing behind.';
