create or replace function wallet.list_operations(
  p_wallet_uuid text,
  p_before_seq bigint default null,
  p_limit int default 100
)
returns setof wallet.operation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_before_seq < 1 then
    raise sqlstate 'WA400' using message = 'before_seq must be from 1 to 9223372036854775807';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  perform wallet.get_wallet(p_wallet_uuid);

  return query
  select o.*
  from wallet.operation as o
  where o.wallet_uuid = p_wallet_uuid and o.seq < coalesce(p_before_seq, 9223372036854775807)
  order by o.seq desc
  limit p_limit;
end
$$;

comment on function wallet.list_operations(text, bigint, int) is
  'Returns a wallet''s operations, newest first: at most p_limit (1 to 1000) with a seq below p_before_seq (null: from the newest). '
  'The next page starts before the last row''s seq; after seq 1 there is none. '
  'Raises WA400 (null or bad name, limit or seq out of range), WA404 (no such wallet).';
