"""Upgrades from released states: an older service and the newer one on the same data, with money moving meanwhile."""

import asyncio
import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from app.server.embedded import connection_url
from app.server.migrations import LOGIN
from app.settings import CHECKOUT
from tests.api.test_process import Service, Start, start, wait_until
from tests.db.test_migrations import MIGRATIONS, RELEASED, dbmate, money
from tests.proof.clients import Connection

__all__ = ["start"]

BY_SIGNATURE = "b046021"
"""The version that looks for functions by the signatures of then: with a newer schema it goes on, but is not ready."""
CLIENTS = 24
WALLETS = ("hot", *(f"spread{number}" for number in range(10)))


def broken(connection: psycopg.Connection) -> list[Any]:
    return connection.execute("select * from wallet.verify()").fetchall()


@pytest.fixture(params=[path.stem for path in RELEASED])
def released(request: pytest.FixtureRequest) -> str:
    """The commit of a released state."""
    return request.param


@pytest.fixture
def old_checkout(released: str, tmp_path: Path) -> Path:
    """The released commit's files."""
    archive = subprocess.run(["git", "archive", released, "app", "db"], cwd=CHECKOUT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"commit {released} is not in this checkout's history")
    checkout = tmp_path / released
    checkout.mkdir()
    checkout.chmod(0o711)
    subprocess.run(["tar", "-x", "-C", checkout], input=archive.stdout, check=True)
    return checkout


def test_the_data_folder_of_a_released_version_is_upgraded_by_the_start(
    start: Start, released: str, old_checkout: Path
) -> None:
    old = start(new=True, checkout=old_checkout)
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
        assert broken(connection) == []
    assert new.ask("/api/v1/wallets/savings/operation", operation)[1]["same_request"] is True
    new.deposit("savings", 5)
    assert new.stop() == 0

    if released == BY_SIGNATURE:
        return
    back = start(checkout=old_checkout)  # an older service starts on a newer database
    assert back.ask("/readyz")[0] == 200
    back.deposit("savings", 5)
    assert back.balance("savings") == 15
    assert back.stop() == 0


Restored = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="module")
def databases(server: SimpleNamespace) -> Iterator[Restored]:
    """Gives databases as a released commit left them, with money in them, and `migrated` since if so wanted.

    Each is a copy of one that was restored, and migrated, once.
    """
    templates: set[str] = set()
    with psycopg.connect(connection_url(server.host, "postgres", "postgres"), autocommit=True) as admin:
        admin.execute("do $$ begin create role wallet_owner; exception when duplicate_object then null; end $$")

        def make(name: str, released: str, migrated: bool) -> None:
            admin.execute(f"create database {name}".encode())
            templates.add(name)
            url = connection_url(server.host, "postgres", name)
            dump = CHECKOUT / "tests" / "db" / "released" / f"{released}.sql"
            restore = [server.postgres.binaries / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-f", dump, url]
            subprocess.run(restore, check=True, capture_output=True)
            if migrated:
                dbmate(url, "migrate")

        @contextlib.contextmanager
        def databases(released: str, *, migrated: bool = False) -> Iterator[str]:
            """The URI of such a database for a superuser."""
            template = f"template_{released}_{migrated}".lower()
            if template not in templates:
                make(template, released, migrated)
            admin.execute(f"create database upgraded template {template}".encode())
            try:
                yield connection_url(server.host, "postgres", "upgraded")
            finally:
                admin.execute("drop database upgraded with (force)")

        yield databases
        for template in templates:
            admin.execute(f"drop database {template} with (force)".encode())


@pytest.fixture
def restored(released: str, databases: Restored) -> Iterator[str]:
    """The URI, for a superuser, of a database as the released commit left it, with money in it."""
    with databases(released) as url:
        yield url


@pytest.fixture
def migrated(released: str, databases: Restored) -> Iterator[str]:
    """The URI, for a superuser, of such a database that was migrated since."""
    with databases(released, migrated=True) as url:
        yield url


class Load:
    """Clients of an older service: deposits and withdrawals, single and in bulk, reads, some operations sent again."""

    def __init__(self, port: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.applied: dict[UUID, tuple[str, str, int]] = {}
        """What was answered as applied: operation to wallet, type, amount."""
        self.slowest = 0.0
        """Seconds that the slowest answer took."""
        self._port = port
        self._over = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the clients; at the end wait until each has its answer."""
        async with asyncio.TaskGroup() as clients:
            for number in range(CLIENTS):
                clients.create_task(self._client(Random(number)))
            try:
                yield
            finally:
                self._over = True

    async def progress(self, operations: int) -> None:
        """Wait until so many more operations were applied."""
        enough = len(self.applied) + operations
        async with asyncio.timeout(60):
            while len(self.applied) < enough:
                await asyncio.sleep(0.01)

    async def _client(self, random: Random) -> None:
        with contextlib.closing(Connection(self._port)) as connection:
            while not self._over:
                requests = [self._new(random) for _ in range(1 if random.random() < 0.9 else 20)]
                await self._ask(connection, requests)
                if random.random() < 0.1:
                    await self._ask(connection, requests)
                wallet = random.choice(WALLETS)
                for path in (f"/api/v1/wallets/{wallet}", f"/api/v1/wallets/{wallet}/operations?limit=3"):
                    await self._answer(connection, path)
                if random.random() < 0.05:
                    await self._answer(connection, "/api/v1/wallets", {})

    def _new(self, random: Random) -> dict[str, Any]:
        return {
            "wallet_uuid": "hot" if random.random() < 0.4 else random.choice(WALLETS),
            "operation_uuid": str(UUID(int=random.getrandbits(128), version=4)),
            "operation_type": random.choice(("DEPOSIT", "WITHDRAW")),
            "amount": random.randint(1, 100),
        }

    async def _ask(self, connection: Connection, requests: list[dict[str, Any]]) -> None:
        if len(requests) > 1:
            answer = await self._answer(connection, "/api/v1/operations", {"operations": requests})
            applied = [result["applied"] for result in answer["results"]]
        else:
            [request] = requests
            body = {name: value for name, value in request.items() if name != "wallet_uuid"}
            answer = await self._answer(connection, f"/api/v1/wallets/{request['wallet_uuid']}/operation", body)
            applied = [answer == request["operation_uuid"]]
        for request, was_applied in zip(requests, applied, strict=True):
            if was_applied:
                named = (request["wallet_uuid"], request["operation_type"], request["amount"])
                self.applied[UUID(request["operation_uuid"])] = named

    async def _answer(self, connection: Connection, path: str, body: object = None) -> Any:
        await connection.open()
        sent = time.monotonic()
        answer = await connection.ask(path, body)
        self.slowest = max(self.slowest, time.monotonic() - sent)
        self.statuses[answer.status] += 1
        assert answer.status < 500, answer
        return answer.body


async def test_a_released_version_s_database_is_migrated_and_rolled_back_under_its_load(
    restored: str, released: str, server: SimpleNamespace, old_checkout: Path, tmp_path: Path
) -> None:
    url = restored
    with psycopg.connect(url) as connection:
        before = money(connection)["ledger"]
        newer = MIGRATIONS[connection.execute("select count(*) from schema_migrations").fetchall()[0][0] :]
    login = connection_url(server.host, LOGIN, "upgraded")
    services = [Service(tmp_path, tmp_path / "old", checkout=old_checkout, DATABASE_URL=login, LOG_LEVEL="WARNING")]
    try:
        await asyncio.to_thread(wait_until, services[0].is_up)
        for wallet in WALLETS:
            status, _ = await asyncio.to_thread(services[0].ask, "/api/v1/wallets", {"uuid": wallet})
            assert status == 201
        load = Load(services[0].port)
        async with load.running():
            await load.progress(500)
            await asyncio.to_thread(dbmate, url, "migrate")
            await load.progress(500)
            ready, _ = await asyncio.to_thread(services[0].ask, "/readyz")
            assert ready == (503 if released == BY_SIGNATURE else 200)

            new = Service(tmp_path, tmp_path / "new", DATABASE_URL=login, LOG_LEVEL="WARNING")
            services.append(new)
            await asyncio.to_thread(wait_until, new.is_up)
            assert (await asyncio.to_thread(new.ask, "/readyz"))[0] == 200
            await asyncio.to_thread(new.deposit, "savings", 7)
            assert new.stop() == 0

            for _ in newer:
                await asyncio.to_thread(dbmate, url, "rollback")
                await load.progress(200)
            await asyncio.to_thread(dbmate, url, "migrate")
            await load.progress(300)
    finally:
        for service in services:
            service.process.terminate()
            service.process.wait(30)

    assert load.slowest < 5
    assert {status for status in load.statuses if status not in (200, 201, 400)} == set()
    with psycopg.connect(url) as connection:
        after = money(connection)["ledger"]
        assert broken(connection) == []
    recorded = {row[2]: (row[0], row[3], row[4]) for row in after if row[0] in WALLETS}
    assert recorded == load.applied
    assert [row for row in after if row[0] not in WALLETS and row[4] != 7] == before


[SWAP] = [number for number, path in enumerate(MIGRATIONS) if path.stem.endswith("_the_ledger_is_the_state")]
IRREVERSIBLE = {
    "a transfer": "select wallet.apply_operation('savings', gen_random_uuid(), 'TRANSFER', 1, 'empty')",
    "metadata": "select wallet.apply_operation('savings', gen_random_uuid(), 'DEPOSIT', 1, p_metadata => '{\"a\": 1}')",
    "a currency": "select wallet.create_wallet('euros', 'EUR')",
    "a status": "select wallet.set_status('empty', 'CLOSED')",
}


@pytest.mark.parametrize("what", IRREVERSIBLE)
def test_what_the_schema_before_cannot_hold_is_not_rolled_back(what: str, migrated: str) -> None:
    with psycopg.connect(migrated, autocommit=True) as connection:
        connection.execute(IRREVERSIBLE[what].encode())
        before = money(connection)

        for _ in MIGRATIONS[SWAP + 1 :]:
            dbmate(migrated, "rollback")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            dbmate(migrated, "rollback")

        [line] = [line for line in refused.value.stderr.decode().splitlines() if "refused" in line]
        assert "nothing was changed" in line
        assert money(connection) == before
        assert broken(connection) == []
