create or replace function wallet.fault_message(p_sqlstate text)
returns text
language sql immutable
as $$
  select case p_sqlstate
    when 'WA402' then 'Not enough money'
    when 'WA403' then 'Wallet is frozen'
    when 'WA404' then 'Wallet not found'
    when 'WA405' then 'Wallet is closed'
    when 'WA409' then 'Transaction already exists'
    when 'WA410' then 'Hold is closed'
    when 'WA414' then 'Operation not found'
    when 'WA416' then 'Balance out of range'
    when 'WA417' then 'Wallet is not empty'
    when 'WA419' then 'Wallet already exists'
    when 'WA420' then 'Key already exists'
    when 'WA421' then 'Key not found'
    when 'WA422' then 'Currencies differ'
    when 'WA424' then 'Hold not found'
    when 'WA425' then 'Another operation of the request was refused'
    when '55P03' then 'Wallet is locked by another transaction: not applied'
    else case when p_sqlstate is not null then 'Refused by the database: not applied' end
  end
$$;

comment on function wallet.fault_message(text) is
  'Internal: the message that goes with a SQLSTATE; REST clients see it as detail. '
  'No security definer and no search_path of its own, so that it is inlined into its callers, which have both.';
