"""A session that answered is not a session that is good: what the service keeps, and on what it starts."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.calls import database, dispatch
from app.calls.database import connect
from app.calls.parties import Parties
from app.server.embedded import Postgres
from app.server.migrations import LOGIN, bring_up_to_date
from app.server.preconditions import check
from app.settings import Settings, StartupError
from app.web.application import make_app
from tests.api.door import balance, create, deposit, path, problem
from tests.api.test_lanes import lane_pids, through, until
from tests.conftest import url_of
from tests.proxy import Point, Proxy
from tests.proxy import Postgres as PostgresTalk


@pytest.fixture
async def client(database_url: str, aiohttp_client: AiohttpClient) -> TestClient:
    """A client of an app with one lane. Wallet `w` is empty."""
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1)))
    await create(client, {"w": 0})
    return client


@pytest.fixture
def login(superuser: psycopg.Connection) -> Iterator[str]:
    """A login of this test's own, a member of wallet_app."""
    name = f"login_{superuser.info.dbname}"
    superuser.execute(f"create role {name} login in role wallet_app".encode())
    yield name
    superuser.execute(f"drop role {name}".encode())


def end_sessions(superuser: psycopg.Connection) -> None:
    superuser.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and application_name like 'wallet%'"
    )


async def ready(client: TestClient) -> int:
    return (await client.get("/readyz")).status


# Kept only if known to be good


async def test_sessions_that_may_not_write_are_replaced(client: TestClient, superuser: psycopg.Connection) -> None:
    name = superuser.info.dbname
    superuser.execute(f"alter database {name} set default_transaction_read_only = on".encode())
    end_sessions(superuser)
    waiting = [asyncio.create_task(deposit(client, "w", 1)) for _ in range(20)]
    waiting.append(asyncio.create_task(client.post("/api/v1/wallets", json={"uuid": "v"})))
    await problem(await client.get("/readyz"), 503, "unavailable")
    assert (await client.get(path("w"))).status == 200
    assert not any(task.done() for task in waiting)

    superuser.execute(f"alter database {name} reset default_transaction_read_only".encode())

    async with asyncio.timeout(3):
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 20 + [201]
    assert await ready(client) == 200
    assert await balance(client, "w") == 20


async def test_a_ready_service_can_be_written_whatever_its_older_sessions_say(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    name = superuser.info.dbname
    assert await ready(client) == 200
    superuser.execute(f"alter database {name} set default_transaction_read_only = on".encode())
    end_sessions(superuser)
    assert await ready(client) == 503
    superuser.execute(f"alter database {name} reset default_transaction_read_only".encode())
    assert await ready(client) == 200


async def test_a_lane_s_session_ends_after_an_error_that_is_none_of_ours(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    """Here it has lost its rights by itself, as after an error that changed more than its statement."""
    assert (await deposit(client, "w", 1)).status == 200
    [before] = lane_pids(superuser)
    for task in asyncio.all_tasks():
        frame = task.get_coro().cr_frame
        line = frame.f_locals.get("line") if frame is not None and task.get_coro().__qualname__ == "Lane.run" else None
        if line is not None and line._connection is not None:
            await line._connection.execute("set default_transaction_read_only = on")

    assert (await deposit(client, "w", 1)).status == 200

    [after] = lane_pids(superuser)
    assert after != before


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        ("WA402", True),
        ("40001", True),
        ("40P01", True),
        ("55P03", True),
        ("57014", True),
        ("25006", False),
        ("42501", False),
        ("P0001", False),
        ("22012", False),
        ("53100", False),
        ("XX000", False),
    ],
)
async def test_a_session_is_kept_after_errors_that_are_known_to_be_harmless(
    error: str, kept: bool, superuser: psycopg.Connection, database_url: str
) -> None:
    body = f"begin raise sqlstate '{error}'; end"
    superuser.execute(f"create function public.fail() returns int language plpgsql as $$ {body} $$".encode())
    superuser.execute("grant usage on schema public to public")
    pool = database.Pool(database_url, 1, 5, Parties(1))

    async def backend(query: str) -> int:
        async with pool.connection() as connection:
            pid: int = await connection.fetchval("select pg_backend_pid()")
            await connection.fetchval(query)
            return pid

    before = await backend("select 1")
    with pytest.raises(asyncpg.PostgresError) as raised:
        await backend("select public.fail()")
    assert raised.value.sqlstate == error
    assert (await backend("select 1") == before) is kept
    pool.close()


async def test_connections_that_idle_are_given_back_but_for_the_lanes(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "IDLE", 0.3)
    monkeypatch.setattr(dispatch, "IDLE", 0.3)
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=3)))
    await until(lambda: len(lane_pids(superuser)) == 3)
    kept = lane_pids(superuser)
    await create(client, {"w": 0})
    with psycopg.connect(url_of(superuser, "postgres")) as holder:
        holder.execute("lock table wallet.wallet in access exclusive mode")
        reads = [asyncio.create_task(client.get(path("w"))) for _ in range(10)]
        sessions = "select count(*) from pg_stat_activity where application_name = 'wallet' and datname = %s"
        counted = (sessions, [superuser.info.dbname])
        await until(lambda: superuser.execute(*counted).fetchone() == (10,))
    assert {answer.status for answer in await asyncio.gather(*reads)} == {200}
    items = [{"wallet_uuid": "w", "operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}]
    assert (await client.post("/api/v1/operations", json={"operations": items})).status == 200
    assert len(lane_pids(superuser)) == 4

    await until(lambda: superuser.execute(*counted).fetchone() == (0,), 3)
    await until(lambda: sorted(lane_pids(superuser)) == sorted(kept), 3)

    assert await balance(client, "w") == 1
    assert (await deposit(client, "w", 1)).status == 200


async def test_a_peer_that_is_gone_without_a_word_is_noticed_by_the_kernel(
    superuser: psycopg.Connection, database_url: str
) -> None:
    proxy = Proxy(f"{superuser.info.host}/.s.PGSQL.5432", PostgresTalk)
    await proxy.listen(("127.0.0.1", 0))
    url = f"postgresql://{LOGIN}@127.0.0.1:{proxy.address[1]}/{superuser.info.dbname}?sslmode=disable"
    connection = await connect(url, 10)
    peer = connection._transport.get_extra_info("socket")
    assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
    await connection.close()
    await proxy.close()


async def test_what_a_role_or_a_database_has_set_makes_no_session_unsafe(
    login: str, superuser: psycopg.Connection
) -> None:
    for setting in (
        "synchronous_commit = off",
        "default_transaction_isolation = 'repeatable read'",
        "lock_timeout = 1",
    ):
        superuser.execute(f"alter role {login} set {setting}".encode())
    connection = await connect(url_of(superuser, login), 5)
    assert await connection.fetchval("show synchronous_commit") == "on"
    assert await connection.fetchval("show transaction_isolation") == "read committed"
    assert await connection.fetchval("show lock_timeout") == "0"
    await connection.close()

    superuser.execute(f"alter role {login} set synchronous_commit = 'remote_apply'".encode())
    connection = await connect(url_of(superuser, login), 5)
    assert await connection.fetchval("show synchronous_commit") == "remote_apply"
    await connection.close()


async def test_the_lane_and_the_pool_commit_to_disk_whatever_the_role_has_set(
    login: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    superuser.execute(f"alter role {login} set synchronous_commit = off".encode())
    superuser.execute("create table public.seen (setting text)")
    superuser.execute("grant insert on public.seen to public; grant usage on schema public to public")
    superuser.execute("""
        create function public.look() returns trigger language plpgsql as
          $$ begin insert into public.seen values (current_setting('synchronous_commit')); return new; end $$;
        create trigger look before insert on wallet.wallet for each row execute function public.look();
        create trigger look before insert on wallet.operation for each row execute function public.look()""")
    client = await aiohttp_client(make_app(Settings(database_url=url_of(superuser, login), lanes=1)))
    await create(client, {"w": 0})
    item = {"wallet_uuid": "w", "operation_uuid": "8a6e0000-0000-4000-8000-000000000001", "operation_type": "DEPOSIT"}
    assert (await deposit(client, "w", 1)).status == 200
    assert (await client.post("/api/v1/operations", json={"operations": [{**item, "amount": 1}]})).status == 200

    assert superuser.execute("select setting, count(*) from public.seen group by 1").fetchall() == [("on", 3)]
    await client.close()


# A start


async def test_a_start_on_a_server_that_does_not_flush_is_refused_unless_it_is_asked_for(database_url: str) -> None:
    with pytest.raises(StartupError, match="fsync = off"):
        await check(Settings(database_url=database_url))
    await check(Settings(database_url=database_url, allow_fsync_off=True))


async def test_a_start_on_a_read_only_server_is_one_clear_line(
    database_url: str, superuser: psycopg.Connection
) -> None:
    superuser.execute(f"alter database {superuser.info.dbname} set default_transaction_read_only = on".encode())
    with pytest.raises(StartupError, match=r"^the database is read-only") as refused:
        await check(Settings(database_url=database_url, allow_fsync_off=True))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("version", "starts"), [(4, False), (5, True), (99, True)])
async def test_a_start_wants_a_contract_that_is_new_enough(
    version: int, starts: bool, database_url: str, superuser: psycopg.Connection
) -> None:
    superuser.execute(
        f"create or replace function wallet.contract_version() returns int language sql as 'select {version}'".encode()
    )
    settings = Settings(database_url=database_url, allow_fsync_off=True)
    if starts:
        await check(settings)
    else:
        with pytest.raises(StartupError, match="not migrated"):
            await check(settings)


@pytest.fixture
async def two_servers(tmp_path: Path) -> AsyncIterator[list[Postgres]]:
    """Two migrated servers of this test's own; the first is read-only."""
    servers = [Postgres(tmp_path / name, "fsync=off") for name in ("first", "second")]
    try:
        for server in servers:
            server.start()
            await asyncio.to_thread(asyncio.run, bring_up_to_date(server))
        with psycopg.connect(servers[0].url("postgres", "postgres"), autocommit=True) as connection:
            connection.execute("alter system set default_transaction_read_only = on")
            connection.execute("select pg_reload_conf()")
        yield servers
    finally:
        for server in servers:
            server.stop()


async def test_of_several_hosts_the_one_that_takes_writes_is_used(
    two_servers: list[Postgres], aiohttp_client: AiohttpClient
) -> None:
    hosts = ",".join(str(server.socket_dir) for server in two_servers)
    url = f"postgresql://{LOGIN}@/wallet?host={hosts}&port=5432,5432&sslmode=disable"
    settings = Settings(database_url=url, allow_fsync_off=True)
    await check(settings)
    client = await aiohttp_client(make_app(settings))
    assert (await deposit(client, "1111111111", 1)).status == 200
    assert await ready(client) == 200

    with psycopg.connect(two_servers[1].url("postgres", "postgres"), autocommit=True) as connection:
        connection.execute("alter system set default_transaction_read_only = on")
        connection.execute("select pg_reload_conf()")
    with pytest.raises(StartupError, match="none of the hosts in DATABASE_URL takes writes"):
        await check(settings)
    await client.close()


# Creating a wallet


@pytest.mark.parametrize("point", Point)
@pytest.mark.parametrize("name", ["mine", None])
async def test_a_wallet_s_creator_is_never_refused_for_what_it_made_itself(
    name: str | None, point: Point, proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser), lanes=1)))
    cut = proxy.cut_next(b"wallet.create_wallet", point)

    answer = await client.post("/api/v1/wallets", json={"uuid": name} if name else {})

    assert cut.done()
    if name is None or point in (Point.BEFORE_THE_CALL,):
        assert answer.status == 201
    elif answer.status != 201:  # it is there already: made by the attempt that was lost, or by somebody else
        await problem(answer, 503, "unavailable")
        await problem(await client.post("/api/v1/wallets", json={"uuid": name}), 400, "wallet_exists")
    assert superuser.execute("select count(*) from wallet.wallet").fetchone() == (1,)


async def test_a_name_that_was_taken_before_is_refused(client: TestClient) -> None:
    await problem(await client.post("/api/v1/wallets", json={"uuid": "w"}), 400, "wallet_exists")
