"""A real PostgreSQL for every test: one server a run, one migrated database a test, cloned from a template."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient
from pytest_postgresql import factories

from app.server.embedded import BINARIES, Postgres, connection_url
from app.server.migrations import LOGIN, dbmate
from app.settings import Settings
from app.web.application import make_app


def open_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Make a folder whose parents everybody can enter: programs before PostgreSQL 16 leave theirs and come back."""
    folder = tmp_path_factory.mktemp(name)
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o711)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A PostgreSQL server: the embedded one, or the one whose programs lie in WALLET_TEST_BINARIES."""
    binaries = Path(os.environ.get("WALLET_TEST_BINARIES", BINARIES))
    folder = open_folder(tmp_path_factory, "server")
    postgres = Postgres(folder, "fsync=off", "max_connections=300", "max_locks_per_transaction=256", binaries=binaries)
    postgres.start()
    with psycopg.connect(postgres.url("postgres", "postgres"), autocommit=True) as connection:
        connection.execute("create role wallet_app")
        connection.execute(f"create role {LOGIN} login in role wallet_app")
        connection.execute("create role wallet_reader")
        connection.execute("create role report login in role wallet_reader")
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
postgresql = factories.postgresql("postgresql_noproc")


def url_of(connection: psycopg.Connection, user: str) -> str:
    """Return the URI of a connection's database for another user."""
    return connection_url(connection.info.host, user, connection.info.dbname)


@pytest.fixture
def superuser(postgresql: psycopg.Connection) -> psycopg.Connection:
    """A superuser's connection to a migrated, empty database of this test's own."""
    postgresql.autocommit = True
    return postgresql


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
async def client(database_url: str, aiohttp_client: AiohttpClient) -> TestClient:
    """An HTTP client of the app, which runs on this test's database."""
    return await aiohttp_client(make_app(Settings(database_url=database_url)))
