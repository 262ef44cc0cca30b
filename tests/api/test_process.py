"""`python -m app` as a process: how it starts, what it survives, how it stops, what it says when it cannot start."""

import contextlib
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.client import RemoteDisconnected
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from app.server.embedded import LOG_LIMIT, Postgres, connection_url, running_server
from app.server.supervisor import LOOK_AT_LOG
from app.settings import CHECKOUT
from app.web.connections import PAUSE
from tests.conftest import environment_with, open_folder
from tests.forked import command

COMMAND = [sys.executable, "-m", "app"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forked"])
FIVE = {1: "1111111111", 2: "2222222222", 3: "3333333333", 4: "4444444444", 5: "5555555555"}


class Service:
    """A started `python -m app`, its embedded database and its REST door."""

    def __init__(
        self,
        home: Path,
        log: Path,
        user: int | None = None,
        checkout: Path = CHECKOUT,
        command: list[str] = COMMAND,
        **environment: str,
    ) -> None:
        self.home = home
        self.port = free_port()
        identity: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=checkout,
                env=environment_with(WALLET_DATA_DIR=str(home), PORT=str(self.port), **environment),
                stdout=output,
                stderr=output,
                start_new_session=True,
                **identity,
            )

    def said(self) -> str:
        return self.log.read_text()

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.said()
        return "Try: " in self.said()

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Send a GET, or a POST of a body, and return status and decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json", **headers})
        try:
            with urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)

    def balance(self, wallet: str) -> int:
        status, answer = self.ask(f"/api/v1/wallets/{wallet}")
        assert status == 200, answer
        return answer["balance"]

    def deposit(self, wallet: str, amount: int) -> None:
        operation = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": amount}
        assert self.ask(f"/api/v1/wallets/{wallet}/operation", operation)[0] == 200

    def postgres(self) -> int:
        """Return the pid of the embedded PostgreSQL."""
        return self.server()[0]

    def server(self) -> tuple[int, str]:
        """Return the pid of the embedded PostgreSQL and the folder of its socket."""
        running = running_server(self.home)
        assert running is not None
        return running

    def workers(self) -> set[int]:
        """Return the pids of the workers. They are forked after the service has said that it listens."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        running = running_server(self.home)
        return {int(pid) for pid in children.split()} - {running[0] if running else None}

    def url(self, user: str = "postgres") -> str:
        """Return the URI of the database for a user."""
        return connection_url(self.server()[1], user, "wallet")

    def superuser(self) -> psycopg.Connection:
        return psycopg.connect(self.url())

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal the process and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_until(come_true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not come_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(pid: int) -> None:
    """Kill -9 a process and wait until it is gone, or a zombie that its parent has to reap."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path, used_home: Path) -> Iterator[Start]:
    """Start services; whatever still runs after the test is stopped.

    A data folder is a copy of a used one, unless it is there or to be `new`: a first start takes seconds.
    """
    started: list[Service] = []

    def start(home: Path = tmp_path / "data", *, new: bool = False, **options: Any) -> Service:
        if not new and not home.exists() and "DATABASE_URL" not in options:
            subprocess.run(["cp", "-a", used_home, home], check=True)
        service = Service(home, tmp_path / f"output-{len(started)}", **options)
        started.append(service)
        wait_until(service.is_up)
        return service

    yield start
    for service in started:
        service.process.terminate()
        try:
            service.process.wait(20)
        except subprocess.TimeoutExpired:
            service.process.kill()
            service.process.wait()
        if (running := running_server(service.home)) is not None:
            kill(running[0])


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m app` until it ends by itself.

    It is forked, because imports take longer than all that a command does; Service starts a new interpreter.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = FORKS.Process(target=command, args=(arguments, environment_with(**settings), output, errors))
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail(f"it has not ended after a minute: {errors.read_text()}")
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())


# Starting


def test_it_says_where_it_listens_where_its_data_lies_and_what_to_try(start: Start) -> None:
    service = start(new=True)

    listening, data, attempt = service.said().splitlines()

    assert listening.split()[-1] == f"http://127.0.0.1:{service.port}"
    assert str(service.home) in data
    command, url = attempt.removeprefix("Try: ").split()
    assert command == "curl"
    with urlopen(url) as answer:
        assert json.load(answer) == {"id": 1, "uuid": "1111111111", "balance": 1500}


def test_a_new_database_holds_five_wallets_and_the_next_start_finds_it_again(start: Start) -> None:
    service = start(new=True)
    for number, wallet in FIVE.items():
        assert service.ask(f"/api/v1/wallets/{wallet}") == (200, {"id": number, "uuid": wallet, "balance": 1500})
    service.deposit("1111111111", 5)
    service.stop()

    service = start()

    assert [service.balance(wallet) for wallet in FIVE.values()] == [1505, 1500, 1500, 1500, 1500]


@pytest.mark.parametrize("folder", ["/".join(["deep" * 5] * 20), "with a space and an 'ä'", "for its owner only"])
def test_its_data_may_lie_anywhere(start: Start, tmp_path: Path, folder: str) -> None:
    home = tmp_path / folder / "data"
    home.parent.mkdir(parents=True)
    home.parent.chmod(0o700)

    assert start(home, new=True).balance("1111111111") == 1500


def test_two_run_at_once(start: Start, tmp_path: Path) -> None:
    one, other = start(tmp_path / "one"), start(tmp_path / "other")

    one.deposit("1111111111", 5)

    assert (one.balance("1111111111"), other.balance("1111111111")) == (1505, 1500)


@pytest.mark.skipif(os.getuid() != 0, reason="every other test runs it as a normal user")
def test_a_normal_user_can_run_it(start: Start) -> None:
    user = pwd.getpwnam("nobody").pw_uid
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="wallet-test-") as folder:
        os.chown(folder, user, user)
        try:
            subprocess.run([*COMMAND, "--help"], cwd=CHECKOUT, check=True, capture_output=True, **identity)
        except (PermissionError, subprocess.CalledProcessError):
            pytest.skip("another user cannot enter this checkout, its venv or its Python")

        service = start(Path(folder) / "data", new=True, user=user)

        assert service.balance("1111111111") == 1500
        assert {service.home.stat().st_uid, (service.home / "postgres").stat().st_uid} == {user}
        assert service.stop() == 0


# Surviving


@pytest.mark.parametrize("victims", [["app"], ["postgres", "app"], ["app", "postgres"]], ids="_and_".join)
def test_a_killed_service_starts_again_with_all_its_money(start: Start, victims: list[str]) -> None:
    service = start()
    service.deposit("1111111111", 5)
    pids = {"app": service.process.pid, "postgres": service.postgres()}

    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    service.process.wait()

    assert start().balance("1111111111") == 1505


def test_a_killed_postgres_is_brought_back(start: Start) -> None:
    service = start()
    service.deposit("1111111111", 5)
    killed = service.postgres()

    kill(killed)

    wait_until(lambda: service.ask("/readyz")[0] == 200 and service.postgres() != killed)
    service.deposit("1111111111", 5)
    assert service.balance("1111111111") == 1510


KILLS_POSTGRES = """
import os, sys
from app import __main__
from app.server import supervisor

def announce(settings, listening, postgres, **more):
    postgres.process.kill()
    os.waitid(os.P_PID, postgres.process.pid, os.WEXITED | os.WNOWAIT)
    said(settings, listening, postgres, **more)

said, supervisor.announce = supervisor.announce, announce
sys.exit(__main__.main([]))
"""
"""The service, whose PostgreSQL ends after it has started and before anybody waits for that."""


def test_a_postgres_that_ends_during_the_start_is_brought_back_at_once(start: Start) -> None:
    service = start(command=[sys.executable, "-c", KILLS_POSTGRES])
    wait_until(lambda: "starting it again" in service.said(), LOOK_AT_LOG / 2)
    wait_until(lambda: service.ask("/readyz")[0] == 200)


def test_a_killed_worker_is_replaced(start: Start) -> None:
    service = start(WORKERS="2")
    wait_until(lambda: len(service.workers()) == 2)
    killed = service.workers()

    for worker in killed:
        kill(worker)

    wait_until(lambda: len(service.workers() - killed) == 2)
    wait_until(lambda: answers(service))
    assert service.balance("1111111111") == 1500


def answers(service: Service) -> bool:
    try:
        return service.ask("/healthz")[0] == 200
    except (URLError, ConnectionError):
        return False


def refuses_connections(service: Service) -> bool:
    try:
        socket.create_connection(("127.0.0.1", service.port)).close()
    except ConnectionRefusedError:
        return True
    return False


# Stopping


@pytest.mark.parametrize("how", ["sigterm", "sigint", "ctrl_c"])
def test_it_stops_after_it_has_answered(start: Start, how: str) -> None:
    service = start()
    statuses: list[int] = []
    withdrawal = {"operation_uuid": str(uuid4()), "operation_type": "WITHDRAW", "amount": 500}

    def client() -> None:
        statuses.append(service.ask("/api/v1/wallets/1111111111/operation", withdrawal)[0])

    with service.superuser() as other:
        socket_folder = Path(other.info.host)
        other.execute("select from wallet.wallet where uuid = '1111111111' for update")
        in_flight = threading.Thread(target=client)
        in_flight.start()
        waiting = "select pid from pg_locks where not granted"
        wait_until(lambda: other.execute(waiting).fetchone())

        if how == "ctrl_c":
            os.killpg(service.process.pid, signal.SIGINT)
        else:
            service.process.send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGINT)
        wait_until(lambda: not answers(service))
        assert statuses == []

    in_flight.join(30)
    assert statuses == [200]
    assert service.process.wait(30) == 0
    assert running_server(service.home) is None
    assert not socket_folder.exists()
    assert start().balance("1111111111") == 1000


def test_while_one_worker_answers_the_last_requests_no_other_s_connections_are_accepted(
    start: Start, database_url: str, superuser: psycopg.Connection
) -> None:
    superuser.execute("select from wallet.create_wallet('w')")
    service = start(WORKERS="2", DATABASE_URL=database_url)
    deposit = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}
    statuses: list[int] = []
    with psycopg.connect(superuser.info.dsn) as other:
        other.execute("select from wallet.wallet where uuid = 'w' for update")
        in_flight = threading.Thread(
            target=lambda: statuses.append(service.ask("/api/v1/wallets/w/operation", deposit)[0])
        )
        in_flight.start()
        wait_until(lambda: superuser.execute("select pid from pg_locks where not granted").fetchone())
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses_connections(service), 5)
        assert statuses == []
    in_flight.join(30)
    assert statuses == [200]
    assert service.process.wait(30) == 0


@pytest.mark.parametrize("seconds", ["0", "2"])
def test_a_request_that_does_not_end_is_waited_for_no_longer_than_the_shutdown_timeout(
    start: Start, database_url: str, superuser: psycopg.Connection, seconds: str
) -> None:
    superuser.execute("select from wallet.create_wallet('w')")
    service = start(DATABASE_URL=database_url, SHUTDOWN_TIMEOUT=seconds, REQUEST_DEADLINE="60")
    body = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}

    ends: list[object] = []

    def client() -> None:
        try:
            ends.append(service.ask("/api/v1/wallets/w/operation", body))
        except ConnectionError as error:
            ends.append(type(error))

    with psycopg.connect(superuser.info.dsn) as other:
        other.execute("select from wallet.wallet where uuid = 'w' for update")
        in_flight = threading.Thread(target=client)
        in_flight.start()
        wait_until(lambda: superuser.execute("select pid from pg_locks where not granted").fetchone())
        began = time.monotonic()
        assert service.stop() == 0
        assert float(seconds) - 0.1 < time.monotonic() - began < max(2 * float(seconds), 3)
    in_flight.join(30)
    assert ends == [RemoteDisconnected]


def test_what_a_client_sent_that_has_hung_up_since_is_not_begun(
    start: Start, database_url: str, superuser: psycopg.Connection
) -> None:
    """The worker was stopped meanwhile: the request may have been repeated elsewhere and refused."""
    superuser.execute("select from wallet.create_wallet('w')")
    service = start(DATABASE_URL=database_url)
    wait_until(lambda: len(service.workers()) == 1)
    [worker] = service.workers()
    body = json.dumps({"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1})
    head = "POST /api/v1/wallets/w/operation HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    kept = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(2)]
    for connection in kept:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    time.sleep(2 * PAUSE)  # a worker has its doubts about its first requests, too
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    time.sleep(2 * PAUSE)
    os.kill(worker, signal.SIGSTOP)
    for connection in (*kept, socket.create_connection(("127.0.0.1", service.port))):
        connection.sendall(request)
        connection.close()
    time.sleep(2 * PAUSE)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: service.said().count('"status":408') == 3, 5)
    assert service.balance("w") == 0


# Not starting


def refuse(**settings: str) -> str:
    """Start the service with settings with which it cannot, and return the one line that it says."""
    began = time.monotonic()
    ran = run(**settings)
    assert ran.returncode not in (0, -signal.SIGKILL)
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert time.monotonic() - began < 20
    return line


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refuse(PORT=port, WALLET_DATA_DIR=str(tmp_path))
        assert port in refuse(PORT=port, WALLET_DATA_DIR=str(tmp_path), WORKERS="2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", ["abc", "0", "-1", "65536", "80.5", "8000 8001", "٨٠٠٠"])
def test_a_port_that_is_none(port: str) -> None:
    assert "PORT" in refuse(PORT=port)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize(
    ("host", "shown", "reached"),
    [
        ("::1", "[::1]", ["[::1]"]),
        ("::", "[::1]", ["[::1]", "127.0.0.1"]),
        ("0:0::0", "[::1]", ["[::1]", "127.0.0.1"]),
        ("0.0.0.0", "127.0.0.1", ["127.0.0.1"]),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_listens_where_it_says(
    start: Start, database_url: str, host: str, shown: str, reached: list[str], workers: str
) -> None:
    service = start(HOST=host, ACCESS="open", WORKERS=workers, DATABASE_URL=database_url)
    assert service.said().splitlines()[0] == f"Listening on http://{shown}:{service.port}"
    assert f"http://{shown}:{service.port}/" in service.said().splitlines()[2]
    for address in reached:
        with urlopen(f"http://{address}:{service.port}/healthz", timeout=10) as answer:
            assert answer.status == 200
    assert f":{service.port}" in refuse(HOST=host, PORT=str(service.port), DATABASE_URL=database_url)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_it_does_not_open_to_others_unless_told_to(host: str, tmp_path: Path) -> None:
    said = refuse(HOST=host, PORT=str(free_port()), WALLET_DATA_DIR=str(tmp_path / "data"))
    assert "ACCESS=keys" in said
    assert "ACCESS=open" in said
    assert not (tmp_path / "data").exists()


def test_with_keys_it_says_that_it_wants_one(start: Start) -> None:
    service = start(HOST="0.0.0.0", ACCESS="keys")
    [attempt] = [line for line in service.said().splitlines() if line.startswith("Try: ")]
    with service.superuser() as superuser:
        [[secret]] = superuser.execute("select wallet.create_key('me', '{read}')").fetchall()
    assert service.ask("/api/v1/wallets/1111111111")[0] == 401
    command = attempt.removeprefix("Try: ").replace("wk_...", secret).replace("curl", "curl -s")

    def wallet() -> bool:
        said = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30).stdout
        return '"balance":1500' in said

    wait_until(wallet, 5)


def test_a_revoked_key_is_refused_by_every_worker_within_5_seconds(start: Start, database_url: str) -> None:
    """A new connection may reach any of them."""
    service = start(ACCESS="keys", WORKERS="3", DATABASE_URL=database_url)

    def statuses(secret: str) -> set[int]:
        found = set()
        for _ in range(30):
            request = Request(f"http://127.0.0.1:{service.port}/metrics", headers={"Authorization": f"Bearer {secret}"})
            try:
                with urlopen(request, timeout=30) as answer:
                    found.add(answer.status)
            except HTTPError as error:
                found.add(error.code)
        return found

    url = psycopg.conninfo.make_conninfo(database_url, user="postgres")
    with psycopg.connect(url, autocommit=True) as superuser:
        [[secret]] = superuser.execute("select wallet.create_key('shop', '{metrics}')").fetchall()
        wait_until(lambda: statuses(secret) == {200}, 5)
        superuser.execute("select from wallet.revoke_key('shop')")
        revoked = time.monotonic()
        wait_until(lambda: statuses(secret) == {401}, 5)
        while time.monotonic() < revoked + 5:
            time.sleep(0.1)
        assert statuses(secret) == {401}


def test_a_host_that_is_not_this_one(tmp_path: Path) -> None:
    assert "192.0.2.1" in refuse(HOST="192.0.2.1", WALLET_DATA_DIR=str(tmp_path))


def test_a_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "data", Path("/proc/data"), Path("/dev/null")):
        assert str(folder) in refuse(WALLET_DATA_DIR=str(folder), PORT=str(free_port()))


def test_a_data_folder_that_another_service_uses(start: Start) -> None:
    service = start()

    assert str(service.home) in refuse(WALLET_DATA_DIR=str(service.home), PORT=str(free_port()))

    assert service.balance("1111111111") == 1500


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://nobody@127.0.0.1:1/nowhere",
        "postgresql://nobody@/nowhere?host=/nonexistent",
        "postgresql://nobody@does-not-exist.invalid/nowhere",
        "mysql://nobody@127.0.0.1/nowhere",
        "nonsense",
        "postgresql://nobody@127.0.0.1:99999/nowhere",
        "postgresql://nobody@127.0.0.1/nowhere?connect_timeout=1",
        "postgresql://nobody@127.0.0.1/nowhere?channel_binding=require",
    ],
)
def test_a_database_that_cannot_be_reached(url: str) -> None:
    assert "database" in refuse(DATABASE_URL=url, PORT=str(free_port()))


def test_a_database_that_is_not_there_or_not_migrated(server: SimpleNamespace) -> None:
    name = f"empty_{uuid4().hex}"
    url = connection_url(server.host, server.user, name)
    assert name in refuse(DATABASE_URL=url, PORT=str(free_port()))

    with psycopg.connect(connection_url(server.host, server.user, "postgres"), autocommit=True) as connection:
        connection.execute(f"create database {name}")
    assert "not migrated" in refuse(DATABASE_URL=url, PORT=str(free_port()))


# What another user can write

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root runs PostgreSQL as another user")
NOBODY = pwd.getpwnam("nobody").pw_uid


def pid_file(*lines: object) -> str:
    """Return a postmaster.pid that looks right: pid, data folder, start time, port, socket folder …"""
    rest = ["/proc/self/cwd", "1764000000", "5432", "/tmp/wallet-gone", "", "  1 1", "ready   "]
    return "".join(f"{line}\n" for line in [*lines, *rest[len(lines) - 1 :]])


@pytest.mark.parametrize(
    "garbled",
    ["", "\n", "x\n", "-1\n", "0\n", "1e3\n", "٣\n", f"{10**30}\n", "\0" * 5000, "\xff\xfe", pid_file("-1", "x")],
    ids=repr,
)
def test_a_garbled_pid_file_is_one_line(home: Path, garbled: str) -> None:
    (home / "postgres" / "postmaster.pid").write_bytes(garbled.encode("latin-1" if garbled == "\xff\xfe" else "utf-8"))
    assert "postmaster.pid" in refuse(WALLET_DATA_DIR=str(home), PORT=str(free_port()))
    ran = run("psql", "-c", "select 1", WALLET_DATA_DIR=str(home))
    assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "dangling_link"])
def test_a_pid_file_that_is_no_file_is_one_line(home: Path, tmp_path: Path, kind: str) -> None:
    file, target = home / "postgres" / "postmaster.pid", tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(target)
        if kind == "link":
            target.write_text(pid_file(1))
    assert "postmaster.pid" in refuse(WALLET_DATA_DIR=str(home), PORT=str(free_port()))
    assert target.exists() == (kind == "link")


def test_what_a_pid_file_names_is_neither_removed_nor_signalled(home: Path, start: Start, tmp_path: Path) -> None:
    """A process in the data folder that is no PostgreSQL, and folders that look like those of a socket."""
    bystander = subprocess.Popen(["sleep", "60"], cwd=home / "postgres")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="wallet-") as like_ours,
            tempfile.TemporaryDirectory(prefix="wallet-") as victim,
        ):
            for folder in (like_ours, victim):
                Path(folder, "kept").touch()
            for pid in (bystander.pid, os.getpid(), 1):
                for socket_folder in (victim, f"{like_ours}/../{Path(victim).name}", str(tmp_path)):
                    (home / "postgres" / "postmaster.pid").write_text(
                        pid_file(pid, "/proc/self/cwd", 1764000000, 5432, socket_folder)
                    )
                    assert running_server(home) is None
                    service = start(home)
                    assert service.balance("1111111111") == 1500
                    service.stop()
            assert Path(victim, "kept").exists()
            assert Path(like_ours, "kept").exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@as_root
@pytest.mark.parametrize("name", ["lock", "postgres.log", "postgres.log.1", "postgres", "postgres.new"])
@pytest.mark.parametrize("kind", ["link", "hard_link"])
def test_what_another_user_links_into_his_folder_stays_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    home, target = tmp_path / "data", tmp_path / "roots"
    home.mkdir()
    if name.startswith("postgres.log") or name == "lock" or kind == "hard_link":
        target.write_text("root's")
    else:
        target.mkdir()
        (target / "root's").touch(0o600)
    if kind == "link":
        (home / name).symlink_to(target)
    else:
        (home / name).hardlink_to(target)
    os.chown(home, NOBODY, NOBODY)
    before = everything(target)

    ran = subprocess.run(
        [*COMMAND, "psql", "-X", "-c", "select 1"],
        cwd=CHECKOUT,
        env=environment_with(WALLET_DATA_DIR=str(home)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )

    if ran.returncode:
        (line,) = ran.stderr.splitlines()
        assert str(home) in line
    else:
        assert name in ("postgres.log.1", "postgres.new")  # the one is not in use yet, the other was removed
    assert everything(target) == before


def everything(path: Path) -> list[object]:
    """Return what can be told of a file or a folder and what is in it."""
    found = path.stat()
    content: object = path.read_bytes() if path.is_file() else [everything(each) for each in sorted(path.iterdir())]
    return [path, found.st_uid, found.st_gid, found.st_mode, content]


@as_root
def test_a_copy_of_roots_is_handed_over_but_nothing_that_it_only_names(
    home: Path, start: Start, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    cluster = home / "postgres"
    for path in (cluster, *cluster.rglob("*")):
        os.chown(path, 0, 0)
    (cluster / "link").symlink_to(outside)
    before = everything(outside)
    start(home).stop()
    assert everything(outside) == before
    assert cluster.stat().st_uid == NOBODY

    os.chown(cluster, 0, 0)
    (cluster / "base" / "hard link").hardlink_to(outside / "file")
    before = everything(outside)
    assert "hard link" in refuse(WALLET_DATA_DIR=str(home), PORT=str(free_port()))
    assert everything(outside) == before


@as_root
def test_a_folder_of_roots_in_which_others_write_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "chmod" in refuse(WALLET_DATA_DIR=str(tmp_path), PORT=str(free_port()))


@as_root
def test_beside_the_socket_nothing_in_tmp_is_the_other_users(start: Start, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    service = start()
    socket_folder = Path(service.server()[1])
    owners = {path: path.lstat().st_uid for path in (socket_folder.parent, *socket_folder.parent.rglob("*"))}
    assert {path for path, owner in owners.items() if owner != 0} == {
        path for path in owners if path == socket_folder or socket_folder in path.parents
    }
    assert not any(
        path.lstat().st_mode & 0o022 for path, owner in owners.items() if owner == 0 and not path.is_symlink()
    )
    (socket_folder / "link").symlink_to(tmp_path)

    service.stop()

    assert not socket_folder.parent.exists()
    assert (tmp_path / "kept").exists()


def test_what_a_killed_service_left_in_tmp_is_removed(start: Start) -> None:
    service = start()
    left = Path(service.server()[1])
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    assert left.exists()

    start()

    assert not left.parent.exists()


# What the caller's environment says of another server

ANOTHER_SERVER = {
    "PGHOST": "127.0.0.77",
    "PGHOSTADDR": "127.0.0.77",
    "PGPORT": "1",
    "PGUSER": "somebody",
    "PGDATABASE": "elsewhere",
    "PGPASSWORD": "secret",
    "PGPASSFILE": "/nonexistent",
    "PGSERVICE": "elsewhere",
    "PGSERVICEFILE": "/nonexistent",
    "PGOPTIONS": "-c search_path=nowhere -c default_transaction_read_only=on",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nonexistent",
    "PGREQUIREPEER": "somebody",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGCHANNELBINDING": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCLIENTENCODING": "NONSENSE",
    "PGTZ": "Nowhere/Else",
    "PGDATA": "/nonexistent",
    "PGAPPNAME": "somebody else",
}


@pytest.fixture(scope="module")
def beset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose first start, with its initdb and its migrations, saw all of them."""
    folder = tmp_path_factory.mktemp("beset")
    service = Service(folder / "data", folder / "output", **ANOTHER_SERVER)
    try:
        wait_until(service.is_up)
        yield service
    finally:
        service.process.terminate()
        service.process.wait(30)


@pytest.mark.parametrize("variable", [*ANOTHER_SERVER, None])
def test_the_embedded_server_and_its_programs_see_no_other_server(beset: Service, variable: str | None) -> None:
    settings = ANOTHER_SERVER if variable is None else {variable: ANOTHER_SERVER[variable]}
    beset.deposit("1111111111", 5)
    for pid in (beset.postgres(), *beset.workers()):
        if pid in beset.workers():  # forked: what it was started with is not what it has
            continue
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert not [entry for entry in environment if entry.startswith(b"PG")]
    query = ["psql", "-X", "-A", "-t", "-c", "select current_database(), current_user, current_setting('search_path')"]

    ran = run(*query, WALLET_DATA_DIR=str(beset.home), **settings)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == 'wallet|wallet_service|"$user", public\n'


def test_psql_on_the_embedded_server_is_still_the_callers(start: Start, tmp_path: Path) -> None:
    service = start()
    settings = tmp_path / "psqlrc"
    settings.write_text("\\set QUIET on\n\\pset format unaligned\n\\pset tuples_only\n\\set greeting hello\n")
    ran = run("psql", "-c", "\\echo :greeting", WALLET_DATA_DIR=str(service.home), PSQLRC=str(settings))
    assert (ran.returncode, ran.stdout) == (0, "hello\n")


# PostgreSQL's log


def test_postgres_log_is_for_its_owner_and_does_not_grow_by_refusals(start: Start) -> None:
    service = start()
    log = service.home / "postgres.log"
    assert log.stat().st_mode & 0o777 == 0o600
    before = log.stat().st_size
    query = "select wallet.apply_operation('1111111111', gen_random_uuid(), 'WITHDRAW', 1000000)"
    assert run("psql", "-X", *["-c", query] * 50, WALLET_DATA_DIR=str(service.home)).returncode == 1
    withdrawal = {"operation_type": "WITHDRAW", "amount": 1_000_000}
    for _ in range(50):
        path = "/api/v1/wallets/1111111111/operation"
        assert service.ask(path, withdrawal | {"operation_uuid": str(uuid4())})[0] == 400
    assert log.stat().st_size - before < 1000


def test_what_fails_is_still_found_in_postgres_log_but_not_its_text(start: Start) -> None:
    service = start()
    with service.superuser() as superuser, pytest.raises(psycopg.errors.UndefinedColumn):
        superuser.execute("select nonsense, 'a secret' from wallet.wallet")
    text = (service.home / "postgres.log").read_text()
    assert 'column "nonsense" does not exist' in text
    assert "a secret" not in text


def test_postgres_log_is_bounded(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path, "fsync=off")
    postgres.start()
    try:
        for _ in range(3):
            with postgres.log.open("ab") as log:
                log.write(b"x" * LOG_LIMIT + b"the end\n")
            postgres.bound_log()
            assert postgres.log.stat().st_size == 0
            older = tmp_path / "postgres.log.1"
            assert (older.stat().st_size, older.stat().st_mode & 0o777) == (LOG_LIMIT, 0o600)
            assert older.read_bytes().endswith(b"the end\n")
        with (
            psycopg.connect(postgres.url("postgres", "postgres")) as superuser,
            pytest.raises(psycopg.errors.UndefinedColumn),
        ):
            superuser.execute("select nonsense")
        assert postgres.log.read_text().count("nonsense") == 1
        assert postgres.log.stat().st_size < 1000
    finally:
        postgres.stop()


# Sessions


def test_the_embedded_server_has_room_for_all_sessions_of_the_settings(start: Start) -> None:
    service = start(WORKERS="6", POOL_SIZE="40")
    with service.superuser() as superuser:
        row = superuser.execute("show max_connections").fetchone()
    assert row is not None
    assert int(row[0]) >= 6 * (40 + 2 + 3) + 10


def test_settings_that_want_more_sessions_than_there_are(database_url: str, superuser: psycopg.Connection) -> None:
    """The tests' server has 300, of which superusers keep 3."""
    line = refuse(DATABASE_URL=database_url, PORT=str(free_port()), WORKERS="12", POOL_SIZE="20")
    assert all(number in line for number in ("300", "297", "12 ", "20 ", str(12 * (20 + 2 + 3))))

    superuser.execute("alter role wallet_service connection limit 14")
    try:
        line = refuse(DATABASE_URL=database_url, PORT=str(free_port()))
        assert all(number in line for number in ("14", "15", "role"))
    finally:
        superuser.execute("alter role wallet_service connection limit -1")
    superuser.execute(f'alter database "{superuser.info.dbname}" connection limit 13'.encode())
    assert "13" in refuse(DATABASE_URL=database_url, PORT=str(free_port()))


PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture
def pooler(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Callable[..., str]]:
    """Start PgBouncers before this test's database: each is the function's URL of it."""
    if PGBOUNCER is None:
        pytest.skip("there is no pgbouncer")
    folder = open_folder(tmp_path_factory, "pgbouncer")
    folder.chmod(0o777)
    server = conninfo_to_dict(database_url)
    started: list[subprocess.Popen[bytes]] = []

    def start(**settings: object) -> str:
        port = free_port()
        file = folder / f"{port}.ini"
        lines = {
            "auth_type": "any",
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            "ignore_startup_parameters": "extra_float_digits",
            **settings,
        }
        [name, host] = [server["dbname"], server["host"]]
        target = f"{name} = host={host} port=5432 dbname={name} user=wallet_service"
        body = "\n".join(f"{key} = {value}" for key, value in lines.items())
        file.write_text(f"[databases]\n{target}\n[pgbouncer]\n{body}\n")
        file.chmod(0o644)
        identity: dict[str, Any] = {"user": NOBODY, "group": NOBODY} if os.getuid() == 0 else {}
        with (folder / f"{port}.log").open("wb") as log:
            command = [PGBOUNCER, "-q", str(file)]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, **identity))
        wait_until(lambda: listens(port))
        return f"postgresql://wallet_service@127.0.0.1:{port}/{name}?sslmode=disable"

    yield start
    for process in started:
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("settings", [{}, {"server_round_robin": 1}, {"default_pool_size": 1}, {"min_pool_size": 2}])
@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_does_not_keep_sessions_apart(
    pooler: Callable[..., str], mode: str, settings: dict[str, object]
) -> None:
    url = pooler(pool_mode=mode, **settings)
    with contextlib.ExitStack() as stack:
        others = [  # so that it is in use already, and has sessions to choose from
            stack.enter_context(psycopg.connect(url, autocommit=True, prepare_threshold=None)) for _ in range(2)
        ]
        for other in others:
            other.execute("select 1")
        for _ in range(2):
            assert f"{mode} " in refuse(DATABASE_URL=url, PORT=str(free_port()))


def test_a_pooler_that_keeps_sessions_apart_is_as_good_as_none(pooler: Callable[..., str], start: Start) -> None:
    service = start(DATABASE_URL=pooler(pool_mode="session"))
    assert service.ask("/readyz")[0] == 200


# The other door


def test_psql_opens_the_database_whether_the_service_runs_or_not(start: Start) -> None:
    service = start()
    home = str(service.home)
    query = ["psql", "-X", "-A", "-t", "-c", "select (wallet.get_wallet('1111111111')).balance"]

    while_running = run(*query, WALLET_DATA_DIR=home)
    assert (while_running.returncode, while_running.stdout, while_running.stderr) == (0, "1500\n", "")
    service.deposit("1111111111", 5)
    service.stop()
    while_not = run(*query, WALLET_DATA_DIR=home)
    assert (while_not.returncode, while_not.stdout, while_not.stderr) == (0, "1505\n", "")
    assert running_server(service.home) is None


def test_psql_cannot_touch_the_tables(start: Start) -> None:
    service = start()
    update = ["psql", "-X", "-v", "VERBOSITY=sqlstate", "-c", "update wallet.operation set balance_after = 1000000"]

    ran = run(*update, WALLET_DATA_DIR=str(service.home))

    assert ran.returncode == 1
    assert "42501" in ran.stderr


def test_psql_reaches_the_database_of_database_url(database_url: str) -> None:
    ran = run("psql", "-X", "-A", "-t", "-c", "select current_user", DATABASE_URL=database_url)

    assert (ran.returncode, ran.stdout) == (0, "wallet_service\n")


def test_psql_shows_nobody_the_password(tmp_path: Path) -> None:
    """A program in psql's place tells what it was called with, and what it could have found besides."""
    psql = tmp_path / "psql"
    psql.write_text('#!/bin/sh\ntr "\\0" "\\n" < /proc/$$/cmdline\necho "password $PGPASSWORD"\n')
    psql.chmod(0o755)
    url = "postgresql://u:p%40ss@db.example:1/wallet?sslmode=disable"

    ran = run("psql", "-X", DATABASE_URL=url, PATH=f"{tmp_path}:{os.environ['PATH']}")

    *called, password = ran.stdout.splitlines()
    assert called[-3:] == ["--dbname", "postgresql://u@db.example:1/wallet?sslmode=disable", "-X"]
    assert password == "password p@ss"
