"""The aiohttp application: routes, resources, and what is looked at before a handler is asked."""

from collections.abc import Callable
from functools import partial
from typing import get_args

from aiohttp import web
from aiohttp.typedefs import Handler

from app import metrics
from app.calls import database, dispatch
from app.calls.database import SETTINGS
from app.calls.parties import PARTIES, Parties
from app.calls.refusals import DATABASE_REFUSED, REFUSALS
from app.settings import Settings
from app.web import connections, docs, handlers, origins, party
from app.web.body import ROOM, Room, check_head
from app.web.messages import OperationType, check_query
from app.web.request_log import access_log, answer
from app.web.turns import Turns

MIB = 1024 * 1024

OPERATION_TYPES = get_args(OperationType)
"""The types of operations that clients ask for."""
NOT_OF_OPERATIONS = ("WA414", "WA419", "WA417")
"""What is refused to other requests only."""
OUTCOMES = (
    "applied",
    *(code for sqlstate, (_, code) in REFUSALS.items() if sqlstate not in NOT_OF_OPERATIONS),
    DATABASE_REFUSED[1],
)
"""What may come of an operation."""


def make_app(settings: Settings) -> web.Application:
    """Return the application; `settings.database_url` names the database."""
    app = web.Application(handler_args={"auto_decompress": False})
    app[SETTINGS] = settings
    app[PARTIES] = parties = Parties(settings.key_requests)
    app[ROOM] = Room(settings.body_memory * MIB)
    app[handlers.TURNS] = Turns(parties)
    app.cleanup_ctx.extend([access_log, database.pool, dispatch.keep_lanes])
    routes = [  # the router tries those that share a prefix in this order
        web.post("/api/v1/wallets/{wallet_uuid}/operation", handlers.apply_operation),
        web.put("/api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}", handlers.put_operation),
        web.get("/api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}", handlers.get_operation),
        web.get("/api/v1/wallets/{wallet_uuid}/operations", handlers.list_operations),
        web.get("/api/v1/wallets/{wallet_uuid}/holds", handlers.list_holds),
        web.get("/api/v1/wallets/{wallet_uuid}/balance", handlers.get_balance),
        web.get("/api/v1/wallets/{wallet_uuid}", handlers.get_wallet),
        web.put("/api/v1/wallets/{wallet_uuid}", handlers.put_wallet),
        web.patch("/api/v1/wallets/{wallet_uuid}", handlers.set_status),
        web.get("/api/v1/wallets", handlers.list_wallets),
        web.post("/api/v1/wallets", handlers.create_wallet),
        web.post("/api/v1/operations", handlers.apply_operations),
        web.get("/healthz", handlers.healthz),
        web.get("/readyz", handlers.readyz),
        web.get("/metrics", metrics.metrics),
        *docs.routes(),
    ]
    check_origin = origins.guard(settings)
    app.router.add_routes(
        web.RouteDef(r.method, r.path, guarded(r.handler, check_origin), {**r.kwargs, "expect_handler": expect})
        for r in routes
    )
    metrics.begin_at_zero(app.router, OPERATION_TYPES, OUTCOMES)
    connections.keep(app, settings, partial(answer, app))
    return app


async def expect(_request: web.Request) -> None:
    """Don't answer `Expect: 100-continue` in the router: a client whose request is refused is not told to go on."""


def guarded(handler: Handler, check_origin: Callable[[web.Request], None]) -> Handler:
    """Return a handler that is asked only for what its request's head allows.

    The contract's order is the protocol, the route, whose page asks, the form. The body comes later.
    """
    has_query = handler in (handlers.list_operations, handlers.list_holds, handlers.list_wallets, handlers.get_balance)

    async def enter(request: web.Request) -> web.StreamResponse:
        check_origin(request)
        check_head(request)
        if not has_query:
            check_query(request)
        asking = party.party_of(request)
        if not asking:
            return await handler(request)
        parties = request.app[PARTIES]
        await parties.enter(asking)
        try:
            return await handler(request)
        finally:
            parties.leave(asking)

    return enter
