"""What goes over the wire: requests decoded by type, answers encoded by type, nothing untyped in between."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from uuid import UUID

import msgspec
from aiohttp import web
from msgspec import UNSET, Raw, UnsetType

from app.calls.records import Balance, Hold, Operation
from app.web.body import BODY_LIMIT, JSON, check_content_type, receive_body
from app.web.problems import invalid, invalid_input
from app.web.response import WholeResponse

MAX_INT64 = 2**63 - 1
_NAME = r"\A[A-Za-z0-9_-]{1,64}\Z"
WalletUuid = Annotated[str, msgspec.Meta(pattern=_NAME)]
_is_name = re.compile(_NAME).match
Amount = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT64)]
Currency = Annotated[str, msgspec.Meta(pattern=r"\A[A-Z0-9]{3,12}\Z")]
OperationType = Literal["DEPOSIT", "WITHDRAW", "TRANSFER", "HOLD", "RELEASE"]
Seq = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT64)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=1000)]
METADATA_LIMIT = 2048
"""Octets of metadata, at most, as SQL shows it."""
NO_METADATA = '"none"'
"""Sent in place of metadata that jsonb cannot hold: as it is no object, SQL refuses this one request, not the call."""
LONG_METADATA = '{"": "' + "x" * METADATA_LIMIT + '"}'
"""Stands for an object that is longer than METADATA_LIMIT, by however much: SQL refuses it for that."""

T = TypeVar("T")
Q = TypeVar("Q", bound="NoQuery")


class Time(str):
    """A time in a body, as text in UTC: asyncpg sends the first and the last datetime as -infinity and infinity."""


class NewWallet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a wallet's creation."""

    uuid: WalletUuid | None = None
    currency: Currency | None = None


class WalletTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a wallet's creation under the name in the path."""

    currency: Currency | None = None


class NewStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a change of a wallet's status."""

    status: Literal["OPEN", "FROZEN", "CLOSED"]


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """What every request for an operation has: the body under the operation's own path. `amount` is in minor units.

    SQL decides which members a type needs and which it may have.
    """

    operation_type: OperationType
    amount: Amount | None = None
    counterparty_uuid: WalletUuid | None = None
    hold_uuid: UUID | None = None
    expires_at: Time | None = None
    metadata: dict[str, Raw] | None = None


class NewOperation(Terms, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """The body of an operation."""

    operation_uuid: UUID


class BulkOperation(NewOperation, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """One operation of a bulk request."""

    wallet_uuid: WalletUuid


class NewOperations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a bulk request. `atomic`: all of them or none."""

    operations: Annotated[list[BulkOperation], msgspec.Meta(max_length=10_000)]
    atomic: bool = False


class BulkParts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same, its operations not decoded yet."""

    operations: Annotated[list[Raw], msgspec.Meta(max_length=10_000)]
    atomic: bool = False


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The query without parameters, and what every query has: the names of its numbers and of its times."""

    numbers: ClassVar[tuple[str, ...]] = ()
    times: ClassVar[tuple[str, ...]] = ()


class Moment(NoQuery, frozen=True, forbid_unknown_fields=True):
    """The query of a balance: now, or as it was at a moment."""

    times = ("at",)
    at: datetime | None = None


class WalletPage(NoQuery, frozen=True, forbid_unknown_fields=True):
    """The query of a list of wallets: at most `limit` with a name after this one."""

    numbers = ("limit",)
    limit: Limit = 100
    after: WalletUuid | None = None


class Wallets(msgspec.Struct, frozen=True):
    """Wallets by name, and the `after` of the next page (None: there is none)."""

    wallets: list[Balance]
    next: str | None


class Page(NoQuery, frozen=True, forbid_unknown_fields=True):
    """The query of a list of operations: at most `limit` with a seq below `before`, from `start` to before `end`."""

    numbers = ("limit", "before")
    times = ("from", "to")
    limit: Limit = 100
    before: Seq | None = None
    start: datetime | None = msgspec.field(default=None, name="from")
    end: datetime | None = msgspec.field(default=None, name="to")


class OperationPage(msgspec.Struct, frozen=True):
    """Operations, newest first, and the `before` of the next page (None: there is none)."""

    operations: list[Operation]
    next: int | None


class HoldPage(NoQuery, frozen=True, forbid_unknown_fields=True):
    """The query of a list of holds: at most `limit` with a seq above `after`."""

    numbers = ("limit", "after")
    limit: Limit = 100
    after: Seq | None = None


class Holds(msgspec.Struct, frozen=True):
    """Open holds, oldest first, and the `after` of the next page (None: there is none)."""

    holds: list[Hold]
    next: int | None


class Applied(msgspec.Struct, frozen=True, gc=False):
    """The outcome of an operation of a bulk request that was applied. Money is in minor units."""

    operation_uuid: UUID
    applied: Literal[True]
    balance_after: int
    held_after: int
    seq: int


class Refused(msgspec.Struct, frozen=True, gc=False):
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


def decoder(shape: type[T]) -> msgspec.json.Decoder[T]:
    """Return a decoder of bodies."""
    return msgspec.json.Decoder(shape, dec_hook=_time)


def _time(_shape: type, value: Any) -> Time:
    """Decode the one type that msgspec does not know, Time. Raises ValueError."""
    try:
        return Time(instant(value).isoformat())
    except OverflowError:
        raise ValueError("must be in the years 1 to 9999") from None


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[T], limit: int = BODY_LIMIT) -> T:
    """Receive and decode a request's body. Raises what receive_body and decode_body do."""
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
            return decoder.decode(_with_exact_amounts(body, error))
    except msgspec.DecodeError as error:
        raise invalid_input("body", error) from None
    except RecursionError:
        raise invalid(["body"], "not valid JSON: nested too deeply", "json_invalid") from None
    except UnicodeDecodeError:  # msgspec lets it through where it stands in a field's name
        raise invalid(["body"], "not valid JSON: not valid UTF-8", "json_invalid") from None


def decode_part(part: Sequence[Raw]) -> list[BulkOperation]:
    """Decode some operations of a bulk request. Raises Problem (400), which doesn't say where they stand."""
    return decode_body(b"[" + b",".join(part) + b"]", _some_operations)


def _with_exact_amounts(body: bytes | bytearray, error: msgspec.ValidationError) -> bytes:
    """Return a body with whole amounts written as integers. Raises `error` if the body has another shape."""
    try:
        members = _members(body)
        if "operations" in members:
            members["operations"] = Raw(
                msgspec.json.encode(list(map(_with_exact_amount, _list(members["operations"]))))
            )
        return msgspec.json.encode(_with_exact_amount(members))
    except msgspec.DecodeError:
        raise error from None


def _with_exact_amount(members: dict[str, Raw]) -> dict[str, Raw]:
    amount = members.get("amount")
    if amount is None or bytes(amount)[:1] not in _NUMBER:
        return members
    return members | {"amount": exact_number(amount)}


def exact_number(number: Raw) -> Raw:
    """Return a JSON number with a point or an exponent as an integer if it is a whole one that a double tells apart.

    JSON Schema (2020-12 core, section 4.2.3) takes 10.0 and 1e1 for integers, and old clients send doubles. From 2^53
    on a double stands for more than one integer.
    """
    try:
        value = Decimal(bytes(number).decode())
        is_exact = abs(value) < 2**53 and value == value.to_integral_value()
    except ArithmeticError:  # an exponent of 20 digits
        is_exact = False
    return Raw(b"%d" % int(value)) if is_exact else number


_NUMBER = tuple(b"%c" % character for character in b"-0123456789")
_some_operations = decoder(list[BulkOperation])
_members = msgspec.json.Decoder(dict[str, Raw]).decode
_list = msgspec.json.Decoder(list[dict[str, Raw]]).decode


def metadata_text(metadata: dict[str, Raw] | None) -> str | None:
    """Return metadata for SQL, which decides whether it is good: None for null and for an empty one.

    What jsonb cannot hold at all (section 8.14 of PostgreSQL's manual) is not sent: it would fail everything that
    shares the call. Nor is what is too long, which may be megabytes. Something stands for it that SQL refuses.
    """
    if not metadata:
        return None
    text = msgspec.json.encode(metadata)
    try:
        shortest = msgspec.json.encode(_metadata(text))
        if len(shortest) > METADATA_LIMIT:
            return LONG_METADATA
        if not _has_nul(text):
            return text.decode()
    except msgspec.ValidationError:  # an integer of more than 4,300 digits
        return LONG_METADATA
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass
    return NO_METADATA


def _short_number(text: str) -> int | str:
    """Return a stand-in for a number: short, or too long if jsonb would write it so long (it writes out exponents)."""
    with contextlib.suppress(ArithmeticError):  # Decimal knows no exponent of 20 digits
        number = Decimal(text)
        exponent = number.adjusted()
        if abs(exponent if number else min(exponent, 0)) <= METADATA_LIMIT:  # 0e9 is written 0
            return 0
    return LONG_METADATA


_metadata = msgspec.json.Decoder(float_hook=_short_number).decode
_has_nul = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000").search


def check_query(request: web.Request) -> None:
    """Raise the Problem (400) for a parameter where none is known. Outside of the API anything goes."""
    if request.rel_url.raw_query_string and request.path.startswith("/api/v1/"):
        read_query(request.query, NoQuery)


def read_query(query: Mapping[str, str], shape: type[Q]) -> Q:
    """Decode a request's query; a number is plain digits. Raises Problem (400), also for what stands there twice."""
    values: dict[str, int | str | datetime] = {}
    for name, text in query.items():
        if name in values:
            raise invalid(["query", name], "Repeated parameter")
        if name in shape.numbers and re.fullmatch("[0-9]{1,19}", text):
            values[name] = int(text)
        else:
            values[name] = read_time(name, text) if name in shape.times else text
    try:
        return msgspec.convert(values, shape)
    except msgspec.ValidationError as error:
        raise invalid_input("query", error) from None


_is_time = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d)", re.ASCII).fullmatch


def read_time(name: str, text: str) -> datetime:
    """Return a time of a query. Raises Problem (400).

    One whose year in UTC is 0 or 10000 becomes the first or the last time that Python has.
    """
    try:
        return instant(text)
    except OverflowError:
        return (datetime.min if text.startswith("0001") else datetime.max).replace(tzinfo=UTC)
    except ValueError as error:
        raise invalid(["query", name], f"{name} {error} (whose + is %2B in a URL)") from None


def instant(text: object) -> datetime:
    """Return a time (RFC 3339, with an offset, at most six decimals) in UTC.

    Raises ValueError, and OverflowError for one whose year in UTC is 0 or 10000.
    """
    try:
        if isinstance(text, str) and _is_time(text):
            return msgspec.convert(text, datetime).astimezone(UTC)
    except msgspec.ValidationError:
        pass
    raise ValueError("must be a time like 2026-11-29T12:00:00.123456Z, with an offset")


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
    return WholeResponse(body=msgspec.json.encode(body), status=status, headers=headers, content_type=JSON)
