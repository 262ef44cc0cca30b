-- migrate:up

set local search_path = pg_catalog, pg_temp;

-- Before commit b046021 the functions' migration was rewritten in place, so its version number says nothing about an older database.
do $$
begin
  if to_regprocedure('wallet.raise_too_late()') is null then
    raise exception '%',
      'this database was made before commit b046021, the first state that can be upgraded; nothing was changed: '
      || 'see "A database from before b046021" in db/README.md';
  end if;
end
$$;

reset search_path;

-- migrate:down

set local search_path = pg_catalog, pg_temp;
reset search_path;
