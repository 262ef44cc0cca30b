"""A standby: a second server that follows a first one, whose commits may wait for it."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg

from app.server.embedded import BINARIES, Postgres

NAME = "standby"
"""What a primary calls its standby (application_name)."""


def standby_of(primary: Postgres, home: Path, *settings: str, name: str = NAME, binaries: Path = BINARIES) -> Postgres:
    """Copy a running server and start the copy as its standby."""
    standby = Postgres(home, *settings, binaries=binaries)
    home.mkdir(mode=0o711)
    copy = ["pg_basebackup", "--checkpoint=fast", "--no-sync", "--write-recovery-conf"]
    where = [f"--pgdata={standby.data}", f"--dbname={primary.url('postgres', 'postgres')}&application_name={name}"]
    subprocess.run([binaries / copy[0], *copy[1:], *where], check=True, capture_output=True)
    standby.start()
    return standby


@contextlib.contextmanager
def replicated(home: Path, folder: Path) -> Iterator[tuple[Postgres, Postgres]]:
    """Run a copy of a data folder as a primary whose commits wait for its standby, and that."""
    subprocess.run(["cp", "-a", home, folder / "primary"], check=True)
    primary = Postgres(folder / "primary", "fsync=off", f"synchronous_standby_names={NAME}")
    with contextlib.ExitStack() as stack:
        stack.callback(primary.stop)
        primary.start()
        standby = standby_of(primary, folder / "standby", "fsync=off")
        stack.callback(standby.stop)  # first: a primary stops when its standby has everything
        yield primary, standby


def execute(server: Postgres, *statements: str) -> list[tuple[object, ...]]:
    """Run statements as a server's superuser, and return the rows of the last one."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []
