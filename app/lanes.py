"""The hot lane: requests for one wallet share a call instead of queueing for its row lock one commit at a time.

A wallet always uses the same lane of a process. A lane has one call in flight; what arrives meanwhile waits, and all
of it goes in the next call, one commit for all. An idle lane sends at once. The queue is bounded, and so is the time
that a request takes: at its deadline it is answered 503, whatever the lane is doing. Its call was given up before that,
and the database looks at the clock itself: a call that comes too late is taken back, and one that is in time holds its
locks until it is committed. So what is refused after a 503 is not applied later by the call that was given up.
"""

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from aiohttp import web

from app.database import SETTINGS, connect, pauses, session_survives
from app.messages import Operation
from app.metrics import BATCH_SIZE, CALLS_IN_FLIGHT, LANE_WAITING, OPERATIONS, RESENDS
from app.problems import NO_ANSWER, NO_SUCCESS, REFUSALS, Problem, Refusal
from app.settings import Settings

BULK_LINES = 2
"""Connections for bulk requests in each worker."""
CLOCK_AGE = 5.0
"""Seconds after which the database's clock is read again."""
LEAD = 0.05
"""The part of a deadline by which a call is given up before it: room for clocks that do not go alike."""
HEADROOM = 0.1
"""The part of a deadline that every request of a call has before it, at least.

With less, after an outage as long as the deadline, the oldest request of each call would spoil it for all the others.
"""

_IN_TIME = "case when clock_timestamp() < $5 then true else wallet.raise_too_late() end"
"""$5 is the call's last moment by the database's clock. A filter of a function's rows is evaluated when it has run."""

_APPLY = f"""
select
  sqlstate, message, balance_after, seq,
  case when sqlstate is not null then operation_type end,
  case when sqlstate is not null then amount end,
  case when sqlstate is not null then created_at end
from wallet.apply_operations($1, $2, $3, $4)
where {_IN_TIME}
"""

_APPLY_ONE = f"""
select null, null, balance_after, seq, null, null, null
from wallet.apply_operation($1, $2, $3, $4)
where {_IN_TIME}
"""

_log = logging.getLogger("wallet")


class Request(NamedTuple):
    """One operation to apply. `amount` is in minor units."""

    wallet_uuid: str
    operation_uuid: UUID
    operation_type: str
    amount: int


class Outcome(NamedTuple):
    """What came of a request: a row of wallet.apply_operations.

    `sqlstate` and `message` are None for an applied one. A duplicate carries the recorded operation if it belongs to
    the same wallet; otherwise the rest is None.
    """

    sqlstate: str | None
    message: str | None
    balance_after: int
    seq: int
    operation_type: str
    amount: int
    created_at: datetime | None

    def is_repeat_of(self, request: Request) -> bool:
        """Tell whether this is a duplicate whose record is the very same request."""
        same = (self.operation_type, self.amount) == (request.operation_type, request.amount)
        return self.sqlstate == "WA409" and same

    def recorded(self, request: Request) -> Operation | None:
        """Return the operation on record for a duplicate of the same wallet."""
        if self.seq is None or self.created_at is None:
            return None
        return Operation(
            request.operation_uuid,
            request.wallet_uuid,
            str(self.operation_type),
            int(self.amount or 0),
            int(self.balance_after or 0),
            self.seq,
            self.created_at,
        )


class Waiting(NamedTuple):
    """A request, the future of its outcome, and its deadline (on the loop's clock)."""

    request: Request
    outcome: asyncio.Future[Outcome]
    until: float


class Line:
    """A connection to wallet.apply_operations that survives whatever happens to the connection.

    One call at a time. A call whose outcome was lost is made again, once its backend is gone: otherwise a refusal could
    be answered now and the old call still apply the operation later. What the lost call had committed comes back as a
    duplicate of the very same request, and is the success that it is.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.database_url is not None
        self._url = settings.database_url
        self._deadline = settings.request_deadline
        self._connection: Any = None
        self._backend: asyncpg.Record | None = None
        self._abandoned: asyncpg.Record | None = None
        self._abandoned_until = 0.0
        self._lost = False
        self._clock: datetime | None = None
        self._clock_read = 0.0

    async def apply(self, requests: Sequence[Request], last: float, *, again: bool = False) -> list[Outcome]:
        """Apply requests in one call and return their outcomes, in order, once they are committed.

        Tries until the database gives a definite answer. Raises TimeoutError at the last moment, on the loop's clock:
        then nobody knows what was applied, and may be told so a LEAD later. `again`: the requests were in a call that
        was given up, just before.
        """
        if not again:
            self._lost = False
        BATCH_SIZE.observe(len(requests))
        CALLS_IN_FLIGHT.inc()
        try:
            async with asyncio.timeout_at(last):
                outcomes = await self._apply(requests, last)
        except TimeoutError:
            await self._end_abandoned()
            raise
        finally:
            CALLS_IN_FLIGHT.dec()
        count(requests, outcomes)
        return outcomes

    async def _apply(self, requests: Sequence[Request], last: float) -> list[Outcome]:
        pause = pauses()
        while True:
            try:
                clock = await self._prepare()
                last_there = clock + timedelta(seconds=last - self._clock_read)
                outcomes = await self._call(requests, last, last_there)
                break
            except asyncpg.PostgresError as error:
                extra = {"sqlstate": error.sqlstate}
                _log.warning("a call failed and is made again: SQLSTATE %s", error.sqlstate, extra=extra)
                self._clock = None  # if it was too late, then by a clock that has been set: read it again
            except NO_ANSWER as error:
                _log.warning("a call was lost and is made again: %s", type(error).__name__)
            RESENDS.inc()
            await asyncio.sleep(next(pause))
        return _recognise(requests, outcomes) if self._lost else outcomes

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _call(self, requests: Sequence[Request], last: float, last_there: datetime) -> list[Outcome]:
        try:
            if len(requests) == 1:  # the shorter way for a lone client; what it refuses, the array function explains
                with contextlib.suppress(Refusal):
                    return [Outcome._make(await self._connection.fetchrow(_APPLY_ONE, *requests[0], last_there))]
            arguments = [list(column) for column in zip(*requests, strict=True)]
            return [Outcome._make(row) for row in await self._connection.fetch(_APPLY, *arguments, last_there)]
        except BaseException as error:
            if not session_survives(error):  # it ended, perhaps between the commit and the answer
                self._lost = True
                self._abandoned = self._backend
                self._abandoned_until = last + LEAD * self._deadline
                await self.close()
            raise

    async def _prepare(self) -> datetime:
        """Have a connection and no abandoned backend; return the time by the database's clock at `_clock_read`.

        A backend that cannot be ended is waited for until its call is too late by any clock.
        """
        loop = asyncio.get_running_loop()
        try:
            if self._connection is None or self._connection.is_closed():
                self._clock = None
                self._connection = await connect(self._url, self._deadline, "wallet lane")
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
            if self._clock is None or loop.time() - self._clock_read > CLOCK_AGE:
                clock: datetime = await self._connection.fetchval("select clock_timestamp()")
                self._clock, self._clock_read = clock, loop.time()  # it was read earlier than this, if anything
            return self._clock
        except BaseException:
            await self.close()
            raise

    async def _end_abandoned(self) -> None:
        """End the backend of a call that was given up, so that it holds no locks, if the database answers at once."""
        if self._abandoned is not None:
            with contextlib.suppress(*NO_SUCCESS):
                async with asyncio.timeout(LEAD * self._deadline):
                    await self._prepare()


def count(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
    """Count what was decided, by type and outcome."""
    kinds = Counter(
        (request.operation_type, outcome.sqlstate) for request, outcome in zip(requests, outcomes, strict=True)
    )
    for (operation_type, sqlstate), number in kinds.items():
        outcome = "applied" if sqlstate is None else REFUSALS[sqlstate][1]
        OPERATIONS.labels(operation_type, outcome).inc(number)


def _recognise(requests: Sequence[Request], outcomes: list[Outcome]) -> list[Outcome]:
    """Turn the duplicates that an earlier, lost call of the same requests had applied into the successes that they are.

    An operation that was sent twice within the call succeeds once.
    """
    own: set[UUID] = set()
    recognised = []
    for request, outcome in zip(requests, outcomes, strict=True):
        if request.operation_uuid not in own and outcome.is_repeat_of(request):
            outcome = outcome._replace(sqlstate=None, message=None)
        if outcome.sqlstate is None:
            own.add(request.operation_uuid)
        recognised.append(outcome)
    return recognised


class Lane:
    """A queue of requests and the task that sends them, all that wait in one call, one call at a time."""

    def __init__(self, line: Line, settings: Settings, number: int = 0) -> None:
        self._line = line
        self._gauge = LANE_WAITING.labels(str(number))
        self._deadline = settings.request_deadline
        self._batch = settings.lane_batch
        self._limit = settings.lane_queue
        self._waiting: deque[Waiting] = deque()
        self._sent: list[Waiting] = []
        self._late: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def apply(self, request: Request) -> asyncio.Future[Outcome]:
        """Queue a request and return the future of its outcome, or of a TimeoutError at its deadline.

        Raises Problem (429) if too many wait already.
        """
        if len(self._waiting) >= self._limit:
            raise overloaded()
        waiting = Waiting(request, self._loop.create_future(), self._loop.time() + self._deadline)
        self._waiting.append(waiting)
        self._arrived.set()
        if self._timer is None:
            self._timer = self._loop.call_at(waiting.until, self._watch)
        return waiting.outcome

    async def run(self) -> None:
        """Send what waits, for ever.

        Nothing is awaited between the look at the queue and the wait for an arrival, so none slips in between unseen.
        """
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            self._take()
            await self._send()

    def _take(self) -> None:
        taken: list[Waiting] = []
        while self._waiting and len(taken) < self._batch:
            waiting = self._waiting.popleft()
            if not waiting.outcome.done():  # else it was given up before it was sent
                taken.append(waiting)
        self._sent = self._with_headroom(taken)
        self._gauge.set(len(self._waiting))

    def _with_headroom(self, requests: list[Waiting]) -> list[Waiting]:
        """Return the requests that have time for a call; the others wait for their 503."""
        least = self._loop.time() + HEADROOM * self._deadline
        self._late += [waiting for waiting in requests if waiting.until <= least]
        return [waiting for waiting in requests if waiting.until > least]

    async def _send(self) -> None:
        """Send what was taken. Its call is given up shortly before the deadline of the oldest; the others go again."""
        again = False
        while self._sent:
            last = self._sent[0].until - LEAD * self._deadline
            try:
                outcomes = await self._line.apply([waiting.request for waiting in self._sent], last, again=again)
            except TimeoutError:
                again = True
                self._sent = self._with_headroom(self._sent)
            except Exception:
                _log.exception("a lane failed")
                self._late += self._sent
                self._sent = []
            else:
                for waiting, outcome in zip(self._sent, outcomes, strict=True):
                    if not waiting.outcome.done():
                        waiting.outcome.set_result(outcome)
                self._sent = []

    def _watch(self) -> None:
        """Keep the deadlines, whatever the task is doing: one timer, for the oldest request that has no answer."""
        now = self._loop.time()
        self._late = [waiting for waiting in self._late if not waiting.outcome.done()]
        self._timer = None
        for waiting in chain(self._late, self._sent, self._waiting):  # from the oldest on
            if waiting.until > now:
                self._timer = self._loop.call_at(waiting.until, self._watch)
                break
            if not waiting.outcome.done():
                waiting.outcome.set_exception(TimeoutError())

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()


class Bulk:
    """A few lines for batches that clients made themselves: each goes in a call of its own."""

    def __init__(self, lines: Sequence[Line], settings: Settings) -> None:
        self._idle: asyncio.LifoQueue[Line] = asyncio.LifoQueue()
        for line in lines:
            self._idle.put_nowait(line)
        self._limit = settings.bulk_queue
        self._deadline = settings.request_deadline
        self._waiting = 0

    async def apply(self, requests: Sequence[Request]) -> list[Outcome]:
        """Apply requests and return their outcomes, in order.

        Raises Problem (429) if too many batches wait already, and TimeoutError at the deadline.
        """
        if self._waiting >= self._limit:
            raise overloaded()
        until = asyncio.get_running_loop().time() + self._deadline
        self._waiting += 1
        try:
            async with asyncio.timeout_at(until - HEADROOM * self._deadline):
                line = await self._idle.get()
        finally:
            self._waiting -= 1
        try:
            return await line.apply(requests, until - LEAD * self._deadline)
        except TimeoutError:
            pass
        finally:
            self._idle.put_nowait(line)
        await asyncio.sleep(until - asyncio.get_running_loop().time())
        raise TimeoutError


LANES = web.AppKey("lanes", list[Lane])
BULK = web.AppKey("bulk", Bulk)


def overloaded() -> Problem:
    """Return the 429 for a request that may not wait."""
    return Problem(429, "overloaded", "Too many requests are waiting", headers={"Retry-After": "1"})


def apply(app: web.Application, request: Request) -> asyncio.Future[Outcome]:
    """Queue a request on its wallet's lane and return the future of its outcome. Raises Problem (429)."""
    lanes = app[LANES]
    return lanes[hash(request.wallet_uuid) % len(lanes)].apply(request)


async def lanes(app: web.Application) -> AsyncIterator[None]:
    """Run the lanes while the app runs. They end after the last handler has its answer."""
    settings = app[SETTINGS]
    lines = [Line(settings) for _ in range(settings.lanes + BULK_LINES)]
    app[LANES] = [Lane(line, settings, number) for number, line in enumerate(lines[: settings.lanes])]
    app[BULK] = Bulk(lines[settings.lanes :], settings)
    tasks = [asyncio.create_task(lane.run()) for lane in app[LANES]]
    yield
    for lane in app[LANES]:
        lane.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for line in lines:
        await line.close()
