"""`python -m app` as a process: how it starts, what it survives, how it stops, what it says when it cannot start."""

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from uuid import uuid4

import psycopg
import pytest

from app.embedded import connection_url, running_server
from app.settings import CHECKOUT

COMMAND = [sys.executable, "-m", "app"]
SETTINGS = ("DATABASE_URL", "HOST", "PORT", "WORKERS", "WALLET_DATA_DIR")
FIVE = {1: "1111111111", 2: "2222222222", 3: "3333333333", 4: "4444444444", 5: "5555555555"}


class Service:
    """A started `python -m app`, its embedded database and its REST door."""

    def __init__(
        self, home: Path, log: Path, user: int | None = None, checkout: Path = CHECKOUT, **environment: str
    ) -> None:
        self.home = home
        self.port = free_port()
        identity: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                COMMAND,
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

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Send a GET, or a POST of a body, and return status and decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
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
        return {int(pid) for pid in children.split()} - {self.postgres()}

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


def environment_with(**settings: str) -> dict[str, str]:
    """Return the environment of a service; the tests' own server does not flush."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**kept, "ALLOW_FSYNC_OFF": "true", **settings}


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
def start(tmp_path: Path) -> Iterator[Start]:
    """Start services; whatever still runs after the test is stopped."""
    started: list[Service] = []

    def start(home: Path = tmp_path / "data", **options: Any) -> Service:
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
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=CHECKOUT,
        env=environment_with(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# Starting


def test_it_says_where_it_listens_where_its_data_lies_and_what_to_try(start: Start) -> None:
    service = start()

    listening, data, attempt = service.said().splitlines()

    assert listening.split()[-1] == f"http://127.0.0.1:{service.port}"
    assert str(service.home) in data
    command, url = attempt.removeprefix("Try: ").split()
    assert command == "curl"
    with urlopen(url) as answer:
        assert json.load(answer) == {"id": 1, "uuid": "1111111111", "balance": 1500}


def test_a_new_database_holds_five_wallets_and_the_next_start_finds_it_again(start: Start) -> None:
    service = start()
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

    assert start(home).balance("1111111111") == 1500


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

        service = start(Path(folder) / "data", user=user)

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
    update = ["psql", "-X", "-v", "VERBOSITY=sqlstate", "-c", "update wallet.wallet set balance = 1000000"]

    ran = run(*update, WALLET_DATA_DIR=str(service.home))

    assert ran.returncode == 1
    assert "42501" in ran.stderr


def test_psql_reaches_the_database_of_database_url(database_url: str) -> None:
    ran = run("psql", "-X", "-A", "-t", "-c", "select current_user", DATABASE_URL=database_url)

    assert (ran.returncode, ran.stdout) == (0, "wallet_service\n")
