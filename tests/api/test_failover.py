"""The primary is lost, and its standby takes its place: clients only notice that it takes a moment."""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from pytest_aiohttp.plugin import AiohttpClient

from app.calls.database import SETTINGS
from app.calls.session import several_hosts
from app.server.embedded import Postgres
from app.server.migrations import LOGIN
from app.settings import Settings
from app.web.application import make_app
from tests.api.door import balance, deposit, history, path, put
from tests.api.test_lanes import until
from tests.api.test_process import is_alive
from tests.conftest import open_folder
from tests.proof.stand import signal_tree, tree
from tests.replication import execute, replicated

CLIENTS = 200
WALLETS = [f"w{number}" for number in range(10)]
Ask = Callable[[TestClient, str], Awaitable[ClientResponse]]


@pytest.fixture
def servers(used_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Postgres]]:
    """A primary whose commits wait for its standby, and that."""
    with replicated(used_home, open_folder(tmp_path_factory, "servers")) as servers:
        try:
            yield list(servers)
        finally:
            for server in servers:
                if server.is_running():
                    assert server.process is not None
                    signal_tree(server.process.pid, signal.SIGCONT)


@pytest.fixture
def key(servers: list[Postgres]) -> str:
    scopes = "{read,create,deposit,admin}"
    [(secret,)] = execute(servers[0], f"select wallet.create_key('all', '{scopes}')")
    return str(secret)


@pytest.fixture
async def client(servers: list[Postgres], key: str) -> AsyncIterator[TestClient]:
    """A client of an app that knows both servers, with a key."""
    hosts = ",".join(str(server.socket_dir) for server in servers)
    url = f"postgresql://{LOGIN}@/wallet?host={hosts}&port=5432&sslmode=disable"
    app = make_app(Settings(database_url=url, access="keys", bulk_queue=2 * CLIENTS))
    async with TestClient(TestServer(app), headers={"Authorization": f"Bearer {key}"}) as client:
        for wallet in WALLETS:
            assert (await client.put(path(wallet))).status == 201
        yield client


async def bulk(client: TestClient, wallet: str) -> ClientResponse:
    item = {"wallet_uuid": wallet, "operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}
    return await client.post("/api/v1/operations", json={"operations": [item]})


ASKS: list[Ask] = [
    *[lambda client, wallet: deposit(client, wallet, 1)] * 6,
    *[lambda client, wallet: put(client, wallet, "DEPOSIT", 1, uuid4())] * 6,
    *[bulk] * 3,
    lambda client, _: client.put(path(str(uuid4()))),
    lambda client, _: client.post("/api/v1/wallets"),
    lambda client, wallet: client.patch(path(wallet), json={"status": "OPEN"}),
    lambda client, wallet: client.get(path(wallet)),
    lambda client, wallet: client.get(path(wallet, "/operations")),
]


class Load:
    """Clients that ask again and again, and what they were told: deposits by wallet, and all statuses."""

    def __init__(self, client: TestClient) -> None:
        self.deposited: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._client = client
        self._over = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]
        yield
        self._over = True
        await asyncio.gather(*tasks)

    async def _ask(self, number: int) -> None:
        ask, wallet = ASKS[number % len(ASKS)], WALLETS[number % len(WALLETS)]
        while not self._over:
            answer = await ask(self._client, wallet)
            self.statuses[answer.status] += 1
            if number % len(ASKS) < 15 and answer.status < 300:
                self.deposited[wallet] += 1
                if ask is bulk:
                    assert [result["applied"] for result in (await answer.json())["results"]] == [True]

    async def progress(self, answers: int) -> None:
        enough = self.statuses.total() + answers
        await until(lambda: self.statuses.total() >= enough, 20)


async def kill(server: Postgres) -> None:
    """Kill -9 every process of a server."""
    assert server.process is not None
    pids = tree(server.process.pid)
    signal_tree(server.process.pid, signal.SIGKILL)
    server.process.wait()
    await until(lambda: not any(is_alive(pid) for pid in pids))


async def freeze(server: Postgres) -> None:
    """Have a server say nothing more, as if its machine had lost its network."""
    assert server.process is not None
    signal_tree(server.process.pid, signal.SIGSTOP)


@pytest.mark.parametrize("lose", [kill, freeze])
async def test_a_lost_primary_costs_no_answer_and_no_operation(
    lose: Callable[[Postgres], Awaitable[None]], client: TestClient, servers: list[Postgres]
) -> None:
    primary, standby = servers
    load = Load(client)
    async with load.running():
        await load.progress(5 * CLIENTS)
        await lose(primary)
        await asyncio.sleep(0.3)  # until somebody has noticed
        execute(standby, "select pg_promote()")
        await load.progress(5 * CLIENTS)

    assert {status for status in load.statuses if status not in (200, 201)} == set()
    assert {wallet: await balance(client, wallet) for wallet in WALLETS} == dict(load.deposited)
    assert {wallet: len(await history(client, wallet)) for wallet in WALLETS} == dict(load.deposited)
    assert execute(standby, "select * from wallet.verify()") == []
    assert (await client.get("/readyz")).status == 200

    execute(standby, "select wallet.revoke_key('all')")
    async with asyncio.timeout(6):
        while (await client.get(path(WALLETS[0]))).status != 401:
            await asyncio.sleep(0.05)


async def test_a_primary_that_takes_no_writes_any_more_is_left(client: TestClient, servers: list[Postgres]) -> None:
    """Its sessions are left to themselves, and go on answering reads."""
    primary, standby = servers
    load = Load(client)
    async with load.running():
        await load.progress(CLIENTS)
        execute(primary, "alter system set default_transaction_read_only = on", "select pg_reload_conf()")
        [(promoted,)] = execute(standby, "select clock_timestamp() from pg_promote()")
        await load.progress(5 * CLIENTS)

    assert {status for status in load.statuses if status not in (200, 201)} == set()
    assert {wallet: await balance(client, wallet) for wallet in WALLETS} == dict(load.deposited)
    sessions = (  # a line that has not been used since does not hear of what has become of its server
        "select count(*) from pg_stat_activity where usename = 'wallet_service'"
        f" and (state <> 'idle' or state_change > '{promoted}')"
    )
    await until(lambda: execute(primary, sessions) == [(0,)], 4)  # before they have been idle for long


async def test_a_call_that_waits_for_a_lost_standby_is_ended_where_it_waits(
    servers: list[Postgres], client: TestClient, aiohttp_client: AiohttpClient
) -> None:
    """Else it would keep its wallet locked there until a standby comes: it does not notice that its client is gone."""
    primary, standby = servers
    settings = msgspec.structs.replace(client.app[SETTINGS], access="open", request_deadline=4)
    impatient = await aiohttp_client(make_app(settings))
    assert (await deposit(impatient, WALLETS[0], 1)).status == 200  # its lane is connected to the primary
    execute(standby, "select pg_promote()")  # the primary has not heard of it, and still takes writes
    asked = asyncio.create_task(deposit(impatient, WALLETS[0], 1))
    waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"
    await until(lambda: execute(primary, waits) == [(1,)])
    execute(primary, "alter system set default_transaction_read_only = on", "select pg_reload_conf()")
    assert (await asked).status == 200
    await until(lambda: execute(primary, waits) == [(0,)], 2)


async def test_reads_leave_a_primary_that_takes_no_writes_any_more(client: TestClient, servers: list[Postgres]) -> None:
    primary, standby = servers

    async def read() -> None:
        assert {answer.status for answer in await asyncio.gather(*(client.get(path("w0")) for _ in range(50)))} == {200}

    await read()
    execute(primary, "alter system set default_transaction_read_only = on", "select pg_reload_conf()")
    execute(standby, "select pg_promote()")
    await read()  # with its answer a server says that it takes no writes
    await read()
    sessions = "select count(*) from pg_stat_activity where usename = 'wallet_service' and application_name = 'wallet'"
    await until(lambda: execute(primary, sessions) == [(0,)], 4)  # before they have been idle for long


async def test_idle_sessions_of_a_lost_primary_are_not_tried_one_after_another(
    client: TestClient, servers: list[Postgres]
) -> None:
    primary, standby = servers
    for _ in range(3):
        await asyncio.gather(*(client.get(path(WALLETS[0])) for _ in range(20)))
    await freeze(primary)
    execute(standby, "select pg_promote()")
    assert (await client.get(path(WALLETS[0]))).status == 200


@pytest.mark.parametrize(
    ("url", "environment", "hosts"),
    [
        ("postgresql://u@one/d", {}, []),
        ("postgresql://u@one:1,two:2/d", {}, [("one", 1), ("two", 2)]),
        ("postgresql://u:p@one,two:2/d?sslmode=disable", {"PGPORT": "7"}, [("one", 7), ("two", 2)]),
        ("postgresql://u@%2Fa,%2Fb:2/d", {}, [("/a", 5432), ("/b", 2)]),
        ("postgresql://u@[::1]:1,[::2]/d", {}, [("::1", 1), ("::2", 5432)]),
        ("postgresql://u@/d?host=/a,/b&port=1,2", {}, [("/a", 1), ("/b", 2)]),
        ("postgresql://u@/d?host=/a,/b&port=1", {}, [("/a", 1), ("/b", 1)]),
        ("postgresql://u@/d?host=/a,/b", {}, [("/a", 5432), ("/b", 5432)]),
        ("postgresql:///d", {"PGHOST": "one,two"}, [("one", 5432), ("two", 5432)]),
        ("postgresql:///d", {"PGHOST": "one,two", "PGTARGETSESSIONATTRS": "any"}, []),
        ("postgresql://u@one:1,two:2/d?target_session_attrs=any", {}, []),
    ],
)
def test_the_hosts_of_a_url(
    url: str, environment: dict[str, str], hosts: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGHOST", "PGPORT", "PGTARGETSESSIONATTRS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert several_hosts(url) == hosts
