"""An answer means what synchronous_standby_names says: an operation is on the standby as well when it is answered."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from app.calls import line
from app.server.embedded import Postgres
from app.server.migrations import LOGIN
from app.settings import Settings
from app.web.application import make_app
from tests.api.door import balance, create, deposit, history, path, problem, put, withdraw
from tests.api.test_lanes import until
from tests.api.test_process import run
from tests.conftest import open_folder
from tests.proof.stand import signal_tree
from tests.replication import execute, replicated

ENDINGS = ("pg_cancel_backend", "pg_terminate_backend")
Ask = Callable[[TestClient, str, UUID], Awaitable[ClientResponse]]


@pytest.fixture(scope="module")
def servers(used_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Postgres, Postgres]]:
    """A primary and its standby; the service's login has a setting by which a WARNING would not be told."""
    with replicated(used_home, open_folder(tmp_path_factory, "servers")) as servers:
        execute(servers[0], f"alter role {LOGIN} set client_min_messages = error")
        yield servers


@pytest.fixture
def primary(servers: tuple[Postgres, Postgres]) -> Postgres:
    return servers[0]


@pytest.fixture
def standby(servers: tuple[Postgres, Postgres]) -> Postgres:
    return servers[1]


@contextlib.contextmanager
def away(standby: Postgres) -> Iterator[None]:
    """Have the standby write nothing."""
    assert standby.process is not None
    signal_tree(standby.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_tree(standby.process.pid, signal.SIGCONT)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch, patience: None) -> None:
    """Let calls wait for locked wallets no longer than they do in service."""
    monkeypatch.setattr(line, "LOCK_PART", 0.03)


@contextlib.asynccontextmanager
async def client_of(server: Postgres, deadline: float = 10) -> AsyncIterator[TestClient]:
    settings = Settings(database_url=server.url(LOGIN), lanes=1, request_deadline=deadline)
    async with TestClient(TestServer(make_app(settings))) as client:
        yield client


@pytest.fixture
async def client(primary: Postgres, standby: Postgres) -> AsyncIterator[TestClient]:
    async with client_of(primary) as client:
        yield client


@pytest.fixture
async def wallet(client: TestClient) -> str:
    """A wallet that holds 10."""
    name = str(uuid4())
    await create(client, {name: 10})
    return name


def waiting(server: Postgres, since: str = "-infinity", whose: str = "wallet%") -> list[int]:
    """Return the service's backends whose commit waits for the standby, of those that began it after a moment."""
    query = "select pid from pg_stat_activity where wait_event = 'SyncRep'"
    return [
        int(str(pid))
        for (pid,) in execute(server, f"{query} and query_start > '{since}' and application_name like '{whose}'")
    ]


async def ended(server: Postgres, ending: str) -> None:
    """Wait for a commit that waits for the standby, and end its wait; wait until the next one does."""
    [pid] = await until(lambda: waiting(server))
    [(now,)] = execute(server, "select clock_timestamp()::text")
    execute(server, f"select {ending}({pid})")
    await until(lambda: waiting(server, str(now)))


async def post_bulk(client: TestClient, wallet: str, operation: UUID, *, atomic: bool = False) -> ClientResponse:
    item = {"wallet_uuid": wallet, "operation_uuid": str(operation), "operation_type": "DEPOSIT", "amount": 1}
    return await client.post("/api/v1/operations", json={"operations": [item], "atomic": atomic})


OPERATIONS: dict[str, tuple[Ask, int]] = {
    "POST": (lambda client, wallet, operation: deposit(client, wallet, 1, operation), 200),
    "PUT": (lambda client, wallet, operation: put(client, wallet, "DEPOSIT", 1, operation), 201),
    "bulk": (post_bulk, 200),
    "atomic": (lambda client, wallet, operation: post_bulk(client, wallet, operation, atomic=True), 200),
}
"""Ways to deposit 1, and what says that it was applied by this request."""


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("way", OPERATIONS)
async def test_an_operation_whose_wait_for_the_standby_is_ended_is_no_success_until_it_is_there(
    way: str, ending: str, client: TestClient, wallet: str, primary: Postgres, standby: Postgres
) -> None:
    ask, success = OPERATIONS[way]
    with away(standby):
        answer = asyncio.ensure_future(ask(client, wallet, uuid4()))
        await ended(primary, ending)
        assert await balance(client, wallet) == 11  # a read does not wait
        assert not answer.done()
    assert (await answer).status == success
    if way in ("bulk", "atomic"):
        assert [result["applied"] for result in (await (await answer).json())["results"]] == [True]
    assert len(await history(client, wallet)) == 2
    assert await balance(client, wallet) == 11


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_wallet_or_a_status_whose_wait_for_the_standby_is_ended_is_no_success_until_it_is_there(
    ending: str, client: TestClient, wallet: str, primary: Postgres, standby: Postgres
) -> None:
    named, new = str(uuid4()), str(uuid4())
    cases = (
        (client.put(path(named)), 200),
        (client.post("/api/v1/wallets"), 201),
        (client.post("/api/v1/wallets", json={"uuid": new}), 503),  # it may be somebody else who made it
        (client.patch(path(wallet), json={"status": "FROZEN"}), 200),
    )
    for request, status in cases:
        with away(standby):
            answer = asyncio.ensure_future(request)
            await ended(primary, ending)
            assert not answer.done()
        assert (await answer).status == status
    await problem(await client.post("/api/v1/wallets", json={"uuid": new}), 400, "wallet_exists")
    assert (await (await client.get(path(wallet, "/balance"))).json())["status"] == "FROZEN"


async def test_while_the_standby_is_away_nothing_succeeds_and_nothing_is_known_to_be_there(
    client: TestClient, primary: Postgres, standby: Postgres
) -> None:
    """Nor when it is asked again, although all of it is recorded here by then. Only reads are answered."""
    ways = [ask for ask, _ in OPERATIONS.values()]
    wallets = [str(uuid4()) for _ in range(8)]
    await create(client, dict.fromkeys(wallets, 10))
    name, new, another = uuid4(), str(uuid4()), str(uuid4())

    async def ask(client: TestClient) -> list[int]:
        answers = await asyncio.gather(
            *(way(client, wallet, UUID(wallet)) for way, wallet in zip(ways, wallets, strict=False)),
            withdraw(client, wallets[4], 1000, name),
            client.patch(path(wallets[5]), json={"status": "CLOSED"}),
            client.patch(path(wallets[6]), json={"status": "FROZEN"}),
            client.patch(path(wallets[7]), json={"status": "OPEN"}),
            client.post("/api/v1/wallets", json={"uuid": new}),
            client.put(path(another)),
        )
        return [answer.status for answer in answers]

    async with client_of(primary, 1) as hasty:
        with away(standby):
            for _ in range(2):
                assert set(await ask(hasty)) == {503}
            assert await balance(hasty, wallets[0]) == 11
            assert (await hasty.get(path(another))).status == 200
            assert (await hasty.post(path(wallets[0], "/operation"), json={})).status == 400
            await until(lambda: not waiting(primary, whose="wallet"))  # what is given up does not wait for ever

    assert await ask(client) == [400, 200, 200, 200, 400, 400, 200, 200, 400, 200]
    assert [await balance(client, wallet) for wallet in wallets] == [11] * 4 + [10] * 4


async def test_a_repeat_for_a_locked_wallet_waits_for_the_standby(
    client: TestClient, wallet: str, primary: Postgres, standby: Postgres
) -> None:
    name = uuid4()
    async with client_of(primary, 2) as hasty:
        with away(standby):
            applied = f"select wallet.apply_operation('{wallet}', '{name}', 'DEPOSIT', 1)"
            execute(primary, "set synchronous_commit = local", applied)
            with psycopg.connect(primary.url("postgres")) as holder:
                holder.execute("select from wallet.wallet where uuid = %s for update", [wallet])
                answers = await asyncio.gather(*(ask(hasty, wallet, name) for ask, _ in OPERATIONS.values()))
                assert [answer.status for answer in answers] == [503] * 4
                holder.rollback()
        await problem(await deposit(client, wallet, 1, name), 400, "duplicate_operation")


async def test_a_lost_call_that_may_still_commit_is_no_refusal_though_it_keeps_its_wallet_locked(
    client: TestClient, primary: Postgres, standby: Postgres
) -> None:
    wallets = [str(uuid4()) for _ in OPERATIONS]
    await create(client, dict.fromkeys(wallets, 10))
    async with contextlib.AsyncExitStack() as stack:
        hasty = [await stack.enter_async_context(client_of(primary, 3)) for _ in wallets]
        pids: list[int] = []
        with away(standby):
            ways = zip(OPERATIONS.values(), hasty, wallets, strict=True)
            asked = [asyncio.ensure_future(ask(each, wallet, UUID(wallet))) for (ask, _), each, wallet in ways]
            await until(lambda: len(waiting(primary)) == len(asked))
            pids = waiting(primary)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        try:
            for answer in asked:
                await problem(await answer, 503, "unavailable")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    for wallet in wallets:
        await problem(await deposit(client, wallet, 1, UUID(wallet)), 400, "duplicate_operation")
        assert await balance(client, wallet) == 11


async def test_a_warning_of_a_trigger_s_is_no_lost_commit(client: TestClient, wallet: str, primary: Postgres) -> None:
    body = "begin raise warning 'The transaction has already committed locally'; return new; end"
    execute(
        primary,
        f"create function public.warn() returns trigger language plpgsql as $$ {body} $$",
        "create constraint trigger warn after insert on wallet.operation initially deferred"
        " for each row execute function public.warn()",
    )
    lanes = "select pid from pg_stat_activity where application_name = 'wallet lane'"
    before = execute(primary, lanes)
    try:
        assert (await deposit(client, wallet, 1)).status == 200
        assert execute(primary, lanes) == before
    finally:
        execute(primary, "drop function public.warn() cascade")


async def test_a_key_is_made_or_revoked_only_once_the_standby_knows(primary: Postgres, standby: Postgres) -> None:
    def ask(*command: str, deadline: float = 10) -> "asyncio.Future[subprocess.CompletedProcess[str]]":
        url = primary.url("postgres")
        return asyncio.ensure_future(
            asyncio.to_thread(run, "key", *command, DATABASE_URL=url, REQUEST_DEADLINE=str(deadline))
        )

    name = f"k{uuid4()}"
    for command, told in ((("create", name, "--scopes", "read"), "secret"), (("revoke", name), "revoked")):
        with away(standby):
            asked = ask(*command)
            [pid] = await until(lambda: waiting(primary))
            execute(primary, f"select pg_cancel_backend({pid})")
            answer = await asked
            assert answer.returncode == 1
            assert told not in answer.stderr
            again = await ask(*command, deadline=1)
            assert again.returncode == 1
            assert re.fullmatch("error: no answer from the database: .*\n", again.stderr)
            assert waiting(primary) == []
        if command[0] == "create":
            assert (await ask(*command)).stderr == "error: Key already exists\n"
        else:
            assert "is revoked since" in (await ask(*command)).stderr


async def test_refused_changes_that_wait_for_the_standby_leave_connections_to_reads(
    primary: Postgres, standby: Postgres
) -> None:
    settings = Settings(database_url=primary.url(LOGIN), lanes=1, pool_size=2, request_deadline=4)
    async with TestClient(TestServer(make_app(settings))) as client:
        name = str(uuid4())
        await create(client, {name: 0})
        with away(standby):
            asked = [asyncio.ensure_future(client.put(path(name))) for _ in range(4)]
            await until(lambda: waiting(primary))
            async with asyncio.timeout(1):
                for _ in range(5):
                    assert (await client.get(path(name))).status == 200
            assert not any(answer.done() for answer in asked)
        assert {(await answer).status for answer in asked} <= {200, 503}
