"""What the service is measured against, with the service's own settings: `python -m tests.bench.baselines KIND`.

ceiling: parses and validates the same body and answers, without a database. single: one call of
wallet.apply_operation a request.
"""

import sys

import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler

from app.calls import database
from app.calls.database import POOL, SETTINGS
from app.calls.parties import PARTIES, Parties
from app.server.supervisor import spare_the_collector
from app.settings import from_environment
from app.web.application import MIB
from app.web.body import ROOM, Room
from app.web.messages import NewOperation, decoder, read_body, respond, wallet_uuid
from app.web.problems import answer_to

_decoder = decoder(NewOperation)


async def ceiling(request: web.Request) -> web.Response:
    wallet_uuid(request)
    operation = await read_body(request, _decoder)
    return respond(operation.operation_uuid)


async def single(request: web.Request) -> web.Response:
    name = wallet_uuid(request)
    operation = await read_body(request, _decoder)
    await request.app[POOL].fetch(
        "select seq from wallet.apply_operation($1, $2, $3, $4)",
        name,
        operation.operation_uuid,
        operation.operation_type,
        operation.amount,
    )
    return respond(operation.operation_uuid)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Exception as error:
        return answer_to(error)


def main(kind: str) -> None:
    settings = from_environment()
    app = web.Application(middlewares=[problems])
    app[SETTINGS] = settings
    app[PARTIES] = Parties(settings.key_requests)
    app[ROOM] = Room(settings.body_memory * MIB)
    app.cleanup_ctx.append(database.pool)
    app.router.add_post("/api/v1/wallets/{wallet_uuid}/operation", {"ceiling": ceiling, "single": single}[kind])
    spare_the_collector()
    web.run_app(app, host=settings.host, port=settings.port, loop=uvloop.new_event_loop(), access_log=None, print=None)


if __name__ == "__main__":
    main(sys.argv[1])
