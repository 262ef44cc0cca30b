"""What the tests over HTTP share."""

import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer

from app.calls import line
from app.server.migrations import LOGIN
from app.settings import Settings
from app.web.application import make_app
from tests.conftest import url_of
from tests.proxy import Postgres, Proxy


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls wait for locked wallets past their deadline: most tests lock a wallet to keep a lane busy."""
    monkeypatch.setattr(line, "LOCK_PART", 1000)
    monkeypatch.setattr(line, "LOCK_TIMEOUT", 3600)


@pytest.fixture(autouse=True)
def patience(patient: None) -> None:
    """All calls are patient, but in a module that has a fixture of this name."""


@pytest.fixture
def home(used_home: Path, tmp_path: Path) -> Path:
    """A data folder that has been used, and is not in use."""
    home = tmp_path / "data"
    subprocess.run(["cp", "-a", used_home, home], check=True)
    return home


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_client(shared_superuser: psycopg.Connection) -> AsyncIterator[TestClient]:
    """An HTTP client of an app and a database that a module's tests share.

    For requests that change nothing, or with `emptied`. Tests with it have `pytest.mark.asyncio(loop_scope="module")`.
    """
    settings = Settings(database_url=url_of(shared_superuser, LOGIN))
    async with TestClient(TestServer(make_app(settings))) as client:
        yield client


@pytest.fixture
async def proxy(superuser: psycopg.Connection) -> AsyncIterator[Proxy]:
    """A proxy before PostgreSQL."""
    proxy = Proxy(f"{superuser.info.host}/.s.PGSQL.5432", Postgres)
    with tempfile.TemporaryDirectory(prefix="wallet-proxy-", dir="/tmp") as folder:
        await proxy.listen(f"{folder}/.s.PGSQL.5432")
        yield proxy
        await proxy.close()
