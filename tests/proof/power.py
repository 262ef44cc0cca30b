"""The power goes: PostgreSQL's data lies on a disk that forgets what was not flushed."""

import asyncio
import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from app.server.embedded import Postgres
from app.settings import StartupError
from tests.proof.clients import Load
from tests.proof.disk import Disk, disk
from tests.proof.faults import Fault, Outage, Trial, check, run
from tests.proof.history import History
from tests.proof.section import Account, Scale
from tests.proof.stand import server, stand

NOT_FLUSHED = ("alter system set fsync = off", "select pg_reload_conf()")
DEADLINE = 5.0


def power_loss(scale: Scale) -> Account:
    """The power goes under load, again and again: what was answered is there, and the books agree."""
    with a_disk(scale) as one:
        if one is None:
            return skipped()

        async def power_is_lost(trial: Trial) -> None:
            await lose_power(trial, one)

        return Fault(power_is_lost, 50, 2, Outage.SHORTER, server=lambda: server_on(one))(scale)


def control_not_flushed(scale: Scale) -> Account:
    """With `fsync = off` what was answered is lost: it is a finding if the proof finds nothing."""
    with a_disk(scale) as one:
        return skipped() if one is None else run(lose_what_is_not_flushed(one, scale))


@contextlib.contextmanager
def a_disk(scale: Scale) -> Iterator[Disk | None]:
    """A disk, or None where this user may not make one."""
    with tempfile.TemporaryDirectory(prefix="wallet-proof-") as folder, contextlib.ExitStack() as stack:
        one = None
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            one = stack.enter_context(disk(Path(folder), scale.random("disk")))
        yield one


@contextlib.contextmanager
def server_on(one: Disk) -> Iterator[Postgres]:
    """A server whose data lies on a disk; the power is not cut before what it begins with is there."""
    with server(one.folder) as postgres:
        one.flush()
        yield postgres


def skipped() -> Account:
    account = Account()
    account.counts["skipped: no FUSE, no loop device, or may not mount"] += 1
    return account


async def lose_power(trial: Trial, one: Disk) -> None:
    """Cut off the disk while PostgreSQL works, kill PostgreSQL, and start it on what the disk holds."""
    await trial.some_progress()
    unflushed, lost = one.cut_power()
    await trial.stand.kill_postgres()
    trial.account.counts["blocks not flushed"] += unflushed
    trial.account.counts["blocks lost or torn"] += lost
    await asyncio.to_thread(one.turn_off)
    await asyncio.to_thread(one.turn_on)
    await trial.stand.start_postgres()
    await trial.recovers(time.monotonic())


async def lose_what_is_not_flushed(one: Disk, scale: Scale) -> Account:
    """Lose the power once, under a server that flushes nothing from the moment on when the load begins."""
    account, noticed = Account(), Account()
    random = scale.random("not flushed")
    with server_on(one) as postgres:
        async with stand(postgres, 2, scripts=NOT_FLUSHED, settings={"REQUEST_DEADLINE": f"{DEADLINE:g}"}) as running:
            load = Load(running.front, random, History(), DEADLINE)
            await load.create_wallets()
            await running.script("checkpoint")
            await asyncio.to_thread(one.flush)
            try:
                async with load.running(running.database):
                    await lose_power(Trial(running, load, random, noticed), one)
                await check(running, load, noticed)
            except StartupError as error:
                noticed.findings.append(str(error))
    account.counts["noticed"] = len(noticed.findings)
    account.counts["asked"] = len(load.history.operations)
    if not noticed.findings:
        account.findings.append("a bug of the checker: it did not notice that nothing was flushed")
    return account
