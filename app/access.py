"""Around every request: its id, its line in the log, its place in the metrics."""

import functools
import random
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from aiohttp import web
from aiohttp.typedefs import Handler

from app.logs import REQUEST_ID, AccessLine, AccessLog
from app.metrics import REQUEST_SECONDS

ACCESS_LOG = web.AppKey("access_log", AccessLog)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""What may stand in a metric's label: a client could send any word."""

_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


_histogram = functools.cache(REQUEST_SECONDS.labels)
"""A look-up of the labels for each request would cost more than the observation."""


@web.middleware
async def access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take the request's id from X-Request-ID or make one, and repeat it in the answer; log and measure the request."""
    started = time.perf_counter()
    given = request.headers.get("X-Request-ID", "")
    request_id = given if _GOOD_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
    REQUEST_ID.set(request_id)
    response = await handler(request)
    response.headers["X-Request-ID"] = request_id
    seconds = time.perf_counter() - started
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "none"
    method = request.method if request.method in METHODS else "other"
    _histogram(method, route, response.status).observe(seconds)
    log = request.app[ACCESS_LOG]
    if log.enabled:
        path, ms = request.rel_url.raw_path[:200], round(seconds * 1000, 3)
        log.add(AccessLine(datetime.now(UTC), request_id, request.method, path, response.status, ms))
    return response


async def access_log(app: web.Application) -> AsyncIterator[None]:
    """Keep the access log while the app runs, and write its last lines."""
    app[ACCESS_LOG] = AccessLog()
    yield
    app[ACCESS_LOG].flush()
