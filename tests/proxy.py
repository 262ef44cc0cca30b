"""A proxy that cuts connections at a chosen point of a call: between app and PostgreSQL, or between client and app."""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

Address = str | tuple[str, int]
"""The path of a unix socket, or a host and a port."""


class Point(Enum):
    """Where in a call the connection is cut."""

    BEFORE_THE_CALL = "before_the_call"
    """Nothing of the call is forwarded."""
    AFTER_THE_CALL = "after_the_call"
    """The call is forwarded; whether it takes effect, and when, is the server's business."""
    BEFORE_THE_ANSWER = "before_the_answer"
    """The server has done it and answered; nothing of the answer is passed on."""
    IN_THE_ANSWER = "in_the_answer"
    """Half of the answer is passed on."""


class Talk(Protocol):
    """What the proxy has to understand of a protocol: one object a connection, for calls that don't overlap."""

    def call_length(self, data: bytes) -> int:
        """Return the length of the first call in what the client sent; 0 if the rest is still to come."""

    def is_answer(self, data: bytes) -> bool:
        """Tell whether what the server sent since the call is the whole answer."""

    def topic(self, call: bytes) -> bytes:
        """Return what a call is about. It is asked about every call, in order."""


class Postgres:
    """PostgreSQL's protocol, version 3: a call is what goes up to a Sync, its answer ends with ReadyForQuery."""

    def __init__(self) -> None:
        self._started = False
        self._queries: dict[bytes, bytes] = {}

    def call_length(self, data: bytes) -> int:
        if not self._started:  # the only message without a letter in front
            length = int.from_bytes(data[:4])
            if not 4 <= length <= len(data):
                return 0
            self._started = True
            return length
        end = 0
        for letter, body in _messages(data):
            end += 5 + len(body)
            if letter in b"SHQXp":  # Sync, Flush, Query, Terminate, a password
                return end
        return 0

    def is_answer(self, data: bytes) -> bool:
        return any(letter == b"Z" for letter, _ in _messages(data))

    def topic(self, call: bytes) -> bytes:
        """Return the query that is executed, nothing for one that is only prepared, and the start-up packet itself."""
        if call[:1] == b"\0":
            return call
        for letter, body in _messages(call):
            if letter == b"P":  # Parse
                name, query, _ = body.split(b"\0", 2)
                self._queries[name] = query
            elif letter == b"B":  # Bind
                _, name, _ = body.split(b"\0", 2)
                return self._queries.get(name, b"")
        return b""


class Http:
    """HTTP/1.1 with bodies of a declared length."""

    def call_length(self, data: bytes) -> int:
        head, end, body = data.partition(b"\r\n\r\n")
        declared = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        length = int(declared[1]) if declared else 0
        return len(head) + len(end) + length if end and length <= len(body) else 0

    def is_answer(self, data: bytes) -> bool:
        return self.call_length(data) > 0

    def topic(self, call: bytes) -> bytes:
        return call


class Cut(NamedTuple):
    """A cut to be made in the next call about a text."""

    text: bytes
    point: Point
    client_too: bool
    server_too: bool
    done: asyncio.Future[None]


class Proxy:
    """Passes on what clients and a server say to each other, and makes the cuts that are asked for."""

    def __init__(self, target: Address, talk: Callable[[], Talk]) -> None:
        self._target = target
        self._talk = talk
        self._cuts: deque[Cut] = deque()
        self._links: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, address: Address) -> None:
        """Start to listen; port 0 takes a free one."""
        if isinstance(address, str):
            self._server = await asyncio.start_unix_server(self._accept, address)
        else:
            self._server = await asyncio.start_server(self._accept, *address)

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self._server is not None
        name = self._server.sockets[0].getsockname()
        return name if isinstance(name, str) else name[:2]

    async def close(self) -> None:
        """Stop to listen and cut all connections."""
        assert self._server is not None
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def cut_next(
        self, text: bytes, point: Point, *, client_too: bool = True, server_too: bool = True
    ) -> asyncio.Future[None]:
        """Cut the connection of the next call about a text; the future is done when that has happened.

        Each call takes one cut. Without `server_too` the server keeps its connection, and whatever it says goes
        nowhere; without `client_too` as well, nobody is told, as when a network fails.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cuts.append(Cut(text, point, client_too, server_too, done))
        return done

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        try:
            connect = asyncio.open_unix_connection if isinstance(self._target, str) else asyncio.open_connection
            target = (self._target,) if isinstance(self._target, str) else self._target
            server_reader, server_writer = await connect(*target)
            try:
                await Link(self._talk(), self._cuts, reader, writer, server_reader, server_writer).run()
            finally:
                server_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass  # either side went away, the server is not there, or it is over: the close tells
        finally:
            writer.transport.abort()
            self._links.discard(link)


class Link:
    """A client's connection and the server's that belongs to it."""

    def __init__(
        self,
        talk: Talk,
        cuts: deque[Cut],
        client_reader: asyncio.StreamReader,
        client_writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        self._talk = talk
        self._cuts = cuts
        self._client_reader = client_reader
        self._client_writer = client_writer
        self._server_reader = server_reader
        self._server_writer = server_writer
        self._cut: Cut | None = None
        for writer in (client_writer, server_writer):
            writer.transport.set_write_buffer_limits(0)  # so that drain waits until all is sent

    async def run(self) -> None:
        """Pass on until either side ends; a server that must survive a cut ends by itself."""
        calls = asyncio.create_task(self._pass_calls())
        answers = asyncio.create_task(self._pass_answers())
        try:
            await asyncio.wait({calls, answers}, return_when=asyncio.FIRST_COMPLETED)
            if self._cut is not None and not self._cut.server_too:
                await answers
        finally:
            for task in (calls, answers):
                task.cancel()
            await asyncio.gather(calls, answers, return_exceptions=True)

    async def _pass_calls(self) -> None:
        said = b""
        while data := await self._client_reader.read(65536):
            said += data
            while length := self._talk.call_length(said):
                call, said = said[:length], said[length:]
                cut = self._cut = self._next_cut(call)
                if cut is not None and cut.point is Point.BEFORE_THE_CALL:
                    self._make(cut)
                    return
                await _send(self._server_writer, call)
                if cut is not None and cut.point is Point.AFTER_THE_CALL:
                    self._make(cut)
                    return

    async def _pass_answers(self) -> None:
        held = b""
        while data := await self._server_reader.read(65536):
            cut = self._cut
            if cut is None:
                await _send(self._client_writer, data)
                continue
            held += data
            if not cut.done.done() and self._talk.is_answer(held):
                if cut.point is Point.IN_THE_ANSWER:
                    await _send(self._client_writer, held[: len(held) // 2])
                self._make(cut)
                if cut.server_too:
                    return

    def _next_cut(self, call: bytes) -> Cut | None:
        topic = self._talk.topic(call)
        for cut in self._cuts:
            if cut.text in topic:
                self._cuts.remove(cut)
                return cut
        return None

    def _make(self, cut: Cut) -> None:
        if cut.client_too:
            self._client_writer.transport.abort()
        if cut.server_too:
            self._server_writer.transport.abort()
        cut.done.set_result(None)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _messages(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the complete messages of PostgreSQL's protocol at the start of some data: letter and body."""
    messages = []
    start = 0
    while len(data) - start >= 5:
        end = start + 1 + int.from_bytes(data[start + 1 : start + 5])
        if end > len(data):
            break
        messages.append((data[start : start + 1], data[start + 5 : end]))
        start = end
    return messages
