create or replace function wallet.list_operations(
  p_wallet_uuid text,
  p_before_seq bigint default null,
  p_limit int default 100,
  p_from timestamptz default null,
  p_to timestamptz default null
)
returns setof wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_after bigint := 0;
  v_before bigint := coalesce(p_before_seq, 9223372036854775807);
begin
  if p_before_seq < 1 then
    raise sqlstate 'WA400' using message = 'before_seq must be from 1 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  perform wallet.get_wallet(p_wallet_uuid);

  if p_from is not null then
    v_after := wallet.seq_before(p_wallet_uuid, p_from);
  end if;
  if p_to is not null then
    v_before := least(v_before, wallet.seq_before(p_wallet_uuid, p_to) + 1);
  end if;

  return query
  select o.*
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.seq > v_after and o.seq < v_before
  order by o.seq desc
  limit p_limit;
end
$$;

comment on function wallet.list_operations(text, bigint, int, timestamptz, timestamptz) is
  'Returns a wallet''s operations, newest first: at most p_limit (1 to 1000) with a seq below p_before_seq (null: from the newest) and a created_at '
  'from p_from, which is included, to p_to, which is not (null: without bound). What lies outside does not add to the cost. '
  'The next page starts before the last row''s seq; after a page with fewer than p_limit rows there is none. '
  'Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';
