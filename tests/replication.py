"""A standby: a second server that follows a first one, whose commits may wait for it."""

import subprocess
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


def execute(server: Postgres, *statements: str) -> list[tuple[object, ...]]:
    """Run statements as a server's superuser, and return the rows of the last one."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []
