"""Lanes: requests for one wallet share a call instead of queueing for its row lock one commit at a time.

Single requests for a wallet always use the same lane of a process; a transfer uses its payer's. A lane has one call in
flight; what arrives meanwhile waits, and all of it goes in the next call, one commit for all. An idle lane sends at
once. The queue is bounded, and so is the time that a request takes: at its deadline it is answered 503, whatever the
lane is doing. Its call was given up before that, and the database looks at the clock itself: a call that comes too late
is rolled back, and one that is in time holds its locks until it is committed. So if a retry after a 503 is refused, the
earlier call cannot apply the operation later.

Bulk requests have a lane of their own, which may have a few calls in flight: while one is under way, another is sent
once it carries as much, or after a moment. An atomic one goes alone.

A wallet that somebody keeps locked delays the first call that needs it by a lock_timeout. If the database refuses
an operation, its call is made again in halves. From then on requests for such a wallet wait on the siding, a separate
lane, each of whose calls has the requests of only one client for that wallet. They do so until an outcome shows that it
is unlocked or, where the database refused an operation, until one is applied. A transfer goes there if either of its
wallets is in trouble.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from app.calls.database import LEAD, deadline_of
from app.calls.line import UNTRIED, Line, Outcome, Request
from app.calls.parties import PARTY, ByTurns, Parties, check_share
from app.calls.refusals import Overloaded
from app.calls.trouble import Trouble
from app.metrics import LANE_WAITING

BULK_BATCH = 4096
"""Operations in a call that several bulk requests share, at most. A larger request goes by itself."""
LINGER = 0.005
"""Seconds that bulk requests wait, at most, for others to share a call while another call is under way."""
HEADROOM = 0.1
"""The part of its deadline that a request must have left to go in a call.

Without this, after a long outage, the deadline of the oldest request would cut each call short for the others.
"""
CONTENTION_DIVISOR = 32
"""The divisor of a call's size while several keys are active.

All requests of a call are answered together, and their clients ask again together: the larger it is, the longer others
wait.
"""
SHORT = 100
"""Operations of a call that is over soon."""
SIDING_HEADROOM = 3 * HEADROOM
"""HEADROOM for the siding, whose calls wait longer for locks."""
GAUGE_INTERVAL = 0.5
"""Seconds after an arrival until the requests that wait are counted."""

_log = logging.getLogger("wallet")


class Waiting(NamedTuple):
    """What one client waits for: requests, the future of their outcomes, and their deadline (on the loop's clock).

    A client is a single or a bulk request over HTTP.

    `atomic`: all or none of them are to be applied. `party`: who asks. On the siding, `wallets` are
    those that they change, and `tried` is when they were tried last (0: not yet).
    """

    requests: Sequence[Request]
    outcomes: asyncio.Future[list[Outcome]]
    until: float
    atomic: bool = False
    party: str = ""
    wallets: frozenset[str] = frozenset()
    tried: float = 0


_until = attrgetter("until")


def _cost(waiting: Waiting) -> float:
    return len(waiting.requests)


def _size(waiting: Iterable[Waiting]) -> int:
    return sum(len(each.requests) for each in waiting)


def _names_culprits(sent: Sequence[Waiting], outcomes: Iterable[Outcome]) -> bool:
    """Tell whether outcomes say which requests failed: an atomic one may be refused as a whole, at its commit."""
    return not sent[0].atomic or any(outcome.is_ours() or outcome.is_locked() for outcome in outcomes)


class Lane:
    """A queue of requests and the lines that send them: all that wait in one call, one call at a time on each line."""

    def __init__(
        self,
        name: str,
        batch: int,
        limit: int,
        deadline: float,
        trouble: Trouble,
        parties: Parties,
        headroom: float = HEADROOM,
    ) -> None:
        self._gauge = LANE_WAITING.labels(name)
        self._batch = batch
        self._limit = limit
        self._deadline = deadline
        self._headroom = headroom * deadline
        self._trouble = trouble
        self._parties = parties
        self._waiting: ByTurns[Waiting] = ByTurns()
        self._sent: dict[Line, list[Waiting]] = {}
        self._late: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._watched = math.inf
        self._counting = False

    def apply(
        self, requests: Sequence[Request], *, atomic: bool = False, until: float | None = None
    ) -> asyncio.Future[list[Outcome]]:
        """Queue requests and return the future of their outcomes, in order, or of a TimeoutError at their deadline.

        They go in one call (in contention, many in several parts); `atomic` ones share theirs with nobody. `until` is
        their deadline, if it is known already. Raises Overloaded if too many clients wait already.
        """
        party = PARTY.get()
        self._admit()
        until = until or deadline_of(self._deadline)
        waiting = Waiting(requests, self._loop.create_future(), until, atomic, party)
        self._insert(waiting)
        return waiting.outcomes

    def _insert(self, waiting: Waiting) -> None:
        """Queue in the order of deadlines: one that has waited before may be due before others of its party."""
        self._waiting.add(waiting.party, waiting, _until)
        if waiting.until < self._watched:
            self._watch_at(waiting.until)

    def check_room(self) -> None:
        """Raise Overloaded if too many clients wait already, or too many of this party."""
        party = PARTY.get()
        check_share(self._limit, len(self._waiting), self._waiting.of(party), "Too many requests are waiting")

    def _admit(self) -> None:
        if 2 * len(self._waiting) + 2 > self._limit:  # else everybody's share is free
            self.check_room()
        self._arrived.set()
        if not self._counting:
            self._counting = True
            self._loop.call_later(GAUGE_INTERVAL, self._count)

    def _count(self) -> None:
        self._counting = False
        self._gauge.set(len(self._waiting))

    async def run(self, line: Line, idle: float | None = None) -> None:
        """Send what waits, until cancelled; close the line's connection when nothing has come for `idle` seconds.

        Nothing is awaited between the look at the queue and the wait for an arrival, so no arrival goes unseen.
        """
        if idle is None:
            await line.open()
        while True:
            while not self._is_due():
                self._arrived.clear()
                if idle is None:
                    await self._arrived.wait()
                    continue
                try:
                    async with asyncio.timeout(idle):
                        await self._arrived.wait()
                except TimeoutError:
                    await line.close()
            if any(self._sent.values()) and not self._parties.in_contention():
                await self._linger()
            self._sent[line] = self._take()
            if not await self._send(line):
                await asyncio.sleep(0)  # let the handlers just answered run first: they queue on the siding

    def _is_due(self) -> bool:
        """Tell whether anything may go now."""
        if not self._waiting or not (away := self._away()):
            return bool(self._waiting)
        return any(queue[0].party not in away for queue in self._waiting.queues())

    def _away(self) -> set[str]:
        """In contention, return the parties with a long call under way: the other lines are for other parties."""
        if not self._parties.in_contention():
            return set()
        return {waiting.party for sent in self._sent.values() if _size(sent) > SHORT for waiting in sent}

    def _most(self) -> int | None:
        """Return how many operations go in one part of a call, at most; None: any number, as there is no contention."""
        return max(self._batch // CONTENTION_DIVISOR, 1) if self._parties.in_contention() else None

    async def _linger(self) -> None:
        """While another line has a call under way, wait a little for as many requests as it carries.

        Where both are for one wallet, the second call waits for the first anyway, and nobody can join it any more.
        A full queue goes at once, so lingering refuses nobody; so does one with an atomic request, which nobody joins.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (
                    len(self._waiting) < self._limit
                    and _size(self._waiting) < self._enough()
                    and not any(waiting.atomic for waiting in self._waiting)
                ):
                    self._arrived.clear()
                    await self._arrived.wait()

    def _enough(self) -> int:
        return min(self._batch, max(map(_size, self._sent.values()), default=0))

    def _take(self) -> list[Waiting]:
        """Take what is to go in the next call, by turns; single requests for wallets in trouble are UNTRIED."""
        taken: list[Waiting] = []
        room = self._most() or self._batch
        away = self._away()

        def fits(waiting: Waiting) -> bool:
            if taken and (waiting.atomic or room < len(waiting.requests)):
                return False
            return waiting.party not in away

        while (waiting := self._waiting.take(fits, _cost)) is not None:
            if waiting.outcomes.done():  # it was given up before it was sent
                continue
            if self._trouble.wallets and len(waiting.requests) == 1 and self._trouble.meets(waiting.requests[0]):
                waiting.outcomes.set_result([UNTRIED])
                continue
            taken.append(waiting)
            room -= len(waiting.requests)
            if waiting.atomic:
                break
        self._gauge.set(len(self._waiting))
        return self._with_headroom(sorted(taken, key=_until))

    def _with_headroom(self, sent: list[Waiting]) -> list[Waiting]:
        """Return those that have time for a call; the others wait for their 503."""
        least = self._loop.time() + self._headroom
        self._late += [waiting for waiting in sent if waiting.until <= least]
        return [waiting for waiting in sent if waiting.until > least]

    async def _send(self, line: Line) -> bool:
        """Send what was taken, and tell whether every outcome was ours.

        The call is given up shortly before the deadline of its oldest request; the others are sent again.
        """
        again, good = False, True
        while sent := self._sent[line]:
            requests = [request for waiting in sent for request in waiting.requests]
            try:
                last = sent[0].until - LEAD * self._deadline
                found = await line.apply(requests, last, again=again, atomic=sent[0].atomic, most=self._most())
            except TimeoutError:
                again = True
                self._sent[line] = self._with_headroom(sent)
            except Exception:
                _log.exception("a lane failed")
                self._late += sent
                self._sent[line] = []
            else:
                good = all(outcome.is_ours() for outcome in found)
                if (self._trouble.wallets or not good) and _names_culprits(sent, found):
                    self._trouble.note(requests, found)
                outcomes = iter(found)
                for waiting in sent:
                    own = list(islice(outcomes, len(waiting.requests)))
                    if line.unsure and any(map(Outcome.is_locked, own)):
                        self._late.append(waiting)
                    elif not waiting.outcomes.done():
                        waiting.outcomes.set_result(own)
                self._sent[line] = []
        return good

    def _watch(self) -> None:
        """Keep the deadlines, whatever the lines are doing: one timer, for the oldest that has no answer."""
        now = self._loop.time()
        self._late = sorted((late for late in self._late if not late.outcomes.done()), key=_until)
        due = []
        for queue in (self._late, *self._sent.values(), *self._waiting.queues()):  # each from its oldest on
            for waiting in queue:
                if waiting.until > now:
                    due.append(waiting.until)
                    break
                if not waiting.outcomes.done():
                    waiting.outcomes.set_exception(TimeoutError())
        self._watch_at(min(due, default=math.inf))

    def _watch_at(self, moment: float) -> None:
        self.close()
        self._watched = moment
        self._timer = self._loop.call_at(moment, self._watch) if moment < math.inf else None

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()


class Siding(Lane):
    """The lane for wallets that are in trouble. A call takes, for each of them, the requests of one client only.

    A request for such a wallet delays the others in its call. Requests that need the same wallets in trouble form a
    group. The group that was tried longest ago comes first, and of its requests those that were not tried yet: a wallet
    that many wait for must not keep another from showing that it is free.
    """

    def __init__(self, limit: int, deadline: float, trouble: Trouble, parties: Parties) -> None:
        super().__init__("siding", BULK_BATCH, limit, deadline, trouble, parties, SIDING_HEADROOM)
        self._troubled = False
        self._tried: dict[frozenset[str], float] = {}
        """When each group was last in a call, on the loop's clock, by its wallets in trouble."""

    async def apply_apart(self, requests: Sequence[Request], until: float) -> list[Outcome]:
        """Apply a client's requests, trying again what is locked, and return their outcomes in order.

        What stayed locked up to the deadline (on the loop's clock) is 55P03, or the SQLSTATE with which the database
        last refused an operation on its wallet. Raises TimeoutError if the outcome is unknown at the deadline.
        """
        outcomes = [UNTRIED] * len(requests)
        tried = 0.0
        with contextlib.suppress(Overloaded):  # no room to wait: it stays 55P03
            while locked := [number for number, outcome in enumerate(outcomes) if outcome.is_locked()]:
                if self._loop.time() >= until - self._headroom:
                    break
                found = await self._queue([requests[number] for number in locked], until, tried)
                tried = self._loop.time()
                for number, outcome in zip(locked, found, strict=True):
                    outcomes[number] = outcome
        told = zip(requests, outcomes, strict=True)
        return [self._trouble.outcome_of(request) if outcome.is_locked() else outcome for request, outcome in told]

    async def apply_atomic(
        self, requests: Sequence[Request], until: float, outcomes: list[Outcome] | None
    ) -> list[Outcome]:
        """Apply an atomic request, trying again while any of its wallets is locked.

        `outcomes`: those of an earlier attempt. If the deadline comes before a try that met no lock, what was locked is
        55P03, or the SQLSTATE with which the database last refused an operation on one of its wallets. Raises
        TimeoutError if the outcome is unknown at the deadline, and Overloaded.
        """
        outcomes = outcomes or [UNTRIED] * len(requests)
        tried = 0.0
        while any(map(Outcome.is_locked, outcomes)):
            if self._loop.time() >= until - self._headroom:
                locked = self._trouble.outcome_of(*requests)
                return [locked if outcome.is_locked() else outcome for outcome in outcomes]
            outcomes = await self._queue(requests, until, tried, atomic=True) or outcomes
            tried = self._loop.time()
        return outcomes

    def _queue(
        self, requests: Sequence[Request], until: float, tried: float, *, atomic: bool = False
    ) -> asyncio.Future[list[Outcome]]:
        """Queue requests in the order of their deadlines."""
        party = PARTY.get()
        self._admit()
        wallets = frozenset(wallet for request in requests for wallet in request.wallets())
        waiting = Waiting(requests, self._loop.create_future(), until, atomic, party, wallets, tried)
        self._insert(waiting)
        return waiting.outcomes

    def _take(self) -> list[Waiting]:
        """Take what is to go in the next call; answer those that have no time for another one and were not applied.

        Calls begin alternately with what needs a wallet in trouble and what no longer does. An atomic request has a
        call to itself, and so has one for a wallet whose operations the database refuses, so that no other request
        fails with it. Without time for a call, each is UNTRIED; an atomic request gets an empty list and keeps its
        earlier outcomes.
        """
        trouble, refusals = self._trouble.wallets, self._trouble.refusals.keys()
        taken: list[Waiting] = []
        left: list[Waiting] = []
        met: set[str] = set()
        groups: set[frozenset[str]] = set()
        room = self._batch
        now = self._loop.time()
        least = now + self._headroom

        def turn(waiting: Waiting) -> tuple[bool, float, float, float]:
            group = waiting.wallets & trouble
            return bool(group) is self._troubled, self._tried.get(group, 0), waiting.tried, waiting.until

        for waiting in sorted(self._waiting, key=turn):
            alone = waiting.atomic or not refusals.isdisjoint(waiting.wallets)
            if waiting.outcomes.done():
                continue
            if waiting.until <= least:
                waiting.outcomes.set_result([] if waiting.atomic else [UNTRIED] * len(waiting.requests))
            elif taken and (alone or len(waiting.requests) > room or not met.isdisjoint(waiting.wallets)):
                left.append(waiting)
            else:
                taken.append(waiting)
                groups.add(group := waiting.wallets & trouble)
                met |= group
                room = 0 if alone else room - len(waiting.requests)
        self._troubled = bool(met)
        self._tried = {group: moment for group, moment in self._tried.items() if moment > now - self._deadline}
        self._tried |= dict.fromkeys(groups, now)
        self._waiting = ByTurns()
        for waiting in sorted(left, key=_until):
            self._waiting.add(waiting.party, waiting)
        self._gauge.set(len(left))
        return sorted(taken, key=_until)
