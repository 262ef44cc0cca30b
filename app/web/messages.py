"""What goes over the wire: requests decoded by type, answers encoded by type, nothing untyped in between."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Literal, TypeVar
from uuid import UUID

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from app.calls.records import Operation
from app.web.body import BODY_LIMIT, JSON, check_content_type, receive_body
from app.web.problems import invalid, invalid_input

MAX_INT64 = 2**63 - 1
_NAME = r"\A[A-Za-z0-9_-]{1,64}\Z"
WalletUuid = Annotated[str, msgspec.Meta(pattern=_NAME)]
_is_name = re.compile(_NAME).match
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


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The query of everything but a list."""


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The query of a list: at most `limit` operations with a seq below `before`."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    before: Annotated[int, msgspec.Meta(ge=1, le=MAX_INT64)] | None = None


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
    """The outcome of an operation of a bulk request that was refused.

    A duplicate of the same wallet also has what is recorded, and whether that is the very same request.
    """

    operation_uuid: UUID
    applied: Literal[False]
    code: str
    detail: str
    operation: Operation | UnsetType = UNSET
    same_request: bool | UnsetType = UNSET


class Results(msgspec.Struct, frozen=True):
    """The outcomes of a bulk request, in the order of its operations."""

    results: list[Applied | Refused]


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[T], limit: int = BODY_LIMIT) -> T:
    """Receive and decode a request's body. Raises Problem as these two do."""
    content = request.content
    if content.is_eof() and content.exception() is None and (request.content_length or limit) < limit <= BODY_LIMIT:
        check_content_type(request)  # the shorter way for a small body that came along with the head
        return decode_body(content.read_nowait(), decoder)
    with await receive_body(request, limit) as body:
        return decode_body(body, decoder)


def decode_body(body: bytes | bytearray, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a request's body. Raises Problem (400) for bad JSON or bad values."""
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return msgspec.convert(_exact.decode(body), decoder.type)
    except msgspec.DecodeError as error:
        raise invalid_input("body", error) from None
    except RecursionError:
        raise invalid(["body"], "not valid JSON: nested too deeply", "json_invalid") from None
    except UnicodeDecodeError:  # msgspec lets it through where it stands in a field's name
        raise invalid(["body"], "not valid JSON: not valid UTF-8", "json_invalid") from None


def exact_number(text: str) -> int | float:
    """Return a JSON number with a point or an exponent as an int if it is a whole one that a double tells apart.

    JSON Schema (2020-12 core, section 4.2.3) takes 10.0 and 1e1 for integers, and old clients send doubles. From 2^53
    on a double stands for more than one integer.
    """
    try:
        number = Decimal(text)
        is_exact = abs(number) < 2**53 and number == number.to_integral_value()
    except ArithmeticError:  # an exponent of 20 digits
        is_exact = False
    return int(number) if is_exact else float(text)


_exact = msgspec.json.Decoder(float_hook=exact_number)


def check_query(request: web.Request) -> None:
    """Raise the Problem (400) for a parameter where none is known. Outside of the API anything goes."""
    if request.rel_url.raw_query_string and request.path.startswith("/api/v1/"):
        read_query(request.query, NoQuery)


def read_query(query: Mapping[str, str], shape: type[T]) -> T:
    """Decode a request's query; a number is plain digits. Raises Problem (400), also for what stands there twice."""
    values: dict[str, int | str] = {}
    for name, text in query.items():
        if name in values:
            raise invalid(["query", name], "Repeated parameter")
        values[name] = int(text) if re.fullmatch("[0-9]{1,19}", text) else text
    try:
        return msgspec.convert(values, shape)
    except msgspec.ValidationError as error:
        raise invalid_input("query", error) from None


def wallet_uuid(request: web.Request) -> str:
    """Return the wallet's name from the path. Raises Problem (400) for a name that no wallet can have."""
    name = request.match_info["wallet_uuid"]
    if not _is_name(name):
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
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type=JSON)
