"""What a client may cost beside its request: half a head, an answer that it does not read, a connection that idles.

aiohttp bounds none of these. Its connections are kept here with a limit on their number, on the size of a head and on
the time that a head and the reading of an answer take. One look a second at all of them costs a request nothing.
"""

import asyncio
import contextlib
import fcntl
import logging
import resource
import sys
import termios
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import _ErrInfo

from app.settings import Settings
from app.web.problems import RETRY, Problem

VERSIONS = (HttpVersion11, HttpVersion10)
HEAD_LIMIT = 16 * 1024
"""Bytes of a request's head, at most."""
HEAD_TIMEOUT = 10.0
"""Seconds that a head may take from its first byte to its last."""
WRITE_TIMEOUT = 30.0
"""Seconds after which a client that reads nothing of an answer is given up."""
WATCH_INTERVAL = 1.0
"""Seconds between two looks at all connections."""
TELL_INTERVAL = 60.0
"""Seconds between two lines in the log that tell of too many connections."""
PAUSE = 0.1
"""Seconds without a request after which this process may have been stopped, and for so long again."""
OTHER_FILES = 64
"""Files that a worker has open beside the connections of clients, of its pool and of its lanes."""

_log = logging.getLogger("wallet")
_latest = _doubtful_until = 0.0

Answer = Callable[[Handler, web.Request], Awaitable[web.StreamResponse]]
"""What makes an answer of whatever a handler returns or raises."""


def serve_over(app: web.Application, settings: Settings, answer: Answer) -> None:
    """Have an app served over connections of this kind, and every request answered by `answer`.

    aiohttp has no public way to say so: its runner asks the app for a server.
    """
    make_server = app._make_handler  # noqa: SLF001
    limit = min(settings.connections, _room(settings))
    vars(app)["_make_handler"] = lambda **arguments: Server(make_server(**arguments), answer, limit)


def raise_file_limit() -> None:
    """Raise the soft limit of open files, which is 1024 by custom, to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # a container may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _room(settings: Settings) -> int:
    """Return how many connections of clients the limit of open files leaves room for."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(files - OTHER_FILES - settings.pool_size - settings.lanes, 1)


class Server(web.Server):
    """Makes connections, knows all that are open, and looks at each once a second."""

    def __init__(self, plain: web.Server, answer: Answer, limit: int) -> None:
        super().__init__(
            partial(answer, cast(Handler, plain.request_handler)),
            request_factory=plain.request_factory,
            handler_cancellation=plain.handler_cancellation,
            loop=plain._loop,  # noqa: SLF001
            **plain._kwargs,  # noqa: SLF001
        )
        self.answer = answer
        self._limit = limit
        self._told = -TELL_INTERVAL
        self._timer = self._loop.call_later(WATCH_INTERVAL, self._watch)

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)

    def make_room(self, newcomer: "Connection") -> None:
        """Close a connection that waits for a request if there are too many; refuse the newcomer if none waits.

        The first to go is one that never sent a request, the oldest of its kind.
        """
        if len(self._connections) <= self._limit:
            return
        if self._loop.time() - self._told > TELL_INTERVAL:
            self._told = self._loop.time()
            _log.warning("more than %d connections: those that wait for a request are closed", self._limit)
        others = cast("list[Connection]", [one for one in self._connections if one is not newcomer])
        waiting = [one for one in others if one.is_waiting()]
        if waiting:
            min(waiting, key=Connection.standing).drop()
        elif len(self._connections) - self._limit <= self._limit // 8 + 8:  # room to say so
            newcomer.refuse(503)
        else:
            newcomer.drop()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Close all connections once they are answered."""
        await super().shutdown(timeout)
        self._timer.cancel()

    def _watch(self) -> None:
        now = self._loop.time()
        for connection in list(self._connections):
            cast(Connection, connection).watch(now)
        self._timer = self._loop.call_later(WATCH_INTERVAL, self._watch)


class Connection(web.RequestHandler):
    """A connection whose heads, unread answers and refusals are bounded."""

    __slots__ = ("_body", "_head", "_head_began", "_unread", "_unread_since", "_wire")

    def __init__(self, manager: Server, **arguments: Any) -> None:
        super().__init__(manager, **arguments)
        self._body: StreamReader = EMPTY_PAYLOAD
        self._head = 0
        self._head_began = 0.0
        self._unread = 0
        self._unread_since = 0.0
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or make room for it."""
        super().connection_made(transport)
        self._wire = cast(asyncio.Transport, transport)
        cast(Server, self._manager).make_room(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._wire = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and count it if it belongs to a head that is not whole yet."""
        known, belongs_to_head = self._request_count, self._body is EMPTY_PAYLOAD or self._body.is_eof()
        super().data_received(data)
        if self._request_count != known:
            message, body = self._messages[-1]
            if isinstance(message, _ErrInfo) and not self._body.is_eof():  # aiohttp lets its reader wait
                self._body.set_exception(web.RequestPayloadError(message.message))
            self._body = EMPTY_PAYLOAD if body.is_eof() else body  # else each would live until the next request
            self._head = 0
        elif belongs_to_head and (self._head or data.strip()) and not self._close:  # RFC 9112, section 2.2
            if self._head == 0:
                self._head_began = self._loop.time()
            self._head += len(data)
            if self._head > HEAD_LIMIT:
                self.refuse(431)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume what was paused: aiohttp asks for it after each body, and parses once more what it has.

        Skip it if the body is whole and no request waits: nothing is left to parse. Else the parser may have paused.
        """
        if self._reading_paused or self._messages or not self._body.is_eof():
            super().resume_reading(resume_parser)

    def is_waiting(self) -> bool:
        """Tell whether nothing is being done for this connection: the next request is not here, or not whole."""
        return self._waiter is not None and not self._waiter.done() and not self._close and not self._force_close

    def standing(self) -> tuple[bool, float]:
        """Return what decides which connection has to go: the least does."""
        return self._request_count > 0, self._next_keepalive_close_time

    def drop(self) -> None:
        """Close the connection at once, whatever is still to be written."""
        self._force_close = True
        if self._wire is not None:
            self._wire.abort()

    def refuse(self, status: int) -> None:
        """Answer in place of the next request, and close. What is being answered already goes first."""
        refused = _ErrInfo(status=status, exc=HttpProcessingError(code=status), message="")
        self._messages.append((refused, EMPTY_PAYLOAD))
        self._close = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def watch(self, now: float) -> None:
        """Keep the time limits; `now` is on the loop's clock."""
        if self._wire is None:
            return
        if self._head and self.is_waiting() and now - self._head_began > HEAD_TIMEOUT:
            self.refuse(408)
        unread = self._wire.get_write_buffer_size()
        if unread:  # the kernel takes more of it only once a third of what it has is through
            unread += _in_kernel(self._wire.get_extra_info("socket").fileno())
        if unread == 0 or unread < self._unread or self._unread == 0:
            self._unread_since = now
        elif now - self._unread_since > WRITE_TIMEOUT:
            self.drop()
        self._unread = unread

    def _make_error_handler(self, err_info: _ErrInfo) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        """Return what answers a request that is not HTTP, in place of aiohttp's own plain text."""
        make_answer = cast(Server, self._manager).answer

        async def refuse(_request: web.Request) -> web.StreamResponse:
            raise bad_http(err_info)

        async def refuse_and_close(request: web.BaseRequest) -> web.StreamResponse:
            response = await make_answer(refuse, cast(web.Request, request))
            response.force_close()
            return response

        return refuse_and_close


def _in_kernel(connection: int) -> int:
    """Return the bytes that a socket has taken and its peer has not (tcp(7): SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def check_protocol(request: web.Request) -> None:
    """Raise the Problem for a request that is well formed in a protocol that is not spoken here.

    The answer is in HTTP/1.1.
    """
    coding = request.headers.get(hdrs.TRANSFER_ENCODING)
    if request._version not in VERSIONS:  # noqa: SLF001
        request._version = HttpVersion11  # noqa: SLF001 (request.version remembers what it was at first)
        raise unknown_version()
    if coding is not None and coding.lower() != "chunked":
        raise unknown_coding()


def was_paused(now: float) -> bool:
    """Tell whether this process may have been stopped just before this request, of time.perf_counter() `now`."""
    global _latest, _doubtful_until
    if now - _latest > PAUSE:
        _doubtful_until = now + PAUSE
    _latest = now
    return now < _doubtful_until


def check_presence(request: web.Request) -> None:
    """Raise the Problem for a request whose client has hung up, perhaps long ago, while this process was stopped.

    It may have been repeated elsewhere and refused, so it must not be begun now.
    """
    if request.transport is None or request.transport.is_closing():
        raise Problem(408, "request_timeout", "The client has hung up")


def bad_http(error: _ErrInfo) -> Problem:
    """Return the problem for what the parser did not take, or a connection refused."""
    if error.status == 408:
        return Problem(408, "request_timeout", f"The head did not arrive within {HEAD_TIMEOUT:g} seconds")
    if error.status == 431:
        return Problem(431, "head_too_large", f"A head may have {HEAD_LIMIT} bytes")
    if error.status == 503:
        return Problem(503, "overloaded", "Too many connections", headers=RETRY)
    if "Request has invalid `Transfer-Encoding`" in error.message:  # the last coding is not chunked
        return unknown_coding()
    if "Pause on PRI" in error.message:  # how HTTP/2 begins: RFC 9113, section 3.4
        return unknown_version()
    return Problem(400, "invalid_request", "Not a valid HTTP request")


def unknown_coding() -> Problem:
    """Return the 501 for a transfer coding other than chunked (RFC 9112, section 6.1)."""
    return Problem(501, "not_implemented", "No transfer coding but chunked is understood")


def unknown_version() -> Problem:
    """Return the 505 for a version other than HTTP/1.0 and HTTP/1.1 (RFC 9110, section 15.6.6)."""
    return Problem(505, "http_version_not_supported", "HTTP/1.1 is spoken here")
