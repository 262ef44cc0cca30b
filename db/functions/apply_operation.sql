-- The row lock on the wallet comes first and is held to the end of the transaction: it puts the operations of one
-- wallet in order, so nothing below it can race but the same operation_uuid on another wallet, where the unique
-- index decides. The balance is checked before the duplicate because that is the order that costs a good operation
-- nothing; an operation that was applied and is sent again must hear that it exists, so the failing paths look for it.
-- A plain insert whose unique_violation is caught costs less than one that is on conflict do nothing. Lock, insert and
-- update stand in one block, and so in one subtransaction: an update of a row that another one locked needs a multixact.
create or replace function wallet.apply_operation(
  p_wallet_uuid text,
  p_operation_uuid uuid,
  p_operation_type text,
  p_amount bigint
)
returns wallet.operation
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
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

comment on function wallet.apply_operation(text, uuid, text, bigint) is
  'Applies one operation to one wallet exactly once and returns its row. p_operation_uuid: the caller''s name for the operation, '
  'not the nil UUID; p_operation_type: DEPOSIT or WITHDRAW; p_amount: minor units, 1 to 2^63-1. '
  'Raises, the first that applies: WA400 (bad argument), WA404 (no such wallet), WA409 (the operation exists, on whichever wallet), '
  'WA402 (not enough money), WA416 (the balance would pass 2^63-1); under a lock_timeout also 55P03, after WA409 (another transaction keeps '
  'the wallet locked, or the operation_uuid in flight); under repeatable read or serializable also 40001. '
  'A refused operation leaves nothing behind.';
