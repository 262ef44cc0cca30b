"""One handler a route: decode, call, answer."""

import asyncio
import contextlib
from collections.abc import Sequence
from uuid import UUID

import msgspec
from aiohttp import web
from msgspec import Raw

from app.calls import database, dispatch
from app.calls.database import POOL
from app.calls.line import Outcome, Request
from app.calls.records import Wallet
from app.calls.refusals import NO_SUCCESS, Refusal, code_of
from app.web.body import BULK_BODY_LIMIT, receive_body
from app.web.keys import CALLER, permit_operation, permit_operations, permit_wallet
from app.web.messages import (
    Applied,
    BulkParts,
    HoldPage,
    Holds,
    Moment,
    NewOperation,
    NewOperations,
    NewStatus,
    NewWallet,
    OperationPage,
    Page,
    Refused,
    Results,
    Terms,
    WalletPage,
    Wallets,
    WalletTerms,
    decode_body,
    decode_part,
    decoder,
    metadata_text,
    operation_uuid,
    read_body,
    read_query,
    respond,
    wallet_uuid,
)
from app.web.problems import RETRY, Problem, refusal, unavailable
from app.web.turns import Turns

TURNS = web.AppKey("turns", Turns)
LEAST = 100
"""Bytes of an operation of a bulk request, at least."""
READY_TIMEOUT = 2.0
"""Seconds that the database has to answer a readiness check."""

_new_wallet = decoder(NewWallet)
_wallet_terms = decoder(WalletTerms)
_new_status = decoder(NewStatus)
_new_operation = decoder(NewOperation)
_terms = decoder(Terms)
_new_operations = decoder(NewOperations)
_bulk_parts = decoder(BulkParts)


async def create_wallet(request: web.Request) -> web.Response:
    """POST /api/v1/wallets"""
    new = await read_body(request, _new_wallet) if request.can_read_body else NewWallet()
    permit_wallet(request, new.uuid)
    wallet = await database.create_wallet(request.app[POOL], new.uuid, new.currency)
    return respond(Wallet(wallet.id, wallet.uuid, wallet.balance), 201, Location=f"/api/v1/wallets/{wallet.uuid}")


async def put_wallet(request: web.Request) -> web.Response:
    """PUT /api/v1/wallets/{wallet_uuid}"""
    name = wallet_uuid(request)
    terms = await read_body(request, _wallet_terms) if request.can_read_body else WalletTerms()
    try:
        wallet, created = await database.put_wallet(request.app[POOL], name, terms.currency)
    except Refusal as error:
        raise refusal(str(error.sqlstate), str(error), conflicts=True) from None
    return respond(wallet, 201 if created else 200)


async def list_wallets(request: web.Request) -> web.Response:
    """GET /api/v1/wallets"""
    page = read_query(request.query, WalletPage)
    wallets, more = await database.list_wallets(
        request.app[POOL], page.after, page.limit, request[CALLER].prefix or None
    )
    return respond(Wallets(wallets, wallets[-1].uuid if more else None))


async def get_wallet(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}"""
    return respond(await database.get_wallet(request.app[POOL], wallet_uuid(request)))


async def set_status(request: web.Request) -> web.Response:
    """PATCH /api/v1/wallets/{wallet_uuid}"""
    name = wallet_uuid(request)
    new = await read_body(request, _new_status)
    return respond(await database.set_status(request.app[POOL], name, new.status))


async def get_balance(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}/balance"""
    query = read_query(request.query, Moment)
    return respond(await database.get_balance(request.app[POOL], wallet_uuid(request), query.at))


async def apply_operation(request: web.Request) -> web.Response:
    """POST /api/v1/wallets/{wallet_uuid}/operation"""
    name = wallet_uuid(request)
    new = await read_body(request, _new_operation)
    permit_operation(request, new.operation_type)
    outcome = await dispatch.apply_one(request.app, _request(name, new.operation_uuid, new))
    if outcome.sqlstate is not None:
        raise _refusal(outcome)
    return respond(new.operation_uuid)


async def put_operation(request: web.Request) -> web.Response:
    """PUT /api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}"""
    name, operation = wallet_uuid(request), operation_uuid(request)
    terms = await read_body(request, _terms)
    permit_operation(request, terms.operation_type)
    outcome = await dispatch.apply_one(request.app, _request(name, operation, terms)._replace(whole=True))
    if outcome.sqlstate is not None and not outcome.is_repeat():
        raise _refusal(outcome, conflicts=True)
    return respond(outcome.recorded(), 201 if outcome.sqlstate is None else 200)


async def apply_operations(request: web.Request) -> web.Response:
    """POST /api/v1/operations"""
    turns = request.app[TURNS]
    dispatch.admit_bulk(request.app)
    with await receive_body(request, BULK_BODY_LIMIT) as body:
        asked, atomic = await _requests(turns, body)
    permit_operations(request, asked)
    outcomes = await dispatch.apply_all(request.app, asked, atomic=atomic)
    told = list(zip(asked, outcomes, strict=True))
    if not turns.takes_several(len(told)):
        return await turns.take(lambda: respond(Results(_results(told))))
    results = await turns.take_each(_results, told)
    return await turns.take(lambda: respond(Results(results)))


async def list_operations(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}/operations"""
    page = read_query(request.query, Page)
    operations, more = await database.list_operations(
        request.app[POOL], wallet_uuid(request), page.before, page.limit, page.start, page.end
    )
    return respond(OperationPage(operations, operations[-1].seq if more else None))


async def get_operation(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}/operations/{operation_uuid}"""
    return respond(await database.get_operation(request.app[POOL], wallet_uuid(request), operation_uuid(request)))


async def list_holds(request: web.Request) -> web.Response:
    """GET /api/v1/wallets/{wallet_uuid}/holds"""
    page = read_query(request.query, HoldPage)
    holds, more = await database.list_holds(request.app[POOL], wallet_uuid(request), page.after, page.limit)
    return respond(Holds(holds, holds[-1].seq if more else None))


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


def _request(wallet: str, operation: UUID, terms: Terms) -> Request:
    return Request(
        wallet,
        operation,
        terms.operation_type,
        terms.amount,
        terms.counterparty_uuid,
        terms.hold_uuid,
        terms.expires_at,
        metadata_text(terms.metadata),
    )


async def _requests(turns: Turns, body: bytes | bytearray) -> tuple[list[Request], bool]:
    """Decode a bulk request; a long one in several steps in contention."""
    if turns.takes_several(len(body) // LEAST):
        with contextlib.suppress(Problem):  # it is looked at again as a whole, which tells where the fault is
            new = await turns.take(lambda: decode_body(body, _bulk_parts))
            return await turns.take_each(_requests_of, new.operations), new.atomic
    return await turns.take(lambda: _whole(body))


def _whole(body: bytes | bytearray) -> tuple[list[Request], bool]:
    new = decode_body(body, _new_operations)
    return [_request(each.wallet_uuid, each.operation_uuid, each) for each in new.operations], new.atomic


def _requests_of(part: Sequence[Raw]) -> list[Request]:
    return [_request(each.wallet_uuid, each.operation_uuid, each) for each in decode_part(part)]


def _refusal(outcome: Outcome, *, conflicts: bool = False) -> Problem:
    recorded = outcome.recorded()
    same_request = None if recorded is None else outcome.same_request
    return refusal(
        str(outcome.sqlstate),
        str(outcome.message),
        conflicts=conflicts,
        operation=recorded,
        same_request=same_request,
    )


def _results(told: Sequence[tuple[Request, Outcome]]) -> list[Applied | Refused]:
    return [_result(*each) for each in told]


def _result(asked: Request, outcome: Outcome) -> Applied | Refused:
    if outcome.sqlstate is None:
        return Applied(asked.operation_uuid, True, outcome.balance_after, outcome.held_after, outcome.seq)
    refused = Refused(asked.operation_uuid, False, code_of(outcome.sqlstate), str(outcome.message))
    if (recorded := outcome.recorded()) is None:
        return refused
    return msgspec.structs.replace(refused, operation=recorded, same_request=outcome.same_request)
