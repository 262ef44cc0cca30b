-- An operation records all holds that are due at its moment, so those that are still open were not due at the moment of the wallet's last
-- row: the search starts there and skips the dead index entries of earlier holds.
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
