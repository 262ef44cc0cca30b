"""The service as somebody starts it who has nothing else: a process with an embedded PostgreSQL of its own."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from app.server.migrations import LOGIN
from tests.api.test_process import Service, wait_until


@contextlib.contextmanager
def service(log_level: str = "WARNING", **settings: str) -> Iterator[Service]:
    """A service that answers, in a temporary folder; it is stopped afterwards, and PostgreSQL with it."""
    with tempfile.TemporaryDirectory(prefix="wallet-proof-") as folder:
        Path(folder).chmod(0o711)
        running = Service(Path(folder) / "data", Path(folder) / "log", LOG_LEVEL=log_level, **settings)
        try:
            wait_until(running.is_up)
            yield running
        finally:
            running.process.terminate()
            running.process.wait(60)


def database(running: Service, user: str = LOGIN) -> psycopg.Connection:
    """Connect to the service's database as the service does, or as another user."""
    return psycopg.connect(running.url(user), autocommit=True)


def processes(running: Service) -> list[int]:
    """Return the pids of the service without PostgreSQL: supervisor and workers."""
    return [running.process.pid, *running.workers()]


def memory(pids: list[int]) -> int:
    """Return the bytes of anonymous memory that processes hold: what a leak adds to.

    Mapped files and shared memory are left out: PostgreSQL's shared buffers fill up once, by design.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total
