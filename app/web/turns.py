"""Turns: what keeps the event loop busy for long is done by one request at a time, and leaves others as much time."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from app.calls.parties import Places

T = TypeVar("T")


class Turns:
    """A queue of long steps: decoding a bulk request, say, for which everybody else has to wait."""

    def __init__(self) -> None:
        self.places = Places(1)

    async def take(self, step: Callable[[], T]) -> T:
        """Take a step and return what it returns; the next one begins after as much time as this one took."""
        loop = asyncio.get_running_loop()
        async with self.places:
            began = loop.time()
            done = step()
            await asyncio.sleep(loop.time() - began)
            return done
