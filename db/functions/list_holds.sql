create or replace function wallet.list_holds(p_wallet_uuid text, p_after_seq bigint default null, p_limit int default 100)
returns setof wallet.hold
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_moment timestamptz;
begin
  if p_after_seq < 0 then
    raise sqlstate 'WA400' using message = 'after_seq must be from 0 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  v_moment := greatest(clock_timestamp(), (wallet.get_wallet(p_wallet_uuid)).updated_at);

  return query
  select h.*
  from wallet.hold as h
  where h.wallet_uuid = p_wallet_uuid and h.seq > coalesce(p_after_seq, 0) and h.seq > 0 -- as hold_seq_idx says
    and (h.expires_at > v_moment) is not false
  order by h.seq
  limit p_limit;
end
$$;

comment on function wallet.list_holds(text, bigint, int) is
  'Returns a wallet''s open holds that have not expired, oldest first: at most p_limit (1 to 1000) with a seq above p_after_seq (null: from the oldest). '
  'The next page starts after the last row''s seq; after a page with fewer than p_limit rows there is none. '
  'Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';
