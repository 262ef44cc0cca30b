"""Around every request, also one that is not HTTP: its id, its line in the log, its place in the metrics."""

import asyncio
import functools
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from msgspec import UNSET

from app.calls.parties import PARTY
from app.logs import PEER, REQUEST_ID, AccessLine, AccessLog
from app.metrics import REQUEST_SECONDS
from app.web.connections import check_presence, check_protocol, was_paused
from app.web.problems import answer_to
from app.web.slash import redirection

ACCESS_LOG = web.AppKey("access_log", AccessLog)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""What may stand in a metric's label: a client could send any word."""

PROBE = "/readyz"
"""Asked all day long: it leaves a line only if the answer is not 200."""

_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


_histogram = functools.cache(REQUEST_SECONDS.labels)
"""A look-up of the labels for each request would cost more than the observation."""


async def answer(
    app: web.Application, peer_of: Callable[[web.Request], str], handler: Handler, request: web.Request
) -> web.StreamResponse:
    """Take the request's id from X-Request-ID or make one, and repeat it in the answer; log and measure the request.

    What was never routed, because it is not HTTP, has neither method nor path.
    """
    started = time.perf_counter()
    given = request.headers.get("X-Request-ID", "")
    request_id = given if _GOOD_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
    REQUEST_ID.set(request_id)
    PEER.set(peer := peer_of(request))
    response: web.StreamResponse | None
    try:
        check_protocol(request)
        if was_paused(started):
            await asyncio.sleep(0)  # have the loop see what came after the request
        check_presence(request)
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            response = await redirection(request)
            if response is None:
                raise
    except Exception as error:
        response = answer_to(error)
    response.headers["X-Request-ID"] = request_id
    if hdrs.EXPECT in request.headers and not request.content.is_eof():
        response.force_close()  # the body of a client that was not told to go on will never come
    elif request.method == "CONNECT" or request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
        response.force_close()  # aiohttp takes what follows for another protocol, which is not spoken here
    seconds = time.perf_counter() - started
    match = request._match_info  # noqa: SLF001
    resource = match.route.resource if match is not None else None
    route = resource.canonical if resource is not None else "none"
    method = request.method if request.method in METHODS else "other"
    _histogram(method, route, response.status).observe(seconds)
    log = app[ACCESS_LOG]
    if log.enabled and (route != PROBE or response.status != 200):
        asked = (request.method, request.rel_url.raw_path[:200]) if match is not None else ("-", "-")
        ms = round(seconds * 1000, 3)
        log.add(AccessLine(datetime.now(UTC), request_id, *asked, response.status, ms, peer, PARTY.get() or UNSET))
    return response


async def access_log(app: web.Application) -> AsyncIterator[None]:
    """Keep the access log while the app runs, and write its last lines."""
    app[ACCESS_LOG] = AccessLog()
    yield
    app[ACCESS_LOG].flush()
