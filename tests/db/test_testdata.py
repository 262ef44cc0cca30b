"""The demonstration wallets come and go beside whatever else happens in the database."""

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import psycopg
import pytest

from app.settings import CHECKOUT
from tests.cases import A, B, deposit
from tests.conftest import url_of
from tests.db.door import apply, call, create, outcome
from tests.db.test_migrations import DEMONSTRATION, dbmate
from tests.db.test_verify import transfer

[MIGRATION] = (CHECKOUT / "db" / "testdata").glob("*.sql")


@pytest.fixture
def deployed(superuser: psycopg.Connection) -> str:
    """The URI, for a superuser, of a database with the demonstration wallets."""
    url = url_of(superuser, "postgres")
    dbmate(url, "testdata migrate")
    return url


def wait_until(come_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not come_true():
        assert time.monotonic() < deadline


def test_a_rollback_waits_for_an_operation_that_is_under_way(
    deployed: str, superuser: psycopg.Connection, service: psycopg.Connection
) -> None:
    """The operation has locked its wallet, and waits for another one of its name, when the rollback begins."""
    create(superuser, {"other": 0})
    other = psycopg.connect(deployed)
    other.execute(
        "insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)"
        " values ('other', 'DEPOSIT', %s, 1, 1, 1)",
        [A],
    )
    blocked = "select from pg_stat_activity where %s = any(pg_blocking_pids(pid))"
    with ThreadPoolExecutor(2) as pool:
        applied = pool.submit(apply, service, deposit("1111111111", A, 5))
        wait_until(lambda: superuser.execute(blocked, [other.info.backend_pid]).fetchall())
        rolled_back = pool.submit(dbmate, deployed, "testdata rollback")
        wait_until(lambda: superuser.execute(blocked, [service.info.backend_pid]).fetchall())
        other.rollback()
        other.close()

        assert applied.result(30).balance_after == 1505
        rolled_back.result(30)

    assert superuser.execute("select uuid from wallet.wallet").fetchall() == [("other",)]
    assert superuser.execute("select from wallet.operation").fetchall() == []
    assert call(service, "verify") == []


def test_a_rollback_comes_through_beside_writers(deployed: str, database_url: str, service: psycopg.Connection) -> None:
    def write() -> set[str | None]:
        outcomes: set[str | None] = set()
        deadline = time.monotonic() + 20
        with psycopg.connect(database_url, autocommit=True) as connection:
            while "WA404" not in outcomes and time.monotonic() < deadline:
                outcomes |= {outcome(connection, deposit(wallet, uuid4(), 1)) for wallet in DEMONSTRATION}
        return outcomes

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write) for _ in range(4)]
        wait_until(lambda: call(service, "get_wallet", "5555555555")[0].balance > 1600)
        dbmate(deployed, "testdata rollback")
        for writer in writers:
            assert writer.result(30) == {None, "WA404"}
    assert call(service, "verify") == []


@pytest.mark.parametrize(("payer", "payee"), [("1111111111", "other"), ("other", "5555555555")])
def test_a_rollback_is_refused_where_it_would_take_one_side_of_a_transfer(
    payer: str, payee: str, deployed: str, service: psycopg.Connection
) -> None:
    create(service, {"other": 10})
    transfer(service, "1111111111", "2222222222", B, 4)
    transfer(service, payer, payee, A, 5)
    before = call(service, "list_wallets")

    with pytest.raises(subprocess.CalledProcessError) as refused:
        dbmate(deployed, "testdata rollback")

    assert "refused: money was transferred" in refused.value.stderr.decode()
    assert call(service, "list_wallets") == before


def test_a_rollback_takes_transfers_between_its_wallets(
    deployed: str, superuser: psycopg.Connection, service: psycopg.Connection
) -> None:
    transfer(service, "1111111111", "2222222222", A, 5)
    dbmate(deployed, "testdata rollback")
    assert superuser.execute("select from wallet.operation").fetchall() == []


def test_nobody_else_s_functions_are_run(superuser: psycopg.Connection) -> None:
    """Schema public is not on the path: whoever may create in it could do what the one who migrates may do."""
    superuser.execute(
        """
        create function public.format(text, text) returns text language sql as $$ select (1 / 0)::text $$;
        create function public.lpad(text, integer, text) returns text language sql as $$ select (1 / 0)::text $$;
        create function public.pg_get_serial_sequence(text, text) returns text language sql as
          $$ select (1 / 0)::text $$;
        """
    )
    superuser.execute(f"alter database {superuser.info.dbname} set search_path = public, pg_catalog".encode())
    url = url_of(superuser, "postgres")
    dbmate(url, "testdata migrate")
    dbmate(url, "testdata rollback")


def test_both_sections_pin_their_search_path() -> None:
    sections = MIGRATION.read_text().split("-- migrate:")[1:]
    assert [section.split()[0] for section in sections] == ["up", "down"]
    for section in sections:
        statements = [line for line in section.splitlines()[1:] if line]
        assert statements[0] == "set local search_path = pg_catalog, pg_temp;"
        assert statements[-1] == "reset search_path;"
