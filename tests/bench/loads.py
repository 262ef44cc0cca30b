"""The pieces of the benchmark: a durable server, databases cloned from a template, services, wrk and pgbench."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from app.server.embedded import BINARIES, Postgres
from app.server.migrations import LOGIN, dbmate

WALLETS = 10_000
HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent


class Bench:
    """A PostgreSQL server with everything durable, and template databases.

    `template` has 10,000 empty wallets, `funded` the same with money, `many` a million whose names begin with m; with
    a prefix, they are of another checkout.
    """

    def __init__(self, postgres: Postgres, many: int) -> None:
        self.postgres = postgres
        self.many = many
        """Wallets of the template `many`."""

    def prepare(self) -> None:
        """Make the templates."""
        self._migrate("template", CHECKOUT)
        self.execute("template", (HERE / "bare.sql").read_text())
        self._fill("")

    def prepare_before(self, checkout: Path) -> None:
        """Make the templates of another checkout: `before`, `before_many`."""
        self._migrate("before_template", checkout)
        self._fill("before_")

    def _migrate(self, database: str, checkout: Path) -> None:
        self.execute("postgres", f"create database {database}")
        dbmate(self.postgres.url("postgres", database), str(checkout / "db" / "migrations"), "migrate")
        if not self.execute("postgres", f"select 1 from pg_roles where rolname = '{LOGIN}'"):
            self.execute("postgres", f"create role {LOGIN} login in role wallet_app")

    def _fill(self, prefix: str) -> None:
        template = f"{prefix}template"
        self.execute("postgres", f"create database {prefix}many template {template}")
        names = f"select 'm' || lpad(n::text, 7, '0') from generate_series(1, {self.many}) as n"
        self.execute(f"{prefix}many", f"insert into wallet.wallet (uuid) {names}")
        names = f"select 'w' || lpad(n::text, 5, '0') from generate_series(1, {WALLETS}) as n"
        self.execute(template, f"select count(wallet.create_wallet(name)) from ({names}) as w (name)")
        self.execute("postgres", f"create database {prefix}funded template {template}")
        self.execute(
            f"{prefix}funded",
            "select count(*) from (select array_agg(uuid) as uuids from wallet.wallet) as w, wallet.apply_operations("
            f"uuids, (select array_agg(gen_random_uuid()) from generate_series(1, {WALLETS})),"
            f" array_fill('DEPOSIT'::text, array[{WALLETS}]), array_fill(1000000::bigint, array[{WALLETS}]))",
        )
        for name in ("many", "template", "funded"):
            self.execute(f"{prefix}{name}", "vacuum (analyze)")

    def execute(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """Run one statement as superuser and return its rows."""
        with psycopg.connect(self.postgres.url("postgres", database), autocommit=True) as connection:
            cursor = connection.execute(query)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def database(self, template: str = "template") -> Iterator[str]:
        """A database of one load's own: cloned, checked afterwards, dropped."""
        self.execute("postgres", "drop database if exists bench with (force)")
        self.execute("postgres", f"create database bench template {template} strategy file_copy")
        self.execute("postgres", "checkpoint")
        yield "bench"

    def operations(self, database: str) -> int:
        """Return the number of operations in a ledger that somebody asked for."""
        query = "select count(*) from wallet.operation where operation_type <> 'RECEIVE'"
        return int(self.execute(database, query)[0][0])

    def bytes_per_operation(self, database: str) -> float:
        """Return the bytes on disk that an operation takes, in the table and in its indexes."""
        query = "select pg_total_relation_size('wallet.operation') / greatest(count(*), 1)::float from wallet.operation"
        return float(self.execute(database, query)[0][0])

    def check_books(self, database: str) -> None:
        """Raise if wallet.verify() finds anything."""
        faults = self.execute(database, "select * from wallet.verify() limit 3")
        if faults:
            raise AssertionError(f"the books are wrong: {faults}")

    def pgbench(self, database: str, script: str, clients: int, seconds: int) -> dict[str, float]:
        """Run a script with prepared statements; return transactions a second and the latencies in milliseconds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "script.sql")
            path.write_text(script)
            command: list[object] = [
                BINARIES / "pgbench",
                "-n",
                "-M",
                "prepared",
                "-c",
                clients,
                "-j",
                1,
                "-T",
                seconds,
            ]
            command += ["-l", "--sampling-rate=0.2" if clients * seconds > 20 else "--sampling-rate=1", "-f", path]
            ran = subprocess.run(
                [str(part) for part in [*command, self.postgres.url("postgres", database)]],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            )
            latencies = sorted(
                int(line.split()[2]) / 1000
                for log in Path(folder).glob("pgbench_log.*")
                for line in log.read_text().splitlines()
            )
        tps = next(float(line.split()[2]) for line in ran.stdout.splitlines() if line.startswith("tps"))
        return {"per_second": tps, **percentiles(latencies)}


def percentiles(latencies: list[float]) -> dict[str, float]:
    """Return p50 and p99 of sorted latencies in milliseconds."""
    last = len(latencies) - 1
    return {"p50_ms": latencies[last // 2], "p99_ms": latencies[last * 99 // 100]}


@contextlib.contextmanager
def server(*settings: str, many: int) -> Iterator[Bench]:
    """A PostgreSQL server for the benchmark, in a temporary folder, fsync and synchronous_commit on."""
    with tempfile.TemporaryDirectory(prefix="wallet-bench-") as folder:
        postgres = Postgres(Path(folder), "max_connections=200", "shared_buffers=1GB", "max_wal_size=8GB", *settings)
        postgres.start()
        try:
            bench = Bench(postgres, many)
            bench.prepare()
            yield bench
        finally:
            postgres.stop()


@contextlib.contextmanager
def service(command: list[str], checkout: Path = CHECKOUT, **settings: object) -> Iterator[int]:
    """A server process of ours, or of another checkout, on a free port, ready to answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    environment |= {"PORT": str(port)} | {name: str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a service answers at all."""
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return
        except urllib.error.HTTPError:  # a baseline has no such page, but it answers
            return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"no service on port {port}")


def known_key(port: int, postgres: Postgres, database: str, name: str = "bench") -> str:
    """Make a key that deposits and reads, wait until a service on this port knows it, and return its secret."""
    with psycopg.connect(postgres.url("postgres", database), autocommit=True) as connection:
        call = "select wallet.create_key(%s, '{deposit,read,metrics}')"
        [[secret]] = connection.execute(call, [name]).fetchall()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {secret}"})
    for _ in range(100):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return str(secret)
        except urllib.error.HTTPError:
            time.sleep(0.05)
    raise AssertionError("the service does not learn of a new key")


def wrk(port: int, connections: int, seconds: int, secret: str | None = None, **load: int) -> dict[str, Any]:
    """Run wrk on one thread; return requests a second, the latencies and the count of answers that were not 2xx."""
    environment = os.environ | ({} if secret is None else {"WALLET_KEY": secret})
    command = wrk_command(port, connections, seconds, **load)
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    result["per_second"] = result["requests"] / result["seconds"]
    return result


def wrk_command(
    port: int,
    connections: int,
    seconds: int,
    *,
    wallets: int = 1,
    reads: int = 0,
    size: int = 1,
    payees: int = 0,
    holds: int = 0,
) -> list[str]:
    """Return the command that has wrk ask for what wrk.lua is told."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(HERE / "wrk.lua")]
    return [*command, f"http://127.0.0.1:{port}", "--", *map(str, (wallets, reads, size, payees, holds))]
