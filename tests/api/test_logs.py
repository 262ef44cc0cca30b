"""What a running service writes to standard error."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen
from uuid import uuid4

import psycopg
import pytest

from app.logs import WAITING_LIMIT
from app.metrics import MAX_AGE
from app.server.embedded import running_server
from app.settings import CHECKOUT
from tests.api.test_process import COMMAND, free_port, wait_until
from tests.conftest import environment_with

MADE_ID = re.compile(r"[0-9a-f]{16}")
ACCESS_FIELDS = {"time", "level", "logger", "request_id", "method", "path", "status", "ms", "peer"}


class Service:
    """A started `python -m app` on this test's database, whose standard error is a file or a terminal."""

    def __init__(self, folder: Path, stderr: int | None, **settings: str) -> None:
        self.port = free_port()
        self.errors = folder / "stderr"
        self.output = folder / "stdout"
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                COMMAND,
                cwd=CHECKOUT,
                env=environment_with(PORT=str(self.port), **settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors if stderr is None else stderr,
            )
        wait_until(lambda: self.process.poll() is not None or "Try: " in self.output.read_text())
        assert self.process.poll() is None, self.errors.read_text()

    def ask(self, method: str, path: str, body: object = None, **headers: str | bytes) -> tuple[int, str | None]:
        """Make a request and return its status and its X-Request-ID."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = None if body is None else json.dumps(body)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"Content-Type": "application/json", **sent})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.getheader("X-Request-ID")

    def send(self, raw: bytes) -> bytes:
        """Send bytes, and return all that comes back until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), 30) as connection:
            connection.sendall(raw)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def lines(self) -> list[dict[str, Any]]:
        """Stop the service and return its lines, each of which is a JSON object."""
        self.stop()
        return [json.loads(line) for line in self.errors.read_bytes().splitlines()]


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path, database_url: str) -> Iterator[Start]:
    """Start services; they are stopped after the test."""
    started: list[Service] = []

    def start(stderr: int | None = None, **settings: str) -> Service:
        folder = tmp_path / f"service-{len(started)}"
        folder.mkdir()
        started.append(Service(folder, stderr, **{"DATABASE_URL": database_url} | settings))
        return started[-1]

    yield start
    for service in started:
        service.stop()


def access(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["logger"] == "access"]


def operation(amount: int) -> dict[str, Any]:
    return {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": amount}


# Lines


def test_every_request_has_a_json_line(start: Start) -> None:
    service = start()
    service.ask("POST", "/api/v1/wallets", {"uuid": "w"})
    service.ask("GET", "/api/v1/wallets/w")
    service.ask("DELETE", "/api/v1/wallets/w")

    lines = service.lines()

    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/api/v1/wallets", 201),
        ("GET", "/api/v1/wallets/w", 200),
        ("DELETE", "/api/v1/wallets/w", 405),
    ]
    for line in lines:
        assert line.keys() == ACCESS_FIELDS
        assert (line["level"], line["logger"]) == ("info", "access")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["time"])
        assert MADE_ID.fullmatch(line["request_id"])
        assert 0 < line["ms"] < 30_000
        assert line["peer"] == "127.0.0.1"


def test_whatever_is_asked_for_the_log_stays_json_and_goes_on(start: Start) -> None:
    service = start()
    targets = [b"/\xff", b"/\xed\xa0\x80", b"/\xc3\xa4", b"/%00%0a%22", b'/"\\', b"/" + b"a" * 5000]
    for target in targets:
        for _ in range(2):
            answer = service.send(b"GET " + target + b" HTTP/1.1\r\nHost: w\r\nConnection: close\r\n\r\n")
            assert answer.split()[1] in (b"400", b"404"), target
        service.ask("GET", "/healthz")

    lines = service.lines()

    assert {line["logger"] for line in lines} == {"access"}
    assert len(lines) == 3 * len(targets)
    assert {line["path"] for line in lines[2::3]} == {"/healthz"}
    assert max(len(line["path"]) for line in lines) <= 1000


def test_what_is_not_http_leaves_a_line_and_no_traceback(start: Start) -> None:
    service = start()
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"nonsense\r\n\r\n"):
        assert service.send(raw).split()[1] == b"400"
    service.ask("GET", "/healthz")

    *strange, last = service.lines()
    assert [(line["method"], line["path"], line["status"]) for line in strange] == [("-", "-", 400)] * 3
    assert {line["peer"] for line in strange} == {"127.0.0.1"}
    assert all(MADE_ID.fullmatch(line["request_id"]) for line in strange)
    assert last["path"] == "/healthz"


def test_whoever_is_led_elsewhere_leaves_a_line(start: Start) -> None:
    service = start()
    for path in ("/docs/", "/api/v1/wallets/w/"):
        status, request_id = service.ask("GET", path)
        assert (status, bool(request_id)) == (308, True)

    assert [(line["path"], line["status"]) for line in service.lines()] == [
        ("/docs/", 308),
        ("/api/v1/wallets/w/", 308),
    ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_many_requests_at_once_have_a_whole_line_each(start: Start, workers: str) -> None:
    service = start(WORKERS=workers)

    def ask(number: int) -> None:
        for request in range(25):
            service.ask("GET", "/healthz", X_Request_ID=f"{number}-{request}")

    clients = [threading.Thread(target=ask, args=[number]) for number in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()

    asked = sorted(f"{number}-{request}" for number in range(8) for request in range(25))
    assert sorted(line["request_id"] for line in service.lines()) == asked


def test_a_terminal_gets_short_lines(start: Start) -> None:
    terminal, stderr = os.openpty()
    service = start(stderr=stderr)
    os.close(stderr)
    service.ask("GET", "/api/v1/wallets/nobody", X_Request_ID="abc")
    service.stop()

    said = b""
    with suppress(OSError):  # nobody has the other end open any more
        while data := os.read(terminal, 65536):
            said += data
    os.close(terminal)

    assert re.fullmatch(
        rb"\d\d:\d\d:\d\d GET /api/v1/wallets/nobody 404 \d+(\.\d+)? ms abc\r\n",
        said,
    ), said


@pytest.mark.parametrize(("level", "logged"), [("DEBUG", True), ("INFO", True), ("WARNING", False), ("ERROR", False)])
def test_the_level_decides_whether_requests_are_logged(start: Start, level: str, logged: bool) -> None:
    service = start(LOG_LEVEL=level)
    service.ask("GET", "/healthz")
    assert bool(access(service.lines())) is logged


def test_below_error_a_database_that_fails_is_still_logged(start: Start, superuser: psycopg.Connection) -> None:
    superuser.execute("revoke execute on function wallet.list_operations from wallet_app")
    for level, levels in (("WARNING", {"warning"}), ("ERROR", set())):
        superuser.execute("grant execute on function wallet.list_operations to wallet_app")
        service = start(LOG_LEVEL=level, REQUEST_DEADLINE="0.2")
        superuser.execute("revoke execute on function wallet.list_operations from wallet_app")
        assert service.ask("GET", "/api/v1/wallets/w/operations")[0] == 503
        assert {line["level"] for line in service.lines()} == levels


# Whose request it was

FORWARDED = [
    ("203.0.113.7", "203.0.113.7"),
    ("198.51.100.1, 203.0.113.7", "203.0.113.7"),
    ("198.51.100.1, 203.0.113.7, 10.1.2.3", "203.0.113.7"),
    ("203.0.113.7,10.1.2.3,  10.200.0.1", "203.0.113.7"),
    ("10.1.2.3, 10.4.5.6", "10.1.2.3"),
    ("2001:db8::7", "2001:db8::7"),
    ("2001:DB8:0::7, fd00::1", "2001:db8::7"),
    ("203.0.113.7:4711", "203.0.113.7"),
    ("[2001:db8::7]:4711", "2001:db8::7"),
    ("::ffff:203.0.113.7", "203.0.113.7"),
    ("203.0.113.7, unknown", "127.0.0.1"),
    ("203.0.113.7, unknown, 10.1.2.3", "10.1.2.3"),
    ("203.0.113.7,", "127.0.0.1"),
    ('<script>"\\', "127.0.0.1"),
    ("", "127.0.0.1"),
    (None, "127.0.0.1"),
]
"""What X-Forwarded-For says behind trusted proxies, and whose request it is then."""


def forwarded(text: str | None) -> dict[str, str]:
    return {} if text is None else {"X_Forwarded_For": text}


def test_behind_trusted_proxies_a_line_names_the_client(start: Start) -> None:
    service = start(TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8,fd00::/8")
    for text, _ in FORWARDED:
        service.ask("GET", "/healthz", **forwarded(text))
    assert [line["peer"] for line in service.lines()] == [peer for _, peer in FORWARDED]


@pytest.mark.parametrize("trusted", ["", "10.0.0.0/8", "127.0.0.2"])
def test_nobody_else_is_believed(start: Start, trusted: str) -> None:
    service = start(TRUSTED_PROXIES=trusted)
    for text, _ in FORWARDED:
        service.ask("GET", "/healthz", **forwarded(text))
    assert {line["peer"] for line in service.lines()} == {"127.0.0.1"}


def shop(superuser: psycopg.Connection, service: Service) -> str:
    """Make a key of this name, wait until the service knows it, and return its secret."""
    [[secret]] = superuser.execute("select wallet.create_key('shop', '{read,deposit}')").fetchall()
    wait_until(lambda: service.ask("GET", "/api/v1/wallets", Authorization=f"Bearer {secret}")[0] == 200, 5)
    return str(secret)


def test_a_request_s_lines_name_its_key_and_its_client(start: Start, superuser: psycopg.Connection) -> None:
    superuser.execute("select from wallet.create_wallet('w')")
    service = start(ACCESS="keys", TRUSTED_PROXIES="127.0.0.1", REQUEST_DEADLINE="0.5")
    secret = shop(superuser, service)
    superuser.execute("revoke execute on function wallet.list_operations from wallet_app")
    connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
    for number, (path, authorization) in enumerate(
        [
            ("/api/v1/wallets/w", f"Bearer {secret}"),
            ("/metrics", f"Bearer {secret}"),
            ("/api/v1/wallets/w/operations", f"Bearer {secret}"),
            ("/api/v1/wallets/w", "Bearer wk_nonsense"),
            ("/api/v1/wallets/w", ""),
            ("/nowhere", f"Bearer {secret}"),
        ]
    ):  # on one connection
        headers = {"Authorization": authorization, "X-Forwarded-For": "203.0.113.7", "X-Request-ID": f"number-{number}"}
        connection.request("GET", path, headers=headers)
        connection.getresponse().read()
    connection.close()

    lines = service.lines()

    told = [line for line in lines if line.get("request_id", "").startswith("number-")]
    assert [(line["status"], line.get("key")) for line in access(told)] == [
        (200, "shop"),
        (403, "shop"),
        (503, "shop"),
        (401, None),
        (401, None),
        (404, None),
    ]
    assert {line["peer"] for line in told} == {"203.0.113.7"}
    [*others] = [line for line in told if line["logger"] == "wallet"]
    assert others
    assert {(line["request_id"], line["key"]) for line in others} == {("number-2", "shop")}


def test_a_secret_stands_in_no_line_no_metric_and_no_answer(start: Start, superuser: psycopg.Connection) -> None:
    service = start(ACCESS="keys", LOG_LEVEL="DEBUG", REQUEST_DEADLINE="0.5")
    secret = shop(superuser, service)
    guessed = "wk_" + secret[:2:-1]
    said = []
    body = b'{"operation_uuid": "x"}'
    for one in (secret, guessed):
        for request in (
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Bearer {one}",
            f"GET /metrics HTTP/1.1\r\nAuthorization: Bearer {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Bearer {one} {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Basic {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Bearer {one}\r\nAuthorization: Bearer {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Bearer {one}\x01",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization : Bearer {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nBearer {one}",
            f"GET /api/v1/wallets/w HTTP/9.1\r\nAuthorization: Bearer {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Bearer {one}{'x' * 20_000}",
            f"GET /api/v1/wallets/w?key={one} HTTP/1.1\r\nAuthorization: Bearer {one}",
            f"GET /api/v1/wallets/w HTTP/1.1\r\nAuthorization: Bearer {one}\r\nCookie: key={one}",
            f"POST /api/v1/wallets/w/operation HTTP/1.1\r\nAuthorization: Bearer {one}"
            f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}",
        ):
            raw = f"{request}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            said.append(service.send(raw + (body if request.startswith("POST") else b"")))
    superuser.execute("alter function wallet.live_keys() rename to no_keys")
    superuser.execute("alter function wallet.get_wallet rename to no_wallet")
    superuser.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like 'wallet%' and datname = current_database()"
    )
    service.ask("GET", "/api/v1/wallets/w", Authorization=f"Bearer {secret}")
    superuser.execute("alter function wallet.no_keys() rename to live_keys")
    superuser.execute("select wallet.create_key('meter', '{metrics}')")
    [[meter]] = superuser.execute("select wallet.create_key('meter-2', '{metrics}')").fetchall()
    ask = f"GET /metrics HTTP/1.1\r\nAuthorization: Bearer {meter}\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    wait_until(lambda: service.send(ask.encode()).split()[1] == b"200", 5)
    said.append(service.send(ask.encode()))
    service.stop()
    said += [service.errors.read_bytes(), service.output.read_bytes()]
    assert sum(map(len, said)) > 10_000
    for one in (secret, guessed, meter):
        assert not [text for text in said if one.encode() in text or one[3:].encode() in text]


# A reader that stalls


class Stalled(Service):
    """A service whose standard error is a pipe that nobody reads yet."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.reader, writer = os.pipe()
        super().__init__(folder, writer, **settings)
        os.close(writer)

    def read(self) -> bytes:
        """Read until the last process has closed the pipe."""
        with os.fdopen(self.reader, "rb") as pipe:
            return pipe.read()

    def flood(self, requests: int) -> None:
        """Make requests with lines that are long."""

        def ask() -> None:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
            for _ in range(requests // 8):
                connection.request("GET", "/" + "x" * 300, headers={"X-Request-ID": "y" * 128})
                connection.getresponse().read()
            connection.close()

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_reader_that_stalls_stops_nobody_and_is_told_what_it_has_missed(
    tmp_path: Path, database_url: str, workers: str
) -> None:
    service = Stalled(tmp_path, DATABASE_URL=database_url, WORKERS=workers)
    limit = WAITING_LIMIT * int(workers)
    requests = (limit // 450 + 2000) // 8 * 8
    service.flood(requests)
    for _ in range(20):
        assert service.ask("GET", "/healthz")[0] == 200
    time.sleep(MAX_AGE)  # the metrics of an earlier look are told no longer
    with urlopen(f"http://127.0.0.1:{service.port}/metrics", timeout=10) as answer:
        [counted] = re.findall(r"^wallet_log_lines_dropped_total (\S+)", answer.read().decode(), re.MULTILINE)
    assert 0 < float(counted) < requests

    reading: list[bytes] = []
    reader = threading.Thread(target=lambda: reading.append(service.read()))
    reader.start()
    wait_until(lambda: service.ask("GET", "/healthz?last")[0] == 200)
    time.sleep(0.5)
    service.stop()
    reader.join()

    lines = [json.loads(line) for line in reading[0].splitlines()]
    told = [line["message"] for line in lines if line["logger"] == "wallet"]
    dropped = sum(int(message.split()[0]) for message in told)
    assert float(counted) <= dropped <= float(counted) + 30
    assert len(access(lines)) + dropped == requests + 20 + 2  # and the question for the metrics, and the last one
    assert "/healthz" in {line["path"] for line in access(lines)[-2:]}


def test_the_supervisor_goes_on_while_nobody_reads(tmp_path: Path, database_url: str) -> None:
    service = Stalled(tmp_path, DATABASE_URL=database_url, WORKERS="2")
    service.flood(2000)
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    for _ in range(3):
        before = {int(pid) for pid in children.read_text().split()}
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda before=before: len({int(pid) for pid in children.read_text().split()} - before) == 2)
    wait_until(lambda: answers(service))
    began = time.monotonic()
    service.stop()
    assert service.process.returncode == 0
    assert time.monotonic() - began < 10
    os.close(service.reader)


def answers(service: Service) -> bool:
    with suppress(OSError):
        return service.ask("GET", "/healthz")[0] == 200
    return False


def test_a_reader_that_is_gone_stops_nobody(tmp_path: Path, database_url: str) -> None:
    service = Stalled(tmp_path, DATABASE_URL=database_url)
    os.close(service.reader)
    service.flood(400)
    assert service.ask("GET", "/healthz")[0] == 200
    service.stop()
    assert service.process.returncode == 0


# What the supervisor says


def test_what_the_supervisor_says_later_is_in_the_log(start: Start) -> None:
    service = start(WORKERS="2")
    said = service.output.read_text()
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 2)
    killed = [int(pid) for pid in children.read_text().split()]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: len(children.read_text().split()) == 2 and not {*map(int, children.read_text().split())} & {*killed}
    )
    lines = [line for line in service.lines() if line["level"] == "error"]
    assert all(any(str(pid) in line["message"] for line in lines) for pid in killed)
    assert service.output.read_text() == said


def test_all_that_comes_out_of_one_pipe_is_json(database_url: str, tmp_path: Path) -> None:
    """`python -m app 2>&1 | jq`"""
    port = free_port()
    process = subprocess.Popen(
        COMMAND,
        cwd=CHECKOUT,
        env=environment_with(PORT=str(port), WALLET_DATA_DIR=str(tmp_path), LOG_LEVEL="warning"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        said = [json.loads(process.stdout.readline())["message"] for _ in range(3)]
        assert said[0] == f"Listening on http://127.0.0.1:{port}"
        assert said[2].startswith("Try: curl http://127.0.0.1:")
        running = running_server(tmp_path)
        assert running is not None
        os.kill(running[0], signal.SIGKILL)
        assert "PostgreSQL ended" in json.loads(process.stdout.readline())["message"]
        process.terminate()
        for line in process.stdout.read().splitlines():
            json.loads(line)
    finally:
        process.terminate()
        process.wait(30)


def test_a_probe_leaves_a_line_only_if_all_is_not_well(start: Start, superuser: psycopg.Connection) -> None:
    service = start()
    assert service.ask("GET", "/readyz")[0] == 200
    superuser.execute("drop function wallet.contract_version")
    assert service.ask("GET", "/readyz")[0] == 503
    assert [line["status"] for line in service.lines() if line["logger"] == "access"] == [503]


# The request's id


def test_a_request_id_that_is_given_is_kept(start: Start) -> None:
    service = start()
    ids = ["a", "0af7651916cd43dd8448eb211c80319c", "req:2026/11.24+a=b@c_d-e", "x" * 128]
    for given in ids:
        assert service.ask("GET", "/healthz", X_Request_ID=given) == (200, given)
    assert [line["request_id"] for line in service.lines()] == ids


def test_a_request_id_that_is_no_id_is_replaced(start: Start) -> None:
    service = start()
    told = [
        service.ask("GET", "/healthz", X_Request_ID=bad)[1]
        for bad in ("", " ", "x" * 129, "a b", "a\tb", b"a\x80b", "a\u00e4b", '{"a":1}', "a;b")
    ]
    told.append(service.ask("GET", "/healthz")[1])

    assert all(MADE_ID.fullmatch(str(request_id)) for request_id in told)
    assert len(set(told)) == len(told)
    assert [line["request_id"] for line in service.lines()] == told


def test_control_characters_in_a_request_id_reach_neither_answer_nor_log(start: Start) -> None:
    service = start()
    controls = [b"\x00", b"\x01", b"\x1b[2J", b"\r", b"\x7f"]
    for control in controls:
        head = b"GET /healthz HTTP/1.1\r\nHost: w\r\nConnection: close\r\nX-Request-ID: a" + control + b"b\r\n\r\n"
        assert control not in service.send(head).replace(b"\r\n", b"")
    service.stop()
    logged = service.errors.read_bytes()
    assert len(logged.splitlines()) == len(controls)
    assert [control for control in controls if control in logged] == []


def test_the_answers_that_are_problems_have_their_request_id_too(start: Start) -> None:
    service = start()
    for method, path, body, status in (
        ("GET", "/nowhere", None, 404),
        ("PUT", "/healthz", None, 405),
        ("GET", "/api/v1/wallets/nobody", None, 404),
        ("POST", "/api/v1/wallets/w/operation", {"amount": 1.5}, 400),
        ("POST", "/api/v1/wallets/w/operation", "x" * 100_000, 413),
    ):
        assert service.ask(method, path, body, X_Request_ID="mine") == (status, "mine")


# What fails


def deny(superuser: psycopg.Connection, function: str) -> None:
    superuser.execute(f"revoke execute on function wallet.{function} from wallet_app".encode())


def test_a_read_that_fails_is_told_with_its_sqlstate_its_code_and_its_request(
    start: Start, superuser: psycopg.Connection
) -> None:
    service = start(REQUEST_DEADLINE="0.3")
    deny(superuser, "get_wallet")

    assert service.ask("GET", "/api/v1/wallets/w", X_Request_ID="mine") == (503, "mine")

    lines = service.lines()
    assert {line["request_id"] for line in lines} == {"mine"}
    assert {line["sqlstate"] for line in lines if "sqlstate" in line} == {"42501"}
    assert {line["code"] for line in lines if "code" in line} == {"database_refused"}


def test_a_write_that_fails_is_told_with_its_sqlstate(start: Start, superuser: psycopg.Connection) -> None:
    """The call may be about many requests, so it has no request's id; the 503 has."""
    service = start(REQUEST_DEADLINE="0.3")
    deny(superuser, "apply_operation")
    deny(superuser, "apply_operations")

    assert service.ask("POST", "/api/v1/wallets/w/operation", operation(5), X_Request_ID="mine") == (503, "mine")

    lines = service.lines()
    assert {line["sqlstate"] for line in lines if "sqlstate" in line} == {"42501"}
    assert [line["request_id"] for line in lines if line.get("code") == "database_refused"] == ["mine"]
    assert {line.get("request_id") for line in lines if "sqlstate" in line} == {None}


# What stays out


def test_no_body_no_amount_and_no_credential_is_logged(
    start: Start, superuser: psycopg.Connection, database_url: str
) -> None:
    """A password in DATABASE_URL is of no use on a server that trusts everybody, but it is there to be found."""
    parts = urlsplit(database_url)
    with_password = urlunsplit(parts._replace(netloc=parts.netloc.replace("@", ":s3cret-password@")))
    assert "s3cret-password" in with_password
    service = start(DATABASE_URL=with_password, LOG_LEVEL="DEBUG", REQUEST_DEADLINE="0.3")
    amount = 987_654_321
    secret = {"Authorization": "Bearer s3cret-token", "Cookie": "session=s3cret-cookie"}

    service.ask("POST", "/api/v1/wallets", {"uuid": "w"})
    service.ask("POST", "/api/v1/wallets/w/operation", operation(amount), **secret)
    service.ask("POST", "/api/v1/wallets/w/operation", operation(amount) | {"operation_type": "s3cret-type"})
    service.ask("POST", "/api/v1/wallets/w/operation", {"s3cret-field": amount})
    service.ask("POST", "/api/v1/operations", {"operations": [{"wallet_uuid": "w"} | operation(amount)]}, **secret)
    service.ask("GET", "/api/v1/wallets/w/operations?limit=5&token=s3cret-query")
    service.ask("GET", "http://user:s3cret-user@w/healthz")
    deny(superuser, "apply_operation")
    deny(superuser, "apply_operations")
    service.ask("POST", "/api/v1/wallets/w/operation", operation(amount), **secret)
    service.stop()

    said = service.errors.read_text() + service.output.read_text()
    assert '"status":503' in said
    assert "s3cret" not in said
    assert str(amount) not in said


@pytest.mark.parametrize("port", ["", ":x"])
def test_a_database_that_is_not_reached_does_not_give_the_password_away(port: str) -> None:
    for password in ("s3cret", "s3/cret", "s3#cret", "s3?cret", "s3@cret"):
        url = f"postgresql://nobody:{password}@127.0.0.1{port}/nowhere?connect_timeout=1"
        ran = subprocess.run(
            COMMAND,
            cwd=CHECKOUT,
            env=environment_with(DATABASE_URL=url, PORT=str(free_port())),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 1
        assert "s3" not in ran.stdout + ran.stderr, ran.stderr
        assert "cret" not in ran.stdout + ran.stderr, ran.stderr
