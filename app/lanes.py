"""The hot lane: requests for one wallet share a call instead of queueing for its row lock one commit at a time.

A wallet always uses the same lane of a process. A lane has one call in flight; what arrives meanwhile waits, and all
of it goes in the next call, one commit for all. An idle lane sends at once. The queue is bounded, and so is the time
that a request takes: at its deadline it is answered 503, whatever the lane is doing. Its call was given up before that,
and the database looks at the clock itself: a call that comes too late is taken back, and one that is in time holds its
locks until it is committed. So what is refused after a 503 is not applied later by the call that was given up.

Bulk requests have a lane of their own, which may have a few calls in flight: while one is under way, another is sent
once it carries as much, or after a moment.
"""

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime, timedelta
from itertools import islice
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
BULK_BATCH = 4096
"""Operations in a call that several bulk requests share, at most. A larger request goes by itself."""
LINGER = 0.005
"""Seconds that bulk requests wait, at most, for others to share a call while another call is under way."""
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
from wallet.apply_operations($1::text::text[], $2, $3::text::text[], $4)
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
    """Requests of one client, the future of their outcomes, and their deadline (on the loop's clock)."""

    requests: Sequence[Request]
    outcomes: asyncio.Future[list[Outcome]]
    until: float


def _size(waiting: Iterable[Waiting]) -> int:
    return sum(len(each.requests) for each in waiting)


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
            wallets, operations, types, amounts = zip(*requests, strict=True)
            arguments = (_literal(wallets), operations, _literal(types), amounts)
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


def _literal(values: Iterable[str]) -> str:
    """Return an array as PostgreSQL writes it (section 8.15.6 of its manual); no text holds a zero byte.

    asyncpg's own encoding looks at each element several times and takes several times as long.
    """
    escaped = "\0".join(values).replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + escaped.replace("\0", '","') + '"}'


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
    """A queue of requests and the lines that send them: all that wait in one call, one call at a time on each line."""

    def __init__(self, name: str, batch: int, limit: int, deadline: float) -> None:
        self._gauge = LANE_WAITING.labels(name)
        self._batch = batch
        self._limit = limit
        self._deadline = deadline
        self._waiting: deque[Waiting] = deque()
        self._sent: dict[Line, list[Waiting]] = {}
        self._late: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def apply(self, requests: Sequence[Request]) -> asyncio.Future[list[Outcome]]:
        """Queue requests and return the future of their outcomes, in order, or of a TimeoutError at their deadline.

        They go in one call. Raises Problem (429) if too many clients wait already.
        """
        if len(self._waiting) >= self._limit:
            raise overloaded()
        waiting = Waiting(requests, self._loop.create_future(), self._loop.time() + self._deadline)
        self._waiting.append(waiting)
        self._arrived.set()
        if self._timer is None:
            self._timer = self._loop.call_at(waiting.until, self._watch)
        return waiting.outcomes

    async def run(self, line: Line) -> None:
        """Send what waits, for ever.

        Nothing is awaited between the look at the queue and the wait for an arrival, so none slips in between unseen.
        """
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            if any(self._sent.values()):
                await self._linger()
            self._sent[line] = self._take()
            await self._send(line)

    async def _linger(self) -> None:
        """While another line has a call under way, wait a little for as many requests as it carries.

        Where both are for one wallet, the second call waits for the first anyway, and nobody can join it any more.
        Nobody is refused for it: a full queue goes.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while len(self._waiting) < self._limit and _size(self._waiting) < self._enough():
                    self._arrived.clear()
                    await self._arrived.wait()

    def _enough(self) -> int:
        return min(self._batch, max(map(_size, self._sent.values()), default=0))

    def _take(self) -> list[Waiting]:
        taken: list[Waiting] = []
        room = self._batch
        while self._waiting and (room >= len(self._waiting[0].requests) or not taken):
            waiting = self._waiting.popleft()
            if not waiting.outcomes.done():  # else it was given up before it was sent
                taken.append(waiting)
                room -= len(waiting.requests)
        self._gauge.set(len(self._waiting))
        return self._with_headroom(taken)

    def _with_headroom(self, sent: list[Waiting]) -> list[Waiting]:
        """Return those that have time for a call; the others wait for their 503."""
        least = self._loop.time() + HEADROOM * self._deadline
        self._late += [waiting for waiting in sent if waiting.until <= least]
        return [waiting for waiting in sent if waiting.until > least]

    async def _send(self, line: Line) -> None:
        """Send what was taken. Its call is given up shortly before the deadline of the oldest; the others go again."""
        again = False
        while sent := self._sent[line]:
            requests = [request for waiting in sent for request in waiting.requests]
            try:
                outcomes = iter(await line.apply(requests, sent[0].until - LEAD * self._deadline, again=again))
            except TimeoutError:
                again = True
                self._sent[line] = self._with_headroom(sent)
            except Exception:
                _log.exception("a lane failed")
                self._late += sent
                self._sent[line] = []
            else:
                for waiting in sent:
                    own = list(islice(outcomes, len(waiting.requests)))
                    if not waiting.outcomes.done():
                        waiting.outcomes.set_result(own)
                self._sent[line] = []

    def _watch(self) -> None:
        """Keep the deadlines, whatever the lines are doing: one timer, for the oldest that has no answer."""
        now = self._loop.time()
        self._late = sorted((late for late in self._late if not late.outcomes.done()), key=lambda late: late.until)
        due = []
        for queue in (self._late, *self._sent.values(), self._waiting):  # each from its oldest on
            for waiting in queue:
                if waiting.until > now:
                    due.append(waiting.until)
                    break
                if not waiting.outcomes.done():
                    waiting.outcomes.set_exception(TimeoutError())
        self._timer = self._loop.call_at(min(due), self._watch) if due else None

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()


LANES = web.AppKey("lanes", list[Lane])
BULK = web.AppKey("bulk", Lane)


def overloaded() -> Problem:
    """Return the 429 for a request that may not wait."""
    return Problem(429, "overloaded", "Too many requests are waiting", headers={"Retry-After": "1"})


def apply(app: web.Application, request: Request) -> asyncio.Future[list[Outcome]]:
    """Queue a request on its wallet's lane and return the future of its outcome. Raises Problem (429)."""
    lanes = app[LANES]
    return lanes[hash(request.wallet_uuid) % len(lanes)].apply([request])


async def lanes(app: web.Application) -> AsyncIterator[None]:
    """Run the lanes while the app runs. They end after the last handler has its answer."""
    settings = app[SETTINGS]
    deadline = settings.request_deadline
    lanes = [Lane(str(number), settings.lane_batch, settings.lane_queue, deadline) for number in range(settings.lanes)]
    bulk = Lane("bulk", BULK_BATCH, settings.bulk_queue, deadline)
    app[LANES], app[BULK] = lanes, bulk
    running = [(lane, Line(settings)) for lane in [*lanes, *[bulk] * BULK_LINES]]
    tasks = [asyncio.create_task(lane.run(line)) for lane, line in running]
    yield
    for lane in (*lanes, bulk):
        lane.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _, line in running:
        await line.close()
