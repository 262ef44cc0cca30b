"""The aiohttp application: routes, resources, and what is checked before a handler is called."""

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import get_args

from aiohttp import web
from aiohttp.typedefs import Handler

from app import metrics
from app.calls import database, dispatch
from app.calls.database import SETTINGS
from app.calls.parties import PARTIES, Parties
from app.calls.refusals import DATABASE_REFUSED, REFUSALS
from app.settings import Settings, access
from app.web import connections, docs, handlers, keys, origins, peers
from app.web.body import ROOM, Room, check_head
from app.web.keys import OPEN, OPERATE, Key, Keys
from app.web.messages import OperationType, check_query
from app.web.request_log import access_log, answer
from app.web.turns import Turns

MIB = 1024 * 1024
RECURSION_LIMIT = 3000
"""Metadata of 2,048 octets can be nested 1,020 deep; before Python 3.12 the decoder counts each level as a call."""

OPERATION_TYPES = get_args(OperationType)
"""The types of operations that clients ask for."""
NOT_OF_OPERATIONS = ("WA414", "WA419", "WA417")
"""SQLSTATEs that operations never get."""
OUTCOMES = (
    "applied",
    *(code for sqlstate, (_, code) in REFUSALS.items() if sqlstate not in NOT_OF_OPERATIONS),
    DATABASE_REFUSED[1],
)
"""What may come of an operation."""


def make_app(settings: Settings) -> web.Application:
    """Return the application; `settings.database_url` must be set. Raises StartupError: see app.settings.access."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION_LIMIT))
    wants_keys = access(settings) == "keys"
    app = web.Application(handler_args={"auto_decompress": False})
    app[SETTINGS] = settings
    app[PARTIES] = parties = Parties(settings.key_requests)
    app[ROOM] = Room(settings.body_memory * MIB)
    app[handlers.TURNS] = Turns(parties)
    app.cleanup_ctx.extend([access_log, database.pool, dispatch.keep_lanes])
    check_origin, admit = origins.guard(settings), keys.admit_anybody
    if wants_keys:
        app[keys.KEYS] = Keys(settings.request_deadline)
        app.cleanup_ctx.append(keys.keep)
        admit = app[keys.KEYS].admit
    app.router.add_routes(
        web.RouteDef(
            r.method,
            r.path,
            guarded(r.handler, scopes, check_origin, admit, parties),
            {**r.kwargs, "expect_handler": expect},
        )
        for r, scopes in routes(wants_keys=wants_keys)
    )
    metrics.begin_at_zero(app.router, OPERATION_TYPES, OUTCOMES)
    connections.serve_over(app, settings, partial(answer, app, peers.finder(settings)))
    return app


def routes(*, wants_keys: bool) -> list[tuple[web.RouteDef, tuple[str, ...]]]:
    """Return the routes, each with the scopes of which a key needs one.

    The router tries those that share a prefix in this order.
    """
    return [
        (web.post("/api/v1/wallets/{wallet_uuid}/operation", handlers.apply_operation), OPERATE),
        (web.put("/api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}", handlers.put_operation), OPERATE),
        (web.get("/api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}", handlers.get_operation), ("read",)),
        (web.get("/api/v1/wallets/{wallet_uuid}/operations", handlers.list_operations), ("read",)),
        (web.get("/api/v1/wallets/{wallet_uuid}/holds", handlers.list_holds), ("read",)),
        (web.get("/api/v1/wallets/{wallet_uuid}/balance", handlers.get_balance), ("read",)),
        (web.get("/api/v1/wallets/{wallet_uuid}", handlers.get_wallet), ("read",)),
        (web.put("/api/v1/wallets/{wallet_uuid}", handlers.put_wallet), ("create",)),
        (web.patch("/api/v1/wallets/{wallet_uuid}", handlers.set_status), ("admin",)),
        (web.get("/api/v1/wallets", handlers.list_wallets), ("read",)),
        (web.post("/api/v1/wallets", handlers.create_wallet), ("create",)),
        (web.post("/api/v1/operations", handlers.apply_operations), OPERATE),
        (web.get("/healthz", handlers.healthz), OPEN),
        (web.get("/readyz", handlers.readyz), OPEN),
        (web.get("/metrics", metrics.metrics), ("metrics",)),
        *((route, OPEN) for route in docs.routes(wants_keys=wants_keys)),
    ]


async def expect(_request: web.Request) -> None:
    """Don't answer `Expect: 100-continue` in the router: a client whose request is refused is not told to go on."""


def guarded(
    handler: Handler,
    scopes: tuple[str, ...],
    check_origin: Callable[[web.Request], None],
    admit: Callable[[web.Request, tuple[str, ...]], Awaitable[Key]],
    parties: Parties,
) -> Handler:
    """Return a handler that checks a request's head and its key's limit before it calls this one.

    Protocol and route are checked before that. The order here is: origin, key, encoding and expectation, query,
    requests in flight. Path and body come later.
    """
    has_query = handler in (handlers.list_operations, handlers.list_holds, handlers.list_wallets, handlers.get_balance)

    async def enter(request: web.Request) -> web.StreamResponse:
        check_origin(request)
        party = (await admit(request, scopes)).name
        check_head(request)
        if not has_query:
            check_query(request)
        if not party:
            return await handler(request)
        await parties.enter(party)
        try:
            return await handler(request)
        finally:
            parties.leave(party)

    return enter
