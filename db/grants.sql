-- wallet_app calls functions and touches no table; wallet_reader reads the books and changes nothing;
-- wallet_admin is a member of wallet_app that manages keys, too. PUBLIC has nothing.
-- Functions that are granted to nobody are internal: they run as part of the others, with the owner's rights.
revoke all on schema wallet from public;
revoke all on all tables in schema wallet from public;
revoke all on all functions in schema wallet from public;

grant usage on schema wallet to wallet_app, wallet_reader;

grant execute on function
  wallet.create_wallet(text, text, timestamptz),
  wallet.apply_operation(text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz),
  wallet.apply_operations(text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz),
  wallet.set_status(text, text, timestamptz),
  wallet.expire_holds(text, int),
  wallet.live_keys(),
  wallet.raise_too_late()
to wallet_app;

grant execute on function
  wallet.create_key(text, text[], text, timestamptz),
  wallet.revoke_key(text),
  wallet.list_keys()
to wallet_admin;

grant execute on function
  wallet.get_wallet(text, timestamptz),
  wallet.get_operation(text, uuid),
  wallet.list_operations(text, bigint, int, timestamptz, timestamptz),
  wallet.list_wallets(text, int, text),
  wallet.list_holds(text, bigint, int),
  wallet.contract_version(),
  wallet.verify()
to wallet_app, wallet_reader;

grant select on wallet.wallet, wallet.operation, wallet.hold, wallet.balance to wallet_reader;
grant execute on function wallet.due_amount(text, timestamptz, timestamptz) to wallet_reader; -- the view wallet.balance calls it

-- The ledger is append-only and a wallet with a history stays, for the owner too: whoever means it grants it to himself.
revoke delete, truncate on wallet.wallet from wallet_owner;
revoke update, delete, truncate on wallet.operation from wallet_owner;
