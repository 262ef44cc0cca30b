-- The lock comes first: an operation that is under way ends before the balance is read, and none begins before the commit.
create or replace function wallet.set_status(p_wallet_uuid text, p_status text, p_not_after timestamptz default null)
returns wallet.balance
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
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

comment on function wallet.set_status(text, text, timestamptz) is
  'Sets a wallet''s status and returns its row of wallet.balance. OPEN: everything is allowed. FROZEN: money comes in, and none leaves or is held anew. '
  'CLOSED: no operation is applied; only an empty wallet can be closed. Every change between the three is allowed; the same status again changes nothing. '
  'p_not_after: the last moment of this call by the database''s clock, or null. Raises WA400 (bad name or status), WA404 (no such wallet), '
  'WA417 (not empty), 57014 (too late: nothing was changed), 0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';
