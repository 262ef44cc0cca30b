"""The hot lane: requests for one wallet share a call instead of queueing for its row lock one commit at a time.

A wallet always uses the same lane of a process. A lane has one call in flight; what arrives meanwhile waits, and all
of it goes in the next call, one commit for all. An idle lane sends at once. The queue is bounded, and so is the time
that a request takes: at its deadline it is answered 503, whatever the lane is doing. Its call was given up before that,
and the database looks at the clock itself: a call that comes too late is taken back, and one that is in time holds its
locks until it is committed. So what is refused after a 503 is not applied later by the call that was given up.

Bulk requests have a lane of their own, which may have a few calls in flight: while one is under way, another is sent
once it carries as much, or after a moment.

A wallet that somebody keeps locked delays the call that meets it by a lock_timeout, and one to which the database
refuses something has its call made again in parts. From then on its requests wait on the siding, and one of them at a
time is tried in a call apart from the lanes, until that has had an outcome of ours.
"""

import asyncio
import contextlib
import logging
from bisect import insort
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence, Set
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from aiohttp import web

from app.database import IDLE, SETTINGS
from app.line import LEAD, Line, Outcome, Request, refused
from app.metrics import LANE_WAITING, WALLETS_APART
from app.problems import RETRY, Problem

BULK_LINES = 2
"""Connections for bulk requests in each worker."""
SIDING_LINES = 1
"""Connections for wallets in trouble in each worker."""
BULK_BATCH = 4096
"""Operations in a call that several bulk requests share, at most. A larger request goes by itself."""
BULK_PATIENCE = 4
"""Times that a bulk call waits for locks as long as others do: what it waits for may be another bulk call."""
LINGER = 0.005
"""Seconds that bulk requests wait, at most, for others to share a call while another call is under way."""
HEADROOM = 0.1
"""The part of a deadline that every request of a call has before it, at least.

With less, after an outage as long as the deadline, the oldest request of each call would spoil it for all the others.
"""
BULK_HEADROOM = 2 * HEADROOM
SIDING_HEADROOM = 3 * HEADROOM
"""The same for calls that wait longer for locks."""
SIDING_PATIENCE = 2.5
"""Times that a call of the siding waits for a lock as long as others do: a wallet may be in the hands of long calls."""
SIDING_SHARE = 100
"""Wallets for which one bulk request may wait on the siding; what it wants of more is not applied at once."""
SIDING_WALLETS = 10_000
"""Wallets that are known to be in trouble, at most."""
GAUGE_INTERVAL = 0.5
"""Seconds after an arrival until the requests that wait are counted."""

_log = logging.getLogger("wallet")


class Waiting(NamedTuple):
    """Requests of one client, the future of their outcomes, and their deadline (on the loop's clock)."""

    requests: Sequence[Request]
    outcomes: asyncio.Future[list[Outcome]]
    until: float


_until = attrgetter("until")


def _size(waiting: Iterable[Waiting]) -> int:
    return sum(len(each.requests) for each in waiting)


class Lane:
    """A queue of requests and the lines that send them: all that wait in one call, one call at a time on each line."""

    def __init__(self, name: str, batch: int, limit: int, deadline: float, headroom: float = HEADROOM) -> None:
        self._gauge = LANE_WAITING.labels(name)
        self._batch = batch
        self._limit = limit
        self._deadline = deadline
        self._headroom = headroom * deadline
        self.trouble: Set[str] = frozenset()
        """Wallets whose single requests don't go on this lane; those that wait already are answered 55P03."""
        self._waiting: deque[Waiting] = deque()
        self._sent: dict[Line, list[Waiting]] = {}
        self._late: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._counting = False

    def apply(self, requests: Sequence[Request]) -> asyncio.Future[list[Outcome]]:
        """Queue requests and return the future of their outcomes, in order, or of a TimeoutError at their deadline.

        They go in one call. Raises Problem (429) if too many clients wait already.
        """
        self._admit()
        waiting = Waiting(requests, self._loop.create_future(), self._loop.time() + self._deadline)
        self._waiting.append(waiting)
        if self._timer is None:
            self._timer = self._loop.call_at(waiting.until, self._watch)
        return waiting.outcomes

    def see_room(self) -> None:
        """Raise Problem (429) if too many clients wait already."""
        if len(self._waiting) >= self._limit:
            raise overloaded()

    def _admit(self) -> None:
        self.see_room()
        self._arrived.set()
        if not self._counting:
            self._counting = True
            self._loop.call_later(GAUGE_INTERVAL, self._count)

    def _count(self) -> None:
        self._counting = False
        self._gauge.set(len(self._waiting))

    async def run(self, line: Line, idle: float | None = None) -> None:
        """Send what waits, for ever; give the line's connection back when nothing has come for so many seconds.

        Nothing is awaited between the look at the queue and the wait for an arrival, so none slips in between unseen.
        """
        if idle is None:
            await line.open()
        while True:
            while not self._waiting:
                self._arrived.clear()
                try:
                    async with asyncio.timeout(idle):
                        await self._arrived.wait()
                except TimeoutError:
                    await line.close()
            if any(self._sent.values()):
                await self._linger()
            self._sent[line] = self._take()
            await self._send(line)
            await asyncio.sleep(0)  # whoever was answered goes first, and may find a wallet in trouble

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
            if waiting.outcomes.done():  # it was given up before it was sent
                continue
            if self.trouble and len(waiting.requests) == 1 and waiting.requests[0].wallet_uuid in self.trouble:
                waiting.outcomes.set_result([refused("55P03")])
                continue
            taken.append(waiting)
            room -= len(waiting.requests)
        self._gauge.set(len(self._waiting))
        return self._with_headroom(taken)

    def _with_headroom(self, sent: list[Waiting]) -> list[Waiting]:
        """Return those that have time for a call; the others wait for their 503."""
        least = self._loop.time() + self._headroom
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


class Siding(Lane):
    """Requests for wallets that are in trouble: a single client's for each such wallet in one call.

    Somebody keeps the wallet locked, or the database refuses it something: a call with such a request costs its fellows
    some time.
    """

    def __init__(self, limit: int, deadline: float) -> None:
        super().__init__("siding", BULK_BATCH, limit, deadline, SIDING_HEADROOM)
        self.wallets: set[str] = set()
        """The wallets in trouble, until a request for them has had an outcome of ours."""

    def note(self, wallet: str, outcomes: Iterable[Outcome]) -> None:
        """Note how a wallet fares."""
        if any(outcome.is_ours() for outcome in outcomes):
            self.wallets.discard(wallet)
        elif len(self.wallets) < SIDING_WALLETS:
            self.wallets.add(wallet)
        WALLETS_APART.set(len(self.wallets))

    async def apply_apart(self, requests: Sequence[Request], until: float) -> list[Outcome]:
        """Apply requests for one wallet, trying again while it is locked, and return their outcomes in order.

        Those of what stayed locked up to the deadline (on the loop's clock) are 55P03. Raises TimeoutError if the
        outcome is unknown at the deadline.
        """
        outcomes = [refused("55P03")] * len(requests)
        with contextlib.suppress(Problem):  # what may not wait is not applied either
            while locked := [number for number, outcome in enumerate(outcomes) if outcome.sqlstate == "55P03"]:
                if self._loop.time() >= until - self._headroom:
                    break
                found = await self._queue([requests[number] for number in locked], until)
                self.note(requests[0].wallet_uuid, found)
                for number, outcome in zip(locked, found, strict=True):
                    outcomes[number] = outcome
        return outcomes

    def _queue(self, requests: Sequence[Request], until: float) -> asyncio.Future[list[Outcome]]:
        """Queue requests in the order of their deadlines."""
        self._admit()
        waiting = Waiting(requests, self._loop.create_future(), until)
        insort(self._waiting, waiting, key=_until)
        self.close()
        self._watch()
        return waiting.outcomes

    def _take(self) -> list[Waiting]:
        """Take what is to go in the next call; answer those that have no time for another one and were not applied."""
        taken: list[Waiting] = []
        left: list[Waiting] = []
        tried: set[str] = set()
        room = self._batch
        least = self._loop.time() + self._headroom
        for waiting in self._waiting:
            wallet = waiting.requests[0].wallet_uuid
            if waiting.outcomes.done():
                continue
            if waiting.until <= least:
                waiting.outcomes.set_result([refused("55P03")] * len(waiting.requests))
            elif (wallet in tried and wallet in self.wallets) or (taken and len(waiting.requests) > room):
                left.append(waiting)
            else:
                taken.append(waiting)
                tried.add(wallet)
                room -= len(waiting.requests)
        self._waiting = deque(left)
        self._gauge.set(len(left))
        return taken


LANES = web.AppKey("lanes", list[Lane])
BULK = web.AppKey("bulk", Lane)
SIDING = web.AppKey("siding", Siding)


def overloaded() -> Problem:
    """Return the 429 for a request that may not wait."""
    return Problem(429, "overloaded", "Too many requests are waiting", headers=RETRY)


def admit_bulk(app: web.Application) -> None:
    """Raise Problem (429) if too many bulk requests wait, before another one is received."""
    app[BULK].see_room()


def apply_one(app: web.Application, request: Request) -> Awaitable[list[Outcome]]:
    """Queue a request on its wallet's lane and return what its outcome is awaited from, in a list.

    Raises Problem (429), and TimeoutError if the outcome is unknown. One that is not ours still has to be settled.
    """
    lanes = app[LANES]
    lane = lanes[hash(request.wallet_uuid) % len(lanes)]
    return lane.apply([request]) if not app[SIDING].wallets else _apply(app, lane, [request])


async def apply_all(app: web.Application, requests: Sequence[Request]) -> list[Outcome]:
    """Apply the requests of a bulk request. Raises Problem (429), and TimeoutError if the outcomes are unknown."""
    return await _apply(app, app[BULK], requests) if requests else []


async def _apply(app: web.Application, lane: Lane, requests: Sequence[Request]) -> list[Outcome]:
    """Apply requests on a lane, but for those for wallets in trouble."""
    began = asyncio.get_running_loop().time()
    wallets = app[SIDING].wallets
    outcomes = [refused("55P03")] * len(requests)
    free = [number for number, request in enumerate(requests) if request.wallet_uuid not in wallets]
    if free:
        for number, outcome in zip(free, await lane.apply([requests[number] for number in free]), strict=True):
            outcomes[number] = outcome
    return await settle(app, requests, outcomes, began)


async def settle(
    app: web.Application, requests: Sequence[Request], outcomes: list[Outcome], began: float
) -> list[Outcome]:
    """Note which wallets are in trouble, and try on the siding what waits for locked ones.

    `began`: when the client asked, on the loop's clock. Raises TimeoutError if an outcome is unknown.
    """
    siding = app[SIDING]
    until = began + app[SETTINGS].request_deadline
    locked: dict[str, list[int]] = defaultdict(list)
    for number, outcome in enumerate(outcomes):
        if not outcome.is_ours():
            wallet = requests[number].wallet_uuid
            siding.note(wallet, [outcome])
            if outcome.sqlstate == "55P03":
                locked[wallet].append(number)
    waiting = list(islice(locked.values(), SIDING_SHARE))
    if waiting:
        apart = (siding.apply_apart([requests[number] for number in some], until) for some in waiting)
        for some, found in zip(waiting, await asyncio.gather(*apart), strict=True):
            for number, outcome in zip(some, found, strict=True):
                outcomes[number] = outcome
    return outcomes


async def lanes(app: web.Application) -> AsyncIterator[None]:
    """Run the lanes while the app runs. They end after the last handler has its answer."""
    settings = app[SETTINGS]
    deadline = settings.request_deadline
    lanes = [Lane(str(number), settings.lane_batch, settings.lane_queue, deadline) for number in range(settings.lanes)]
    bulk = Lane("bulk", BULK_BATCH, settings.bulk_queue, deadline, BULK_HEADROOM)
    siding = Siding(settings.lane_queue, deadline)
    for lane in (*lanes, bulk):
        lane.trouble = siding.wallets
    app[LANES], app[BULK], app[SIDING] = lanes, bulk, siding
    kept = [(lane, Line(settings)) for lane in lanes]
    lent = [(bulk, Line(settings, BULK_PATIENCE)) for _ in range(BULK_LINES)]
    lent += [(siding, Line(settings, SIDING_PATIENCE)) for _ in range(SIDING_LINES)]
    tasks = [asyncio.create_task(lane.run(line)) for lane, line in kept]
    tasks += [asyncio.create_task(lane.run(line, IDLE)) for lane, line in lent]
    yield
    for lane in (*lanes, bulk, siding):
        lane.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _, line in (*kept, *lent):
        await line.close()
