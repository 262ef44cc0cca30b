create or replace function wallet.create_wallet(
  p_wallet_uuid text default null,
  p_currency text default null,
  p_not_after timestamptz default null
)
returns wallet.balance
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
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
$$;

comment on function wallet.create_wallet(text, text, timestamptz) is
  'Creates a wallet with balance 0 and returns its row of wallet.balance. p_wallet_uuid: its name, 1 to 64 characters of A-Z, a-z, 0-9, _ and -; '
  'null for a random UUID. p_currency: 3 to 12 characters of A-Z and 0-9, or null; it never changes. p_not_after: the last moment of this call by the '
  'database''s clock, or null. Raises WA400 (bad name or currency), WA419 (the wallet exists), 57014 (too late: nothing was created), '
  '0A000 (another isolation level than read committed); under a lock_timeout also 55P03.';
