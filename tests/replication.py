"""Standbys: servers that follow a primary, whose commits may wait for them, and take its place."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from app.server.embedded import Postgres
from tests.network import Cable, Machine

NAME = "standby"
"""What a primary calls its standby (application_name)."""


class Wired(Postgres):
    """A server on a machine of its own: the service reaches it through one cable, the other servers through another.

    Its unix socket is reached from everywhere, as a file is.
    """

    def __init__(self, home: Path, *settings: str, binaries: Path, machine: Machine, front: Cable, back: Cable) -> None:
        addresses = f"listen_addresses={front.address},{back.address}"
        super().__init__(home, addresses, *settings, binaries=binaries)
        self.machine = machine
        self.front = front
        self.back = back

    def _run(self, cluster: int) -> None:
        with self.machine.entered():
            super()._run(cluster)


def standby_of(primary: Postgres, standby: Postgres, name: str = NAME) -> Postgres:
    """Copy a running server and start the copy as its standby."""
    standby.home.mkdir(mode=0o711)
    copy(primary, standby, name)
    standby.start()
    return standby


def copy(primary: Postgres, standby: Postgres, name: str) -> None:
    """Copy a running server's data to where a standby finds it (a base backup)."""
    options = ["--checkpoint=fast", "--no-sync", "--write-recovery-conf", f"--pgdata={standby.data}"]
    source = f"--dbname={_source(primary, name)}"
    subprocess.run([primary.binaries / "pg_basebackup", *options, source], check=True, capture_output=True)


def _source(primary: Postgres, name: str) -> str:
    """Return how a server reaches the primary (primary_conninfo)."""
    host = primary.back.address if isinstance(primary, Wired) else primary.socket_dir
    return f"host={host} port=5432 user=postgres dbname=postgres application_name={name}"


@contextlib.contextmanager
def replicated(home: Path, folder: Path) -> Iterator[tuple[Postgres, Postgres]]:
    """Run a copy of a data folder as a primary whose commits wait for its standby, and that."""
    subprocess.run(["cp", "-a", home, folder / "primary"], check=True)
    primary = Postgres(folder / "primary", "fsync=off", f"synchronous_standby_names={NAME}")
    with contextlib.ExitStack() as stack:
        stack.callback(primary.stop)
        primary.start()
        standby = standby_of(primary, Postgres(folder / "standby", "fsync=off"))
        stack.callback(standby.stop)  # first: a primary stops when its standby has everything
        yield primary, standby


def execute(server: Postgres, *statements: str) -> list[tuple[object, ...]]:
    """Run statements as a server's superuser, and return the rows of the last one."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


class Cluster:
    """A primary and two standbys. Who is the primary changes; names and addresses stay."""

    NAMES = ("one", "two", "three")

    def __init__(self, primary: Postgres, *standbys: Postgres) -> None:
        """The standbys are made here, as copies of the primary, which runs."""
        self.primary = primary
        self.servers = [primary, *standbys]
        self.names = dict(zip(self.servers, self.NAMES, strict=True))
        for standby in standbys:
            standby_of(primary, standby, self.names[standby])
        for standby in standbys:
            self._is_followed_by(standby)

    @property
    def standbys(self) -> list[Postgres]:
        return [server for server in self.servers if server is not self.primary]

    @property
    def hosts(self) -> str:
        """All servers, as DATABASE_URL names several hosts."""
        return ",".join(
            server.front.address if isinstance(server, Wired) else str(server.socket_dir) for server in self.servers
        )

    def promote(self) -> None:
        """Make the standby the primary that has most of the log, and the others that run its standbys."""
        lsn = "select greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn"
        self.primary = max(self.standbys, key=lambda standby: execute(standby, lsn))
        execute(self.primary, "select pg_promote()")
        for standby in self.standbys:
            if standby.is_running():
                source = _source(self.primary, self.names[standby])
                execute(standby, f"alter system set primary_conninfo = '{source}'", "select pg_reload_conf()")

    def rejoin(self, server: Postgres, *, rewind: bool) -> str:
        """Start the former primary as a standby: on what it has, taken back to where they parted, or on a copy.

        Returns how. After a crash pg_rewind first has the server recover, and keep its log from before as long as
        postgresql.conf says: a setting of the command line is not seen then.
        """
        how = "copied anew"
        if rewind:
            execute(self.primary, "checkpoint")  # before 16, pg_rewind only then sees that there was a promotion
            command, arguments = server._command("pg_rewind", server.data)
            source = f"--source-server={_source(self.primary, self.names[server])}"
            options = [source, "--no-sync", "--write-recovery-conf"]
            ran = subprocess.run([*command, *options], **arguments, capture_output=True, text=True)
            how = "taken back by pg_rewind"
            if ran.returncode:
                rewind, how = False, f"copied anew, since pg_rewind failed: {ran.stderr[-300:]}"
        if not rewind:
            shutil.rmtree(server.data)
            copy(self.primary, server, self.names[server])
        server.start()
        for standby in self.standbys:
            self._is_followed_by(standby)
        return how

    def _is_followed_by(self, standby: Postgres) -> None:
        query = "select 1 from pg_stat_replication where state = 'streaming' and application_name = "
        over = time.monotonic() + 30
        while not execute(self.primary, f"{query}'{self.names[standby]}'"):
            assert time.monotonic() < over, f"{self.names[standby]} does not follow"
            time.sleep(0.02)
