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
  'An expired hold is no longer held, whether its EXPIRE is recorded or not. '
  'p_at: a moment; balance, held, available, seq and updated_at are then those after the last operation at or before it (balance 0 and seq 0 before '
  'the first), and held without the holds that had expired by then; currency and status are always today''s. Null: now. '
  'Raises WA400 (null or bad name), WA404 (no such wallet).';
