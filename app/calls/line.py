"""A line sends calls one at a time, over a connection that it replaces when lost."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import compress
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from app.calls.database import (
    FIRST_ATTEMPT,
    LEAD,
    OPERATION,
    abandon,
    connect,
    is_deliberate,
    is_passing,
    nothing_changed,
    pauses,
    session_survives,
)
from app.calls.records import Operation, operation_of
from app.calls.refusals import LOCKED, NO_ANSWER, NO_SUCCESS, REFUSED, Refusal, code_of, message_of
from app.metrics import BATCH_SIZE, CALLS_IN_FLIGHT, OPERATIONS, RESENDS
from app.settings import Settings

LOCK_TIMEOUT = 0.2
"""Seconds that a call waits for locks, at most, on a line whose patience is 1."""
LOCK_PART = 0.03
"""The limit of LOCK_TIMEOUT, as a part of the deadline."""
LEAST_ATTEMPT = 0.2
"""The part of a deadline that a first attempt has at least, if so much is left: it has to wait for locks, too."""
PART_PAUSE = 0.02
"""Seconds. The pause between two parts of a call is as long as the last part took, and at most this."""
CLOCK_AGE = 5.0
"""Seconds after which the database's clock is read again."""
_DECIDED = "sqlstate, message, same_request, balance_after, held_after, seq"
_APPLIED = "null, null, true, balance_after, held_after, seq"

_APPLY = f"""
select {_DECIDED}, case when sqlstate is not null and seq is not null then {OPERATION} end
from wallet.apply_operations($1::text::text[], $2, $3::text::text[], $4, p_not_after => $5)
"""

_APPLY_ONE = f"""
select {_APPLIED}, null
from wallet.apply_operation($1, $2, $3, $4, p_not_after => $5)
"""

_APPLY_WHOLE = f"""
select {_DECIDED}, case when seq is not null then {OPERATION} end
from wallet.apply_operations(
  $1::text::text[], $2, $3::text::text[], $4, $5::text::text[], $6, $7::text[]::timestamptz[],
  $8::text[]::jsonb[], $9, $10
)
"""

_APPLY_ONE_WHOLE = f"""
select {_APPLIED}, {OPERATION}
from wallet.apply_operation($1, $2, $3, $4, $5, $6, $7::text::timestamptz, $8::text::jsonb, $9)
"""

_log = logging.getLogger("wallet")


class Request(NamedTuple):
    """One operation to apply: the arguments of wallet.apply_operation, in their order.

    `amount` is in minor units, `expires_at` is RFC 3339, `metadata` is the text of a JSON value. `whole` is no
    argument: the outcome is to have the operation even if it was applied just now.
    """

    wallet_uuid: str
    operation_uuid: UUID
    operation_type: str
    amount: int | None
    counterparty_uuid: str | None = None
    hold_uuid: UUID | None = None
    expires_at: str | None = None
    metadata: str | None = None
    whole: bool = False

    def wallets(self) -> tuple[str, ...]:
        """Return the wallets that it changes."""
        if self.counterparty_uuid is None:
            return (self.wallet_uuid,)
        return self.wallet_uuid, self.counterparty_uuid

    def is_plain(self) -> bool:
        """Tell whether it has only what a deposit has, and is not `whole`."""
        return self[4:] == _PLAIN


_PLAIN = (None, None, None, None, False)


class Outcome(NamedTuple):
    """What came of a request: a row of wallet.apply_operations.

    - Applied: `sqlstate` and `message` are None; `same_request` is True, or None if an earlier, lost call applied it;
      `operation` (JSON) is set if the request is `whole`.
    - A duplicate: `same_request` tells whether the recorded operation is this request; `operation` is the recorded one,
      if it belongs to the same wallet.
    - Any other refusal: all but `sqlstate` and `message` are None.
    """

    sqlstate: str | None
    message: str | None
    same_request: bool | None
    balance_after: int
    held_after: int
    seq: int
    operation: str | None

    def is_ours(self) -> bool:
        """Tell whether it was applied, or refused by the contract's rules, not by a lock or by PostgreSQL itself."""
        return self.sqlstate is None or self.sqlstate.startswith("WA")

    def is_new(self) -> bool:
        """Tell whether it was applied by the very call that says so, not by one that was lost before."""
        return self.sqlstate is None and self.same_request is True

    def shows_free(self) -> bool:
        """Tell whether it shows that its wallets were not locked."""
        return self.is_new() or (self.is_ours() and self.sqlstate not in _SAY_NOTHING)

    def is_locked(self) -> bool:
        """Tell whether its wallet was locked, or it was left out of the call (UNTRIED)."""
        return self.sqlstate == "55P03"

    def is_repeat(self) -> bool:
        """Tell whether this is a duplicate whose record is the very same request."""
        return self.sqlstate == "WA409" and self.same_request is True

    def recorded(self) -> Operation | None:
        """Return the operation, if the outcome has it."""
        return None if self.operation is None else operation_of(self.operation)


_SAY_NOTHING = (None, "WA400", "WA404", "WA409")
"""Outcomes that don't show that a wallet is free now: a lost call may have applied it, or no lock was needed."""


class Found:
    """What came of the earlier parts of a call: the operations applied, and the wallets to leave out of later parts.

    A wallet is left out once it was locked: each part would wait for it again, and a request might overtake an earlier
    one. A line that is not `thorough` also leaves it out once the database itself refused a request on it; a refused
    transfer adds no wallet then: it doesn't show which of its two was the cause. A request that is left out adds all of
    its wallets, so that no later one overtakes it.
    """

    def __init__(self, *, thorough: bool) -> None:
        self.applied: set[UUID] = set()
        self.later: set[str] = set()
        self._thorough = thorough

    def note(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        """Note what came of a part."""
        fared = list(zip(requests, outcomes, strict=True))
        locked = {wallet for request, outcome in fared if outcome.is_locked() for wallet in request.wallets()}
        if locked:
            free = {wallet for request, outcome in fared if outcome.shows_free() for wallet in request.wallets()}
            self.later |= locked - free
        for request, outcome in fared:
            if outcome.sqlstate is None:
                self.applied.add(request.operation_uuid)
            elif outcome.is_locked():
                if self.later.isdisjoint(request.wallets()):  # only the operation_uuid was in use elsewhere
                    self.later.update(request.wallets())
            elif not (self._thorough or outcome.is_ours() or request.counterparty_uuid is not None):
                self.later.add(request.wallet_uuid)

    def leave_out(self, request: Request) -> bool:
        """Tell whether a request has to be left out; if so, leave all of its wallets out from now on."""
        if self.later.isdisjoint(request.wallets()):
            return False
        self.later.update(request.wallets())
        return True


class Line:
    """Sends calls one at a time, over a connection that it replaces when lost.

    A call whose outcome was lost is made again, once its backend is gone: otherwise a refusal could be answered now
    and the old call still apply the operation later. What the lost call had committed comes back as a duplicate of the
    very same request, and is reported as the success that it is.

    A backend that is committing cannot be ended. `unsure`: one of the lost calls' is left, and may be who keeps a
    wallet locked; so a 55P03 does not show that its request was not applied.
    """

    def __init__(self, settings: Settings, patience: float = 1, *, thorough: bool = False) -> None:
        """`thorough`: try a request even if the database refused an earlier one on its wallet in the same call."""
        assert settings.database_url is not None
        self._thorough = thorough
        self._url = settings.database_url
        self._deadline = settings.request_deadline
        self._lock_timeout = patience * min(LOCK_TIMEOUT, LOCK_PART * settings.request_deadline)
        self._connection: Any = None
        self._backend: asyncpg.Record | None = None
        self._abandoned: asyncpg.Record | None = None
        self._abandoned_until = 0.0
        self._lost = False
        self.unsure = False
        self._suspect = False
        self._clock: datetime | None = None
        self._clock_read = 0.0

    async def apply(
        self,
        requests: Sequence[Request],
        last: float,
        *,
        again: bool = False,
        atomic: bool = False,
        most: int | None = None,
    ) -> list[Outcome]:
        """Apply requests, and return their outcomes in order once they are committed.

        `most`: operations in one part; more go in several, unless atomic.

        Tries until the database gives a definite answer. Raises TimeoutError at `last` (on the loop's clock), or up to
        LEAD of a deadline later, while a backend that may still run a lost call is ended: the outcome is then unknown.
        `again`: the requests were in the call before, which was given up. `atomic`: all of them or none.
        """
        if not again:
            self._lost = self.unsure = False
        BATCH_SIZE.observe(len(requests))
        CALLS_IN_FLIGHT.inc()
        try:
            if atomic or most is None or len(requests) <= most:
                outcomes = await self._apply(requests, last, Found(thorough=self._thorough), atomic)
            else:
                outcomes = await self._apply_in_parts(requests, last, most)
        except TimeoutError:
            self._lost = True  # a part of the call may have been applied
            await self._end_abandoned()
            raise
        finally:
            CALLS_IN_FLIGHT.dec()
            if self._suspect:
                await self.close()
        count(requests, outcomes)
        return outcomes

    async def _apply_in_parts(self, requests: Sequence[Request], last: float, most: int) -> list[Outcome]:
        """Make a call in parts of `most` requests, one after another, and leave the database to others in between."""
        loop = asyncio.get_running_loop()
        lost, found, outcomes, took = self._lost, Found(thorough=self._thorough), list[Outcome](), 0.0
        for begin in range(0, len(requests), most):
            await asyncio.sleep(min(took, PART_PAUSE))
            self._lost = lost  # a lost call of the part before did not have this part in it
            part, began = requests[begin : begin + most], loop.time()
            came = await self._apply(part, last, found)
            found.note(part, came)
            outcomes += came
            took = loop.time() - began
        return outcomes

    async def _apply(
        self, requests: Sequence[Request], last: float, found: Found, atomic: bool = False
    ) -> list[Outcome]:
        """Make a call until it has an answer; in halves, down to the culprit, if the database refuses it as a whole.

        `found`: what came of earlier parts of the same call, if it is made in parts. Requests for wallets that it
        leaves out are UNTRIED: else each would be refused too, and have the call sent again in halves.
        """
        if found.later and not self._lost:
            tried = [not found.leave_out(request) for request in requests]
            if not all(tried):
                rest = list(compress(requests, tried))
                came = iter(await self._apply(rest, last, found) if rest else ())
                return [next(came) if each else UNTRIED for each in tried]
        loop = asyncio.get_running_loop()
        pause = pauses()
        objection = None
        now = loop.time()
        limit = min(last, now + max(FIRST_ATTEMPT * (last - now), LEAST_ATTEMPT * self._deadline))
        while True:
            called = False
            try:
                if (clock := self._ready()) is None:
                    async with asyncio.timeout_at(limit):
                        clock = await self._prepare()
                called = True
                last_there = clock + timedelta(seconds=limit - self._clock_read)
                outcomes = await self._call(requests, limit, last_there, atomic)
                return _recognise(requests, outcomes, found.applied, atomic) if self._lost else outcomes
            except (asyncpg.PostgresError, *NO_ANSWER) as error:
                if isinstance(error, TimeoutError) and loop.time() >= last:
                    raise
                sqlstate, told, extra = "", type(error).__name__, {}
                if isinstance(error, asyncpg.PostgresError):
                    sqlstate = str(error.sqlstate)
                    told, extra = f"SQLSTATE {sqlstate}: {message_of(error)}", {"sqlstate": sqlstate}
                _log.warning("a call failed and is made again: %s", told, extra=extra)
                self._clock = None  # after 57014 (too late) the database's clock may have been set: read it again
                if called and not is_passing(error):
                    if len(requests) > 1 and not atomic:
                        half, lost = len(requests) // 2, self._lost
                        first = await self._apply(requests[:half], last, found)
                        found.note(requests[:half], first)
                        self._lost = lost  # a lost call of the first half did not have the second in it
                        return [*first, *await self._apply(requests[half:], last, found)]
                    if sqlstate == objection or (is_deliberate(error) and not atomic):
                        return [refused(sqlstate)] * len(requests)
                    objection = sqlstate
            RESENDS.inc()
            limit = last
            await asyncio.sleep(min(next(pause), max(last - loop.time(), 0)))

    async def open(self) -> None:
        """Connect if the database answers at once, before other programs take the last sessions."""
        with contextlib.suppress(*NO_SUCCESS):
            async with asyncio.timeout(LEAD * self._deadline):
                await self._prepare()

    async def close(self) -> None:
        """Close the connection. A call that may still run is cancelled at its server: the next may be at another."""
        self._suspect = False
        if self._connection is not None:
            if self._abandoned is None:
                self._connection.terminate()
            else:
                abandon(self._connection)
            self._connection = None

    async def _call(
        self, requests: Sequence[Request], last: float, last_there: datetime, atomic: bool
    ) -> list[Outcome]:
        """Make a call. asyncpg keeps the time: asyncio.timeout costs as much as the rest of this."""
        loop = asyncio.get_running_loop()
        left = last - loop.time()
        if left <= 0:
            raise TimeoutError
        try:
            if len(requests) == 1:  # the shorter way for a lone client
                [request] = requests
                query, arguments = (_APPLY_ONE, request[:4]) if request.is_plain() else (_APPLY_ONE_WHOLE, request[:8])
                try:
                    row = await self._connection.fetchrow(query, *arguments, last_there, timeout=left)
                    return [Outcome._make(row)]
                except asyncpg.LockNotAvailableError:
                    return [refused("55P03")]
                except asyncpg.PostgresError as error:
                    if not isinstance(error, Refusal) and is_passing(error):
                        raise
                    left = last - loop.time()  # refused: apply_operations returns the details
            wallets, operations, types, amounts, counterparties, *others, whole = zip(*requests, strict=True)
            query = _APPLY
            columns: list[object] = [_literal(wallets), operations, _literal(types), amounts]
            optional = [column if any(column) else None for column in (counterparties, *others)]
            if atomic or any(optional) or any(whole):
                query = _APPLY_WHOLE
                columns += [optional[0] and _literal_or_null(counterparties), *optional[1:], atomic]
            rows = await self._connection.fetch(query, *columns, last_there, timeout=left)
            return [Outcome._make(row) for row in rows]
        except BaseException as error:
            if not session_survives(error):
                if not nothing_changed(error):  # the session ended, perhaps between commit and answer
                    self._lost = True
                    self._abandoned = self._backend
                    self._abandoned_until = last + LEAD * self._deadline
                if len(requests) > 1 and not is_passing(error):
                    self._suspect = True  # kept for the halves of this call: reconnecting for each takes too long
                else:
                    await self.close()
            raise

    def _ready(self) -> datetime | None:
        """Return the time by the database's clock at `_clock_read`, if there is nothing to prepare, else None."""
        if self._connection is None or self._connection.is_closed() or self._abandoned is not None:
            return None
        return self._clock if asyncio.get_running_loop().time() - self._clock_read <= CLOCK_AGE else None

    async def _prepare(self) -> datetime:
        """Have a connection and no abandoned backend; return the time by the database's clock at `_clock_read`.

        A backend that cannot be ended is waited for until its call is too late by any clock.
        """
        loop = asyncio.get_running_loop()
        try:
            if self._connection is None or self._connection.is_closed():
                self._clock = None
                self._connection = await connect(
                    self._url, self._deadline, "wallet lane", lock_timeout=self._lock_timeout
                )
                self._backend = await self._connection.fetchrow(
                    "select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()"
                )
            while self._abandoned is not None:
                alive = await self._connection.fetchval(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                    " where pid = $1 and backend_start = $2",
                    *self._abandoned,
                )
                if alive and loop.time() < self._abandoned_until:
                    await asyncio.sleep(0.01)
                else:
                    self._abandoned = None
                    self.unsure = self.unsure or (self._lost and bool(alive))
            if (clock := self._ready()) is None:
                clock = await self._connection.fetchval("select clock_timestamp()")
                self._clock, self._clock_read = clock, loop.time()  # read at this moment or before
            return clock
        except BaseException:
            await self.close()
            raise

    async def _end_abandoned(self) -> None:
        """End the backend of a call that was given up, so that it holds no locks, if the database answers at once."""
        if self._abandoned is not None:
            with contextlib.suppress(*NO_SUCCESS):
                async with asyncio.timeout(LEAD * self._deadline):
                    await self._prepare()


def _literal(values: Sequence[str]) -> str:
    """Return an array as PostgreSQL writes it (section 8.15.6 of its manual). Raises DataError for a zero byte.

    asyncpg's own encoding looks at each element several times and takes several times as long.
    """
    joined = "\0".join(values)
    if joined.count("\0") != len(values) - 1:
        raise asyncpg.DataError("a text holds a zero byte")
    escaped = joined.replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + escaped.replace("\0", '","') + '"}'


def _literal_or_null(values: Sequence[str | None]) -> str:
    """Return an array that may have nulls as PostgreSQL writes it."""
    present = [value for value in values if value is not None]
    if len(present) == len(values):
        return _literal(present)
    return "{" + ",".join("null" if value is None else _literal([value])[1:-1] for value in values) + "}"


def refused(sqlstate: str) -> Outcome:
    """Return the outcome of a request that was not applied: its wallet is locked, or the database refused it."""
    return Outcome._make((sqlstate, LOCKED if sqlstate == "55P03" else REFUSED, *[None] * 5))


UNTRIED = refused("55P03")
"""The outcome of a request that was left out of a call. Compare by identity: a 55P03 of SQL is another object."""


def count(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
    """Count what was decided, by type and outcome."""
    kinds = Counter(
        (request.operation_type, outcome.sqlstate)
        for request, outcome in zip(requests, outcomes, strict=True)
        if outcome is not UNTRIED
    )
    for (operation_type, sqlstate), number in kinds.items():
        OPERATIONS.labels(operation_type, "applied" if sqlstate is None else code_of(sqlstate)).inc(number)


def _recognise(requests: Sequence[Request], outcomes: list[Outcome], own: set[UUID], atomic: bool) -> list[Outcome]:
    """Report as applied what an earlier, lost call of the same requests applied: it comes back as a duplicate.

    An operation that was sent twice within the call succeeds once; `own` are those that have succeeded already.
    An atomic call has applied everything or nothing.
    """
    if atomic and not all(map(Outcome.is_repeat, outcomes)):
        return outcomes
    own = set(own)
    recognised = []
    for request, outcome in zip(requests, outcomes, strict=True):
        if request.operation_uuid not in own and outcome.is_repeat():
            outcome = outcome._replace(sqlstate=None, message=None, same_request=None)
        if outcome.sqlstate is None:
            own.add(request.operation_uuid)
        recognised.append(outcome)
    return recognised
