"""The aiohttp application: routes, middlewares, resources."""

from functools import partial

from aiohttp import web

from app import database, docs, handlers, lanes, metrics
from app.access import access, access_log
from app.database import SETTINGS
from app.problems import REFUSALS, Problem, problems
from app.settings import Settings

OPERATION_TYPES = ("DEPOSIT", "WITHDRAW")
"""The types of operations that clients ask for."""
OUTCOMES = ("applied", *(code for sqlstate, (_, code) in REFUSALS.items() if sqlstate not in ("WA414", "WA419")))
"""What may come of an operation."""


def make_app(settings: Settings) -> web.Application:
    """Return the application; `settings.database_url` names the database."""
    app = web.Application(middlewares=[access, problems])
    app[SETTINGS] = settings
    app.cleanup_ctx.extend([access_log, database.pool, lanes.lanes])
    routes = [  # the router tries those that share a prefix in this order
        web.post("/api/v1/wallets/{wallet_uuid}/operation", handlers.apply_operation),
        web.post("/api/v1/wallets", handlers.create_wallet),
        web.get("/api/v1/wallets/{wallet_uuid}", handlers.get_wallet),
        web.get("/api/v1/wallets/{wallet_uuid}/operations", handlers.list_operations),
        web.get("/api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}", handlers.get_operation),
        web.post("/api/v1/operations", handlers.apply_operations),
        web.get("/healthz", handlers.healthz),
        web.get("/readyz", handlers.readyz),
        web.get("/metrics", metrics.metrics),
        *docs.routes(),
    ]
    for route in routes:
        route.kwargs["expect_handler"] = expect
    app.router.add_routes(routes)
    metrics.begin_at_zero(app.router, OPERATION_TYPES, OUTCOMES)
    return app


async def expect(request: web.Request) -> web.StreamResponse | None:
    """Let a client that expects 100-continue go on; no other expectation can be met (RFC 9110, section 10.1.1).

    aiohttp asks this before the middlewares, so a refusal has to go through them by itself.
    """
    if request.headers["Expect"].lower() != "100-continue":
        return await access(request, partial(problems, handler=refuse_expectation))
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0
    return None


async def refuse_expectation(_request: web.Request) -> web.StreamResponse:
    """Raise the 417."""
    raise Problem(417, "expectation_failed", "Only 100-continue can be expected")
