"""Bodies of requests: what is taken at all, within limits of time and memory."""

import asyncio
import contextlib
from collections import Counter

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from app.calls.database import UNTIL
from app.calls.parties import PARTY, check_share
from app.web.keys import check_again
from app.web.problems import Problem, invalid

JSON = "application/json"
BODY_LIMIT = 64 * 1024
"""Bytes of a request body, at most."""
BULK_BODY_LIMIT = 4 * 1024 * 1024
"""Bytes of the body of a bulk request, at most: room for 10,000 operations with the longest names and no metadata."""
BODY_TIMEOUT = 5.0
"""Seconds that a client has to begin with its body, and to go on with it."""
BODY_RATE = 4096
"""Bytes a second that a body has to come at on average, BODY_TIMEOUT aside."""


class Room:
    """Memory for bodies from their first byte until they are decoded. One up to BODY_LIMIT needs none of it.

    A body that says its length has its room before its first byte is kept; one in chunks takes it as it grows.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: Counter[str] = Counter()

    def take(self, size: int) -> None:
        """Take so many bytes. Raises Overloaded if they are not left, or not to this party."""
        if size:
            party = PARTY.get()
            full = "Too many large bodies are being received"
            check_share(self._size, self._taken.total(), self._taken[party], full, size)
            self._taken[party] += size

    def give_back(self, size: int) -> None:
        """Give so many bytes back."""
        if size:
            party = PARTY.get()
            self._taken[party] -= size
            if not self._taken[party]:
                del self._taken[party]


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
            with contextlib.suppress(BufferError):  # what was decoded still shows parts of it, for a moment
                self._content.clear()
        self._content = b""
        self._room.give_back(self._size)


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


async def receive_body(request: web.Request, limit: int) -> Body:
    """Receive a request's body.

    Raises Problem (400, 401, 408, 413, 415), Overloaded, and TimeoutError if the keys cannot be read.
    """
    check_content_type(request)
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
        received = await _receive(request, limit)
    except (web.RequestPayloadError, HttpProcessingError) as error:
        _forget(error)
        raise invalid(["body"], "the body does not decode as its headers say") from None
    except ConnectionError as error:  # nobody will read this
        _forget(error)
        raise invalid(["body"], "the body is incomplete") from None
    except TimeoutError:
        told = f"The body was too slow: it may pause for {BODY_TIMEOUT:g} seconds, and needs {BODY_RATE} bytes a second"
        raise Problem(408, "request_timeout", told) from None
    UNTIL.set(None)  # the time of a request begins when it is here
    with contextlib.ExitStack() as stack:
        stack.push(received)
        await check_again(request)
        stack.pop_all()
    return received


def check_content_type(request: web.Request) -> None:
    """Take what is declared as JSON (in UTF-8: RFC 8259, section 8.1).

    A web page of another origin can send a body without a type, or as a form or as text, but not as JSON, without
    its browser asking the service first (a CORS preflight: Fetch, section 2.2.2: CORS-safelisted request-header).
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
