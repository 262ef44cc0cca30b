-- A wallet's created_at never goes back, so its history is in the order of time as well as of seq: a binary search, which
-- reads about log2(length) rows. The newest row is looked at first, because most
-- moments that people ask for are after it or not long ago.
create or replace function wallet.seq_before(p_wallet_uuid text, p_moment timestamptz, p_inclusive boolean default false)
returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
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

comment on function wallet.seq_before(text, timestamptz, boolean) is
  'Internal: the seq of a wallet''s last operation before a moment, 0 if there is none. p_inclusive: or at the moment itself. '
  'Reads a number of rows that is logarithmic in the length of the wallet''s history.';
