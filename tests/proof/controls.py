"""The service and its database, broken on purpose: the proof that does not notice proves nothing."""

import asyncio
import contextlib
import functools
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.server.embedded import Postgres
from tests.proof.clients import Load
from tests.proof.faults import (
    FUNCTIONS,
    Trial,
    check,
    postgres_is_killed,
    primary_is_lost_ahead,
    run,
    service_is_killed,
)
from tests.proof.history import History
from tests.proof.section import Account, Scale
from tests.proof.stand import STAND, cluster, server, stand
from tests.proxy import Point
from tests.replication import Cluster

HOLD_NOT_UNIQUE = "alter table wallet.hold drop constraint hold_pkey"
SEQ_NOT_UNIQUE = """
alter table wallet.operation drop constraint operation_pkey;
create index on wallet.operation (wallet_uuid, seq);
"""
"""Without it the row locks are not missed: of two operations with the same seq the index lets one through."""

PAYEE_LEFT_OUT = """
create function public.leave_out() returns trigger language plpgsql as $$ begin return null; end $$;
create trigger leave_out before insert on wallet.operation
for each row when (new.operation_type = 'RECEIVE') execute function public.leave_out();
"""

ROUNDS = 5
"""Faults before the books are checked."""


async def nothing_happens(trial: Trial) -> None:
    await trial.load.progress(500)


async def little_happens(trial: Trial) -> None:
    await trial.load.progress(100)


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


def but(function: str, correct: str, wrong: str) -> str:
    """Return a function with something else in the place of a part of it."""
    source = (FUNCTIONS / f"{function}.sql").read_text()
    assert source.count(correct) == 1, correct
    return source.replace(correct, wrong)


@dataclass(frozen=True)
class Control:
    """A row of the table: what is broken, in the database or in the service, and what shows it under load.

    `notices`: what the findings must tell of, at least.
    """

    cycle: Callable[[Trial], Awaitable[None]]
    notices: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()
    command: tuple[str, ...] = ("app",)
    proxy_before: str | None = None
    server: Callable[[], contextlib.AbstractContextManager[Postgres | Cluster]] = server
    rounds: int = ROUNDS
    deadline: float = 2

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
        nothing_happens,
        scripts=("drop index wallet.operation_requested_idx, wallet.operation_receive_idx", HOLD_NOT_UNIQUE),
    ),
    "control-payee-left-out": Control(
        nothing_happens,
        (
            "a transfer is in both ledgers or in none",
            "a snapshot with one side of a transfer",
            "a snapshot in which the circle holds another sum",
            "a snapshot whose sum is not deposits minus withdrawals",
        ),
        scripts=(PAYEE_LEFT_OUT,),
    ),
    "control-hold-stays-open": Control(
        little_happens,
        ("the open holds are those without an end", "a hold has one end at most"),
        scripts=(
            but(
                "apply_operations", "where h.hold_uuid = any(v_closing)", "where false and h.hold_uuid = any(v_closing)"
            ),
        ),
    ),
    "control-expired-hold-captured": Control(
        nothing_happens,
        ("a hold has one end at most", "nothing is taken from a hold that is due"),
        scripts=(
            but("apply_operations", "case when (h.expires_at <= v_now) is not true then h.amount end", "h.amount"),
        ),
    ),
    "control-rest-of-a-hold-lost": Control(
        little_happens,
        ("held after follows",),
        scripts=(but("apply_operations", "v_helds[v_number] - v_available", "v_helds[v_number] - v_amount"),),
    ),
    "control-atomic-in-parts": Control(
        nothing_happens,
        ("an atomic request is applied as a whole", "an atomic request is answered as a whole"),
        command=("tests.proof.broken", "applies_parts"),
    ),
    "control-repeat-called-new": Control(
        nothing_happens, ("a repeat is no news",), command=("tests.proof.broken", "calls_repeats_new")
    ),
    "control-tells-another": Control(
        nothing_happens, ("what was told is what is recorded",), command=("tests.proof.broken", "tells_another")
    ),
    "control-answers-early": Control(service_is_killed, command=("tests.proof.broken", "answers_early")),
    "control-asynchronous-standby": Control(
        primary_is_lost_ahead, server=functools.partial(cluster, ""), rounds=1, deadline=10
    ),
    "control-ignores-the-warning": Control(
        primary_is_lost_ahead,
        command=("tests.proof.broken", "ignores_the_warning"),
        server=cluster,
        rounds=1,
        deadline=10,
    ),
    "control-forgets-its-calls": Control(
        an_answer_is_lost, command=("tests.proof.broken", "forgets_its_calls"), proxy_before="database"
    ),
}


async def trial_of(control: Control, scale: Scale) -> Account:
    """Run a control until the books are found wrong, or until its time is over."""
    account = Account()
    random = scale.random(control.cycle.__name__)
    over = time.monotonic() + 30
    with control.server() as postgres:
        async with stand(
            postgres,
            2,
            command=control.command,
            scripts=control.scripts,
            proxy_before=control.proxy_before,
            settings={"REQUEST_DEADLINE": str(control.deadline)},
        ) as running:
            history = History(no_call_is_lost=control.cycle is nothing_happens)
            load = Load(running.front, random, history, control.deadline)
            await load.create_wallets()
            await running.script("checkpoint")
            noticed = Account()
            while unnoticed(control, noticed) and time.monotonic() < over:
                try:
                    async with load.running(running.database), asyncio.timeout_at(over):
                        for _ in range(control.rounds):
                            await control.cycle(Trial(running, load, random, noticed))
                            account.counts["faults"] += 1
                except TimeoutError:  # in the middle of a cycle, perhaps with the service down
                    await running.revive_service()
                await check(running, load, noticed)
    account.counts["noticed"] = len(noticed.findings)
    account.counts["asked"] = len(history.operations)
    account.findings += [f"a bug of the checker: it did not notice {one}" for one in unnoticed(control, noticed)]
    return account


def unnoticed(control: Control, noticed: Account) -> list[str]:
    """Return what the findings should tell of and don't."""
    return [one for one in control.notices or ("",) if not any(one in finding for finding in noticed.findings)]
