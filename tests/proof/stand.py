"""What the proof runs on: a PostgreSQL of its own with everything durable, and the service, both as real processes."""

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import asyncpg
import psycopg

from app.calls.refusals import NO_SUCCESS
from app.server.embedded import Postgres, connection_url, die_with_parent
from app.server.migrations import LOGIN, dbmate
from app.settings import CHECKOUT
from tests.api.test_process import free_port, is_alive
from tests.conftest import PROGRAMS, environment_with
from tests.network import Cable, Machine, Switch
from tests.proof.clients import CLIENTS, Connection, Lost
from tests.proof.history import Books, Row
from tests.proxy import Http, Proxy
from tests.proxy import Postgres as PostgresTalk
from tests.replication import Cluster, Wired

TEMPLATE = "wallet"
"""The migrated database without a wallet from which each stand's own is cloned."""
STAND = "proof"
ROOM = {"BULK_QUEUE": str(CLIENTS)}
"""Every client's request may wait, so that none is one too many unless something is jammed."""


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def signal_tree(pid: int, number: signal.Signals) -> None:
    """Signal a process and all its descendants; its parent is stopped first, so that none is forked meanwhile."""
    if number is not signal.SIGCONT:
        os.kill(pid, signal.SIGSTOP)
    for one in reversed(tree(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)


async def gone(process: subprocess.Popen[bytes], pids: list[int]) -> None:
    """Wait until a process of ours and its descendants are gone, or zombies that somebody else has to reap."""
    await asyncio.to_thread(process.wait, 30)
    async with asyncio.timeout(30):
        while any(is_alive(pid) for pid in pids):
            await asyncio.sleep(0.005)


@functools.cache
def _template() -> tempfile.TemporaryDirectory[str]:
    """A cluster with a migrated database and the service's login, to be copied; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="wallet-proof-")
    open_to_servers(Path(folder.name))
    postgres = Postgres(Path(folder.name), binaries=PROGRAMS)
    postgres.start()
    try:
        migrate(postgres)
    finally:
        postgres.stop()
    return folder


def open_to_servers(folder: Path) -> None:
    """Let everybody through a folder: programs before PostgreSQL 16 leave theirs and come back."""
    folder.chmod(0o711)


def migrate(postgres: Postgres) -> None:
    """Make the template, and the service's login."""
    dbmate(postgres.url("postgres", TEMPLATE), "migrations", "up")
    with psycopg.connect(postgres.url("postgres", TEMPLATE)) as connection:
        connection.execute(f"create role {LOGIN} login in role wallet_app")


@contextlib.contextmanager
def server(folder: Path | None = None) -> Iterator[Postgres]:
    """A durable PostgreSQL with its default settings, in a folder or in a temporary one."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wallet-proof-")))
            open_to_servers(folder)
        postgres = Postgres(folder, binaries=PROGRAMS)
        _copy_template(postgres)
        postgres.start()
        stack.callback(postgres.stop)
        yield postgres


def _copy_template(postgres: Postgres) -> None:
    shutil.copytree(Path(_template().name) / "postgres", postgres.data, dirs_exist_ok=True)


WAITS_FOR = f"ANY 1 ({', '.join(Cluster.NAMES)})"
FOLLOWED = """
wal_log_hints = on
wal_keep_size = 256MB
wal_retrieve_retry_interval = 100ms
"""
"""Settings of all servers of a cluster, in postgresql.conf: pg_rewind needs them there."""


@contextlib.contextmanager
def cluster(waits_for: str = WAITS_FOR, *, machines: Iterable[dict[str, Any]] = ({}, {}, {})) -> Iterator[Cluster]:
    """A primary and two standbys, durable; `waits_for` is their synchronous_standby_names."""
    with tempfile.TemporaryDirectory(prefix="wallet-proof-") as folder:
        open_to_servers(Path(folder))
        servers = [
            (Wired if machine else Postgres)(Path(folder) / name, binaries=PROGRAMS, **machine)
            for name, machine in zip(Cluster.NAMES, machines, strict=True)
        ]
        primary, *standbys = servers
        primary.home.mkdir(mode=0o711)
        _copy_template(primary)
        with (primary.data / "postgresql.conf").open("a") as settings:
            settings.write(f"{FOLLOWED}synchronous_standby_names = '{waits_for}'\n")
        with (primary.data / "pg_hba.conf").open("a") as access:
            access.write(f"host all,replication postgres,{LOGIN} 10.0.0.0/8 trust\n")
        try:
            primary.start()
            yield Cluster(primary, *standbys)
        finally:
            for one in reversed(servers):
                one.stop()


@contextlib.contextmanager
def wired_cluster() -> Iterator[Cluster]:
    """The same on three machines, with this process and what it starts on a fourth one."""
    with contextlib.ExitStack() as stack:
        here, *machines = [stack.enter_context(contextlib.closing(Machine())) for _ in range(4)]
        stack.enter_context(here.entered())
        switches = Switch("front", "10.0.1"), Switch("back", "10.0.2")
        ends: list[dict[str, Any]] = []
        for number, machine in enumerate(machines, start=1):
            cables = [stack.enter_context(contextlib.closing(Cable(one, machine, number))) for one in switches]
            ends.append({"machine": machine, "front": cables[0], "back": cables[1]})
        yield stack.enter_context(cluster(machines=ends))


class Stand:
    """A service on a database of its own, and what can be done to both."""

    def __init__(
        self, servers: Postgres | Cluster, workers: int, command: Iterable[str], log: Path, settings: Mapping[str, str]
    ) -> None:
        self._servers = servers
        self.port = free_port()
        self.front = self.port
        """The port that clients use: the service's, or a proxy's."""
        self.proxy: Proxy | None = None
        self.database_host: Path | str = servers.hosts if isinstance(servers, Cluster) else servers.socket_dir
        """Where the service finds its database: PostgreSQL, or a proxy."""
        self.process: subprocess.Popen[bytes] | None = None
        self.log = log
        self.log_reader: subprocess.Popen[bytes] | None = None
        """Who reads the service's log, if it logs every request: keeps what is no request's line."""
        self._command = command
        self._settings = {"PORT": str(self.port), "WORKERS": str(workers), "LOG_LEVEL": "WARNING", **ROOM, **settings}

    @property
    def postgres(self) -> Postgres:
        """The PostgreSQL that takes writes."""
        return self._servers.primary if isinstance(self._servers, Cluster) else self._servers

    @property
    def cluster(self) -> Cluster:
        """The PostgreSQL and its standbys."""
        assert isinstance(self._servers, Cluster)
        return self._servers

    @property
    def database(self) -> str:
        """The URI of the database for a superuser."""
        return self.postgres.url("postgres", STAND)

    async def start_service(self) -> None:
        """Start the service and wait until it answers."""
        url = connection_url(self.database_host, LOGIN, STAND)
        with contextlib.ExitStack() as stack:
            log: IO[bytes] = stack.enter_context(self.log.open("ab"))
            if self._settings["LOG_LEVEL"] == "INFO":
                keep = ["grep", "--line-buffered", "-v", '"logger":"access"']
                self.log_reader = subprocess.Popen(keep, stdin=subprocess.PIPE, stdout=log)  # noqa: ASYNC220
                assert self.log_reader.stdin is not None
                log = stack.enter_context(self.log_reader.stdin)
            self.process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", *self._command],
                cwd=CHECKOUT,
                env=environment_with(DATABASE_URL=url, TMPDIR=str(self.log.parent), **self._settings),
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )
        async with asyncio.timeout(30):
            while not await self._answers():
                if self.process.poll() is not None:
                    raise AssertionError(f"the service does not start: {self.log.read_text()[-500:]}")
                await asyncio.sleep(0.02)

    async def revive_service(self) -> None:
        """Start the service unless it runs, and wait until it answers."""
        async with asyncio.timeout(60):
            while not await self._answers():
                if not self.is_running():
                    await self.start_service()
                await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        with contextlib.suppress(Lost, TimeoutError), contextlib.closing(Connection(self.port, 5)) as connection:
            async with asyncio.timeout(0.2):
                await connection.open()
            return (await connection.ask("/healthz")).status == 200
        return False

    async def stop_service(self) -> None:
        """Stop the service as an operator does, and wait until it is gone."""
        assert self.process is not None
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, 60)

    def is_running(self) -> bool:
        """Tell whether the service runs."""
        return self.process is not None and self.process.poll() is None

    async def kill_service(self, *, workers_too: bool = True) -> None:
        """Kill -9 the service, or its supervisor alone: the workers end with it."""
        assert self.process is not None
        pids = tree(self.process.pid)
        if workers_too:
            signal_tree(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        await gone(self.process, pids)

    def workers(self) -> list[int]:
        """Return the pids of the service's workers."""
        assert self.process is not None
        return tree(self.process.pid)[1:]

    async def kill_postgres(self) -> None:
        """Kill -9 every process of PostgreSQL at once."""
        assert self.postgres.process is not None
        pids = tree(self.postgres.process.pid)
        signal_tree(self.postgres.process.pid, signal.SIGKILL)
        await gone(self.postgres.process, pids)

    async def start_postgres(self) -> None:
        """Start PostgreSQL again, through its recovery."""
        await asyncio.to_thread(self.postgres.start)

    def freeze_postgres(self) -> None:
        """Stop every process of PostgreSQL where it stands."""
        assert self.postgres.process is not None
        signal_tree(self.postgres.process.pid, signal.SIGSTOP)

    def thaw_postgres(self) -> None:
        """Let PostgreSQL go on."""
        assert self.postgres.process is not None
        signal_tree(self.postgres.process.pid, signal.SIGCONT)

    async def sql(self, query: str, *arguments: object) -> list[Any]:
        """Run a statement as superuser on a connection of its own."""
        connection = await asyncpg.connect(self.database, timeout=5)
        try:
            return await connection.fetch(query, *arguments, timeout=20)
        finally:
            connection.terminate()

    async def script(self, statements: str) -> None:
        """Run statements as superuser, in one transaction, on a connection of their own."""
        connection = await asyncpg.connect(self.database, timeout=5)
        try:
            await connection.execute(statements, timeout=20)
        finally:
            connection.terminate()

    async def database_writes(self, seconds: float = 30) -> float:
        """Wait until the database takes a write directly, and return when it did."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    async with asyncio.timeout(1):
                        await self.sql("insert into public.heartbeat default values")
                    return time.monotonic()
                except NO_SUCCESS:
                    await asyncio.sleep(0.01)

    async def is_quiet(self) -> None:
        """Wait until no call of the service is under way, neither in PostgreSQL nor in a worker."""
        query = f"select count(*) from pg_stat_activity where usename = '{LOGIN}' and state <> 'idle'"
        async with asyncio.timeout(60):
            while await self._calls_in_flight() or (await self.sql(query))[0][0]:
                await asyncio.sleep(0.01)

    async def _calls_in_flight(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        metrics = (await reader.read()).decode()
        writer.close()
        lines = [line for line in metrics.splitlines() if line.startswith("wallet_calls_in_flight")]
        return any(float(line.rpartition(" ")[2]) for line in lines)

    def books(self) -> Books:
        """Read what the database holds."""
        with psycopg.connect(self.database) as connection:
            rows = connection.execute(
                "select wallet_uuid, seq, operation_uuid, operation_type, amount, balance_after, counterparty_uuid,"
                " hold_uuid, held_after, created_at, expires_at from wallet.operation order by wallet_uuid, seq"
            ).fetchall()
            ledger = [Row(*row[:9]) for row in rows]
            created = {(row[0], row[1]): row[9] for row in rows}
            expiries = {row[2]: row[10] for row in rows if row[10] is not None}
            held = connection.execute("select hold_uuid, wallet_uuid, amount from wallet.hold")
            holds = {hold: (wallet, amount) for hold, wallet, amount in held}
            wallets = {
                name: (balance, seq)
                for name, balance, seq in connection.execute("select uuid, balance, seq from wallet.balance")
            }
            verified = [str(row) for row in connection.execute("select * from wallet.verify()")]
        return Books(ledger, wallets, verified, holds, created, expiries)


@contextlib.asynccontextmanager
async def stand(
    servers: Postgres | Cluster,
    workers: int,
    *,
    command: tuple[str, ...] = ("app",),
    scripts: Iterable[str] = (),
    proxy_before: str | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Stand]:
    """A running service on a new database, with a proxy before the `database` or the `service` if it is asked for.

    `scripts` are run by the superuser before the service starts.
    """
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wallet-proof-", dir="/tmp"))
        running = Stand(servers, workers, command, Path(folder) / "log", settings)
        postgres = running.postgres
        with psycopg.connect(postgres.url("postgres", "postgres"), autocommit=True) as connection:
            connection.execute(f"drop database if exists {STAND} with (force)")
            connection.execute(f"create database {STAND} template {TEMPLATE} strategy file_copy")
        for script in ("create table public.heartbeat (beat timestamptz default clock_timestamp())", *scripts):
            await running.script(script)
        if proxy_before == "database":
            running.proxy = Proxy(f"{postgres.socket_dir}/.s.PGSQL.5432", PostgresTalk)
            await running.proxy.listen(f"{folder}/.s.PGSQL.5432")
            running.database_host = folder
        elif proxy_before == "service":
            running.proxy = Proxy(("127.0.0.1", running.port), Http)
            await running.proxy.listen(("127.0.0.1", 0))
            running.front = int(running.proxy.address[1])
        if running.proxy is not None:
            stack.push_async_callback(running.proxy.close)
        try:
            await running.start_service()
            yield running
        finally:
            if running.is_running():
                await running.kill_service()
            if running.log_reader is not None:
                await asyncio.to_thread(running.log_reader.wait, 30)
