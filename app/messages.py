"""What goes over the wire: requests decoded by type, answers encoded by type, nothing untyped in between."""

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar
from uuid import UUID

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from app.problems import Problem, invalid, invalid_input

BODY_LIMIT = 64 * 1024
"""Bytes of a request body, at most."""
BULK_BODY_LIMIT = 4 * 1024 * 1024
"""Bytes of the body of a bulk request, at most: room for 10,000 operations with the longest names."""
BODY_TIMEOUT = 5.0
"""Seconds that a client has to send its body."""

MAX_INT64 = 2**63 - 1
_NAME = r"\A[A-Za-z0-9_-]{1,64}\Z"
WalletUuid = Annotated[str, msgspec.Meta(pattern=_NAME)]
Amount = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT64)]

T = TypeVar("T")


class NewWallet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a wallet's creation."""

    uuid: WalletUuid | None = None


class NewOperation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an operation. `amount` is in minor units."""

    operation_uuid: UUID
    operation_type: Literal["DEPOSIT", "WITHDRAW"]
    amount: Amount


class BulkOperation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operation of a bulk request. `amount` is in minor units."""

    wallet_uuid: WalletUuid
    operation_uuid: UUID
    operation_type: Literal["DEPOSIT", "WITHDRAW"]
    amount: Amount


class NewOperations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a bulk request."""

    operations: Annotated[list[BulkOperation], msgspec.Meta(max_length=10_000)]


class Page(msgspec.Struct, frozen=True):
    """The query of a list: at most `limit` operations with a seq below `before`."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    before: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT64)] | None = None


class Wallet(msgspec.Struct, frozen=True):
    """A wallet as clients see it. `balance` is in minor units."""

    id: int
    uuid: str
    balance: int


class Operation(msgspec.Struct, frozen=True):
    """An applied operation as clients see it. `amount` and `balance_after` are in minor units."""

    operation_uuid: UUID
    wallet_uuid: str
    operation_type: str
    amount: int
    balance_after: int
    seq: int
    created_at: str


class OperationPage(msgspec.Struct, frozen=True):
    """Operations, newest first, and the `before` of the next page (None: there is none)."""

    operations: list[Operation]
    next: int | None


class Applied(msgspec.Struct, frozen=True):
    """The outcome of an operation of a bulk request that was applied. `balance_after` is in minor units."""

    operation_uuid: UUID
    applied: Literal[True]
    balance_after: int
    seq: int


class Refused(msgspec.Struct, frozen=True):
    """The outcome of an operation of a bulk request that was refused."""

    operation_uuid: UUID
    applied: Literal[False]
    code: str
    detail: str


class Results(msgspec.Struct, frozen=True):
    """The outcomes of a bulk request, in the order of its operations."""

    results: list[Applied | Refused]


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[T], limit: int = BODY_LIMIT) -> T:
    """Decode a request's body. Raises Problem: 400 for bad JSON or bad values, 408, 413, 415."""
    _check_content_type(request)
    body = await _read(request, limit)
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise invalid_input("body", error) from None
    except RecursionError:
        raise invalid(["body"], "not valid JSON: nested too deeply", "json_invalid") from None
    except UnicodeDecodeError:  # msgspec lets it through where it stands in a field's name
        raise invalid(["body"], "not valid JSON: not valid UTF-8", "json_invalid") from None


def read_query(query: Mapping[str, str], shape: type[T]) -> T:
    """Decode a request's query; a number is plain digits. Raises Problem (400)."""
    values = {name: int(text) if re.fullmatch("[0-9]{1,19}", text) else text for name, text in query.items()}
    try:
        return msgspec.convert(values, shape)
    except msgspec.ValidationError as error:
        raise invalid_input("query", error) from None


def wallet_uuid(request: web.Request) -> str:
    """Return the wallet's name from the path. Raises Problem (400) for a name that no wallet can have."""
    name = request.match_info["wallet_uuid"]
    if not re.match(_NAME, name):
        message = "wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
        raise invalid(["path", "wallet_uuid"], message)
    return name


def operation_uuid(request: web.Request) -> UUID:
    """Return the operation's UUID from the path. Raises Problem (400)."""
    try:
        return msgspec.convert(request.match_info["operation_uuid"], UUID)
    except msgspec.ValidationError:
        raise invalid(["path", "operation_uuid"], "operation_uuid must be a UUID") from None


def respond(body: object, status: int = 200, **headers: str) -> web.Response:
    """Return a JSON response."""
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


def _check_content_type(request: web.Request) -> None:
    """Take JSON (in UTF-8: RFC 8259, section 8.1), also where the client doesn't say (RFC 9110, section 8.3)."""
    if "Content-Type" not in request.headers:
        return
    is_json = request.content_type == "application/json" or request.content_type.endswith("+json")
    if not is_json or (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Problem(415, "unsupported_media_type", "Content-Type must be application/json in UTF-8")


async def _read(request: web.Request, limit: int) -> bytes:
    try:
        if request.content.is_eof():  # it came along with the head, as nearly always: nothing to wait for
            body = request.content.read_nowait()
        else:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await _read_chunks(request, limit)
    except (web.RequestPayloadError, HttpProcessingError):
        raise invalid(["body"], "the body does not decode as its headers say") from None
    except TimeoutError:
        raise Problem(408, "request_timeout", f"The body did not arrive within {BODY_TIMEOUT:g} seconds") from None
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def _read_chunks(request: web.Request, limit: int) -> bytes:
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit:
            break
    return bytes(body)


def _too_large(limit: int) -> Problem:
    return Problem(413, "body_too_large", f"A body may have {limit} bytes")
