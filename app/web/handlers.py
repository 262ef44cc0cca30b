"""One handler a route: decode, call, answer."""

import asyncio

import msgspec
from aiohttp import web

from app.calls import database, dispatch
from app.calls.database import POOL
from app.calls.line import Outcome, Request
from app.calls.refusals import NO_SUCCESS, code_of
from app.web.body import BULK_BODY_LIMIT, receive_body
from app.web.messages import (
    Applied,
    NewOperation,
    NewOperations,
    NewWallet,
    OperationPage,
    Page,
    Refused,
    Results,
    decode_body,
    operation_uuid,
    read_body,
    read_query,
    respond,
    wallet_uuid,
)
from app.web.problems import RETRY, Problem, refusal, unavailable
from app.web.turns import Turns

TURNS = web.AppKey("turns", Turns)
READY_TIMEOUT = 2.0
"""Seconds that the database has to answer a readiness check."""

_new_wallet = msgspec.json.Decoder(NewWallet)
_new_operation = msgspec.json.Decoder(NewOperation)
_new_operations = msgspec.json.Decoder(NewOperations)


async def create_wallet(request: web.Request) -> web.Response:
    """POST /api/v1/wallets"""
    new = await read_body(request, _new_wallet) if request.can_read_body else NewWallet()
    wallet = await database.create_wallet(request.app[POOL], new.uuid)
    return respond(wallet, 201, Location=f"/api/v1/wallets/{wallet.uuid}")


async def get_wallet(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}"""
    return respond(await database.get_wallet(request.app[POOL], wallet_uuid(request)))


async def apply_operation(request: web.Request) -> web.Response:
    """POST /api/v1/wallets/{wallet_uuid}/operation"""
    name = wallet_uuid(request)
    operation = await read_body(request, _new_operation)
    asked = Request(name, operation.operation_uuid, operation.operation_type, operation.amount)
    outcome = await dispatch.apply_one(request.app, asked)
    if outcome.sqlstate is not None:
        recorded = outcome.recorded(asked)
        same_request = None if recorded is None else outcome.is_repeat_of(asked)
        raise refusal(outcome.sqlstate, str(outcome.message), operation=recorded, same_request=same_request)
    return respond(operation.operation_uuid)


async def apply_operations(request: web.Request) -> web.Response:
    """POST /api/v1/operations"""
    turns = request.app[TURNS]
    dispatch.admit_bulk(request.app)
    with await receive_body(request, BULK_BODY_LIMIT) as body:
        asked = await turns.take(lambda: _requests(body))
    outcomes = await dispatch.apply_all(request.app, asked)
    return await turns.take(lambda: respond(Results(list(map(_result, asked, outcomes)))))


async def list_operations(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}/operations"""
    page = read_query(request.query, Page)
    operations = await database.list_operations(request.app[POOL], wallet_uuid(request), page.before, page.limit)
    # seq has no gaps and starts at 1, so the last row itself says whether there are more.
    more = bool(operations) and operations[-1].seq > 1
    return respond(OperationPage(operations, operations[-1].seq if more else None))


async def get_operation(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}"""
    return respond(await database.get_operation(request.app[POOL], wallet_uuid(request), operation_uuid(request)))


async def healthz(_request: web.Request) -> web.Response:
    """GET /healthz: the process lives."""
    return respond({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """GET /readyz: the database can be written and is migrated."""
    try:
        async with asyncio.timeout(READY_TIMEOUT):
            writable, migrated = await database.readiness(request.app[POOL])
    except NO_SUCCESS:
        raise unavailable("The database does not answer") from None
    if not writable:
        raise unavailable("The database is read-only")
    if not migrated:
        raise Problem(503, "not_migrated", "The database is not migrated", headers=RETRY)
    return respond({"status": "ok"})


def _requests(body: bytes | bytearray) -> list[Request]:
    operations = decode_body(body, _new_operations).operations
    return [Request(o.wallet_uuid, o.operation_uuid, o.operation_type, o.amount) for o in operations]


def _result(asked: Request, outcome: Outcome) -> Applied | Refused:
    if outcome.sqlstate is None:
        return Applied(asked.operation_uuid, True, outcome.balance_after, outcome.seq)
    refused = Refused(asked.operation_uuid, False, code_of(outcome.sqlstate), str(outcome.message))
    if (recorded := outcome.recorded(asked)) is None:
        return refused
    return msgspec.structs.replace(refused, operation=recorded, same_request=outcome.is_repeat_of(asked))
