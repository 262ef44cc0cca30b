"""Half an hour at full rate: the same memory, the same connections, the same latency at the end as at the beginning."""

import asyncio
import statistics
import time
from array import array
from collections import Counter
from random import Random
from typing import NamedTuple
from uuid import UUID

import psycopg
import uvloop

from app.server.migrations import LOGIN
from tests.api.test_process import Service
from tests.proof.clients import Connection, Lost
from tests.proof.section import Account, Scale
from tests.proof.service import database, memory, processes, service

WINDOWS = 6
"""Parts of the whole: five minutes each at full length. The first is the warm-up."""
SAMPLES = 20
"""Looks at memory and connections in a window."""
HOT, SPREAD, READERS = 32, 16, 16
"""Connections that change one wallet, that change any of a thousand, and that read."""
WALLETS = 1000
APP_GROWTH = 8 * 2**20
POSTGRES_GROWTH = 16 * 2**20
"""Bytes of anonymous memory that may be added after the warm-up."""
P99_RATIO = 1.5
"""How much slower the last window may be than the first; asserted where a window is a minute or longer."""


class Sample(NamedTuple):
    """What was in use at a moment: bytes, and the service's connections to PostgreSQL."""

    app: int
    postgres: int
    connections: int


def run(scale: Scale) -> Account:
    """Keep 64 connections busy, look at the service meanwhile, and compare the books with what was answered."""
    account = Account()
    seconds = scale.times(1800, 20)
    with service() as running, database(running, "postgres") as superuser:
        superuser.execute("select wallet.create_wallet('w' || n) from generate_series(0, %s) as n", [WALLETS])
        before = operations(superuser)
        load = Load(running.port, seconds, scale.random("soak"))
        samples = uvloop.run(load_and_look(load, running, superuser))
        account.counts.update({f"answers {status}": number for status, number in load.statuses.items()})
        account.figures["answers a second"] = load.statuses.total() / seconds
        judge_latency(load, seconds / WINDOWS, account)
        judge_samples(samples, account)
        judge_books(load, superuser, before, account)
        if running.process.poll() is not None or "Worker " in running.said():
            account.findings.append("the service ended, or a worker of it")
    return account


class Load:
    """Clients that ask again as soon as they are answered: deposits of 2, withdrawals of 1, balances, histories."""

    def __init__(self, port: int, seconds: float, chance: Random) -> None:
        self.port = port
        self.seconds = seconds
        self.chance = chance
        self.statuses: Counter[str] = Counter()
        self.applied = 0
        self.sums: Counter[str] = Counter()
        self.latencies = [array("f") for _ in range(WINDOWS)]
        """Seconds, by window."""

    async def run(self) -> None:
        wallets: list[str | None] = [*["w0"] * HOT, *[None] * SPREAD]
        clients = [self.change(wallet) for wallet in wallets] + [self.read() for _ in range(READERS)]
        self.began = time.monotonic()
        await asyncio.gather(*clients)

    async def change(self, wallet: str | None) -> None:
        """Deposit 2 to a wallet and withdraw 1, again and again; None: any wallet."""
        connection = Connection(self.port)
        while self.goes_on():
            name = wallet or f"w{self.chance.randint(1, WALLETS)}"
            for kind, amount in (("DEPOSIT", 2), ("WITHDRAW", 1)):
                uuid = UUID(int=self.chance.getrandbits(128))
                body = {"operation_uuid": uuid, "operation_type": kind, "amount": amount}
                if await self.ask(connection, f"/api/v1/wallets/{name}/operation", body):
                    self.applied += 1
                    self.sums[name] += amount if kind == "DEPOSIT" else -amount
        connection.close()

    async def read(self) -> None:
        connection = Connection(self.port)
        while self.goes_on():
            path = f"/api/v1/wallets/w{self.chance.randint(0, WALLETS)}"
            if self.chance.random() < 0.2:
                path += "/operations?limit=20"
            await self.ask(connection, path)
        connection.close()

    def goes_on(self) -> bool:
        return time.monotonic() - self.began < self.seconds

    async def ask(self, connection: Connection, path: str, body: object = None) -> bool:
        """Send a request, measure the time to its answer and tell whether that is a success."""
        sent = time.monotonic()
        try:
            async with asyncio.timeout(1):
                await connection.open()
            status = str((await connection.ask(path, body)).status)
        except (Lost, TimeoutError):
            await asyncio.sleep(0.1)
            status = "lost"
        window = min(int((sent - self.began) / self.seconds * WINDOWS), WINDOWS - 1)
        self.latencies[window].append(time.monotonic() - sent)
        self.statuses[status] += 1
        return status.startswith("2")


async def load_and_look(load: Load, running: Service, superuser: psycopg.Connection) -> list[Sample]:
    """Run the load; return the samples, equally spaced."""
    loading = asyncio.create_task(load.run())
    samples = []
    while not loading.done():
        await asyncio.wait([loading], timeout=load.seconds / WINDOWS / SAMPLES)
        samples.append(await asyncio.to_thread(look, running, superuser))
    await loading
    return samples


def look(running: Service, superuser: psycopg.Connection) -> Sample:
    """Take a sample. Autovacuum's workers come and go, with memory of their own, and are not counted."""
    sessions = superuser.execute(
        "select pid, usename from pg_stat_activity where backend_type not in ('autovacuum worker', 'parallel worker')"
    ).fetchall()
    postgres = [running.postgres(), *(pid for pid, _ in sessions)]
    connections = sum(user == LOGIN for _, user in sessions)
    return Sample(memory(processes(running)), memory(postgres), connections)


def judge_latency(load: Load, window: float, account: Account) -> None:
    p99 = []
    for number, latencies in enumerate(load.latencies, 1):
        p99.append(sorted(latencies)[len(latencies) * 99 // 100] * 1000)
        account.figures[f"p99 of window {number} (ms)"] = p99[-1]
    if window >= 60 and p99[-1] > P99_RATIO * p99[0]:
        account.findings.append(f"p99 was {p99[0]:.1f} ms at first and is {p99[-1]:.1f} ms at last")


def judge_samples(samples: list[Sample], account: Account) -> None:
    """Compare the second window with the last, by their medians: the first is the warm-up."""
    second, last = samples[SAMPLES : 2 * SAMPLES], samples[-SAMPLES:]
    for name, bound in (("app", APP_GROWTH), ("postgres", POSTGRES_GROWTH)):
        before, after = (statistics.median(getattr(sample, name) for sample in part) for part in (second, last))
        account.figures[f"memory of {name} after the warm-up (MB)"] = before / 2**20
        account.figures[f"memory of {name} at the end (MB)"] = after / 2**20
        if after - before > bound:
            account.findings.append(f"{name} grew by {(after - before) / 2**20:.1f} MB after the warm-up")
    connections = {sample.connections for sample in samples[SAMPLES:]}
    account.figures["connections to PostgreSQL"] = max(connections)
    if len(connections) > 1:
        account.findings.append(f"the service's connections to PostgreSQL vary: {sorted(connections)}")


def judge_books(load: Load, superuser: psycopg.Connection, before: int, account: Account) -> None:
    account.findings += [f"answers {status}: {n}" for status, n in load.statuses.items() if status != "200"]
    account.counts["operations"] = operations(superuser) - before
    if account.counts["operations"] != load.applied:
        account.findings.append(f"{load.applied} operations answered, {account.counts['operations']} in the ledger")
    held: dict[str, int] = dict(
        superuser.execute("select uuid, balance from wallet.balance where uuid like 'w%'").fetchall()
    )
    wrong = {name: held.get(name) for name, total in load.sums.items() if held.get(name) != total}
    if wrong:
        account.findings.append(f"{len(wrong)} balances are not what was answered: {list(wrong.items())[:5]}")
    superuser.execute("set work_mem = '256MB'")
    account.findings += [f"verify: {row}" for row in superuser.execute("select * from wallet.verify() limit 10")]


def operations(superuser: psycopg.Connection) -> int:
    row = superuser.execute("select count(*) from wallet.operation").fetchone()
    assert row is not None
    return int(row[0])
