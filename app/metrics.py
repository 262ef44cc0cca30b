"""Prometheus metrics. Labels are few and known beforehand: route templates, never a wallet's name.

With several workers, prometheus-client shares the values through files in PROMETHEUS_MULTIPROC_DIR, which
app/__main__.py sets before this module is imported.
"""

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version

from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

REQUEST_SECONDS = Histogram(
    "wallet_request_seconds",
    "Time from a request's head to its answer; the count is the number of requests.",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
OPERATIONS = Counter("wallet_operations", "Operations decided, by type and outcome.", ["type", "outcome"])
LANE_WAITING = Gauge(
    "wallet_lane_waiting",
    "Requests that wait in the lanes, as of at most half a second ago.",
    ["lane"],
    multiprocess_mode="livesum",
)
WALLETS_APART = Gauge(
    "wallet_wallets_apart",
    "Wallets whose requests are tried apart: somebody keeps them locked, or the database refuses their operations.",
    multiprocess_mode="livesum",
)
BATCH_SIZE = Histogram(
    "wallet_batch_size",
    "Operations in one call of a line.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 10_000),
)
CALLS_IN_FLIGHT = Gauge("wallet_calls_in_flight", "Lines that are applying operations.", multiprocess_mode="livesum")
RESENDS = Counter("wallet_resends", "Calls made again because an earlier one failed or was lost.")
POOL_IN_USE = Gauge("wallet_pool_in_use", "Connections of the pool that are lent.", multiprocess_mode="livesum")
LINES_DROPPED = Counter("wallet_log_lines_dropped", "Log lines dropped because nobody read standard error.")
BUILD_INFO = Gauge("wallet_build_info", "Always 1.", ["python", "aiohttp", "asyncpg"], multiprocess_mode="livemax")
BUILD_INFO.labels(platform.python_version(), version("aiohttp"), version("asyncpg")).set(1)


MAX_AGE = 1.0
"""Seconds for which collected values are served again: collecting blocks the event loop."""

_collected = (b"", -MAX_AGE)


def begin_at_zero(router: web.UrlDispatcher, types: Iterable[str], outcomes: Iterable[str]) -> None:
    """Make the series that alerts look at, of the routes of the API and the health checks.

    Otherwise a series begins with its first event, and rate() misses what it began with.
    """
    for route in router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        if path.startswith("/api/") or path in ("/healthz", "/readyz"):
            for status in (429, 500, 503):
                REQUEST_SECONDS.labels(route.method, path, status)
            if route.method != "HEAD":
                REQUEST_SECONDS.labels(route.method, path, 200)
    for operation_type in types:
        for outcome in outcomes:
            OPERATIONS.labels(operation_type, outcome)


async def metrics(_request: web.Request) -> web.Response:
    """GET /metrics: the values of all workers, in Prometheus' text format, up to MAX_AGE old."""
    global _collected
    text, collected_at = _collected
    if time.monotonic() - collected_at >= MAX_AGE:
        text = _collect()
        _collected = text, time.monotonic()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _collect() -> bytes:
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
