"""Which lane a request goes on, and what becomes of one whose wallets are in trouble."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import islice

from aiohttp import web

from app.calls.database import IDLE, SETTINGS, deadline_of
from app.calls.lane import BULK_BATCH, HEADROOM, Lane, Siding
from app.calls.line import UNTRIED, Line, Outcome, Request
from app.calls.parties import PARTIES
from app.calls.refusals import Overloaded
from app.calls.trouble import Trouble

BULK_LINES = 2
"""Connections for bulk requests in each worker."""
SIDING_LINES = 1
"""Connections for wallets in trouble in each worker."""
BULK_PATIENCE = 2
"""A bulk call waits this many times as long as others for locks: it may wait for another bulk call."""
SIDING_PATIENCE = 2.5
"""A call of the siding waits this many times as long as others for a lock: long calls may keep a wallet locked."""
SIDING_SHARE = 100
"""Groups of a bulk request's operations, with no wallet in common, that may wait on the siding; others are 55P03."""
BULK_HEADROOM = 2 * HEADROOM
"""HEADROOM for bulk requests, whose calls wait longer for locks."""

LANES = web.AppKey("lanes", list[Lane])
BULK = web.AppKey("bulk", Lane)
SIDING = web.AppKey("siding", Siding)
TROUBLE = web.AppKey("trouble", Trouble)


def admit_bulk(app: web.Application) -> None:
    """Raise Overloaded if too many bulk requests wait, before another one is received."""
    app[BULK].check_room()


async def apply_one(app: web.Application, request: Request) -> Outcome:
    """Apply a request on its wallet's lane. Raises Overloaded, and TimeoutError if the outcome is unknown."""
    lanes = app[LANES]
    lane = lanes[hash(request.wallet_uuid) % len(lanes)]
    if app[TROUBLE].wallets:
        [outcome] = await _apply(app, lane, [request])
        return outcome
    last = deadline_of(app[SETTINGS].request_deadline)
    [outcome] = await lane.apply([request], until=last)
    if outcome.is_locked():
        [outcome] = await _settle(app, [request], [outcome], last)
    return outcome


async def apply_all(app: web.Application, requests: Sequence[Request], *, atomic: bool = False) -> list[Outcome]:
    """Apply the requests of a bulk request. Raises Overloaded, and TimeoutError if the outcomes are unknown."""
    if not requests:
        return []
    return await (_apply_atomic(app, requests) if atomic else _apply(app, app[BULK], requests))


async def _apply_atomic(app: web.Application, requests: Sequence[Request]) -> list[Outcome]:
    """Apply all of a bulk request's requests or none, on the siding if any of their wallets is in trouble."""
    bulk, trouble = app[BULK], app[TROUBLE]
    last = deadline_of(app[SETTINGS].request_deadline)
    outcomes = None
    if not trouble.wallets or not any(map(trouble.meets, requests)):
        outcomes = await bulk.apply(requests, atomic=True, until=last)
    try:
        return await app[SIDING].apply_atomic(requests, last, outcomes)
    except Overloaded:
        if outcomes is None:
            raise
        return outcomes


async def _apply(app: web.Application, lane: Lane, requests: Sequence[Request]) -> list[Outcome]:
    """Apply requests on a lane; those that need a wallet in trouble, or meet a locked one, go on the siding."""
    last = deadline_of(app[SETTINGS].request_deadline)
    trouble = app[TROUBLE]
    if not trouble.wallets:
        return await _settle(app, requests, await lane.apply(requests, until=last), last)
    outcomes = [UNTRIED] * len(requests)
    free = [number for number, request in enumerate(requests) if not trouble.meets(request)]
    if free:
        found = await lane.apply([requests[number] for number in free], until=last)
        for number, outcome in zip(free, found, strict=True):
            outcomes[number] = outcome
    return await _settle(app, requests, outcomes, last)


async def _settle(
    app: web.Application, requests: Sequence[Request], outcomes: list[Outcome], last: float
) -> list[Outcome]:
    """Try on the siding what a wallet in trouble kept from being applied.

    `last`: their deadline, on the loop's clock. Raises TimeoutError if an outcome is unknown.
    """
    siding = app[SIDING]
    locked = [number for number, outcome in enumerate(outcomes) if outcome.is_locked()]
    parts = list(islice(_apart(requests, locked), SIDING_SHARE))
    if parts:
        apart = (siding.apply_apart([requests[number] for number in part], last) for part in parts)
        for part, found in zip(parts, await asyncio.gather(*apart), strict=True):
            for number, outcome in zip(part, found, strict=True):
                outcomes[number] = outcome
    return outcomes


def _apart(requests: Sequence[Request], numbers: Sequence[int]) -> Iterable[list[int]]:
    """Group requests, by their numbers, so that no two groups have a wallet in common; each group is in order."""
    leads: dict[str, str] = {}

    def part_of(wallet: str) -> str:
        while (lead := leads.setdefault(wallet, wallet)) != wallet:
            leads[wallet] = wallet = leads.get(lead, lead)
        return wallet

    for number in numbers:
        wallet, *others = requests[number].wallets()
        for other in others:
            leads[part_of(other)] = part_of(wallet)
    parts: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        parts[part_of(requests[number].wallet_uuid)].append(number)
    return parts.values()


async def keep_lanes(app: web.Application) -> AsyncIterator[None]:
    """Run the lanes while the app runs. They end after the last handler has its answer."""
    settings = app[SETTINGS]
    deadline = settings.request_deadline
    trouble, parties = Trouble(), app[PARTIES]
    lanes = [
        Lane(str(number), settings.lane_batch, settings.lane_queue, deadline, trouble, parties)
        for number in range(settings.lanes)
    ]
    bulk = Lane("bulk", BULK_BATCH, settings.bulk_queue, deadline, trouble, parties, BULK_HEADROOM)
    siding = Siding(settings.lane_queue, deadline, trouble, parties)
    app[LANES], app[BULK], app[SIDING], app[TROUBLE] = lanes, bulk, siding, trouble
    kept = [(lane, Line(settings)) for lane in lanes]
    lent = [(bulk, Line(settings, BULK_PATIENCE)) for _ in range(BULK_LINES)]
    lent += [(siding, Line(settings, SIDING_PATIENCE, thorough=True)) for _ in range(SIDING_LINES)]
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
