"""The hot lane: requests for one wallet share a call instead of queueing for its row lock one commit at a time.

A wallet always uses the same lane of a process. A lane has one call in flight; what arrives meanwhile waits, and all
of it goes in the next call, one commit for all. An idle lane sends at once. The queue is bounded, and so is the time
that a request takes: at its deadline it is answered 503, whatever the lane is doing, and its call is given up. Nothing
of a call is applied after its deadline, however late the database comes to it: the database itself looks at the clock.
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
from app.problems import NO_ANSWER, REFUSALS, Problem, Refusal
from app.settings import Settings

BULK_LINES = 2
"""Connections for bulk requests in each worker."""
CLOCK_AGE = 5.0
"""Seconds that the database's clock, once it was read, is trusted to go like the loop's."""
LEAD = 0.05
"""Seconds by which the database's last moment for a call comes before its deadline, should it not have done so."""

_IN_TIME = "case when clock_timestamp() < $5 then true else wallet.raise_too_late() end"
"""The filter of the query is evaluated on the function's rows: after it has run, and while it holds its locks."""

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
    """A request, the future of its outcome, and when it is given up (on the loop's clock)."""

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
        self._backend: Any = None
        self._abandoned: Any = None
        self._lost = False
        self._clock: Any = None
        self._clock_read = 0.0

    async def apply(self, requests: Sequence[Request], until: float, *, again: bool = False) -> list[Outcome]:
        """Apply requests in one call and return their outcomes, in order, once they are committed.

        Tries until the database gives a definite answer. Raises TimeoutError at `until`, on the loop's clock: then
        nothing is known, but whatever has not been applied never will be. `again`: the requests were in a call that was
        given up, just before.
        """
        if not again:
            self._lost = False
        BATCH_SIZE.observe(len(requests))
        CALLS_IN_FLIGHT.inc()
        try:
            async with asyncio.timeout_at(until):
                outcomes = await self._apply(requests, until - LEAD)
        finally:
            CALLS_IN_FLIGHT.dec()
        count(requests, outcomes)
        return outcomes

    async def _apply(self, requests: Sequence[Request], last: float) -> list[Outcome]:
        pause = pauses()
        while True:
            try:
                await self._prepare()
                outcomes = await self._call(requests, last)
                break
            except asyncpg.PostgresError as error:
                extra = {"sqlstate": error.sqlstate}
                _log.warning("a call failed and is made again: SQLSTATE %s", error.sqlstate, extra=extra)
                self._clock = None  # perhaps it was too late by a clock that was set
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

    async def _call(self, requests: Sequence[Request], last: float) -> list[Outcome]:
        deadline = self._clock + timedelta(seconds=last - self._clock_read)
        try:
            if len(requests) == 1:  # the shorter way for a lone client; what it refuses, the array function explains
                with contextlib.suppress(Refusal):
                    return [Outcome._make(await self._connection.fetchrow(_APPLY_ONE, *requests[0], deadline))]
            arguments = [list(column) for column in zip(*requests, strict=True)]
            return [Outcome._make(row) for row in await self._connection.fetch(_APPLY, *arguments, deadline)]
        except BaseException as error:
            if not session_survives(error):  # it ended, perhaps between the commit and the answer
                self._abandon()
            raise

    def _abandon(self) -> None:
        self._lost = True
        self._abandoned = self._backend
        self._connection.terminate()
        self._connection = None

    async def _prepare(self) -> None:
        """Have a connection, no abandoned backend, and the time on the database's clock."""
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
                if alive:
                    await asyncio.sleep(0.01)
                else:
                    self._abandoned = None
            await self._read_clock()
        except BaseException:
            await self.close()
            raise

    async def _read_clock(self) -> None:
        """Know what time it is by the database's clock, or a little less: the answer took its time too."""
        loop = asyncio.get_running_loop()
        if self._clock is None or loop.time() - self._clock_read > CLOCK_AGE:
            self._clock = await self._connection.fetchval("select clock_timestamp()")
            self._clock_read = loop.time()


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
        while self._waiting and len(self._sent) < self._batch:
            waiting = self._waiting.popleft()
            if not waiting.outcome.done():  # else it was given up before it was sent
                self._sent.append(waiting)
        self._gauge.set(len(self._waiting))

    async def _send(self) -> None:
        """Send what was taken. At the deadline of the oldest request its call is given up, and the others go again."""
        again = False
        while self._sent:
            requests, until = [waiting.request for waiting in self._sent], self._sent[0].until
            try:
                outcomes = await self._line.apply(requests, until, again=again)
            except TimeoutError:
                again = True
                self._give_up(until)
            except Exception:
                _log.exception("a lane failed")
                self._give_up(self._sent[-1].until)
            else:
                for waiting, outcome in zip(self._sent, outcomes, strict=True):
                    if not waiting.outcome.done():
                        waiting.outcome.set_result(outcome)
            self._sent = [waiting for waiting in self._sent if not waiting.outcome.done()]

    def _watch(self) -> None:
        """Keep the deadlines, whatever the task is doing: one timer, for the oldest request that has no answer."""
        oldest = self._give_up(self._loop.time())
        self._timer = None if oldest is None else self._loop.call_at(oldest.until, self._watch)

    def _give_up(self, now: float) -> Waiting | None:
        """Give up the requests whose deadline has passed, and return the oldest that is left."""
        for waiting in chain(self._sent, self._waiting):
            if waiting.outcome.done():
                continue
            if waiting.until > now:
                return waiting
            waiting.outcome.set_exception(TimeoutError())
        return None


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
            async with asyncio.timeout_at(until):
                line = await self._idle.get()
        finally:
            self._waiting -= 1
        try:
            return await line.apply(requests, until)
        finally:
            self._idle.put_nowait(line)


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
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for line in lines:
        await line.close()
