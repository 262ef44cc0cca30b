-- Names are compared byte for byte (collation "C"), and every byte of a name is below '~': so the names that begin with a
-- prefix are those from the prefix up to the prefix with a '~', one range of the primary key.
create or replace function wallet.list_wallets(
  p_after text default null,
  p_limit int default 100,
  p_prefix text default null
)
returns setof wallet.balance
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_prefix text := coalesce(p_prefix, '');
begin
  if p_after is not null and wallet.name_fault(p_after) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(p_after), 'wallet_uuid', 'after');
  elsif v_prefix <> '' and wallet.name_fault(v_prefix) is not null then
    raise sqlstate 'WA400' using message = replace(wallet.name_fault(v_prefix), 'wallet_uuid', 'prefix');
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise sqlstate 'WA400' using message = 'limit must be from 1 to 1000';
  end if;

  return query
  select b.*
  from wallet.balance as b
  where b.uuid > coalesce(p_after, '') and b.uuid >= v_prefix and b.uuid < v_prefix || '~'
  order by b.uuid
  limit p_limit;
end
$$;

comment on function wallet.list_wallets(text, int, text) is
  'Returns wallets as rows of wallet.balance, in the order of uuid byte for byte: at most p_limit (1 to 1000), with a uuid after p_after (which need not '
  'exist; null: from the first) that begins with p_prefix (null or empty: any). The next page starts after the last row''s uuid; '
  'after a page with fewer than p_limit rows there is none. Raises WA400 (bad name or prefix, limit out of range).';
