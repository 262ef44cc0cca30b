"""Parties: who asks. What all of them share is shared out between them, so that one's flood delays mainly itself.

A party is the name of the key that a request carries; "" where there are no keys: then only common limits bound it.
"""

import asyncio
import contextlib
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, Generic, TypeVar

from aiohttp import web

from app.calls.refusals import Overloaded

T = TypeVar("T")

PARTY: ContextVar[str] = ContextVar("party", default="")
"""The party of the request that is being answered."""
CONTENTION = 10.0
"""Seconds for which parties are in contention after a request whose party is not that of the request before it."""
PORTION = 8
"""Requests let in at once in contention, at most: meanwhile the event loop does nothing else."""
REST_FACTOR = 0.5
"""The pause after a portion, as a part of the time that the event loop spent on it."""
REFUSAL_PAUSE = 0.5
"""Seconds before a party over its limit is told so: it may retry at once, and each answer costs time."""


class Parties:
    """How many requests each party has in flight, and whether there is more than one party."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight: dict[str, int] = {}
        self._last = ""
        self._changed = 0.0
        self._arrived: ByTurns[asyncio.Future[None]] = ByTurns()

    async def enter(self, party: str) -> None:
        """Count a request of a party as in flight, until leave(). In contention, let requests in by turns.

        Raises Overloaded, after a moment, if there are too many.
        """
        if party != self._last:
            if self._last:
                self._changed = asyncio.get_running_loop().time()
            self._last = party
        in_flight = self._in_flight.get(party, 0)
        if in_flight >= self._limit:
            await asyncio.sleep(REFUSAL_PAUSE)
            if self.in_contention():
                await self._turn(party)
            raise Overloaded(f"This key has {self._limit} requests in flight already")
        self._in_flight[party] = in_flight + 1
        if self.in_contention():
            try:
                await self._turn(party)
            except BaseException:
                self.leave(party)
                raise

    def leave(self, party: str) -> None:
        """Count a request as answered."""
        if left := self._in_flight[party] - 1:
            self._in_flight[party] = left
        else:
            del self._in_flight[party]

    def in_contention(self) -> bool:
        """Tell whether in the last CONTENTION seconds a request came from another party than the request before it."""
        return bool(self._changed) and asyncio.get_running_loop().time() - self._changed < CONTENTION

    async def _turn(self, party: str) -> None:
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._arrived:
            loop.call_soon(self._let_in)
        self._arrived.add(party, turn)
        await turn

    def _let_in(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(PORTION):
            if (turn := self._arrived.take()) is None:
                return
            if not turn.done():
                turn.set_result(None)
        if self._arrived:
            loop.call_soon(self._rest, time.perf_counter())

    def _rest(self, began: float) -> None:
        """Let in the next portion, after a part of the time that the last one took."""
        asyncio.get_running_loop().call_later(REST_FACTOR * (time.perf_counter() - began), self._let_in)


PARTIES = web.AppKey("parties", Parties)


def check_share(size: int, taken: int, own: int, full: str, wanted: int = 1) -> None:
    """Raise Overloaded if less than `wanted` is left, or the asking party would then hold more than remains.

    The dynamic threshold of Choudhury and Hahne (1998): one party alone has up to a half, two a third each. Only a
    party that has nothing may take all that is left.
    `size` is all that there is, `taken` what all have, `own` what this party has; `full` is what clients are told.
    """
    left = size - taken - wanted
    if left < 0:
        raise Overloaded(full)
    if PARTY.get() and own and own + wanted > left:
        raise Overloaded(f"{full}: this key has its share")


class ByTurns(Generic[T]):
    """What waits, by party: each in its own order, and the party that has had the least goes next.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): who was away has no credit for it.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[T]] = {}
        self._had: dict[str, float] = {}
        self._now = 0.0
        self._length = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return self._length

    def __iter__(self) -> Iterator[T]:
        """Return what waits, party by party."""
        for queue in self._queues.values():
            yield from queue

    def queues(self) -> Iterator[deque[T]]:
        """Return the queue of each party that waits."""
        return iter(self._queues.values())

    def of(self, party: str) -> int:
        """Return how many of a party wait."""
        return len(self._queues.get(party, ()))

    def add(self, party: str, item: T, key: Callable[[T], Any] | None = None) -> None:
        """Add an item of a party, behind its others or, with a `key`, in the order of that."""
        queue = self._queues.get(party)
        if queue is None:
            queue = self._queues[party] = deque()
            self._had[party] = max(self._now, self._had.get(party, 0.0))
        if key is None or not queue or key(queue[-1]) <= key(item):
            queue.append(item)
        else:
            insort(queue, item, key=key)
        self._length += 1

    def charge(self, party: str, cost: float) -> None:
        """Charge a party a cost that was known only afterwards, if anybody waits."""
        if self._queues:
            self._had[party] = self._had.get(party, self._now) + cost

    def take(self, fits: Callable[[T], bool] = lambda _: True, cost: Callable[[T], float] = lambda _: 1) -> T | None:
        """Take the first item of the party whose turn it is, of those whose first item fits; None if none does."""
        queues = self._queues
        if len(queues) == 1:  # as nearly always, and then nothing has to be counted
            party = next(iter(queues))
            queue = queues[party]
            if not fits(queue[0]):
                return None
            item = queue.popleft()
        else:
            fitting = [party for party, queue in queues.items() if fits(queue[0])]
            if not fitting:
                return None
            party = min(fitting, key=self._had.__getitem__)
            queue = queues[party]
            item = queue.popleft()
            self._now = max(self._now, self._had[party])
            self._had[party] += cost(item)
        self._length -= 1
        if not queue:
            del queues[party]
            if not queues:
                self._had.clear()
                self._now = 0.0
        return item


class Places:
    """Places that are lent by turns: a semaphore, fair between parties by the time for which each has had one.

    Time is measured with time.perf_counter(): mostly it is under a millisecond, too short for uvloop's clock. `most`:
    how many a party may have now.
    """

    def __init__(self, number: int, most: Callable[[], int] | None = None) -> None:
        self._free = number
        self._most = most or (lambda: number)
        self._lent: Counter[str] = Counter()
        self._turns: ByTurns[tuple[float, str, asyncio.Future[None]]] = ByTurns()

    def waiting(self) -> int:
        """Return how many wait for a place, those who gave up meanwhile included."""
        return len(self._turns)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Lend a place."""
        began = await self.take()
        try:
            yield
        finally:
            self.give_back(began)

    async def take(self, since: float | None = None) -> float:
        """Take a place; return when it was taken, by time.perf_counter(), for give_back.

        `since`: when the work came, on the loop's clock: a party's earlier work goes first. None: now.
        """
        party = PARTY.get()
        if self._free and self._lent[party] < self._most():
            self._free -= 1
            self._lent[party] += 1
            return time.perf_counter()
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._turns.add(party, (loop.time() if since is None else since, party, turn), itemgetter(0))
        try:
            await turn
        except BaseException:
            if not turn.cancelled():  # it was given a place, and gives up at the same moment
                self._pass_on(party)
            raise
        return time.perf_counter()

    def give_back(self, began: float) -> None:
        """Give a place back that was had since `began`, and count that time to the party."""
        party = PARTY.get()
        self._turns.charge(party, time.perf_counter() - began)
        self._pass_on(party)

    def _pass_on(self, party: str) -> None:
        """Take a place back from a party, and lend what may be lent."""
        self._free += 1
        self._lent[party] -= 1
        if not self._lent[party]:
            del self._lent[party]
        most = self._most()
        while self._free and (waiting := self._turns.take(lambda each: self._lent[each[1]] < most, lambda _: 0)):
            _, party, turn = waiting
            if not turn.done():
                self._free -= 1
                self._lent[party] += 1
                turn.set_result(None)
