create or replace function wallet.due_amount(p_wallet_uuid text, p_from timestamptz, p_until timestamptz default null)
returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
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

comment on function wallet.due_amount(text, timestamptz, timestamptz) is
  'Internal: the sum of a wallet''s holds that have expired by p_until (null: now) but have no EXPIRE yet, in minor units. p_from: the created_at of the wallet''s last row. '
  'The view wallet.balance calls it with the rights of whoever reads that.';
