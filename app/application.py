"""The aiohttp application: routes, resources, and what is looked at before a handler is asked."""

from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from app import connections, database, docs, handlers, lanes, metrics, origins
from app.access import access_log, answer
from app.database import SETTINGS
from app.messages import ROOM, Room, check_head, check_query
from app.problems import DATABASE_REFUSED, REFUSALS
from app.settings import Settings
from app.turns import Turns

MIB = 1024 * 1024

OPERATION_TYPES = ("DEPOSIT", "WITHDRAW")
"""The types of operations that clients ask for."""
OUTCOMES = (
    "applied",
    *(code for sqlstate, (_, code) in REFUSALS.items() if sqlstate not in ("WA414", "WA419")),
    DATABASE_REFUSED[1],
)
"""What may come of an operation."""


def make_app(settings: Settings) -> web.Application:
    """Return the application; `settings.database_url` names the database."""
    app = web.Application(middlewares=[doors(settings)], handler_args={"auto_decompress": False})
    app[SETTINGS] = settings
    app[ROOM] = Room(settings.body_memory * MIB)
    app[handlers.TURNS] = Turns()
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
    connections.keep(app, settings, partial(answer, app))
    return app


async def expect(_request: web.Request) -> None:
    """Leave an expectation to what comes after the router: nobody is told to go on who is to be refused."""


def doors(settings: Settings) -> Middleware:
    """Return what every request passes: what its head shows to be refused is refused in the contract's order.

    That order is the protocol, the route, whose page asks, the form. The body comes later.
    """
    check_origin = origins.guard(settings)

    @web.middleware
    async def enter(request: web.Request, handler: Handler) -> web.StreamResponse:
        connections.check_protocol(request)
        if request.match_info.http_exception is None:
            check_origin(request)
            check_head(request)
            if request.match_info.handler is not handlers.list_operations:
                check_query(request)
        elif (path := await path_without_slash(request)) is not None:
            return web.Response(status=308, headers={"Location": path})
        return await handler(request)

    return enter


async def path_without_slash(request: web.Request) -> str | None:
    """Return the path, and the query if there is one, that a path with a slash at its end is led to; None: to nowhere.

    It begins with one slash: with two it would name another host (RFC 3986, section 4.2).
    """
    path, query = request.rel_url.raw_path.removesuffix("/"), request.rel_url.raw_query_string
    if path == request.rel_url.raw_path or not path or path.startswith("//"):
        return None
    known = await request.app.router.resolve(request.clone(rel_url=request.rel_url.with_path(path, encoded=True)))
    if known.http_exception is not None and known.http_exception.status != 405:
        return None
    return f"{path}?{query}" if query else path
