"""What goes over the wire: requests decoded by type, answers encoded by type, nothing untyped in between."""

import asyncio
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Literal, TypeVar
from uuid import UUID

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import UNSET, UnsetType

from app.problems import RETRY, Problem, invalid, invalid_input

BODY_LIMIT = 64 * 1024
"""Bytes of a request body, at most."""
BULK_BODY_LIMIT = 4 * 1024 * 1024
"""Bytes of the body of a bulk request, at most: room for 10,000 operations with the longest names."""
BODY_TIMEOUT = 5.0
"""Seconds that a client has to begin with its body, and to go on with it."""
BODY_RATE = 4096
"""Bytes a second that a body has to come at on average, BODY_TIMEOUT aside."""

JSON = "application/json"
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


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The query of everything but a list."""


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


class Room:
    """Memory for bodies from their first byte until they are decoded. One up to BODY_LIMIT needs none of it.

    A body that says its length has its room before its first byte is kept; one in chunks takes it as it grows.
    """

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> None:
        """Take so many bytes. Raises Problem (429) if they are not left."""
        if size > self._left:
            raise Problem(429, "overloaded", "Too many large bodies are being received", headers=RETRY)
        self._left -= size

    def give_back(self, size: int) -> None:
        """Give so many bytes back."""
        self._left += size


ROOM = web.AppKey("room", Room)


class Body:
    """A body that was received. Used in a `with`, whose end is the end of the body and of its room."""

    __slots__ = ("_content", "_room", "_size")

    def __init__(self, content: bytes | bytearray, room: Room, size: int) -> None:
        self._content, self._room, self._size = content, room, size

    def __enter__(self) -> bytes | bytearray:
        """Return the bytes."""
        return self._content

    def __exit__(self, *_: object) -> None:
        """Free the bytes, whoever still holds them, and their room."""
        if isinstance(self._content, bytearray):
            self._content.clear()
        self._content = b""
        self._room.give_back(self._size)


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[T], limit: int = BODY_LIMIT) -> T:
    """Receive and decode a request's body. Raises Problem as these two do."""
    content = request.content
    if content.is_eof() and content.exception() is None and (request.content_length or limit) < limit <= BODY_LIMIT:
        _check_content_type(request)  # the shorter way for a small body that came along with the head
        return decode_body(content.read_nowait(), decoder)
    with await receive_body(request, limit) as body:
        return decode_body(body, decoder)


async def receive_body(request: web.Request, limit: int) -> Body:
    """Receive a request's body. Raises Problem: 400 for one that ends early, 408, 413, 415, 429."""
    _check_content_type(request)
    try:
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        if request.content.is_eof():  # it came along with the head, as nearly always: nothing to wait for
            body = request.content.read_nowait()
            if len(body) > limit:
                raise _too_large(limit)
            room, size = request.app[ROOM], len(body) if len(body) > BODY_LIMIT else 0
            room.take(size)
            return Body(body, room, size)
        return await _receive(request, limit)
    except (web.RequestPayloadError, HttpProcessingError) as error:
        _forget(error)
        raise invalid(["body"], "the body does not decode as its headers say") from None
    except ConnectionError as error:  # nobody will read this
        _forget(error)
        raise invalid(["body"], "the body ended before its end") from None
    except TimeoutError:
        raise Problem(408, "request_timeout", f"The body did not arrive within {BODY_TIMEOUT:g} seconds") from None


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


def check_head(request: web.Request) -> None:
    """Raise the Problem for what a head asks for in vain: 415 for a compressed body, 417 for an expectation.

    RFC 9110, sections 15.5.16 and 10.1.1, by which an expectation in HTTP/1.0 is ignored.
    """
    headers = request.headers
    if hdrs.CONTENT_ENCODING in headers:
        codings = ",".join(headers.getall(hdrs.CONTENT_ENCODING)).lower().split(",")
        if any(coding.strip() not in ("", "identity") for coding in codings):
            accepted = {"Accept-Encoding": "identity"}
            raise Problem(415, "unsupported_media_type", "A body may not be compressed", headers=accepted)
    if hdrs.EXPECT in headers and request.version >= HttpVersion11 and headers[hdrs.EXPECT].lower() != "100-continue":
        raise Problem(417, "expectation_failed", "Only 100-continue can be expected")


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
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type=JSON)


def _check_content_type(request: web.Request) -> None:
    """Take what is declared as JSON (in UTF-8: RFC 8259, section 8.1).

    A web page of another origin can send a body without a type, or as a form or as text, but not as JSON, without
    asking the browser to ask first (Fetch, section 2.2.2: CORS-safelisted request-header).
    """
    declared = request.headers.get(hdrs.CONTENT_TYPE)
    if declared == JSON:  # as nearly always
        return
    if declared is None and not request.can_read_body:
        return
    is_json = request.content_type == JSON or request.content_type.endswith("+json")
    if declared is None or not is_json or (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Problem(415, "unsupported_media_type", "Content-Type must be application/json in UTF-8")


async def _receive(request: web.Request, limit: int) -> Body:
    """Return a body that is still on its way, within the limits of time and memory."""
    room, loop = request.app[ROOM], asyncio.get_running_loop()
    body, taken = bytearray(), 0
    try:
        if (declared := request.content_length or 0) > BODY_LIMIT:
            room.take(declared)
            taken = declared
        if hdrs.EXPECT in request.headers and request.version >= HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        began = loop.time()
        async with asyncio.timeout(BODY_TIMEOUT) as patience:
            async for chunk in request.content.iter_any():
                if len(body) + len(chunk) > limit:
                    raise _too_large(limit)
                body += chunk
                if len(body) > max(taken, BODY_LIMIT):
                    room.take(len(body) - taken)
                    taken = len(body)
                patience.reschedule(min(loop.time(), began + len(body) / BODY_RATE) + BODY_TIMEOUT)
    except BaseException:
        room.give_back(taken)
        raise
    return Body(body, room, taken)


def _forget(error: Exception) -> None:
    """Cut off where an error came from.

    The stream keeps its error, a traceback keeps its frames, and a frame keeps the stream and the body: a cycle that
    only the collector finds, which looks seldom.
    """
    error.__traceback__ = None


def _too_large(limit: int) -> Problem:
    return Problem(413, "body_too_large", f"A body may have {limit} bytes")
