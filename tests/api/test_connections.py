"""What a connection may cost: memory, time and room, and what comes to those who take more."""

import asyncio
import contextlib
import gzip
import json
import re
import resource
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.settings import Settings
from app.web import body as bodies
from app.web import connections, handlers
from app.web.application import make_app
from app.web.body import BODY_LIMIT, BULK_BODY_LIMIT
from tests.api.door import balance, create, deposit, problem
from tests.api.test_bad_input import send_raw
from tests.api.test_lanes import locked, until, waiting_backends
from tests.api.test_logs import Service, Start, access, operation, start
from tests.api.test_process import COMMAND, wait_until

__all__ = ["start"]  # a fixture

BULK = "/api/v1/operations"
MIB = 1024 * 1024


def head(path: str, *fields: str, method: str = "POST", version: str = "HTTP/1.1") -> bytes:
    """Return the head of a request with a JSON body."""
    lines = [f"{method} {path} {version}", "Host: localhost", "Content-Type: application/json", *fields]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), 30)


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def worker(service: Service) -> Path:
    """Return the folder in /proc of a service's only worker."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 1)
    return Path("/proc") / children.read_text().strip()


def memory(service: Service) -> int:
    """Return the bytes of memory that the worker has."""
    return int((worker(service) / "statm").read_text().split()[1]) * resource.getpagesize()


# Bodies: memory


@pytest.mark.parametrize("framing", ["length", "chunks", "bad_chunks"])
def test_uploads_that_are_broken_off_leave_nothing_behind(start: Start, framing: str) -> None:
    service = start(LOG_LEVEL="WARNING")
    body = b" " * (BULK_BODY_LIMIT - 1)

    def break_off() -> None:
        with contextlib.suppress(ConnectionError), connect(service) as connection:
            if framing == "length":
                connection.sendall(head(BULK, f"Content-Length: {BULK_BODY_LIMIT}") + body)
                reset(connection)
                return
            connection.sendall(head(BULK, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(body), body))
            if framing == "chunks":
                reset(connection)
            else:
                connection.sendall(b"nonsense\r\n")
                connection.recv(100)

    def round_of_uploads() -> int:
        for _ in range(40):
            break_off()
        wait_until(lambda: service.ask("GET", "/healthz")[0] == 200)
        return memory(service)

    round_of_uploads()
    before = round_of_uploads()
    assert round_of_uploads() - before < 30 * MIB  # 40 bodies have 160
    assert service.lines() == []


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_large_bodies_have_a_budget_and_small_ones_need_none(start: Start, framing: str) -> None:
    service = start(BODY_MEMORY="12")
    service.ask("POST", "/api/v1/wallets", {"uuid": "w"})
    before = memory(service)
    body = json.dumps({"operations": []}).encode().ljust(BULK_BODY_LIMIT)
    if framing == "length":
        first, last = head(BULK, f"Content-Length: {len(body)}") + body[:-1], body[-1:]
    else:
        first = head(BULK, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(body), body)
        last = b"0\r\n\r\n"

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(service)) for _ in range(3)]
        for client in clients:
            client.sendall(first)
        told = refused_as_overloaded(service, body)
        assert told == [b"HTTP/1.1 429 Too Many Requests"] * 10
        assert memory(service) - before < 40 * MIB
        assert service.ask("POST", "/api/v1/wallets/w/operation", operation(1))[0] == 200
        for client in clients:
            client.sendall(last)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert service.ask("POST", BULK, {"operations": [], "x": "x" * 1_000_000})[0] == 400  # there is room again


def refused_as_overloaded(service: Service, body: bytes) -> list[bytes]:
    """Announce ten large bodies and return the first lines of their answers, which ask to come again later."""
    told = []
    for _ in range(10):
        with connect(service) as client:
            client.sendall(head(BULK, f"Content-Length: {len(body)}"))
            answer = client.recv(65536)
            assert b"\r\nRetry-After: 1\r\n" in answer
            told.append(answer.split(b"\r\n")[0])
    return told


async def test_a_chunked_body_takes_room_as_it_grows(database_url: str, aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, body_memory=0)))
    await create(client, {"w": 0})
    body = json.dumps({"operations": []}).encode()

    async def grown(size: int) -> AsyncIterator[bytes]:
        yield body
        for _ in range(len(body), size, 1024):
            await asyncio.sleep(0)
            yield b" " * 1024

    headers = {"Content-Type": "application/json"}
    assert (await client.post(BULK, data=grown(BODY_LIMIT - 1024), headers=headers)).status == 200
    refused = await client.post(BULK, data=grown(BODY_LIMIT + 2048), headers=headers)
    assert (await problem(refused, 429, "overloaded"))["detail"]
    assert int(refused.headers["Retry-After"]) > 0


async def test_a_body_has_its_room_until_it_is_decoded(database_url: str, aiohttp_client: AiohttpClient) -> None:
    """Bodies that have arrived wait for their turn to be decoded."""
    client = await aiohttp_client(make_app(Settings(database_url=database_url, body_memory=4)))
    body = json.dumps({"operations": []}).encode().ljust(3 * MIB)
    headers = {"Content-Type": "application/json"}
    async with client.app[handlers.TURNS].places.place():
        waiting = asyncio.create_task(client.post(BULK, data=body, headers=headers))
        await until(client.app[handlers.TURNS].places.waiting)
        await problem(await client.post(BULK, data=body, headers=headers), 429, "overloaded")
    assert (await waiting).status == 200
    assert (await client.post(BULK, data=body, headers=headers)).status == 200


def test_who_hangs_up_while_sending_is_no_fault_of_the_service_or_its_database(start: Start) -> None:
    service = start()
    for hang_up in (reset, socket.socket.close):
        for framing in ("Content-Length: 100", "Transfer-Encoding: chunked"):
            connection = connect(service)
            connection.sendall(head("/api/v1/wallets/w/operation", framing) + b"2\r\n")
            wait_until(lambda: service.ask("GET", "/healthz")[0] == 200)
            hang_up(connection)
    wait_until(lambda: service.errors.read_text().count("/operation") == 4)

    lines = service.lines()
    assert {line["logger"] for line in lines} == {"access"}
    assert [line["status"] for line in access(lines) if line["path"].endswith("/operation")] == [400] * 4


# Bodies: compression

CODINGS = [
    "gzip",
    "x-gzip",
    "deflate",
    "br",
    "zstd",
    "compress",
    "GZIP",
    "gzip, identity",
    "identity, gzip",
    "nonsense",
]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/wallets"),
        ("POST", "/api/v1/wallets/w/operation"),
        ("POST", BULK),
        ("GET", "/api/v1/wallets/w"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
async def test_a_compressed_body_is_refused(client: TestClient, method: str, path: str, coding: str) -> None:
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    answer = await client.request(method, path, data=gzip.compress(b"{}"), headers=headers, compress=False)
    await problem(answer, 415, "unsupported_media_type")
    assert answer.headers["Accept-Encoding"] == "identity"


def compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Compress with gzip (zlib's container 31)."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """510 KB that are 500 MB: to inflate them takes seconds, and to deflate them too."""
    return b"".join(compressed(b" " * MIB for _ in range(500)))


@pytest.mark.parametrize("path", ["/healthz", BULK, "/nowhere"])
def test_nobody_waits_for_a_body_to_be_inflated(start: Start, bomb: bytes, path: str) -> None:
    service = start()
    method = "GET" if path == "/healthz" else "POST"
    with connect(service) as client:
        fields = ("Content-Encoding: gzip", f"Content-Length: {len(bomb)}")
        client.sendall(head(path, *fields, method=method) + bomb)
        client.settimeout(1)
        assert client.recv(65536).split()[1] in (b"415", b"404")
    assert memory(service) < 150 * MIB


async def test_a_body_that_is_declared_as_it_is_is_taken(client: TestClient) -> None:
    await create(client, {"w": 0})
    headers = {"Content-Encoding": "Identity"}
    assert (await client.post("/api/v1/wallets/w/operation", json=operation(5), headers=headers)).status == 200


# Bodies: time


async def trickle(body: bytes, size: int, pause: float) -> AsyncIterator[bytes]:
    for place in range(0, len(body), size):
        yield body[place : place + size]
        await asyncio.sleep(pause)


async def test_a_large_body_may_come_slowly(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 20 KB/s it takes many times as long as the time between two pieces may be."""
    monkeypatch.setattr(bodies, "BODY_TIMEOUT", 0.2)
    await create(client, {"w": 0})
    asked = [{"wallet_uuid": "w"} | operation(1) for _ in range(200)]
    body = json.dumps({"operations": asked}).encode()

    answer = await client.post(BULK, data=trickle(body, 1000, 0.05), headers={"Content-Type": "application/json"})

    assert answer.status == 200
    assert await balance(client, "w") == 200


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_that_comes_in_drops_is_not_waited_for(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT", 0.3)
    body = json.dumps({"operations": []}).encode().ljust(BODY_LIMIT)
    headers = {"Content-Type": "application/json"} | ({"Content-Length": str(len(body))} if framing == "length" else {})
    began = asyncio.get_running_loop().time()

    answer = await client.post(BULK, data=trickle(body, 1, 0.05), headers=headers)

    await problem(answer, 408, "request_timeout")
    assert asyncio.get_running_loop().time() - began < 2


# Heads


async def test_half_a_head_is_not_waited_for(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.1)
    status, headers, told = await send_raw(client, b"GET /healthz HTTP/1.1\r\nHost: localh")
    assert (status, told["code"]) == (408, "request_timeout")
    assert headers["x-request-id"]


async def test_a_head_that_comes_in_drops_is_not_waited_for(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(head("/healthz", method="GET"))
    assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            for byte in head("/healthz", method="GET") * 3:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(5):
        rest = await reader.read()
    assert b"HTTP/1.0 408 " in rest
    dripping.cancel()
    writer.close()


async def test_a_connection_may_idle_between_requests(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.1)
    monkeypatch.setattr(connections, "WATCH_INTERVAL", 0.05)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    for _ in range(2):
        await asyncio.sleep(0.5)
        writer.write(head("/healthz", method="GET") + b"\r\n")  # an empty line too many is no head
        assert (await reader.readuntil(b'{"status":"ok"}')).split()[1] == b"200"
    writer.close()


@pytest.mark.parametrize("piece", [500, 100_000])
async def test_a_head_has_a_limit(client: TestClient, piece: int) -> None:
    fields = [f"X-{number}: {'x' * 4000}" for number in range(20)]
    request = head("/healthz", *fields, method="GET")
    loop = asyncio.get_running_loop()
    with socket.create_connection((client.host, client.port)) as connection:
        connection.setblocking(False)
        with contextlib.suppress(ConnectionError):
            for place in range(0, len(request) - 4, piece):
                await loop.sock_sendall(connection, request[place : place + piece][: len(request) - 4 - place])
                await asyncio.sleep(0)
        async with asyncio.timeout(5):
            answer = await loop.sock_recv(connection, 65536)
    assert answer.split()[1] == b"431"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "head_too_large"


# Connections


@pytest.fixture
def few_files() -> Iterator[None]:
    """What is started has 1024 files, as is the custom, and may ask for more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(start: Start) -> None:
    service = start()
    limits = (worker(service) / "limits").read_text().splitlines()
    soft, hard = next(line.split()[3:5] for line in limits if line.startswith("Max open files"))
    assert soft == hard != "1024"


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc"], ids=["nothing", "half_a_head"])
def test_connections_that_wait_make_room_for_those_that_ask(start: Start, sent: bytes) -> None:
    service = start(CONNECTIONS="100")
    with contextlib.ExitStack() as stack:
        regular = stack.enter_context(connect(service))
        for number in range(300):
            connection = stack.enter_context(connect(service))
            connection.sendall(sent)
            if number % 10 == 0:
                assert service.ask("GET", "/healthz")[0] == 200
                regular.sendall(head("/healthz", method="GET"))
                assert regular.recv(65536).startswith(b"HTTP/1.1 200")
        assert len(list((worker(service) / "fd").iterdir())) < 150
    assert any("more than 100 connections" in line.get("message", "") for line in service.lines())


def test_half_sent_heads_never_use_up_the_files(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than files, at a hard limit of 1024, which nobody can raise."""
    monkeypatch.setattr("tests.api.test_logs.COMMAND", ["prlimit", "--nofile=1024:1024", *COMMAND])
    service = start()
    with contextlib.ExitStack() as stack:
        for number in range(1200):
            stack.enter_context(connect(service)).sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
            if number % 100 == 0:
                assert service.ask("GET", "/healthz")[0] == 200
        for _ in range(20):
            assert service.ask("GET", "/readyz")[0] == 200


async def test_where_all_connections_are_busy_a_newcomer_is_told_to_come_again(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, connections=3)))
    await create(client, {"w": 0})
    with locked(superuser, "w"):
        busy = [asyncio.create_task(deposit(client, "w", 1)) for _ in range(3)]
        await until(lambda: waiting_backends(superuser) == 1)
        await until(lambda: sum(one._current_request is not None for one in client.server.handler.connections) == 3)
        status, headers, told = await send_raw(client, b"")
        assert (status, told["code"], headers["retry-after"]) == (503, "overloaded", "1")
    assert [(await answer).status for answer in busy] == [200] * 3
    assert (await client.get("/healthz")).status == 200


# Answers


async def test_who_does_not_read_answers_is_given_up(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_TIMEOUT", 0.3)
    monkeypatch.setattr(connections, "WATCH_INTERVAL", 0.05)
    open_before = len(client.server.handler.connections)
    reader, writer = await asyncio.open_connection(client.host, client.port, limit=1024)
    writer.transport.pause_reading()
    writer.write(head("/openapi.json", method="GET") * 200)
    await until(lambda: len(client.server.handler.connections) == open_before + 1)

    await until(lambda: len(client.server.handler.connections) == open_before)

    writer.close()
    del reader


async def test_who_reads_answers_slowly_gets_them(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel holds megabytes: that it takes no more of them for a while is no sign that nobody reads."""
    monkeypatch.setattr(connections, "WRITE_TIMEOUT", 0.5)
    monkeypatch.setattr(connections, "WATCH_INTERVAL", 0.05)
    await asyncio.sleep(1.1)  # the watch that is set already
    number, loop, got = 150, asyncio.get_running_loop(), 0
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.setblocking(False)
        await loop.sock_connect(slow, (client.host, client.port))
        last = head("/openapi.json", "Connection: close", method="GET")
        await loop.sock_sendall(slow, head("/openapi.json", method="GET") * (number - 1) + last)
        while piece := await loop.sock_recv(slow, 30_000):
            got += len(piece)
            await asyncio.sleep(0.02)
    assert got > number * len(await (await client.get("/openapi.json")).read())


# What aiohttp's parser holds back


async def answers_to(client: TestClient, *pieces: bytes) -> bytes:
    """Send pieces one after another on one connection, the last of which asks to close it, and return all answers."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        answers = await reader.read()
    writer.close()
    return answers


def whole(*fields: str) -> bytes:
    body = json.dumps(operation(1)).encode()
    return head("/api/v1/wallets/w/operation", f"Content-Length: {len(body)}", *fields) + body


async def test_who_asks_for_another_protocol_is_answered_in_this_one_and_asked_to_connect_again(
    client: TestClient,
) -> None:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    fields = "Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    writer.write(f"GET /healthz HTTP/1.1\r\n{fields}".encode() + head(BULK, "Content-Length: 40000"))
    answer = await asyncio.wait_for(reader.read(), 3)  # to the end of the connection
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in answer
    writer.close()


@pytest.mark.parametrize("number", [5, 31, 32, 33, 130])
async def test_pipelined_requests_are_all_answered(number: int, client: TestClient) -> None:
    """aiohttp's parser stops after 32 that wait, and goes on when it is asked to."""
    await create(client, {"w": 0})
    first, last = whole(), whole("Connection: close")
    middle = b"".join(whole() for _ in range(number - 2))
    split = len(first) - 5
    answers = await answers_to(client, first[:split], first[split:] + middle + last)
    assert answers.count(b"HTTP/1.1 200 OK") == number
    assert await balance(client, "w") == number


@pytest.mark.parametrize("later", [True, False])
async def test_a_request_after_a_body_of_many_chunks_is_answered(later: bool, client: TestClient) -> None:
    """aiohttp's parser stops after so many chunks that nobody has read, and that may be the last one."""
    await create(client, {"w": 0})
    bulk = head("/api/v1/operations", "Transfer-Encoding: chunked") + b"1\r\n \r\n" * 16_385 + b"0\r\n\r\n"
    last = whole("Connection: close")
    answers = await answers_to(client, *([bulk, last] if later else [bulk + last]))
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"400", b"200"]
    assert await balance(client, "w") == 1


# The protocol


async def ask_raw(client: TestClient, request: bytes) -> tuple[bytes, dict[str, Any]]:
    """Send bytes, and return the first line of the answer and its JSON."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(request)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    first, _, rest = answer.partition(b"\r\n")
    return first, json.loads(rest.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/0.9"])
async def test_another_version_is_not_executed(client: TestClient, version: str) -> None:
    await create(client, {"w": 0})
    body = json.dumps(operation(5)).encode()
    request = head("/api/v1/wallets/w/operation", f"Content-Length: {len(body)}", version=version) + body
    first, told = await ask_raw(client, request)
    assert first.startswith(b"HTTP/1.1 505 ")
    assert told["code"] == "http_version_not_supported"
    assert await balance(client, "w") == 0


async def test_http_2_without_asking_is_not_spoken(client: TestClient) -> None:
    _, told = await ask_raw(client, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert (told["status"], told["code"]) == (505, "http_version_not_supported")


@pytest.mark.parametrize("coding", ["gzip, chunked", "foo, chunked", "gzip", "identity", "foo", "xchunked"])
@pytest.mark.parametrize("path", ["/api/v1/wallets/w/operation", BULK, "/healthz"])
async def test_an_unknown_transfer_coding_is_not_implemented(client: TestClient, path: str, coding: str) -> None:
    await create(client, {"w": 0})
    body = json.dumps(operation(5)).encode()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    _, told = await ask_raw(client, head(path, f"Transfer-Encoding: {coding}") + chunks)
    assert (told["status"], told["code"]) == (501, "not_implemented")
    assert await balance(client, "w") == 0


async def test_chunks_are_taken_in_any_spelling(client: TestClient) -> None:
    await create(client, {"w": 0})
    body = json.dumps(operation(5)).encode()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    status, _, _ = await send_raw(
        client, head("/api/v1/wallets/w/operation", "Transfer-Encoding: Chunked", "Expect: 100-Continue") + chunks
    )
    assert status == 200


@pytest.mark.parametrize("expectation", ["100-continue", "miracles"])
async def test_an_expectation_in_http_1_0_is_ignored(client: TestClient, expectation: str) -> None:
    await create(client, {"w": 0})
    body = json.dumps(operation(5)).encode()
    fields = (f"Content-Length: {len(body)}", f"Expect: {expectation}")
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(head("/api/v1/wallets/w/operation", *fields, version="HTTP/1.0"))
    await asyncio.sleep(0.1)
    writer.write(body)
    async with asyncio.timeout(5):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.0 200 ")
    writer.close()


async def test_who_expects_to_go_on_is_told_so_only_if_the_body_is_wanted(client: TestClient) -> None:
    await create(client, {"w": 0})
    body = json.dumps(operation(5)).encode()
    wanted = head("/api/v1/wallets/w/operation", f"Content-Length: {len(body)}", "Expect: 100-continue")
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(wanted)
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
    writer.close()
    for path, length, status in (
        ("/api/v1/wallets/w/operation", BODY_LIMIT + 1, b"413"),
        ("/api/v1/wallets/w w/operation".replace(" ", "%20"), 100, b"400"),
    ):
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(head(path, f"Content-Length: {length}", "Expect: 100-continue"))
        async with asyncio.timeout(5):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split()[1] == status
        assert b"Connection: close" in answer
        writer.close()
