"""The aiohttp application: routes, middlewares, resources."""

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler

from app import database, docs, handlers, lanes, metrics
from app.access import access, access_log
from app.database import SETTINGS
from app.problems import expect, problems
from app.settings import Settings


def make_app(settings: Settings) -> web.Application:
    """Return the application; `settings.database_url` names the database."""
    app = web.Application(middlewares=[access, problems, deadline])
    app[SETTINGS] = settings
    app.cleanup_ctx.extend([access_log, database.pool, lanes.lanes])
    routes = [
        *docs.routes(),
        web.get("/metrics", metrics.metrics),
        web.post("/api/v1/wallets", handlers.create_wallet),
        web.get("/api/v1/wallets/{wallet_uuid}", handlers.get_wallet),
        web.post("/api/v1/wallets/{wallet_uuid}/operation", handlers.apply_operation),
        web.get("/api/v1/wallets/{wallet_uuid}/operations", handlers.list_operations),
        web.get("/api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}", handlers.get_operation),
        web.post("/api/v1/operations", handlers.apply_operations),
        web.get("/healthz", handlers.healthz),
        web.get("/readyz", handlers.readyz),
    ]
    for route in routes:
        route.kwargs["expect_handler"] = expect
    app.router.add_routes(routes)
    return app


@web.middleware
async def deadline(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give up a request that takes longer than its deadline: its TimeoutError becomes a 503."""
    async with asyncio.timeout(request.app[SETTINGS].request_deadline):
        return await handler(request)
