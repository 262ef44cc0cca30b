"""The service and its database, broken on purpose: the proof that does not notice proves nothing."""

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.proof.clients import Load
from tests.proof.faults import FUNCTIONS, Trial, check, postgres_is_killed, run, service_is_killed
from tests.proof.history import History
from tests.proof.section import Account, Scale
from tests.proof.stand import STAND, server, stand
from tests.proxy import Point

SEQ_NOT_UNIQUE = """
alter table wallet.operation drop constraint operation_pkey;
create index on wallet.operation (wallet_uuid, seq);
"""
"""Without it the row locks are not missed: of two operations with the same seq the index lets one through."""

ROUNDS = 5
"""Faults before the books are checked."""


async def nothing_happens(trial: Trial) -> None:
    await trial.load.progress(500)


async def an_answer_is_lost(trial: Trial) -> None:
    assert trial.stand.proxy is not None
    async with asyncio.timeout(10):
        await trial.stand.proxy.cut_next(b"wallet.apply_operation", Point.BEFORE_THE_ANSWER)


def without_row_locks() -> str:
    """Return the functions without the locks on the wallets' rows."""
    sources = "\n".join(path.read_text() for path in sorted(FUNCTIONS.glob("*.sql")))
    unlocked, locks = re.subn(r"^\s*for (no key )?update( skip locked)?\b", "", sources, flags=re.MULTILINE)
    assert locks
    return unlocked


@dataclass(frozen=True)
class Control:
    """A row of the table: what is broken, in the database or in the service, and what shows it under load."""

    cycle: Callable[[Trial], Awaitable[None]]
    scripts: tuple[str, ...] = ()
    command: tuple[str, ...] = ("app",)
    proxy_before: str | None = None

    def __call__(self, scale: Scale) -> Account:
        """Run the section: it is a finding if the proof finds nothing."""
        return run(trial_of(self, scale))


CONTROLS = {
    "control-commits-not-flushed": Control(
        postgres_is_killed,
        scripts=(
            f"alter database {STAND} set synchronous_commit = off",
            "alter system set wal_writer_delay = '10s'",
            "select pg_reload_conf()",
        ),
        command=("tests.proof.broken", "trusts_the_settings"),
    ),
    "control-no-row-lock": Control(nothing_happens, scripts=(without_row_locks(), SEQ_NOT_UNIQUE)),
    "control-operation-not-unique": Control(
        nothing_happens, scripts=("alter table wallet.operation drop constraint operation_operation_uuid_key",)
    ),
    "control-answers-early": Control(service_is_killed, command=("tests.proof.broken", "answers_early")),
    "control-forgets-its-calls": Control(
        an_answer_is_lost, command=("tests.proof.broken", "forgets_its_calls"), proxy_before="database"
    ),
}


async def trial_of(control: Control, scale: Scale) -> Account:
    """Run a control until the books are found wrong, or until its time is over."""
    account = Account()
    random = scale.random(control.cycle.__name__)
    over = time.monotonic() + scale.times(30, 10)
    with server() as postgres:
        async with stand(
            postgres,
            2,
            command=control.command,
            scripts=control.scripts,
            proxy_before=control.proxy_before,
            settings={"REQUEST_DEADLINE": "2"},
        ) as running:
            history = History()
            load = Load(running.front, random, history, deadline=2)
            await load.create_wallets()
            await running.script("checkpoint")
            noticed = Account()
            while not noticed.findings and time.monotonic() < over:
                with contextlib.suppress(TimeoutError):
                    async with load.running(running.database), asyncio.timeout_at(over):
                        for _ in range(ROUNDS):
                            await control.cycle(Trial(running, load, random, noticed))
                            account.counts["faults"] += 1
                await check(running, load, noticed)
    account.counts["noticed"] = len(noticed.findings)
    account.counts["asked"] = len(history.operations)
    if not noticed.findings:
        account.findings.append("a bug of the checker: it noticed nothing")
    return account
