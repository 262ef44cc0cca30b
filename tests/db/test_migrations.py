"""What `dbmate` makes of an empty database, and what it leaves when it takes it back."""

import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from app.server.embedded import BINARIES, Postgres
from app.settings import CHECKOUT
from tests.cases import A, B, C, X, Y, deposit, hold, release, transfer, withdraw
from tests.conftest import url_of
from tests.db.door import apply, balances, call, create, outcome

DBMATE = Path(sys.executable).parent / "dbmate"
FUNCTIONS = sorted((CHECKOUT / "db" / "functions").glob("*.sql"))
MIGRATIONS = sorted((CHECKOUT / "db" / "migrations").glob("*.sql"))
TESTDATA = sorted((CHECKOUT / "db" / "testdata").glob("*.sql"))
RELEASED = sorted((CHECKOUT / "tests" / "db" / "released").glob("*.sql"))
"""Dumps, each named after the commit that left such a database."""
DEMONSTRATION = {digit * 10: 1500 for digit in "12345"}

FORMS = {
    "migrate": ["migrate"],
    "rollback": ["rollback"],
    "testdata migrate": ["-d", "db/testdata", "--migrations-table", "wallet_testdata_migrations", "migrate"],
    "testdata rollback": ["-d", "db/testdata", "--migrations-table", "wallet_testdata_migrations", "rollback"],
}
"""The commands as the README gives them."""

CATALOGUE = {
    "functions": """
        select oid::regprocedure::text, pg_get_functiondef(oid), pg_get_userbyid(proowner)::text,
          array(select unnest(proacl)::text order by 1), obj_description(oid, 'pg_proc')
        from pg_proc where pronamespace = 'wallet'::regnamespace order by 1""",
    "tables": """
        select oid::regclass::text, relkind::text, reloptions, pg_get_userbyid(relowner)::text,
          array(
            select regexp_replace(unnest(coalesce(relacl, acldefault('r', relowner)))::text, '=([a-zA-Z]*)m', '=\\1')
            order by 1
          ), -- 17 added MAINTAIN
          obj_description(oid, 'pg_class')
        from pg_class where relnamespace = 'wallet'::regnamespace order by 1""",
    "columns": """
        select attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, attcollation::int8,
          attidentity::text, col_description(attrelid, attnum)
        from pg_attribute where attrelid::regclass::text like 'wallet.%' and attnum > 0 and not attisdropped
        order by attrelid::regclass::text, attname""",
    "indexes": """
        select indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid
        from pg_index where indrelid::regclass::text like 'wallet.%' order by 1""",
    "views": """
        select viewname, definition from pg_views where schemaname = 'wallet' order by 1""",
    "constraints": """
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        from pg_constraint where connamespace = 'wallet'::regnamespace order by 1, 2""",
    "schema": """
        select pg_get_userbyid(nspowner)::text, array(select unnest(nspacl)::text order by 1),
          obj_description(oid, 'pg_namespace')
        from pg_namespace where nspname = 'wallet'""",
}


def catalogue(connection: psycopg.Connection) -> dict[str, list[Any]]:
    """Return all there is to know about schema wallet."""
    return {name: connection.execute(query).fetchall() for name, query in CATALOGUE.items()}


def dbmate(url: str, form: str, *options: str) -> None:
    """Run a command of the README on the database of this URL."""
    try:
        subprocess.run(
            [DBMATE, "--env-file", "dbmate.env", *options, *FORMS[form]],
            cwd=CHECKOUT,
            env={**os.environ, "DATABASE_URL": url},
            check=True,
            capture_output=True,
        )
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr.decode())
        raise


@pytest.fixture(scope="module")
def bare_server(server: SimpleNamespace) -> Iterator[Postgres]:
    """A PostgreSQL where the roles do not exist yet, with `deployer`: no superuser, but CREATEROLE."""
    home = server.postgres.home / f"bare_{uuid4().hex}"  # a worker may come back to this module
    postgres = Postgres(home, "fsync=off", binaries=server.postgres.binaries)
    postgres.start()
    with psycopg.connect(postgres.url("postgres", "postgres"), autocommit=True) as connection:
        connection.execute("create role deployer login createrole")
    yield postgres
    postgres.stop()


@pytest.fixture
def empty_database(bare_server: Postgres) -> Iterator[Callable[[], str]]:
    """Makes empty databases that belong to `deployer`, and drops them with all roles that were made meanwhile."""
    names: list[str] = []
    with psycopg.connect(bare_server.url("postgres", "postgres"), autocommit=True) as admin:

        def make() -> str:
            names.append(f"empty{len(names)}")
            admin.execute(f"create database {names[-1]} owner deployer")
            return bare_server.url("deployer", names[-1])

        yield make
        for name in names:
            admin.execute(f"drop database {name}")
        for (role,) in admin.execute("select rolname from pg_roles where rolname like 'wallet\\_%'").fetchall():
            admin.execute(f"drop role {role}")


def as_superuser(url: str) -> str:
    """Return the URI of a deployer's database for the superuser."""
    return url.replace("deployer@", "postgres@")


@pytest.fixture
def deployed(superuser: psycopg.Connection) -> str:
    """The URI of this test's migrated database for the superuser who migrated it."""
    return url_of(superuser, "postgres")


@pytest.fixture
def migrated(superuser: psycopg.Connection) -> Iterator[str]:
    """The URI, for `deployer`, of a migrated, empty database as if that role, no superuser, had migrated it.

    To migrate takes a second, for which migrations sleep.
    """
    superuser.execute("create role deployer login createrole in role wallet_owner")
    superuser.execute(f"alter database {superuser.info.dbname} owner to deployer".encode())
    superuser.execute("alter table schema_migrations owner to deployer")
    yield url_of(superuser, "deployer")
    superuser.execute("reassign owned by deployer to postgres")
    superuser.execute("drop owned by deployer")
    superuser.execute("drop role deployer")


# The schema


def test_a_user_with_createrole_migrates_whether_the_roles_exist_or_not(empty_database: Callable[[], str]) -> None:
    with psycopg.connect(first := empty_database(), autocommit=True) as connection:
        assert connection.execute("select from pg_roles where rolname like 'wallet\\_%'").fetchall() == []
        dbmate(first, "migrate")
        without_roles = catalogue(connection)
        roles = "select rolname, rolcanlogin or rolsuper from pg_roles where rolname like 'wallet\\_%' order by 1"
        assert connection.execute(roles).fetchall() == [
            ("wallet_admin", False),
            ("wallet_app", False),
            ("wallet_owner", False),
            ("wallet_reader", False),
        ]
    with psycopg.connect(second := empty_database(), autocommit=True) as connection:
        dbmate(second, "migrate")
        assert catalogue(connection) == without_roles


def test_a_user_without_createrole_migrates_once_the_roles_are_there(
    empty_database: Callable[[], str], bare_server: Postgres
) -> None:
    url = empty_database()
    with psycopg.connect(bare_server.url("postgres", "postgres"), autocommit=True) as admin:
        admin.execute("create role wallet_owner role deployer")
        admin.execute("create role wallet_app")
        admin.execute("create role wallet_reader")
        admin.execute("create role wallet_admin in role wallet_app")
        admin.execute("alter role deployer nocreaterole")
        try:
            dbmate(url, "migrate")
        finally:
            admin.execute("alter role deployer createrole")
    with psycopg.connect(url) as connection:
        assert len(catalogue(connection)["functions"]) == len(FUNCTIONS)


def test_the_migrated_functions_and_grants_are_those_of_their_files(
    superuser: psycopg.Connection, empty_database: Callable[[], str], bare_server: Postgres
) -> None:
    url = empty_database()
    with psycopg.connect(url) as connection:
        dbmate(url, "migrate")
        connection.execute("set local role wallet_owner")
        connection.execute("""
            do $$
            declare
              v_function regprocedure;
            begin
              for v_function in
                select oid from pg_proc
                where pronamespace = 'wallet'::regnamespace and proname <> 'due_amount' -- the view needs it
              loop
                execute format('drop function %s', v_function);
              end loop;
            end
            $$""")
        for path in [*FUNCTIONS, CHECKOUT / "db" / "grants.sql"]:
            connection.execute(path.read_text())
        from_files = catalogue(connection)

    assert catalogue(superuser) == from_files


def test_there_is_one_function_for_each_file(superuser: psycopg.Connection) -> None:
    names = superuser.execute(
        "select proname from pg_proc where pronamespace = 'wallet'::regnamespace order by 1"
    ).fetchall()
    assert [name for (name,) in names] == [path.stem for path in FUNCTIONS]


def test_the_migrations_lead_to_the_files_and_the_newest_is_the_generated_one() -> None:
    generate = runpy.run_path(str(CHECKOUT / "db" / "generate.py"))
    migrated, migration = generate["migrated"], generate["migration"]
    assert migrated(MIGRATIONS) == generate["files"]()
    for number, path in enumerate(MIGRATIONS[3:], 3):
        before, after = migrated(MIGRATIONS[:number]), migrated(MIGRATIONS[: number + 1])
        if before.functions != after.functions:
            assert path.read_text() == migration(before, after, path.read_text())


WITHOUT_TRANSACTION = [path for path in MIGRATIONS if "transaction:false" in path.read_text()]


@pytest.mark.parametrize("path", WITHOUT_TRANSACTION, ids=lambda path: path.stem)
def test_a_section_without_a_transaction_is_one_statement_that_names_its_schema(path: Path) -> None:
    """PostgreSQL runs several in a transaction, and without one nothing sets their search_path."""
    for section in path.read_text().split("-- migrate:")[1:]:
        head, _, statement = section.partition("\n")
        assert head.endswith(" transaction:false")
        assert re.fullmatch(r"(create unique|drop) index concurrently [^;]*\bwallet\.[^;]*;", statement.strip())


@pytest.mark.parametrize(
    "path", [path for path in [*MIGRATIONS, *TESTDATA] if path not in WITHOUT_TRANSACTION], ids=lambda path: path.stem
)
def test_every_section_runs_with_a_search_path_of_its_own(path: Path) -> None:
    up, down = path.read_text().split("-- migrate:down\n")
    for section in (up.removeprefix("-- migrate:up\n"), down):
        lines = [line for line in section.splitlines() if line]
        assert lines[0] == "set local search_path = pg_catalog, pg_temp;"
        assert lines[-1] == "reset search_path;"


def test_a_function_that_somebody_put_on_the_path_is_not_run(empty_database: Callable[[], str]) -> None:
    """Before PostgreSQL 15, and in databases upgraded from there, everybody may create in schema public."""
    url = empty_database()
    with psycopg.connect(url, autocommit=True) as connection:
        for function in ("format(text, text)", "to_regprocedure(text)", "pg_has_role(name, text, text)"):
            name, _, types = function.partition("(")
            connection.execute(
                f"""
                create function public.{name}({types} returns text language plpgsql as
                  $$ begin raise exception 'public.{name} was run'; end $$""".encode()
            )
        for form in ("migrate", "testdata migrate", "testdata rollback"):
            dbmate(url, form)
        for _ in MIGRATIONS:
            dbmate(url, "rollback")


def test_a_rollback_never_destroys_money(migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection:
        dbmate(migrated, "testdata migrate")
        before = money(connection)
        for _ in MIGRATIONS[1:]:
            dbmate(migrated, "rollback")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")
        assert "would destroy the ledger" in refused.value.stderr.decode()
        assert money(connection) == before

        dbmate(migrated, "migrate")
        assert balances(connection, DEMONSTRATION) == DEMONSTRATION


def test_rolling_back_leaves_only_the_roles_and_migrating_again_works(empty_database: Callable[[], str]) -> None:
    url = empty_database()
    with psycopg.connect(url, autocommit=True) as connection:
        dbmate(url, "migrate")
        migrated = catalogue(connection)
        for command in ("testdata migrate", "testdata rollback"):
            dbmate(url, command)
        for _ in MIGRATIONS:
            dbmate(url, "rollback")

        left = connection.execute("""
            select relnamespace::regnamespace::text, relname from pg_class
            where relkind in ('r', 'S', 'v') and relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
            union all select 'schema', nspname from pg_namespace where nspname !~ '^(pg_|information_schema$)'
            union all select 'function', proname from pg_proc where oid >= 16384
            union all select 'kept by', refobjid::regrole::text from pg_shdepend
            where dbid = (select oid from pg_database where datname = current_database())
              and refobjid::regrole::text like 'wallet\\_%' order by 1, 2""").fetchall()
        assert left == [
            ("public", "schema_migrations"),
            ("public", "wallet_testdata_migrations"),
            ("schema", "public"),
        ]
        assert connection.execute("table schema_migrations union all table wallet_testdata_migrations").fetchall() == []

        dbmate(url, "migrate")
        assert catalogue(connection) == migrated


# Released states


@pytest.fixture(params=RELEASED, ids=lambda path: path.stem)
def released(request: pytest.FixtureRequest, bare_server: Postgres, empty_database: Callable[[], str]) -> str:
    """The URI, for a superuser, of a database as a released commit left it, with money in it."""
    url = as_superuser(empty_database())
    with psycopg.connect(url, autocommit=True) as connection:
        for role in ("wallet_owner", "wallet_app", "wallet_reader"):
            connection.execute(f"create role {role}".encode())
    restore = [bare_server.binaries / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-f", request.param, url]
    subprocess.run(restore, check=True, capture_output=True)
    return url


def money(connection: psycopg.Connection) -> dict[str, list[Any]]:
    """Return who has what, and why, as far as each version can tell."""
    view = connection.execute("select to_regclass('wallet.balance')::text").fetchall()[0][0]
    has_balances = "select from pg_attribute where attrelid = 'wallet.wallet'::regclass and attname = 'balance'"
    wallets = "wallet.wallet" if connection.execute(has_balances).fetchall() else view
    queries = {
        "wallets": f"select uuid, id, balance, seq, created_at from {wallets} order by uuid",
        "ledger": """
            select wallet_uuid, seq, operation_uuid, operation_type, amount, balance_after, created_at
            from wallet.operation order by 1, 2""",
    }
    return {name: connection.execute(query.encode()).fetchall() for name, query in queries.items()}


def test_a_released_state_is_migrated_and_rolled_back_without_loss(
    released: str, superuser: psycopg.Connection
) -> None:
    wanted = catalogue(superuser)
    with psycopg.connect(released, autocommit=True) as connection:
        was, held = catalogue(connection), money(connection)
        applied = connection.execute("select count(*) from schema_migrations").fetchone()
        assert applied is not None
        assert held["ledger"]

        dbmate(released, "migrate")
        assert catalogue(connection) == wanted
        assert money(connection) == held
        assert call(connection, "verify") == []

        for _ in MIGRATIONS[applied[0] :]:
            dbmate(released, "rollback")
        assert catalogue(connection) == was
        assert money(connection) == held

        dbmate(released, "migrate")
        assert catalogue(connection) == wanted
        savings = call(connection, "get_wallet", "savings")[0].balance
        assert apply(connection, deposit("savings", A, 5)).balance_after == savings + 5


@pytest.mark.parametrize("released", RELEASED[:1], indirect=True, ids=lambda path: path.stem)
def test_a_database_from_before_the_first_released_state_is_told_what_to_do(released: str) -> None:
    with psycopg.connect(released, autocommit=True) as connection:
        held = money(connection)
        connection.execute("drop function wallet.raise_too_late")  # as commit ebf1f3b left it
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(released, "migrate")
        assert "before commit b046021" in refused.value.stderr.decode()
        assert "db/README.md" in refused.value.stderr.decode()
        assert money(connection) == held

        [command] = re.findall(r"^(sed .*)$", (CHECKOUT / "db" / "README.md").read_text(), re.MULTILINE)
        environment = {**os.environ, "DATABASE_URL": released, "PATH": f"{BINARIES}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=CHECKOUT, env=environment, check=True)
        dbmate(released, "migrate")
        assert money(connection) == held
        assert call(connection, "verify") == []


# Migrating


def test_a_failed_migration_leaves_nothing(empty_database: Callable[[], str]) -> None:
    url = empty_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create schema wallet")
        with pytest.raises(subprocess.CalledProcessError):
            dbmate(url, "migrate")
        assert connection.execute("select from pg_roles where rolname like 'wallet\\_%'").fetchall() == []


def test_four_deployments_at_once_migrate_once(empty_database: Callable[[], str]) -> None:
    url = empty_database()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: dbmate(url, "migrate", "--migration-lock"), range(4)))
    with psycopg.connect(url) as connection:
        assert len(catalogue(connection)["functions"]) == len(FUNCTIONS)


def test_four_databases_of_one_cluster_may_be_migrated_at_once(empty_database: Callable[[], str]) -> None:
    urls = [empty_database() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda url: dbmate(url, "migrate"), urls))


def test_the_dumped_schema_is_the_committed_one(deployed: str, superuser: psycopg.Connection, tmp_path: Path) -> None:
    if superuser.info.server_version // 10000 != 18:
        pytest.skip("db/schema.sql is what pg_dump 18 makes of PostgreSQL 18")
    dumped = tmp_path / "schema.sql"
    subprocess.run(
        [DBMATE, "--env-file", "dbmate.env", "--schema-file", dumped, "dump"],
        cwd=CHECKOUT,
        env={**os.environ, "DATABASE_URL": deployed, "PATH": f"{BINARIES}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )

    def content(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if not line.startswith("-- Dumped")]

    assert content(dumped) == content(CHECKOUT / "db" / "schema.sql")


# The demonstration wallets


def test_the_demonstration_wallets_are_deposits_like_any_other(deployed: str, superuser: psycopg.Connection) -> None:
    dbmate(deployed, "testdata migrate")
    wallets = superuser.execute("select uuid, id, balance, seq from wallet.balance order by id").fetchall()
    assert wallets == [(digit * 10, int(digit), 1500, 1) for digit in "12345"]
    assert call(superuser, "verify") == []


def test_rolling_back_the_demonstration_takes_exactly_its_wallets_whatever_happened_to_them(
    deployed: str, service: psycopg.Connection
) -> None:
    create(service, {"before": 10})
    dbmate(deployed, "testdata migrate")
    create(service, {"after": 20})
    apply(service, withdraw("1111111111", A, 1500))
    apply(service, deposit("2222222222", B, 7))
    apply(service, withdraw("before", C, 10))

    dbmate(deployed, "testdata rollback")

    for wallet in DEMONSTRATION:
        with pytest.raises(psycopg.Error) as missing:
            call(service, "get_wallet", wallet)
        assert missing.value.sqlstate == "WA404"
    assert balances(service, ["before", "after"]) == {"before": 0, "after": 20}
    assert call(service, "verify") == []
    assert call(service, "create_wallet", "next")[0].id == call(service, "get_wallet", "after")[0].id + 1


def test_a_demonstration_that_was_rolled_back_comes_again_as_it_was(
    deployed: str, service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    dbmate(deployed, "testdata migrate")
    apply(service, withdraw("1111111111", A, 1500))
    dbmate(deployed, "testdata rollback")
    emptied = "select (select count(*) from wallet.wallet), (select count(*) from wallet.operation)"
    assert superuser.execute(emptied).fetchall() == [(0, 0)]

    dbmate(deployed, "testdata migrate")
    assert balances(service, DEMONSTRATION) == DEMONSTRATION
    assert [call(service, "get_wallet", wallet)[0].id for wallet in DEMONSTRATION] == [1, 2, 3, 4, 5]


# The ledger is the state


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "select wallet.apply_operation('savings', gen_random_uuid(), 'TRANSFER', 1, 'other')",
            "transfers or metadata",
        ),
        (
            "select wallet.apply_operation('savings', gen_random_uuid(), 'DEPOSIT', 1, p_metadata => '{\"a\": 1}')",
            "transfers or metadata",
        ),
        ("select wallet.create_wallet('euros', 'EUR')", "currency or a status"),
        ("select wallet.set_status('savings', 'FROZEN')", "currency or a status"),
    ],
)
def test_what_the_schema_before_cannot_hold_is_not_rolled_back(change: str, line: str, migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection:
        create(connection, {"savings": 5, "other": 0})
        connection.execute(change.encode())
        before = money(connection)
        for _ in [path for path in MIGRATIONS if path.stem > "20261129000006"]:
            dbmate(migrated, "rollback")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")
        assert line in refused.value.stderr.decode()
        assert money(connection) == before
        dbmate(migrated, "migrate")
        assert apply(connection, deposit("other", A, 5)).operation_uuid == A


BEFORE_HOLDS = [path for path in MIGRATIONS if path.stem < "20261129100001"]


def test_a_ledger_from_before_holds_is_migrated_with_its_money(
    empty_database: Callable[[], str], tmp_path: Path
) -> None:
    url = empty_database()
    for path in BEFORE_HOLDS:
        (tmp_path / path.name).write_text(path.read_text())
    dbmate(url, "migrate", "--migrations-dir", str(tmp_path))
    with psycopg.connect(url, autocommit=True) as connection:
        create(connection, {"w": 100, "v": 0, "u": 5}, statuses={"u": "FROZEN"})
        apply(connection, transfer("w", "v", A, 30, metadata={"a": 1}))
        assert outcome(connection, hold("w", X, 10)) == "WA400"
        before, was = money(connection), catalogue(connection)

        dbmate(url, "migrate")
        assert money(connection) == before
        assert call(connection, "contract_version")[0].contract_version == 5
        assert call(connection, "verify") == []
        for _ in MIGRATIONS[len(BEFORE_HOLDS) :]:
            dbmate(url, "rollback")
        assert (money(connection), catalogue(connection)) == (before, was)

        dbmate(url, "migrate")
        for request in (hold("w", X, 70), transfer("w", "v", B, 50, hold=X), hold("u", Y, 5, "WA403")):
            assert outcome(connection, request) == request.outcome
        assert balances(connection, ["w", "v", "u"]) == {"w": 20, "v": 80, "u": 5}
        assert call(connection, "verify") == []


@pytest.mark.parametrize("ended", [False, True])
def test_a_ledger_with_holds_is_not_rolled_back(ended: bool, migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection:
        create(connection, {"w": 100}, holds=[hold("w", X, 10)])
        if ended:
            apply(connection, release("w", A, X))
        before = money(connection)
        for _ in [path for path in MIGRATIONS if path.stem > "20261129100004"]:
            dbmate(migrated, "rollback")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")
        assert "refused: the ledger has holds" in refused.value.stderr.decode()
        assert money(connection) == before
        assert outcome(connection, hold("w", Y, 5)) is None


def roll_back_to(url: str, last: str) -> None:
    """Roll back until this is the newest migration that is applied, by the number that its name begins with."""
    for path in MIGRATIONS:
        if path.stem.partition("_")[0] > last:
            dbmate(url, "rollback")


def test_a_hold_that_is_being_made_is_not_rolled_back(migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection, psycopg.connect(migrated) as holder:
        create(connection, {"w": 100})
        roll_back_to(migrated, "20261129100003")
        apply(holder, hold("w", X, 90))
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")
        assert "lock timeout" in refused.value.stderr.decode()
        holder.commit()
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")
        assert "refused: the ledger has holds" in refused.value.stderr.decode()
        assert outcome(connection, withdraw("w", A, 100)) == "WA402"


def test_a_hold_that_was_made_between_two_rollbacks_is_not_rolled_back(migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection:
        create(connection, {"w": 100})
        roll_back_to(migrated, "20261129100002")
        connection.execute(
            "insert into wallet.operation"
            " (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, held_after)"
            " values ('w', 'HOLD', %s, 2, 90, 100, 90)",
            [X],
        )
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")
        assert "refused: the ledger has holds" in refused.value.stderr.decode()


def test_a_balance_that_is_not_what_the_ledger_says_is_not_replaced(
    empty_database: Callable[[], str], tmp_path: Path
) -> None:
    url = empty_database()
    for path in MIGRATIONS:
        if path.stem < "20261129000005":
            (tmp_path / path.name).write_text(path.read_text())
    dbmate(url, "migrate", "--migrations-dir", str(tmp_path))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select wallet.create_wallet('w'), wallet.create_wallet('v')")
        connection.execute("select wallet.apply_operation('w', %s, 'DEPOSIT', 100)", [A])
        connection.execute("update wallet.wallet set balance = 150 where uuid = 'w'")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(url, "migrate")
        assert "last operation: w; nothing was changed" in refused.value.stderr.decode()
        connection.execute("update wallet.wallet set balance = 100 where uuid = 'w'")
        dbmate(url, "migrate")
        assert balances(connection, ["w", "v"]) == {"w": 100, "v": 0}


def test_no_migration_that_has_others_after_it_is_written_again() -> None:
    generate = runpy.run_path(str(CHECKOUT / "db" / "generate.py"))
    before = {path: path.read_bytes() for path in MIGRATIONS}
    for path in MIGRATIONS[:-1]:
        with pytest.raises(SystemExit, match="choose another name"):
            generate["main"](path.stem.partition("_")[2])
    assert {path: path.read_bytes() for path in MIGRATIONS} == before


def test_a_migration_lets_readers_go_on_while_it_waits_for_the_view(migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection, psycopg.connect(migrated) as long:
        create(connection, {"w": 5})
        for _ in MIGRATIONS[len(BEFORE_HOLDS) :]:
            dbmate(migrated, "rollback")
        long.execute("select from wallet.balance")
        with ThreadPoolExecutor(1) as pool:
            migrating = pool.submit(dbmate, migrated, "migrate")
            began, slowest = time.monotonic(), 0.0
            while time.monotonic() < began + 1.5:
                asked = time.monotonic()
                assert balances(connection, ["w"]) == {"w": 5}
                slowest = max(slowest, time.monotonic() - asked)
            assert not migrating.done()
            long.rollback()
            migrating.result()
        assert slowest < 1
        assert call(connection, "contract_version")[0].contract_version == 5


def test_the_demonstration_is_rolled_back_with_its_holds(deployed: str, service: psycopg.Connection) -> None:
    create(service, {"w": 100}, holds=[hold("w", X, 60)])
    dbmate(deployed, "testdata migrate")
    apply(service, hold("1111111111", Y, 600))
    dbmate(deployed, "testdata rollback")
    assert [row.hold_uuid for row in call(service, "list_holds", "w")] == [X]
    assert call(service, "verify") == []


BEFORE_KEYS = [path for path in MIGRATIONS if path.stem < "20261130000001"]


@pytest.mark.parametrize(
    "made_before", [None, "create role wallet_admin", "create role wallet_admin in role wallet_app"]
)
def test_a_ledger_from_before_keys_is_migrated_and_taking_keys_back_destroys_no_money(
    made_before: str | None, empty_database: Callable[[], str], tmp_path: Path
) -> None:
    url = empty_database()
    for path in BEFORE_KEYS:
        (tmp_path / path.name).write_text(path.read_text())
    dbmate(url, "migrate", "--migrations-dir", str(tmp_path))
    with psycopg.connect(url, autocommit=True) as connection:
        create(connection, {"w": 100, "v": 0}, holds=[hold("w", X, 10)])
        before, was = money(connection), catalogue(connection)
        if made_before is not None:
            connection.execute(made_before.encode())

        dbmate(url, "migrate")
        assert money(connection) == before
        assert call(connection, "verify") == []
        [membership] = connection.execute("select pg_has_role('wallet_admin', 'wallet_app', 'usage')").fetchone() or ()
        assert membership
        migrated = catalogue(connection)
        with connection.transaction():
            connection.execute("set local role wallet_owner")
            call(connection, "create_key", "k", ["read"])

        for _ in MIGRATIONS[len(BEFORE_KEYS) :]:
            dbmate(url, "rollback")
        assert (money(connection), catalogue(connection)) == (before, was)
        assert apply(connection, transfer("w", "v", B, 10, hold=X)).balance_after == 90

        dbmate(url, "migrate")
        assert catalogue(connection) == migrated
        assert call(connection, "live_keys") == []


def test_an_index_whose_building_was_interrupted_is_built_again(deployed: str) -> None:
    with psycopg.connect(deployed, autocommit=True) as connection:
        wanted = catalogue(connection)["indexes"]
        for _ in [path for path in MIGRATIONS if path.stem > "20261129000003"]:
            dbmate(deployed, "rollback")
        connection.execute(
            "update pg_index set indisvalid = false where indexrelid = 'wallet.operation_requested_idx'::regclass"
        )
        assert catalogue(connection)["indexes"] != wanted
        dbmate(deployed, "migrate")
        assert catalogue(connection)["indexes"] == wanted


@pytest.mark.parametrize("first", ["20261129000003_add_columns", "20261129000005_the_ledger_is_the_state"])
def test_a_migration_lets_others_go_on_while_it_waits_for_its_locks(
    first: str, migrated: str, superuser: psycopg.Connection
) -> None:
    """Also whoever analyses the ledger meanwhile, as autovacuum does: that one keeps it locked until it is done."""
    with psycopg.connect(migrated, autocommit=True) as connection, psycopg.connect(migrated) as long:
        create(connection, {"w": 5})
        for _ in [path for path in MIGRATIONS if path.stem >= first]:
            dbmate(migrated, "rollback")
        long.execute("select from wallet.operation")
        with ThreadPoolExecutor(2) as pool:
            migrating = pool.submit(dbmate, migrated, "migrate")
            began = time.monotonic()
            slowest, calls, analysing = 0.0, 0, None
            while time.monotonic() < began + 2:
                asked = time.monotonic()
                connection.execute("select wallet.apply_operation('w', gen_random_uuid(), 'DEPOSIT', 1)")
                slowest, calls = max(slowest, time.monotonic() - asked), calls + 1
                if analysing is None and asked > began + 1:
                    analysing = pool.submit(superuser.execute, "analyze wallet.operation")
            assert not migrating.done()
            long.rollback()
            migrating.result()
            assert analysing is not None
            analysing.result()
        assert slowest < 1
        assert balances(connection, ["w"]) == {"w": 5 + calls}
        assert call(connection, "verify") == []
