"""What is done to the service and to PostgreSQL under the load of 64 clients, how often, and what it may cost."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import uvloop

from app.server.embedded import Postgres, connection_url
from app.server.migrations import LOGIN, dbmate
from app.settings import CHECKOUT
from app.web.body import BULK_BODY_LIMIT
from tests.network import Cable, can_wire
from tests.proof.clients import WALLETS, Load
from tests.proof.history import APPLIED, LOCKED, NOT_APPLIED, REFUSED, UNKNOWN, History, findings
from tests.proof.section import Account, Scale
from tests.proof.service import memory
from tests.proof.stand import STAND, Stand, cluster, server, stand, wired_cluster
from tests.proxy import Point
from tests.replication import Cluster, Wired

FUNCTIONS = CHECKOUT / "db" / "functions"
LOG_LINES = 1000
"""Lines that the service may log about one fault, on the average."""
RECOVERY = 1.0
"""Seconds that the service has, from the database's first direct write on, until its first 200 after a long outage."""


UNREAD_LINES = 6000
"""Operations while nobody reads the log."""
UPLOAD_GROWTH = 64
"""MiB that the workers may hold more after 160 MiB of aborted uploads: what the allocator keeps of those at once."""
FELLOW = 0.5
"""Seconds that the slowest 1 % of requests may take because of a wallet that is none of theirs."""


class Outage(Enum):
    """How a fault compares with the deadline of a request."""

    SHORTER = "no answer is a 5xx"
    LONGER = "no 5xx but 503, and the service is back by itself within a second of the database"


@dataclass
class Trial:
    """A stand under load, and what is noted about it."""

    stand: Stand
    load: Load
    random: Random
    account: Account

    async def some_progress(self) -> None:
        """Let a random number of operations succeed."""
        await self.load.progress(self.random.randint(20, 400))

    async def some_unavailable(self) -> None:
        """Wait until the outage shows: some requests have had their 503."""
        enough = self.load.history.statuses[503] + 64
        async with asyncio.timeout(20):
            while self.load.history.statuses[503] < enough:
                await asyncio.sleep(0.01)

    def note_recovery(self, seconds: float) -> None:
        """Note how long the service took to be back."""
        slowest = self.account.figures.get("worst recovery ms", 0)
        self.account.figures["worst recovery ms"] = max(slowest, round(seconds * 1000, 1))

    async def recovers(self, moment: float) -> float:
        """Wait for a success after a moment, note how long it took, and return it."""
        seconds = await self.load.success_after(moment) - moment
        self.note_recovery(seconds)
        return seconds

    async def recovers_in_time(self, over: float) -> None:
        """Wait for the database to take a write after an outage, then for the service: it has a second from there."""
        back = await self.stand.database_writes()
        seconds = max(await self.load.success_after(over) - back, 0)
        self.note_recovery(seconds)
        if seconds > RECOVERY:
            self.account.findings.append(f"the service was back {seconds:.2f} s after the database")


async def postgres_is_killed(trial: Trial) -> None:
    await trial.some_progress()
    await trial.stand.kill_postgres()
    await trial.stand.start_postgres()
    await trial.recovers(time.monotonic())


async def service_is_killed(trial: Trial) -> None:
    await trial.some_progress()
    match trial.random.choice(("all", "supervisor", "worker")):
        case "worker":
            os.kill(trial.random.choice(trial.stand.workers()), signal.SIGKILL)
        case which:
            await trial.stand.kill_service(workers_too=which == "all")
            await trial.stand.start_service()
    await trial.recovers(time.monotonic())


async def service_is_stopped(trial: Trial) -> None:
    """SIGTERM. Accepted is a request that was sent before it on a connection that had carried an answer already.

    Over a connection like that the service has accepted for certain; one that waits in the listener's backlog has only
    been accepted by the kernel, and ends with the listener. What is sent later, on a connection that the service is
    closing at that moment, may be lost as with any keep-alive connection: it is unknown, and asked for again.
    """
    await trial.some_progress()
    stopped = time.monotonic()
    await trial.stand.stop_service()
    assert trial.stand.process is not None
    if trial.stand.process.returncode != 0:
        trial.account.findings.append(f"the service ended with {trial.stand.process.returncode} after SIGTERM")
    await trial.stand.start_service()
    await trial.recovers(time.monotonic())
    attempts = [one for operation in trial.load.history.operations.values() for one in operation.attempts]
    accepted = [one for one in attempts if one.sent < stopped < one.ended and not one.first_on_connection]
    unanswered = sum(one.outcome == UNKNOWN for one in accepted)
    trial.account.counts["accepted requests in flight"] += len(accepted)
    if unanswered:
        trial.account.findings.append(f"{unanswered} of {len(accepted)} accepted requests had no answer after SIGTERM")


async def database_connection_is_cut(trial: Trial) -> None:
    """Sometimes PostgreSQL isn't told, and its backend lives on: the lane has to end it. Nobody would end a read's."""
    text = trial.random.choice((b"wallet.apply_operation", b"wallet.apply_operation", b"wallet.get_wallet"))
    server_too = text == b"wallet.get_wallet" or trial.random.random() < 0.5
    await cut(trial, text, server_too=server_too)


async def client_connection_is_cut(trial: Trial) -> None:
    text = trial.random.choice((b"/operation ", b"PUT /api/v1/wallets/", b"/operations ", b"GET /api/v1/wallets/"))
    await cut(trial, text, server_too=True)


async def cut(trial: Trial, text: bytes, *, server_too: bool) -> None:
    """Cut the next call about a text, at each point in turn."""
    assert trial.stand.proxy is not None
    point = list(Point)[trial.account.counts["cuts"] % len(Point)]
    async with asyncio.timeout(30):
        await trial.stand.proxy.cut_next(text, point, server_too=server_too)
    trial.account.counts["cuts"] += 1
    trial.account.counts[point.value.replace("_", " ")] += 1
    await trial.load.progress(trial.random.randint(0, 8))


async def backend_is_ended(trial: Trial) -> None:
    """pg_terminate_backend or pg_cancel_backend on one of the service's backends, a busy one if there is one."""
    ending = ("pg_terminate_backend", "pg_cancel_backend")[trial.account.counts["faults"] % 2]
    backends = f"select pid, state from pg_stat_activity where usename = '{LOGIN}' order by state <> 'active', pid"
    connection = await asyncpg.connect(trial.stand.database)
    try:
        while not (rows := await connection.fetch(backends)):
            await asyncio.sleep(0.005)
        pid = trial.random.choice([row["pid"] for row in rows if row["state"] == rows[0]["state"]])
        await connection.fetch(f"select {ending}($1)", pid)
    finally:
        connection.terminate()
    trial.account.counts[ending] += 1
    await trial.load.progress(trial.random.randint(0, 20))


async def postgres_is_frozen(trial: Trial) -> None:
    await trial.some_progress()
    trial.stand.freeze_postgres()
    await asyncio.sleep(trial.random.uniform(1.2, 2))  # the fault itself: longer than the deadline
    over = time.monotonic()
    trial.stand.thaw_postgres()
    await trial.recovers_in_time(over)


async def disk_is_full(trial: Trial) -> None:
    await trial.some_progress()
    filler = trial.stand.postgres.home / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    try:
        await trial.some_unavailable()
    finally:
        over = time.monotonic()
        filler.unlink()
    if not trial.stand.postgres.is_running():  # it gives up when it cannot write its log, and an operator starts it
        trial.account.counts["PostgreSQL gave up"] += 1
        await trial.stand.start_postgres()
    await trial.recovers_in_time(over)


async def connections_are_exhausted(trial: Trial) -> None:
    await trial.some_progress()
    url = connection_url(trial.stand.postgres.socket_dir, LOGIN, STAND)
    service = f"pg_stat_activity where usename = '{LOGIN}' and application_name like 'wallet%'"
    taken: list[asyncpg.Connection] = []
    operator = await asyncpg.connect(trial.stand.database)
    try:
        while await operator.fetchval(f"select count(pg_terminate_backend(pid)) from {service}"):
            with contextlib.suppress(asyncpg.TooManyConnectionsError):
                while True:
                    taken.append(await asyncpg.connect(url, server_settings={"application_name": "somebody else"}))
        await trial.some_unavailable()
    finally:
        over = time.monotonic()
        for connection in (*taken, operator):
            connection.terminate()
    await trial.recovers_in_time(over)


async def database_is_read_only(trial: Trial) -> None:
    await trial.some_progress()
    await trial.stand.sql("alter system set default_transaction_read_only = on")
    await trial.stand.sql("select pg_reload_conf()")
    try:
        await trial.some_unavailable()
    finally:
        over = time.monotonic()
        await trial.stand.sql("alter system reset default_transaction_read_only")
        await trial.stand.sql("select pg_reload_conf()")
    await trial.recovers_in_time(over)


@contextlib.asynccontextmanager
async def others_go_on(trial: Trial, wallet: str, may_be: set[str]) -> AsyncIterator[None]:
    """See that what is wrong with one wallet is answered to its own requests, and costs the others half a second."""
    began = time.monotonic()
    yield
    over = time.monotonic()
    attempts = [
        (wallet in operation.wallets, attempt)
        for operation in trial.load.history.operations.values()
        for attempt in operation.attempts
        if began < attempt.sent and attempt.ended < over
    ]
    told = Counter(one.outcome for concerned, one in attempts if concerned)
    trial.account.counts[f"told {' or '.join(sorted(may_be))}"] += sum(told[outcome] for outcome in may_be)
    for outcome in told.keys() & {UNKNOWN, *NOT_APPLIED} - may_be:
        trial.account.findings.append(f"the wallet's own requests were answered {outcome}")
    innocent = [one for concerned, one in attempts if not concerned]
    for outcome in (UNKNOWN, *sorted(NOT_APPLIED)):
        if failed := [one for one in innocent if one.outcome == outcome]:
            sent = [one.sent - began for one in failed]
            in_bulk = sum(one.in_bulk for one in failed)
            trial.account.findings.append(
                f"{len(failed)} requests for other wallets were answered {outcome}: {in_bulk} in bulk"
                f", sent {min(sent):.2f} to {max(sent):.2f} s after the fault began"
            )
    seconds = sorted(one.ended - one.sent for one in innocent if not one.in_bulk)
    p99 = seconds[len(seconds) * 99 // 100] if seconds else float("inf")
    slowest = trial.account.figures.get("worst p99 of the others ms", 0)
    trial.account.figures["worst p99 of the others ms"] = max(slowest, round(p99 * 1000, 1))
    if p99 > FELLOW:
        trial.account.findings.append(f"p99 of the others was {p99:.2f} s")


async def wallet_is_locked(trial: Trial) -> None:
    """Somebody leaves a transaction open that has changed a wallet, for longer than a deadline, and takes it back."""
    await trial.some_progress()
    wallet = trial.random.choice(WALLETS[1:])
    somebody = await asyncpg.connect(trial.stand.database)
    try:
        open_for_long = somebody.transaction()
        await open_for_long.start()
        change = "select wallet.apply_operation($1, gen_random_uuid(), 'DEPOSIT', 1)"
        await somebody.fetch(change, wallet)
        async with others_go_on(trial, wallet, {LOCKED}):
            await asyncio.sleep(trial.random.uniform(3, 5))  # the fault itself
        await open_for_long.rollback()
    finally:
        somebody.terminate()
    await trial.some_progress()


async def database_refuses_a_wallet(trial: Trial) -> None:
    """A trigger of the operator's raises for one wallet, at once or at the commit."""
    await trial.some_progress()
    wallet = trial.random.choice(WALLETS[1:])
    await trial.stand.script("""
        create or replace function public.refuse() returns trigger language plpgsql as
          $$ begin raise exception 'nothing for %', new.wallet_uuid; end $$""")
    kind, when = trial.random.choice((("trigger", ""), ("constraint trigger", "deferrable initially deferred")))
    await trial.stand.script(f"""
        create {kind} refuse after insert on wallet.operation {when}
        for each row when (new.wallet_uuid = '{wallet}') execute function public.refuse()""")
    async with others_go_on(trial, wallet, {REFUSED}):
        await trial.load.progress(1000)
    await trial.stand.script("drop trigger refuse on wallet.operation")
    await trial.some_progress()


async def sessions_are_poisoned(trial: Trial) -> None:
    """Every new session is read-only for a while, and stays so: only sessions made afterwards may write."""
    await trial.some_progress()
    await trial.stand.sql(f"alter database {STAND} set default_transaction_read_only = on")
    service = f"pg_stat_activity where usename = '{LOGIN}' and application_name like 'wallet%'"
    try:
        await trial.stand.sql(f"select pg_terminate_backend(pid) from {service}")
        await trial.some_unavailable()
    finally:
        over = time.monotonic()
        await trial.stand.script(
            f"set transaction read write; alter database {STAND} reset default_transaction_read_only"
        )
    await trial.recovers_in_time(over)


async def log_is_not_read(trial: Trial) -> None:
    """Whoever reads the service's log stops reading; there is a line for each request, and no room for so many."""
    assert trial.stand.log_reader is not None
    trial.stand.log_reader.send_signal(signal.SIGSTOP)
    try:
        await trial.load.progress(UNREAD_LINES)
    finally:
        trial.stand.log_reader.send_signal(signal.SIGCONT)
    await trial.some_progress()


async def uploads_are_aborted(trial: Trial) -> None:
    """Clients send a large body but for its last byte, and hang up without a word."""
    await trial.some_progress()
    before = memory(trial.stand.workers())
    for _ in range(5):
        await asyncio.gather(*(abort_upload(trial.stand.port) for _ in range(8)))
    trial.account.counts["aborted uploads"] += 40
    await trial.some_progress()
    grown = (memory(trial.stand.workers()) - before) / 2**20
    largest = trial.account.figures.get("most grown MiB", 0)
    trial.account.figures["most grown MiB"] = max(largest, round(grown, 1))
    if grown > UPLOAD_GROWTH:
        trial.account.findings.append(f"40 aborted uploads of 4 MB: {grown:.0f} MiB more")


async def abort_upload(port: int) -> None:
    """Send all but the last byte of the largest body, then reset the connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /api/v1/operations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {BULK_BODY_LIMIT}\r\n\r\n".encode())
    writer.write(b" " * (BULK_BODY_LIMIT - 1))
    with contextlib.suppress(OSError):
        await writer.drain()
    linger = struct.pack("ii", 1, 0)  # a reset instead of an end (socket(7), SO_LINGER)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def functions_are_replaced(trial: Trial) -> None:
    """Every function anew, and dbmate twice at once: on this database, which is migrated, and on an empty one."""
    await trial.some_progress()
    replaced = time.monotonic()
    await trial.stand.script("\n".join(path.read_text() for path in sorted(FUNCTIONS.glob("*.sql"))))
    await trial.recovers(replaced)

    await trial.stand.sql("create database empty template template0")
    empty = trial.stand.postgres.url("postgres", "empty")
    for url in (trial.stand.database, empty):
        twice = (asyncio.to_thread(dbmate, url, "migrations", "--migration-lock", "migrate") for _ in range(2))
        await asyncio.gather(*twice)
        trial.account.counts["dbmate migrate twice at once"] += 1
    migrated = await asyncpg.connect(empty)
    applied = [version for (version,) in await migrated.fetch("select version from schema_migrations order by version")]
    migrated.terminate()
    if applied != [path.name.partition("_")[0] for path in sorted(FUNCTIONS.parent.glob("migrations/*.sql"))]:
        trial.account.findings.append(f"dbmate twice at once on an empty database applied {applied}")
    await trial.stand.sql("drop database empty with (force)")


async def primary_is_killed(trial: Trial) -> None:
    """The primary's machine is lost, the standby that is ahead takes its place, and the old one becomes its standby."""
    await trial.some_progress()
    await primary_is_replaced(trial, trial.stand.kill_postgres())


async def primary_is_switched(trial: Trial) -> None:
    """The primary is stopped as an operator does, and a standby takes its place."""

    async def stop() -> None:
        process = trial.stand.postgres.process
        assert process is not None
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.wait, 60)

    await trial.some_progress()
    await primary_is_replaced(trial, stop())


async def primary_is_replaced(trial: Trial, ended: Awaitable[None]) -> None:
    """Promote a standby once the primary has ended, wait for the service, and start the old primary as a standby."""
    old = trial.stand.postgres
    await primary_is_promoted(trial, ended)
    await old_primary_comes_back(trial, old)


async def primary_is_promoted(trial: Trial, ended: Awaitable[None]) -> None:
    await ended
    moment = time.monotonic()
    await asyncio.to_thread(trial.stand.cluster.promote)
    await trial.recovers(moment)


async def old_primary_comes_back(trial: Trial, old: Postgres) -> None:
    how = await asyncio.to_thread(trial.stand.cluster.rejoin, old, rewind=trial.random.random() < 0.5)
    trial.account.counts[how] += 1
    if "failed" in how:
        trial.account.findings.append(f"the old primary was {how}")


async def standbys_are_cut_off(trial: Trial) -> None:
    """Nothing reaches the standbys for longer than the deadline: nothing succeeds meanwhile."""
    await trial.some_progress()
    async with standbys_cut_off(trial):
        over = await nothing_succeeds(trial)
    await trial.recovers_in_time(over)


async def nothing_succeeds(trial: Trial) -> float:
    """See for longer than the deadline that what is asked for now has no success; return when that was over."""
    began = time.monotonic()
    await asyncio.sleep(trial.random.uniform(1.2, 2))  # the fault itself
    attempts = (one for operation in trial.load.history.operations.values() for one in operation.attempts)
    if applied := sum(one.outcome == APPLIED and one.sent > began for one in attempts):
        trial.account.findings.append(f"{applied} operations were applied that could not be")
    return time.monotonic()


async def standbys_are_unplugged(trial: Trial) -> None:
    """The network between the servers fails: nothing succeeds meanwhile."""
    await is_unplugged(trial, wired(trial).back)


async def primary_is_unplugged(trial: Trial) -> None:
    """The network between the service and the primary fails; the servers reach each other."""
    await is_unplugged(trial, wired(trial).front)


async def is_unplugged(trial: Trial, cable: Cable) -> None:
    """Pull a cable for longer than the deadline. By turns nothing is said to the other end, or all is reset."""
    await trial.some_progress()
    refuses = trial.account.counts["faults"] % 2 == 1
    with cable.pulled(refuses=refuses):
        over = await nothing_succeeds(trial)
    trial.account.counts["resets" if refuses else "silences"] += 1
    await trial.recovers_in_time(over)


async def network_hiccups(trial: Trial) -> None:
    """The network between the service and the primary fails for less than the half of a deadline."""
    await trial.some_progress()
    refuses = trial.account.counts["faults"] % 2 == 1
    with wired(trial).front.pulled(refuses=refuses):
        await asyncio.sleep(trial.random.uniform(0.5, 3))  # the fault itself
    trial.account.counts["resets" if refuses else "silences"] += 1
    await trial.recovers(time.monotonic())


async def primary_vanishes(trial: Trial) -> None:
    """The primary's machine is lost without a word to anybody: it answers nothing, and resets nothing."""
    await trial.some_progress()
    primary = wired(trial)
    with primary.front.pulled(refuses=False), primary.back.pulled(refuses=False):
        await primary_is_promoted(trial, trial.stand.kill_postgres())
    await old_primary_comes_back(trial, primary)


def wired(trial: Trial) -> Wired:
    """Return the primary, which is on a machine of its own."""
    primary = trial.stand.postgres
    assert isinstance(primary, Wired)
    return primary


async def primary_is_lost_ahead(trial: Trial) -> None:
    """The primary is lost with commits that have not reached a standby, and whose wait was cancelled.

    What a read saw of them is lost, too: reads don't wait.
    """
    await trial.some_progress()
    history = trial.load.history
    began = time.monotonic()
    async with standbys_cut_off(trial):
        await asyncio.sleep(0.3)
        await trial.stand.sql("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")
        await asyncio.sleep(0.2)
        await trial.stand.kill_postgres()
        over = time.monotonic()
    await primary_is_replaced(trial, asyncio.sleep(0))
    history.reads = [read for read in history.reads if read.ended < began or read.sent > over]


@contextlib.asynccontextmanager
async def standbys_cut_off(trial: Trial) -> AsyncIterator[None]:
    """Stop what sends the log to the standbys."""
    senders = [pid for (pid,) in await trial.stand.sql("select pid from pg_stat_replication")]
    for pid in senders:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in senders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def small_disk() -> Iterator[Postgres]:
    """A PostgreSQL whose data lies on a file system of 160 MB, where this user may mount one."""
    with tempfile.TemporaryDirectory(prefix="wallet-proof-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,mode=711", "tmpfs", folder], check=True)
        try:
            with server(Path(folder) / "data") as postgres:
                yield postgres
        finally:
            subprocess.run(["umount", folder], check=True)


def can_mount() -> bool:
    """Tell whether this user may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


@dataclass(frozen=True)
class Fault:
    """A row of the table: what is done, how often at full length and in the short form, and what it may cost."""

    cycle: Callable[[Trial], Awaitable[None]]
    full: int
    short: int
    outage: Outage
    proxy_before: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    server: Callable[[], contextlib.AbstractContextManager[Postgres | Cluster]] = server
    no_call_is_lost: bool = False

    def __call__(self, scale: Scale) -> Account:
        """Run the section: the first half of the cycles with one worker, the other with two."""
        return run(trials(self, scale))


QUICK = {"REQUEST_DEADLINE": "1"}
"""So that an outage longer than the deadline need not be long."""
UNHURRIED = {"REQUEST_DEADLINE": "2"}
"""A call waits for a lock for 3 % of it: with less, wallets that are merely busy look locked on a slow machine."""
SOON_FINAL = {"REQUEST_DEADLINE": "5"}
"""So that what nobody answered is soon final."""

FAULTS = {
    # section                 what is done               full  short  what it may cost
    "postgres-killed": Fault(postgres_is_killed, 100, 4, Outage.SHORTER),
    "service-killed": Fault(service_is_killed, 100, 4, Outage.SHORTER, settings=SOON_FINAL),
    "service-stopped": Fault(service_is_stopped, 50, 2, Outage.SHORTER, settings=SOON_FINAL),
    "database-cut": Fault(database_connection_is_cut, 4 * 1000, 4 * 15, Outage.SHORTER, "database"),
    "client-cut": Fault(client_connection_is_cut, 4 * 1000, 4 * 15, Outage.SHORTER, "service", SOON_FINAL),
    "backends-ended": Fault(backend_is_ended, 2 * 1000, 2 * 20, Outage.SHORTER),
    "postgres-frozen": Fault(postgres_is_frozen, 20, 1, Outage.LONGER, settings=QUICK),
    "disk-full": Fault(disk_is_full, 20, 1, Outage.LONGER, settings=QUICK, server=small_disk),
    "connections-exhausted": Fault(connections_are_exhausted, 6, 1, Outage.LONGER, settings=QUICK),
    "read-only": Fault(database_is_read_only, 6, 1, Outage.LONGER, settings=QUICK),
    "wallet-locked": Fault(wallet_is_locked, 20, 2, Outage.LONGER, settings=UNHURRIED, no_call_is_lost=True),
    "wallet-refused": Fault(database_refuses_a_wallet, 20, 2, Outage.LONGER, settings=UNHURRIED, no_call_is_lost=True),
    "sessions-poisoned": Fault(sessions_are_poisoned, 20, 2, Outage.LONGER, settings=QUICK),
    "log-not-read": Fault(log_is_not_read, 20, 2, Outage.SHORTER, settings={"LOG_LEVEL": "INFO"}),
    "uploads-aborted": Fault(uploads_are_aborted, 20, 2, Outage.SHORTER, no_call_is_lost=True),
    "functions-replaced": Fault(functions_are_replaced, 50, 3, Outage.SHORTER),
    "failover": Fault(primary_is_killed, 50, 3, Outage.SHORTER, server=cluster),
    "failover-ahead": Fault(primary_is_lost_ahead, 20, 2, Outage.SHORTER, server=cluster),
    "switch-over": Fault(primary_is_switched, 20, 2, Outage.SHORTER, server=cluster),
    "failover-silent": Fault(primary_vanishes, 20, 2, Outage.SHORTER, server=wired_cluster),
    "standbys-unplugged": Fault(standbys_are_unplugged, 20, 2, Outage.LONGER, settings=QUICK, server=wired_cluster),
    "primary-unplugged": Fault(primary_is_unplugged, 20, 2, Outage.LONGER, settings=QUICK, server=wired_cluster),
    "network-hiccups": Fault(network_hiccups, 20, 2, Outage.SHORTER, server=wired_cluster),
    "standbys-cut-off": Fault(standbys_are_cut_off, 20, 2, Outage.LONGER, settings=QUICK, server=cluster),
}


def run(section: Coroutine[Any, Any, Account]) -> Account:
    """Run a section in an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(section)


async def trials(fault: Fault, scale: Scale) -> Account:
    """Run a fault's cycles and check the books after each half."""
    account = Account()
    if fault.server is small_disk and not can_mount():
        account.counts["skipped: may not mount"] += 1
        return account
    if fault.server is wired_cluster and not can_wire():
        account.counts["skipped: may not make network namespaces, or no ip"] += 1
        return account
    times = scale.times(fault.full, fault.short)
    with fault.server() as postgres:
        for workers, cycles in ((1, times - times // 2), (2, times // 2)):
            if cycles:
                random = scale.random(f"{fault.cycle.__name__} {workers}")
                async with stand(
                    postgres, workers, proxy_before=fault.proxy_before, settings=fault.settings
                ) as running:
                    await under_load(fault, running, cycles, random, account)
    return account


async def under_load(fault: Fault, running: Stand, cycles: int, random: Random, account: Account) -> None:
    """Run some cycles under the load of 64 clients, settle what is unknown, and check the books."""
    history = History(no_call_is_lost=fault.no_call_is_lost)
    load = Load(running.front, random, history, float(fault.settings.get("REQUEST_DEADLINE", "10")))
    await load.create_wallets()
    trial = Trial(running, load, random, account)
    async with load.running(running.database):
        try:
            await load.progress(100)
            for _ in range(cycles):
                await fault.cycle(trial)
                account.counts["faults"] += 1
        except TimeoutError:
            account.findings.append(f"no progress after fault {account.counts['faults'] + 1}: {last_line(running.log)}")
        if not running.is_running():
            await running.start_service()
    await check(running, load, account)
    answered_in_time(load, account)
    if (lines := running.log.read_bytes().count(b"\n")) > LOG_LINES * cycles:
        account.findings.append(f"the service logged {lines:,} lines about {cycles} faults")
    allowed = {503} if fault.outage is Outage.LONGER else set()
    for status, times in history.statuses.items():
        if status >= 500 and status not in allowed:
            account.findings.append(f"{times} answers of {status}: {fault.outage.value}")


def answered_in_time(load: Load, account: Account) -> None:
    """See that no request waited longer than its deadline, and a second for a busy machine."""
    attempts = [one for operation in load.history.operations.values() for one in operation.attempts]
    slowest = max(one.ended - one.sent for one in attempts)
    account.figures["slowest answer ms"] = max(account.figures.get("slowest answer ms", 0), round(slowest * 1000, 1))
    if slowest > load.deadline + 1:
        account.findings.append(
            f"a request with a deadline of {load.deadline:g} s had its answer after {slowest:.1f} s"
        )


async def check(running: Stand, load: Load, account: Account) -> None:
    """Settle what is unknown, once nothing is under way any more, and check the books."""
    history = load.history
    await running.is_quiet()
    unknown = history.open()
    await load.settle()
    books = running.books()
    account.findings += findings(history, books)
    account.findings += [f"in the service's log: {line}" for line in failures(running.log)]
    attempts = [one.outcome for operation in history.operations.values() for one in operation.attempts]
    applied = sum(operation.acknowledged is not None for operation in history.operations.values())
    account.counts["asked"] += len(history.operations)
    account.counts["attempts"] += len(attempts)
    account.counts["applied"] += applied
    account.counts["rejected"] += len(history.operations) - applied
    kinds = Counter("capture" if row.hold and row.change else row.kind for row in books.ledger)
    for kind in ("HOLD", "capture", "RELEASE", "EXPIRE"):
        account.counts[f"{kind} recorded"] += kinds[kind]
    account.counts["unknown"] += attempts.count(UNKNOWN)
    account.counts["settled at the end"] += len(unknown)
    account.counts["5xx"] += sum(times for status, times in history.statuses.items() if status >= 500)
    account.counts["429"] += history.statuses[429]
    account.counts["reads"] += len(history.reads)
    account.counts["lines logged"] += running.log.read_bytes().count(b"\n")


def failures(log: Path) -> list[str]:
    """Return the lines of the service's log that tell of an exception that nobody expected; the ends of a few."""
    lines = log.read_text(errors="replace").splitlines()
    return [line[-2000:] for line in lines if "exception" in line or "Traceback" in line][:3]


def last_line(log: Path) -> str:
    """Return the last line of the service's log."""
    return (log.read_text(errors="replace").splitlines() or [""])[-1][:300]


def thousand_connections(scale: Scale) -> Account:
    """A thousand connections at once to a service with two connections for reads: each has its 2xx or 429."""
    return run(crowd(scale))


async def crowd(scale: Scale) -> Account:
    """Run the section of a thousand connections, with one worker and then with two."""
    account = Account()
    with server() as postgres:
        for workers in (1, 2):
            random = scale.random(f"crowd {workers}")
            async with stand(postgres, workers, settings={"POOL_SIZE": "2"}) as running:
                load = Load(running.front, random, History(no_call_is_lost=True))
                await load.create_wallets()
                over = time.monotonic() + scale.times(30, 3)
                await asyncio.gather(*(load.deposit_and_read(random, over) for _ in range(1000)))
                account.counts["connections"] += 1000
                await check(running, load, account)
                told = {s: n for s, n in load.history.statuses.items() if s not in (200, 201, 429)}
                if told:
                    account.findings.append(f"answers that are neither 2xx nor 429: {told}")
    return account
