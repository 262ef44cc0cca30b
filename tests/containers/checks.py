"""What compose.yaml and the image promise, in real containers. The tests are one session: each continues the last."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.settings import CHECKOUT, Settings
from tests.db.test_readme import stripped
from tests.test_compose import free_port
from tests.test_readme import blocks, steps

PROJECT = f"wallet-test-{os.getpid()}"
DEMONSTRATION = "1111111111"
PASSWORDS = {"POSTGRES_PASSWORD": "a b'c\"%40$x", "WALLET_DB_PASSWORD": "p@ss:/?#%'\\$y"}
IN_ENV_FILE = {"LANES": "3", "WORKERS": "2"}
IN_SHELL = {"LOG_LEVEL": "DEBUG", "WORKERS": "3"}
"""Where both set it, the shell counts."""


def run(*command: str, check: bool = True, timeout: float = 600, **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout; its standard error is part of what it said."""
    ran = subprocess.run(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        **arguments,
    )
    assert not check or ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}"
    return ran


def request(
    port: int, method: str, path: str, body: object = None, timeout: float = 30, host: str = "127.0.0.1", **headers: str
) -> tuple[int, Any]:
    """Return status and decoded body of the answer. Raises OSError or HTTPException if there is no whole answer."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def becomes_ready(port: int, host: str = "127.0.0.1") -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if request(port, "GET", "/readyz", timeout=5, host=host)[0] == 200:
                return True
        time.sleep(0.1)
    return False


class Stack:
    """The services of compose.yaml, in a project of their own."""

    def __init__(self, env_file: Path) -> None:
        self.port = free_port()
        self.env_file = env_file
        self.environment = os.environ | PASSWORDS | IN_SHELL
        self.environment |= {"PORT": str(self.port), "COMPOSE_PROJECT_NAME": PROJECT}
        for name in ("HOST", "ALLOWED_HOSTS", "ACCESS"):
            self.environment.pop(name, None)

    def compose(self, *arguments: str, check: bool = True) -> str:
        command = ["docker", "compose", "--env-file", str(self.env_file), *arguments]
        return run(*command, env=self.environment, check=check).stdout

    def up(self) -> None:
        self.compose("up", "--detach", "--build", "--wait", "--wait-timeout", "120")
        assert becomes_ready(self.port)

    def inspect(self, service: str) -> Any:
        container = self.compose("ps", "--all", "--quiet", service).strip()
        return json.loads(run("docker", "inspect", container).stdout)[0]

    def superuser(self, sql: str) -> str:
        """Return what psql says to a statement, as the superuser inside of the database's container."""
        psql = ["psql", "--username=postgres", "--dbname=wallet", "-qtAc", sql]
        return self.compose("exec", "-T", "database", *psql).strip()

    def get(self, path: str) -> tuple[int, Any]:
        return request(self.port, "GET", path)

    def balance(self) -> int:
        status, wallet = self.get(f"/api/v1/wallets/{DEMONSTRATION}")
        assert status == 200
        return int(wallet["balance"])

    def testdata(self, command: str) -> str:
        """Run dbmate's command on the demonstration wallets as db/README.md says."""
        history = ["-d", "db/testdata", "--migrations-table", "wallet_testdata_migrations"]
        return self.compose("run", "--rm", "-T", "migrate", "dbmate", "--env-file", "dbmate.env", *history, command)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    env_file = tmp_path_factory.mktemp("compose") / ".env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in IN_ENV_FILE.items()))
    stack = Stack(env_file)
    try:
        stack.up()
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail=50", check=False))
        stack.compose("down", "--volumes", "--rmi", "local", "--timeout", "20", check=False)


def test_the_readmes_session_goes_as_shown(stack: Stack) -> None:
    session = [step for step in steps() if step.command.startswith("curl ")]
    assert len(session) > 3
    for step in session:
        ran = run("bash", "-c", step.command.replace("8000", str(stack.port)))
        assert stripped(ran.stdout) == stripped(step.output), step.command


def test_psql_in_the_backends_container_is_the_backends_login(stack: Stack) -> None:
    said = stack.compose("exec", "-T", "backend", "python", "-m", "app", "psql", "-qtAc", "select current_user")
    assert said.strip() == "wallet_service"


def test_settings_come_from_the_shell_and_from_the_env_file(stack: Stack) -> None:
    there = stack.compose("exec", "-T", "backend", "env").splitlines()
    assert {"LANES=3", "WORKERS=3", "LOG_LEVEL=DEBUG"} <= set(there)
    assert not [line for line in there if line.startswith(("POOL_SIZE", "PORT"))]
    published = stack.inspect("backend")["HostConfig"]["PortBindings"]
    assert published == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]}


def test_several_workers_share_their_metrics_on_a_read_only_root(stack: Stack) -> None:
    container = stack.inspect("backend")
    assert container["HostConfig"]["ReadonlyRootfs"]
    assert "WORKERS=3" in container["Config"]["Env"]
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=10)
    connection.request("GET", "/metrics")
    assert b"wallet_request_seconds_count" in connection.getresponse().read()


def test_the_containers_have_no_more_rights_than_they_need(stack: Stack) -> None:
    for service in ("backend", "database"):
        host = stack.inspect(service)["HostConfig"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}
    assert stack.inspect("backend")["HostConfig"]["Init"]
    assert stack.compose("exec", "-T", "backend", "id", "-u").strip() == "10001"
    capabilities = stack.compose("exec", "-T", "backend", "grep", "^Cap[PE]", "/proc/self/status").split()
    assert set(capabilities[1::2]) == {"0" * 16}


@pytest.mark.parametrize("command", [line for line in "".join(blocks("sh")).splitlines() if " migrate dbmate " in line])
def test_dbmate_runs_in_the_migrate_service_as_the_readme_says(stack: Stack, command: str) -> None:
    said = stack.compose(*command.removeprefix("docker compose ").split())
    assert "Pending: 0" in said


@dataclass
class Load:
    """Clients that deposit 1, one operation after another, each sent again until it is answered."""

    port: int
    stop: threading.Event = field(default_factory=threading.Event)
    acknowledged: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each was acknowledged."""
    faults: list[tuple[int, Any, float]] = field(default_factory=list)
    """Status, body and seconds of each answer from 500 on, and of each refusal."""

    def client(self) -> None:
        path = f"/api/v1/wallets/{DEMONSTRATION}/operation"
        while not self.stop.is_set():
            operation = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}
            for _ in range(60):
                began = time.monotonic()
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status, body = request(self.port, "POST", path, operation)
                    if status == 200 or body.get("same_request"):
                        self.acknowledged.append(operation["operation_uuid"])
                        self.times.append(time.monotonic())
                        break
                    self.faults.append((status, body, time.monotonic() - began))
                time.sleep(0.1)

    @contextlib.contextmanager
    def running(self, clients: int) -> Iterator[None]:
        threads = [threading.Thread(target=self.client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


def test_a_database_that_is_killed_under_load_loses_nothing_and_nobody_sees_it(stack: Stack) -> None:
    before = stack.balance()
    load = Load(stack.port)
    with load.running(clients=16):
        time.sleep(2)
        stack.compose("kill", "--signal", "KILL", "database")
        killed = time.monotonic()
        stack.compose("start", "database")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (load.times and load.times[-1] > killed + 2):
            time.sleep(0.1)
        time.sleep(1)

    assert min(load.times) < killed < max(load.times)
    deadline_passed = Settings().request_deadline * 0.9
    assert [fault for fault in load.faults if fault[0] != 503 or fault[2] < deadline_passed] == []
    assert len(set(load.acknowledged)) == len(load.acknowledged)
    recorded = stack.superuser(f"select operation_uuid from wallet.operation where wallet_uuid = '{DEMONSTRATION}'")
    assert set(load.acknowledged) <= set(recorded.splitlines())
    assert stack.balance() == before + len(load.acknowledged)
    assert stack.superuser("select * from wallet.verify()") == ""


def test_after_a_restart_of_everything_it_serves_and_the_migration_has_succeeded(stack: Stack) -> None:
    before = stack.balance()
    stack.compose("restart")
    assert becomes_ready(stack.port)
    deadline = time.monotonic() + 60
    while stack.inspect("migrate")["State"]["Running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    state = stack.inspect("migrate")["State"]
    assert (state["Running"], state["ExitCode"]) == (False, 0), stack.compose("logs", "migrate")
    assert stack.balance() == before


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5])
def test_a_signal_in_the_first_second_stops_the_backend(stack: Stack, seconds: float) -> None:
    stack.compose("stop", "backend")
    stack.compose("start", "backend")
    time.sleep(seconds)
    began = time.monotonic()
    stack.compose("stop", "backend")
    assert time.monotonic() - began < 10
    assert stack.inspect("backend")["State"]["ExitCode"] != 137  # killed


def test_what_was_there_is_there_after_down_and_up(stack: Stack) -> None:
    stack.up()
    before = stack.balance()
    stack.compose("down")
    stack.up()
    assert stack.balance() == before


def test_another_password_of_the_backend_is_good_from_the_next_up_on(stack: Stack) -> None:
    stack.environment["WALLET_DB_PASSWORD"] = "another $one"
    stack.up()
    assert stack.get(f"/api/v1/wallets/{DEMONSTRATION}")[0] == 200


def test_demonstration_wallets_that_were_rolled_back_stay_away(stack: Stack) -> None:
    stack.testdata("rollback")
    assert stack.get(f"/api/v1/wallets/{DEMONSTRATION}")[0] == 404
    stack.up()
    assert stack.get(f"/api/v1/wallets/{DEMONSTRATION}")[0] == 404
    stack.compose("down")
    stack.up()
    assert stack.get(f"/api/v1/wallets/{DEMONSTRATION}")[0] == 404
    stack.testdata("migrate")
    assert stack.balance() == 1500


def test_what_others_can_reach_starts_closed_and_with_keys_as_the_readme_says(stack: Stack) -> None:
    """Others are containers on this machine: it is published on the address that they know it by."""
    bridge = json.loads(run("docker", "network", "inspect", "bridge").stdout)[0]
    host = bridge["IPAM"]["Config"][0]["Gateway"]
    path = f"/api/v1/wallets/{DEMONSTRATION}"
    stack.environment["HOST"] = host
    stack.compose("up", "--detach")
    deadline = time.monotonic() + 60
    while "set ACCESS=keys" not in (said := stack.compose("logs", "backend")):
        assert time.monotonic() < deadline, said
        time.sleep(0.2)
    with pytest.raises((OSError, http.client.HTTPException)):
        request(stack.port, "GET", path, host=host)

    commands = "".join(blocks("sh")).splitlines()
    [publish] = [line for line in commands if re.fullmatch("HOST=.* docker compose up", line)]
    publish = publish.replace("0.0.0.0", host).replace("wallet.example", host)
    stack.environment |= dict(re.findall(r"(\w+)=(\S+)", publish))
    stack.compose("up", "--detach")
    assert becomes_ready(stack.port, host)
    assert request(stack.port, "GET", path, host=host)[0] == 401
    [make] = [line for line in commands if re.match("docker compose run .* app key create ", line)]
    [secret] = re.findall("^wk_.*", stack.compose(*make.removeprefix("docker compose ").split()), re.MULTILINE)
    key = {"Authorization": f"Bearer {secret}"}
    while request(stack.port, "GET", path, host=host, **key)[0] == 401 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert request(stack.port, "GET", path, host=host, **key)[1]["balance"] == 1500
    assert request(stack.port, "PATCH", path, {"status": "FROZEN"}, host=host, **key)[0] == 403

    for name in ("HOST", "ALLOWED_HOSTS", "ACCESS"):
        del stack.environment[name]
    stack.up()
    assert stack.balance() == 1500


@pytest.fixture
def image(stack: Stack) -> str:
    return str(stack.inspect("backend")["Image"])


def test_the_image_alone_serves_and_keeps_its_data_in_a_volume(image: str) -> None:
    """By the README's command, with another port, volume and name of the image."""
    port, volume = free_port(), f"{PROJECT}-alone"
    [command] = [line for line in "".join(blocks("sh")).splitlines() if line.startswith("docker run ")]
    *words, _ = command.split()
    options = [word.replace(":8000:", f":{port}:").replace("wallet:/data", f"{volume}:/data") for word in words]
    assert {f"127.0.0.1:{port}:8000", f"{volume}:/data"} <= set(options)
    path = f"/api/v1/wallets/{DEMONSTRATION}"
    operation = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}
    try:
        for balance in (1500, 1501):
            container = run(*options, "--detach", image).stdout.strip()
            try:
                assert becomes_ready(port)
                assert request(port, "GET", path)[1]["balance"] == balance
                request(port, "POST", f"{path}/operation", operation)
            finally:
                run("docker", "stop", container)
    finally:
        deadline = time.monotonic() + 20
        while run("docker", "volume", "rm", volume, check=False).returncode and time.monotonic() < deadline:
            time.sleep(0.2)  # until the last container is removed


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--env=ACCESS=open", "--user=12345"],
        ["--env=ACCESS=open", "--read-only"],
        ["--env=ACCESS=open", "--read-only", "--env=WORKERS=2", "--env=DATABASE_URL=postgres://u@127.0.0.1:1/x"],
    ],
)
def test_where_the_image_cannot_run_it_says_why_in_one_line(image: str, options: list[str]) -> None:
    ran = run("docker", "run", "--rm", *options, image, check=False)
    assert ran.returncode == 1
    assert len(ran.stdout.splitlines()) == 1
    assert ran.stdout.startswith("error: ")
