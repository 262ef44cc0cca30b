"""Upgrades from the first released state, commit b046021: its service and the newer one on the same data."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from app.server.embedded import connection_url
from app.server.migrations import LOGIN
from app.settings import CHECKOUT
from tests.api.test_process import Service, Start, start, wait_until
from tests.db.test_migrations import MIGRATIONS, dbmate, money
from tests.proof.clients import WALLETS, Connection, Load
from tests.proof.history import Books, History, Row, findings

__all__ = ["start"]

RELEASED = "b046021"
NEWER = MIGRATIONS[2:]
"""The migrations since then."""


@pytest.fixture
def old_checkout(tmp_path: Path) -> Path:
    """The released commit's files."""
    archive = subprocess.run(["git", "archive", RELEASED, "app", "db"], cwd=CHECKOUT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"commit {RELEASED} is not in this checkout's history")
    checkout = tmp_path / RELEASED
    checkout.mkdir()
    checkout.chmod(0o711)
    subprocess.run(["tar", "-x", "-C", checkout], input=archive.stdout, check=True)
    return checkout


def test_the_data_folder_of_a_released_version_is_upgraded_by_the_start(start: Start, old_checkout: Path) -> None:
    old = start(checkout=old_checkout)
    old.deposit("1111111111", 250)
    assert old.ask("/api/v1/wallets", {"uuid": "savings"})[0] == 201
    operation = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 5}
    assert old.ask("/api/v1/wallets/savings/operation", operation)[0] == 200
    socket_folder = (old.home / "postgres" / "postmaster.pid").read_text().splitlines()[4]
    with psycopg.connect(connection_url(socket_folder, "postgres", "wallet")) as connection:
        before = money(connection)
    assert old.stop() == 0

    new = start()
    assert new.ask("/readyz")[0] == 200
    with new.superuser() as connection:
        assert money(connection) == before
        assert connection.execute("select * from wallet.verify()").fetchall() == []
    assert new.ask("/api/v1/wallets/savings/operation", operation)[1]["same_request"] is True
    new.deposit("savings", 5)
    assert new.stop() == 0

    back = start(checkout=old_checkout)  # an older service goes on with a newer database
    assert back.ask("/readyz")[0] == 200
    back.deposit("savings", 5)
    assert back.balance("savings") == 15
    assert back.stop() == 0


@pytest.fixture
def restored(server: SimpleNamespace) -> Iterator[str]:
    """The URI, for a superuser, of a database as the released commit left it."""
    with psycopg.connect(connection_url(server.host, "postgres", "postgres"), autocommit=True) as admin:
        admin.execute("create database upgraded")
        admin.execute("do $$ begin create role wallet_owner; exception when duplicate_object then null; end $$")
        url = connection_url(server.host, "postgres", "upgraded")
        dump = CHECKOUT / "tests" / "db" / "released" / f"{RELEASED}.sql"
        restore = [server.postgres.binaries / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-f", dump, url]
        subprocess.run(restore, check=True, capture_output=True)
        yield url
        admin.execute("drop database upgraded with (force)")


async def test_a_released_version_s_database_is_migrated_and_rolled_back_under_its_load(
    restored: str, server: SimpleNamespace, old_checkout: Path, tmp_path: Path
) -> None:
    url = restored
    with psycopg.connect(url) as connection:
        before = money(connection)

    login = connection_url(server.host, LOGIN, "upgraded")
    services = [Service(tmp_path, tmp_path / "old", checkout=old_checkout, DATABASE_URL=login, LOG_LEVEL="WARNING")]
    try:
        await asyncio.to_thread(wait_until, services[0].is_up)
        history = History()
        old = Load(services[0].port, Random(RELEASED), history)
        await old.create_wallets()
        async with old.running(url):
            await old.progress(500)
            await asyncio.to_thread(dbmate, url, "migrate")
            await old.progress(500)
            assert await status(services[0].port, "/readyz") == 200

            new = Service(tmp_path, tmp_path / "new", DATABASE_URL=login, LOG_LEVEL="WARNING")
            services.append(new)
            await asyncio.to_thread(wait_until, new.is_up)
            assert await status(new.port, "/readyz") == 200
            await asyncio.to_thread(new.deposit, "savings", 7)
            assert new.stop() == 0

            for _ in NEWER:
                await asyncio.to_thread(dbmate, url, "rollback")
                await old.progress(300)
            await asyncio.to_thread(dbmate, url, "migrate")
            await old.progress(300)
        await old.settle()
    finally:
        for service in services:
            service.process.terminate()
            service.process.wait(30)

    assert {status: times for status, times in history.statuses.items() if status >= 500} == {}
    with psycopg.connect(url) as connection:
        after = money(connection)
        verified = [str(row) for row in connection.execute("select * from wallet.verify()")]
    assert verified == []
    assert findings(history, books(after)) == []
    known = {row[0] for row in before["wallets"]}
    assert [row for row in after["ledger"] if row[0] in known and row[4] != 7] == before["ledger"]


def books(found: dict[str, list[Any]]) -> Books:
    """Return what the database holds of the wallets that the load used."""
    ledger = [Row(*row[:6]) for row in found["ledger"] if row[0] in WALLETS]
    wallets = {name: (balance, seq) for name, _, balance, seq, _ in found["wallets"] if name in WALLETS}
    return Books(ledger, wallets, [])


async def status(port: int, path: str) -> int:
    connection = Connection(port)
    await connection.open()
    answer = await connection.ask(path)
    connection.close()
    return answer.status
