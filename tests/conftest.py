"""A real PostgreSQL for every test: one server a worker, one migrated, empty database a test."""

import asyncio
import fcntl
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
import uvloop
from aiohttp.test_utils import TestClient
from psycopg.pq import TransactionStatus
from pytest_aiohttp.plugin import AiohttpClient
from pytest_postgresql import factories
from pytest_postgresql.executors import NoopExecutor

from app.server.embedded import BINARIES, Postgres, connection_url
from app.server.migrations import LOGIN, dbmate
from app.settings import CHECKOUT, Settings
from app.web.application import make_app

SETTINGS = ("DATABASE_URL", "HOST", "PORT", "WORKERS", "WALLET_DATA_DIR", "ACCESS", "TRUSTED_PROXIES")

os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"  # it would load trio, which nothing here uses

MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30
"""Bytes that must be free in memory if the tests are to put their files there."""

if MEMORY.is_dir() and os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # where pytest makes its temporary folders


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the tests' bytecode, which takes each worker seconds to make, and the garbage collector off the tests."""
    sys.dont_write_bytecode = False
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that are marked `alone`: later, the room would have to be emptied for each."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test that is marked `alone` while no other worker runs one, because it looks at the clock.

    Tests queue for the room: behind one that waits for an empty room nobody enters it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    folder = run_folder(item.config._tmp_path_factory)
    with (folder / "queue").open("w") as queue, (folder / "room").open("w") as room:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        return (yield)


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this run, which its workers share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Have the tests run on the service's event loop, which differs from asyncio's in what it does at the edges."""
    return {"uvloop": uvloop.new_event_loop}


PROGRAMS = Path(os.environ.get("WALLET_TEST_BINARIES", BINARIES))
"""The folder of PostgreSQL's programs: those of the embedded server, unless others are asked for."""
Clone = Callable[[], AbstractContextManager[psycopg.Connection]]


def open_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Make a folder whose parents everybody can enter: programs before PostgreSQL 16 leave theirs and come back."""
    folder = tmp_path_factory.mktemp(name)
    own = 3 if "PYTEST_XDIST_WORKER" in os.environ else 2
    for parent in (folder, *folder.parents[:own]):
        parent.chmod(0o711)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A PostgreSQL server."""
    folder = open_folder(tmp_path_factory, "server")
    postgres = Postgres(folder, "fsync=off", "max_connections=300", "max_locks_per_transaction=256", binaries=PROGRAMS)
    postgres.start()
    with psycopg.connect(postgres.url("postgres", "postgres"), autocommit=True) as connection:
        connection.execute("create role wallet_app")
        connection.execute(f"create role {LOGIN} login in role wallet_app")
        connection.execute("create role wallet_reader")
        connection.execute("create role report login in role wallet_reader")
        connection.execute("create role wallet_admin in role wallet_app")
        connection.execute("create role keeper login in role wallet_admin")
    yield SimpleNamespace(
        host=str(postgres.socket_dir),
        port=5432,
        user="postgres",
        password=None,
        options="",
        maintenance_dbname="postgres",
        template_dbname=None,
        postgres=postgres,
    )
    postgres.stop()


def migrate(host: str, user: str, dbname: str, **_: object) -> None:
    dbmate(connection_url(host, user, dbname), "migrations", "migrate")


postgresql_noproc = factories.postgresql_noproc(depends_on="server", load=[migrate])


CATALOGUES = """
    select string_agg(format('select %L, count(*), max(xmin::text::bigint) from %I', relname, relname), ' union all ')
    from pg_class where relnamespace = 'pg_catalog'::regnamespace and relkind = 'r' and not relisshared"""
"""What asks for the number of rows of each catalogue, and the last transaction that wrote one."""
RESET = """
    close all; set session authorization default; reset all; unlisten *; discard sequences; discard temp;
    select pg_advisory_unlock_all()"""
"""`discard all`, but that plans are kept: to plan the question for the catalogues takes longer than to ask it."""
SETTINGS_OF_DATABASE = """
    select datconnlimit, datacl, (select count(*) from pg_db_role_setting where setdatabase = pg_database.oid)
    from pg_database where datname = current_database()"""
SESSIONS = "select array_agg(pid) from pg_stat_activity where datname = %s and backend_type = 'client backend'"
EMPTY = """
    delete from wallet.key; delete from wallet.hold; delete from wallet.operation; delete from wallet.wallet;
    select setval(oid::regclass, 1, false) from pg_class
    where relnamespace = 'wallet'::regnamespace and relkind = 'S'"""
IS_SMALL = """
    select sum(pg_table_size(oid)) < 500000 from pg_class
    where relnamespace = 'wallet'::regnamespace and relkind = 'r'"""
"""Whether the tables, with their dead rows, are small enough for a database to be used again."""


@pytest.fixture(scope="session")
def clone(postgresql_noproc: NoopExecutor) -> Iterator[Clone]:
    """Give a superuser's connection to a migrated, empty database.

    Both are used again if nothing was changed in the database but rows of its tables, and nobody else is connected: a
    new session costs 10 ms, for it has everything to look up. Else both are given up.
    """
    host, user = postgresql_noproc.host, postgresql_noproc.user
    spare: list[psycopg.Connection] = []
    new: list[object] = []

    def connect(name: str) -> psycopg.Connection:
        return psycopg.connect(connection_url(host, user, name), autocommit=True, prepare_threshold=None)

    def state(connection: psycopg.Connection) -> list[object]:
        return [*sorted(connection.execute("execute catalogues")), *connection.execute(SETTINGS_OF_DATABASE)]

    def is_left(name: str, *but: int) -> bool:
        for _ in range(20):  # a session that was closed takes a moment to end; to drop a database then takes 0.1 s
            if maintenance.execute(SESSIONS, [name]).fetchone() == ([*but] or None,):
                return True
            time.sleep(0.005)
        return False

    def is_as_new(connection: psycopg.Connection, name: str, session: int) -> bool:
        if connection.info.transaction_status != TransactionStatus.IDLE:
            return False
        with suppress(psycopg.Error):  # the test has ended it
            connection.execute(RESET)
            unchanged = is_left(name, session) and state(connection) == new
            return unchanged and connection.execute(IS_SMALL).fetchone() == (True,)
        return False

    with connect("postgres") as maintenance:
        # Files are copied, not logged: half the time, where nothing is flushed. Before version 15 they always are.
        how = "strategy file_copy" if maintenance.info.server_version >= 150000 else ""

        @contextmanager
        def clone() -> Iterator[psycopg.Connection]:
            if spare:
                connection = spare.pop()
            else:
                name = f"test_{uuid4().hex}"
                maintenance.execute(f"create database {name} template {postgresql_noproc.template_dbname} {how}")
                connection = connect(name)
                [[catalogues]] = connection.execute(CATALOGUES).fetchall()
                connection.execute(f"prepare catalogues as {catalogues}")
                if not new:
                    new[:] = state(connection)
            name, session = connection.info.dbname, connection.info.backend_pid
            yield connection
            if is_as_new(connection, name, session):
                connection.execute(EMPTY)
                spare.append(connection)
            else:
                connection.close()
                is_left(name)
                maintenance.execute(f"drop database {name} with (force)")

        yield clone
        for connection in spare:
            connection.close()


def environment_with(**settings: str) -> dict[str, str]:
    """Return the environment of a service; the tests' own server does not flush.

    A service is started some 200 times: it keeps its bytecode, and aiohttp loads no certificates, which takes 0.1 s.
    """
    kept = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "PYTHONDONTWRITEBYTECODE")}
    return {**kept, "ALLOW_FSYNC_OFF": "true", "SSL_CERT_FILE": os.devnull, **settings}


@pytest.fixture(scope="session")
def used_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the embedded mode that has been used once, for tests to copy."""
    folder = run_folder(tmp_path_factory)
    home, new = folder / "used", folder / "used.new"
    query = [sys.executable, "-m", "app", "psql", "-X", "-c", "select 1"]
    environment = environment_with(WALLET_DATA_DIR=str(new))
    with (folder / "used.lock").open("w") as lock:  # the first worker makes it, for all
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            subprocess.run(
                query, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, check=True, capture_output=True
            )
            new.rename(home)
    return home


def url_of(connection: psycopg.Connection, user: str) -> str:
    """Return the URI of a connection's database for another user."""
    return connection_url(connection.info.host, user, connection.info.dbname)


@pytest.fixture
def superuser(clone: Clone) -> Iterator[psycopg.Connection]:
    """A superuser's connection to a migrated, empty database of this test's own."""
    with clone() as connection:
        yield connection


@pytest.fixture(scope="module")
def shared_superuser(clone: Clone) -> Iterator[psycopg.Connection]:
    """A superuser's connection to a database that a module's tests share."""
    with clone() as connection:
        yield connection


@pytest.fixture(scope="module")
def shared_service(shared_superuser: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """The connection of the service's login to that database."""
    with psycopg.connect(url_of(shared_superuser, LOGIN), autocommit=True) as connection:
        yield connection


@pytest.fixture
def emptied(shared_superuser: psycopg.Connection) -> None:
    """Empty the shared database: cheaper than a new one, where a test leaves nothing but wallets and operations."""
    shared_superuser.execute(EMPTY)


@pytest.fixture
def database_url(superuser: psycopg.Connection) -> str:
    """The URI of this test's database for the service: a login that is a member of wallet_app and nothing else."""
    return url_of(superuser, LOGIN)


@pytest.fixture
def service(database_url: str) -> Iterator[psycopg.Connection]:
    """A connection of a login that is only a member of wallet_app."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def admin(superuser: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A connection of a login that is only a member of wallet_admin."""
    with psycopg.connect(url_of(superuser, "keeper"), autocommit=True) as connection:
        yield connection


@pytest.fixture
async def client(database_url: str, aiohttp_client: AiohttpClient) -> TestClient:
    """An HTTP client of the app, which runs on this test's database."""
    return await aiohttp_client(make_app(Settings(database_url=database_url)))
