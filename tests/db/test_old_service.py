"""db/from_old_service.sql: the old service's tables, moved into the ledger, or a list of what stands against it."""

import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from app.settings import CHECKOUT
from tests.cases import MESSAGES, deposit, withdraw
from tests.conftest import url_of
from tests.db.door import apply, call, create

SCRIPT = CHECKOUT / "db" / "from_old_service.sql"
OLD_TABLES = """
create type operation_type as enum ('DEPOSIT', 'WITHDRAW');
create table public.wallet (id bigint primary key, uuid varchar unique, balance bigint);
create table public.wallet_transaction (
  id bigint primary key,
  uuid varchar unique,
  wallet_id bigint references public.wallet (id),
  operation_type operation_type,
  amount bigint,
  created_at timestamp
);
"""
GOOD = """
insert into public.wallet values (3, 'ann', 70), (40, 'bob', 5), (7, 'empty', 0);
insert into public.wallet_transaction values
  (1, '00000000-0000-4000-8000-000000000001', 3, 'DEPOSIT', 100, '2024-01-01 12:00'),
  (2, '00000000-0000-4000-8000-000000000004', 3, 'DEPOSIT', 5, '2024-01-03 12:00'),
  (3, '00000000-0000-4000-8000-000000000003', 3, 'WITHDRAW', 35, '2024-01-02 12:00'),
  (4, '00000000000040008000000000000002', 40, 'DEPOSIT', 5, '2024-01-01 12:00');
"""
"""Transaction 3 comes before 2 by its time; one uuid is written without hyphens."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def old(superuser: psycopg.Connection) -> psycopg.Connection:
    """A superuser's connection to a migrated database that holds the old service's empty tables, too."""
    superuser.execute(OLD_TABLES.encode())
    return superuser


def command_for(server: SimpleNamespace, url: str) -> list[str | Path]:
    """Return the command that stands in the script."""
    return [server.postgres.binaries / "psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", SCRIPT, url]


@pytest.fixture
def move(server: SimpleNamespace, old: psycopg.Connection) -> Run:
    """Run the script and return what became of it."""

    def move(user: str = "postgres") -> subprocess.CompletedProcess[str]:
        return subprocess.run(command_for(server, url_of(old, user)), capture_output=True, text=True)

    return move


def execute(connection: psycopg.Connection, statements: str) -> None:
    connection.execute(statements.encode())


def books(connection: psycopg.Connection) -> tuple[list[Any], list[Any]]:
    """Return wallets and operations, and see that they are right."""
    assert call(connection, "verify") == []
    wallets = connection.execute("select id, uuid, balance, seq from wallet.wallet order by id").fetchall()
    query = """
        select wallet_uuid, seq, operation_uuid, operation_type, amount, balance_after
        from wallet.operation order by wallet_uuid, seq"""
    return wallets, connection.execute(query.encode()).fetchall()


def assert_moved(ran: subprocess.CompletedProcess[str]) -> None:
    assert (ran.returncode, ran.stderr) == (0, "")


def assert_refused(ran: subprocess.CompletedProcess[str], connection: psycopg.Connection, *faults: str) -> None:
    """See that exactly these faults are listed and that nothing was moved."""
    assert ran.returncode == 3
    assert "nothing was moved" in ran.stderr
    _, _, listed = ran.stderr.partition("DETAIL:  ")
    assert listed.split("\nCONTEXT:")[0].splitlines() == list(faults)
    assert books(connection) == ([], [])


def test_wallets_keep_their_ids_balances_and_histories(move: Run, old: psycopg.Connection) -> None:
    execute(old, GOOD)

    assert_moved(move())

    number = "00000000-0000-4000-8000-00000000000{}".format
    assert books(old) == (
        [(3, "ann", 70, 3), (7, "empty", 0, 0), (40, "bob", 5, 1)],
        [
            ("ann", 1, UUID(number(1)), "DEPOSIT", 100, 100),
            ("ann", 2, UUID(number(3)), "WITHDRAW", 35, 65),
            ("ann", 3, UUID(number(4)), "DEPOSIT", 5, 70),
            ("bob", 1, UUID(number(2)), "DEPOSIT", 5, 5),
        ],
    )
    [[created]] = old.execute("select created_at from wallet.operation where wallet_uuid = 'bob'").fetchall()
    assert created == datetime(2024, 1, 1, 12, tzinfo=UTC)


def test_the_service_goes_on_where_the_old_one_stopped(
    move: Run, old: psycopg.Connection, service: psycopg.Connection
) -> None:
    execute(old, GOOD)
    assert_moved(move())

    moved_already = deposit("ann", UUID("00000000-0000-4000-8000-000000000001"), 100)
    with pytest.raises(psycopg.Error, match=MESSAGES["WA409"]):
        apply(service, moved_already)
    assert apply(service, withdraw("ann", UUID("00000000-0000-4000-8000-000000000009"), 70)).seq == 4
    assert call(service, "create_wallet", "new")[0].id == 41
    assert call(service, "verify") == []


@pytest.mark.parametrize("with_history", [True, False], ids=["with_history", "without"])
def test_a_balance_without_its_transactions_begins_with_a_deposit(
    with_history: bool, move: Run, old: psycopg.Connection
) -> None:
    execute(old, "insert into public.wallet values (1, '1111111111', 1500)")
    if with_history:
        execute(
            old,
            "insert into public.wallet_transaction values"
            " (1, '00000000-0000-4000-8000-000000000001', 1, 'WITHDRAW', 500, '2024-01-01')",
        )

    ran = move()

    assert_moved(ran)
    _, [opening, *rest] = books(old)
    assert opening[:2] == ("1111111111", 1)
    assert opening[2] == UUID("d6c221cd-a126-3bb4-8afd-2ba6079b620a")
    assert opening[3:] == (("DEPOSIT", 2000, 2000) if with_history else ("DEPOSIT", 1500, 1500))
    assert [row[3:] for row in rest] == ([("WITHDRAW", 500, 1500)] if with_history else [])


def test_a_balance_below_its_transactions_is_refused(move: Run, old: psycopg.Connection) -> None:
    execute(old, GOOD)
    execute(old, "update public.wallet set balance = 60 where uuid = 'ann'")

    assert_refused(move(), old, "ann: the balance is 10 less than its transactions add up to")


def test_a_history_that_goes_below_zero_is_refused(move: Run, old: psycopg.Connection) -> None:
    execute(old, GOOD)
    execute(old, "update public.wallet_transaction set created_at = '2023-01-01' where id = 3")

    assert_refused(move(), old, "ann: transaction id 3 leaves a balance of -35")


def test_every_fault_is_listed(move: Run, old: psycopg.Connection) -> None:
    execute(
        old,
        """
        alter table public.wallet_transaction
          alter amount type numeric, alter operation_type type text, drop constraint wallet_transaction_uuid_key,
          drop constraint wallet_transaction_wallet_id_fkey;
        insert into public.wallet values
          (1, 'two words', 0), (2, 'good', 0), (3, '', 0), (-4, 'minus', 0), (5, 'minus2', -1);
        insert into public.wallet_transaction values
          (1, 'no uuid', 2, 'DEPOSIT', 1, '2024-01-01'),
          (2, 'abcdefab-0000-4000-8000-000000000001', 2, 'TRANSFER', 1, '2024-01-01'),
          (3, 'ABCDEFAB000040008000000000000001', 2, 'DEPOSIT', 1.5, '2024-01-01'),
          (4, 'abcdefab-0000-4000-8000-000000000002', 99, 'DEPOSIT', 1, '2024-01-01'),
          (5, '00000000-0000-0000-0000-000000000000', 2, 'DEPOSIT', 0, null),
          (6, null, 2, null, null, null);
        """,
    )
    name = "the name must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
    amount = "must be a whole number from 1 to 9223372036854775807"

    ran = move()

    assert "nothing was moved: 16 faults in the old tables" in ran.stderr
    listed = ran.stderr.partition("DETAIL:  ")[2].split("\nCONTEXT:")[0].splitlines()
    assert sorted(listed) == sorted(
        [
            f"two words: wallet id 1: {name}",
            f": wallet id 3: {name}",
            "minus: wallet id -4 must be from 1",
            "minus2: balance -1 must be a whole number from 0 to 9223372036854775807",
            "-: transactions id 2, 3 have one uuid, ABCDEFAB000040008000000000000001",
            "good: transaction id 1: no uuid is no operation_uuid",
            "good: transaction id 2: operation_type TRANSFER must be DEPOSIT or WITHDRAW",
            f"good: transaction id 3: amount 1.5 {amount}",
            "-: transaction id 4: there is no wallet with wallet_id 99",
            "good: transaction id 5: 00000000-0000-0000-0000-000000000000 is no operation_uuid",
            f"good: transaction id 5: amount 0 {amount}",
            "good: transaction id 5: it has no created_at",
            "good: transaction id 6: null is no operation_uuid",
            "good: transaction id 6: operation_type null must be DEPOSIT or WITHDRAW",
            f"good: transaction id 6: amount null {amount}",
            "good: transaction id 6: it has no created_at",
        ]
    )
    assert books(old) == ([], [])


def test_the_readme_gives_the_command() -> None:
    assert (
        'psql -v ON_ERROR_STOP=1 -f db/from_old_service.sql "$DATABASE_URL"'
        in (SCRIPT.parent / "README.md").read_text()
    )


def test_it_runs_once(move: Run, old: psycopg.Connection) -> None:
    execute(old, GOOD)
    assert_moved(move())
    moved = books(old)

    again = move()

    assert again.returncode == 3
    assert "schema wallet holds wallets already" in again.stderr
    assert books(old) == moved


def test_it_does_not_mix_with_wallets_that_are_there(move: Run, old: psycopg.Connection) -> None:
    execute(old, GOOD)
    create(old, {"other": 5})
    before = books(old)

    assert "schema wallet holds wallets already" in move().stderr
    assert books(old) == before


def test_who_migrates_can_run_it_without_being_superuser(move: Run, old: psycopg.Connection) -> None:
    execute(old, GOOD)
    execute(
        old,
        "create role mover login role postgres; grant wallet_owner to mover;"
        "alter table public.wallet owner to mover; alter table public.wallet_transaction owner to mover",
    )
    try:
        assert_moved(move("mover"))
        assert len(books(old)[0]) == 3
        owners = "select distinct tableowner from pg_tables where schemaname = 'wallet'"
        assert old.execute(owners).fetchall() == [("wallet_owner",)]
    finally:
        execute(old, "drop owned by mover; drop role mover")


def test_nobody_writes_meanwhile(server: SimpleNamespace, old: psycopg.Connection) -> None:
    """A write that has begun is waited for, and moved."""
    execute(old, GOOD)
    with psycopg.connect(url_of(old, "postgres")) as writer:
        execute(writer, "insert into public.wallet values (50, 'late', 0)")
        moving = subprocess.Popen(command_for(server, url_of(old, "postgres")), stdout=subprocess.DEVNULL)
        waiting = sql.SQL("select from pg_locks where not granted and relation = 'public.wallet'::regclass")
        deadline = time.monotonic() + 30
        while not old.execute(waiting).fetchall():
            assert time.monotonic() < deadline
    assert moving.wait(30) == 0
    assert (50, "late", 0, 0) in books(old)[0]


def test_a_hundred_thousand_transactions_take_seconds(move: Run, old: psycopg.Connection) -> None:
    execute(
        old,
        """
        insert into public.wallet select n, 'w' || n, 500 from generate_series(1, 1000) as n;
        insert into public.wallet_transaction
        select n, md5(n::text)::uuid, 1 + n % 1000, 'DEPOSIT', 1 + n / 1000 % 5, '2024-01-01'::date + n * interval '1 s'
        from generate_series(0, 99999) as n;
        """,
    )
    began = time.monotonic()

    assert_moved(move())

    assert time.monotonic() - began < 60
    wallets, operations = books(old)
    assert {(balance, seq) for _, _, balance, seq in wallets} == {(500, 101)}
    assert len(operations) == 101_000
