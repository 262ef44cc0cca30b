"""Which lane a request goes on, and what becomes of one whose wallet is in trouble."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from itertools import islice

from aiohttp import web

from app.calls.database import IDLE, SETTINGS
from app.calls.lane import BULK_BATCH, HEADROOM, Lane, Siding
from app.calls.line import Line, Outcome, Request, refused

BULK_LINES = 2
"""Connections for bulk requests in each worker."""
SIDING_LINES = 1
"""Connections for wallets in trouble in each worker."""
BULK_PATIENCE = 2
"""Times that a bulk call waits for locks as long as others do: what it waits for may be another bulk call."""
SIDING_PATIENCE = 2.5
"""Times that a call of the siding waits for a lock as long as others do: a wallet may be in the hands of long calls."""
SIDING_SHARE = 100
"""Wallets for which one bulk request may wait on the siding; what it wants of more is not applied at once."""
BULK_HEADROOM = 2 * HEADROOM
"""The part of a deadline that bulk requests have before them: their calls wait longer for locks."""

LANES = web.AppKey("lanes", list[Lane])
BULK = web.AppKey("bulk", Lane)
SIDING = web.AppKey("siding", Siding)


def admit_bulk(app: web.Application) -> None:
    """Raise Overloaded if too many bulk requests wait, before another one is received."""
    app[BULK].see_room()


async def apply_one(app: web.Application, request: Request) -> Outcome:
    """Apply a request on its wallet's lane. Raises Overloaded, and TimeoutError if the outcome is unknown."""
    lanes = app[LANES]
    lane = lanes[hash(request.wallet_uuid) % len(lanes)]
    if app[SIDING].wallets:
        [outcome] = await _apply(app, lane, [request])
        return outcome
    began = lane.now()
    [outcome] = await lane.apply([request])
    if not outcome.is_ours():
        [outcome] = await _settle(app, [request], [outcome], began)
    return outcome


async def apply_all(app: web.Application, requests: Sequence[Request]) -> list[Outcome]:
    """Apply the requests of a bulk request. Raises Overloaded, and TimeoutError if the outcomes are unknown."""
    return await _apply(app, app[BULK], requests) if requests else []


async def _apply(app: web.Application, lane: Lane, requests: Sequence[Request]) -> list[Outcome]:
    """Apply requests on a lane, but for those for wallets in trouble."""
    began = lane.now()
    wallets = app[SIDING].wallets
    outcomes = [refused("55P03")] * len(requests)
    free = [number for number, request in enumerate(requests) if request.wallet_uuid not in wallets]
    if free:
        for number, outcome in zip(free, await lane.apply([requests[number] for number in free]), strict=True):
            outcomes[number] = outcome
    return await _settle(app, requests, outcomes, began)


async def _settle(
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


async def keep_lanes(app: web.Application) -> AsyncIterator[None]:
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
