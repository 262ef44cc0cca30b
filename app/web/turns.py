"""Turns: what keeps the event loop busy for long is done by one request at a time, and leaves others as much time."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from app.calls.parties import Parties, Places

T = TypeVar("T")
Item = TypeVar("Item")

STEP = 250
"""Operations of a bulk request that are decoded or encoded in one step in contention, at most: a few milliseconds."""
LONG = 0.005
"""Seconds. After a longer step the next waits as long as it took; shorter ones follow at once, to share a call."""


class Turns:
    """Long work in steps: decoding a bulk request, say, for which everybody else has to wait.

    In contention the steps are short. Between two steps of a party, others have a turn; the work of a party is done in
    the order in which it came.
    """

    def __init__(self, parties: Parties) -> None:
        self._parties = parties
        self.places = Places(1)

    async def take(self, step: Callable[[], T], since: float | None = None) -> T:
        """Take a step, and return at once what it returns.

        After a long one, and in contention after any, the next one begins after as much time as this one took.
        `since`: when the work came that the step is part of, on the loop's clock.
        """
        began = await self.places.take(since)
        try:
            return step()
        finally:
            took = time.perf_counter() - began
            rest = took if took > LONG or self._parties.in_contention() else 0
            asyncio.get_running_loop().call_later(rest, self.places.give_back, began)

    def takes_several(self, items: int) -> bool:
        """Tell whether so many items take several steps."""
        return items > STEP and self._parties.in_contention()

    async def take_each(self, step: Callable[[Sequence[Item]], Sequence[T]], items: Sequence[Item]) -> list[T]:
        """Take a step for each part of some items, and return together what they return."""
        since = asyncio.get_running_loop().time()
        done: list[T] = []
        for begin in range(0, len(items), STEP):
            part = items[begin : begin + STEP]
            done += await self.take(lambda: step(part), since)  # noqa: B023
        return done
