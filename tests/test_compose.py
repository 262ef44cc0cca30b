"""compose.yaml and the Dockerfile keep their promises: what they run is run here, without containers.

The server stands in for the database's image: it listens on TCP, asks for passwords, and holds an empty database.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest
import yaml

from app.embedded import BINARIES, Postgres

CHECKOUT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((CHECKOUT / "compose.yaml").read_text())
DATABASE, MIGRATE, BACKEND = (COMPOSE["services"][name] for name in ("database", "migrate", "backend"))
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", (CHECKOUT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]
WALLETS = ["1111111111", "2222222222", "3333333333", "4444444444", "5555555555"]
LOGIN_SQL = "/docker-entrypoint-initdb.d/login.sql"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])


def dockerfile(instruction: str) -> list[str]:
    """Return the arguments of every such instruction, in order."""
    return [arguments for name, arguments in INSTRUCTIONS if name == instruction]


def interpolate(text: str, variables: dict[str, str]) -> str:
    """Replace ${NAME:-default} as compose does."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text)


def environment(service: dict[str, Any], variables: dict[str, str]) -> dict[str, str]:
    """Return the environment that compose gives to a container of our image."""
    image = dict(pair.split("=", 1) for arguments in dockerfile("ENV") for pair in shlex.split(arguments))
    return image | {name: interpolate(value, variables) for name, value in service["environment"].items()}


def probe(test: str | list[str]) -> list[str]:
    """Return the command of a health check in the form that needs no shell."""
    command = json.loads(test.split("CMD", 1)[1]) if isinstance(test, str) else test[1:]
    return [str(word) for word in command]


def test_compose_accepts_the_file() -> None:
    program = shutil.which("check-jsonschema", path=PATH)
    assert program is not None
    subprocess.run([program, "--builtin-schema", "vendor.compose-spec", CHECKOUT / "compose.yaml"], check=True)


def test_the_database_is_5433_and_the_backend_8000_for_this_machine_only() -> None:
    assert DATABASE["ports"] == ["127.0.0.1:5433:5432"]
    assert BACKEND["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in MIGRATE
    assert dockerfile("EXPOSE") == ["8000"]


def test_the_data_outlives_its_container() -> None:
    (volume,) = DATABASE["volumes"]
    name, folder = volume.split(":")
    assert name in COMPOSE["volumes"]
    assert (DATABASE["image"], folder) == ("postgres:18", "/var/lib/postgresql")


def test_migration_runs_once_and_the_backend_waits_for_it() -> None:
    assert MIGRATE["restart"] == "no"
    assert MIGRATE["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert BACKEND["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert MIGRATE["build"] == BACKEND["build"] == "."


def test_what_keeps_running_has_a_health_check() -> None:
    assert probe(DATABASE["healthcheck"]["test"])[:2] == ["pg_isready", "--host=127.0.0.1"]
    assert "/readyz" in probe(BACKEND["healthcheck"]["test"])[-1]
    assert "/healthz" in probe(dockerfile("HEALTHCHECK")[0])[-1]
    assert MIGRATE["healthcheck"] == {"disable": True}


def test_the_image_runs_as_a_normal_user_without_test_tools() -> None:
    (user,) = dockerfile("USER")
    assert int(user.split(":")[0]) > 0
    (install,) = (line for line in dockerfile("RUN") if "pip install" in line)
    assert re.findall(r"-r (\S+)", install) == ["requirements.txt"]
    assert "tests" not in " ".join(dockerfile("COPY"))


class TcpPostgres(Postgres):
    """An embedded server that listens on TCP too, on a port of its own."""

    def __init__(self, home: Path, port: int) -> None:
        super().__init__(home, "listen_addresses=127.0.0.1")
        self.port = port

    def _command(self, name: str, folder: Path) -> tuple[list[str | Path], dict[str, Any]]:
        command, arguments = super()._command(name, folder)
        if name == "postgres":  # the last -p counts
            command = ["sh", "-c", f'exec "$@" -p {self.port}', "sh", *command]
        return command, arguments

    def psql(self, database: str, *arguments: str | Path, **variables: str) -> str:
        command = [BINARIES / "psql", "-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc", "--username", "postgres"]
        where = ["--host", str(self.socket_dir), "--port", str(self.port), "--dbname", database, "-qtA"]
        ran = subprocess.run([*command, *where, *arguments], env=variables, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    def initialize(self, variables: dict[str, str]) -> None:
        """Do what the entrypoint of the database's image does on a new volume."""
        settings = {name: interpolate(value, variables) for name, value in DATABASE["environment"].items()}
        (script,) = (config for config in DATABASE["configs"] if config["target"] == LOGIN_SQL)
        self.start()
        self.psql("postgres", "-c", f"create database {settings['POSTGRES_DB']}")
        file = self.home / "login.sql"
        file.write_text(interpolate(COMPOSE["configs"][script["source"]]["content"], variables))
        self.psql(settings["POSTGRES_DB"], "-f", file, **settings)
        file.write_text("\\getenv password POSTGRES_PASSWORD\nalter role postgres password :'password';")
        self.psql("postgres", "-f", file, **settings)
        (self.data / "pg_hba.conf").write_text("local all all trust\nhost all all all scram-sha-256\n")
        self.stop()
        self.start()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def copied(folder: Path) -> Path:
    """Make the folder that the image has: what the Dockerfile copies, and nothing else."""
    folder.mkdir()
    for arguments in dockerfile("COPY"):
        source, target = arguments.split()
        if (CHECKOUT / source).is_dir():
            shutil.copytree(CHECKOUT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / source, folder / target)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({}, id="the default passwords"),
        pytest.param({"POSTGRES_PASSWORD": "a b'c\"%40", "WALLET_DB_PASSWORD": "p@ss:/?#%'\\"}, id="awkward passwords"),
    ],
)
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What `docker compose up` does: a new database, the migrations, then the backend, each in its turn."""
    variables: dict[str, str] = request.param
    home = tmp_path_factory.mktemp("compose")
    folder = copied(home / "image")
    postgres = TcpPostgres(home / "database", free_port())
    port = free_port()

    def run(service: dict[str, Any], command: list[str], start: Callable[..., Any], **arguments: Any) -> Any:
        settings = environment(service, variables) | {"PATH": PATH, "HOST": "127.0.0.1", "PORT": str(port)}
        settings["DATABASE_URL"] = settings["DATABASE_URL"].replace("@database:5432", f"@127.0.0.1:{postgres.port}")
        command = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in command]
        return start(command, cwd=folder, env=settings, **arguments)

    try:
        postgres.initialize(variables)
        for _ in range(2):  # `up` a second time runs it again
            run(MIGRATE, MIGRATE["command"], subprocess.run, check=True)
        command = json.loads(dockerfile("CMD")[0])
        backend = run(BACKEND, BACKEND.get("command", command), subprocess.Popen)
        try:
            deadline = time.monotonic() + 20
            ready = probe(BACKEND["healthcheck"]["test"])
            while run(BACKEND, ready, subprocess.run, stderr=subprocess.DEVNULL).returncode:
                assert backend.poll() is None, "the backend ended"
                assert time.monotonic() < deadline, "the backend does not become ready"
                time.sleep(0.1)
            yield SimpleNamespace(postgres=postgres, backend=backend, port=port, run=run)
        finally:
            backend.send_signal(signal.SIGTERM)
            backend.wait(20)
    finally:
        postgres.stop()


def get(up: SimpleNamespace, path: str) -> Any:
    with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{up.port}{path}", timeout=5) as response:
        return json.load(response)


def test_the_five_wallets_are_there(up: SimpleNamespace) -> None:
    wallets = [get(up, f"/api/v1/wallets/{uuid}") for uuid in WALLETS]
    assert wallets == [{"id": number, "uuid": uuid, "balance": 1500} for number, uuid in enumerate(WALLETS, 1)]


def test_there_is_nothing_but_the_five_wallets(up: SimpleNamespace) -> None:
    assert up.postgres.psql("wallet", "-c", "select count(*) from wallet.wallet") == "5"
    with pytest.raises(HTTPError, match="404"):
        get(up, "/api/v1/wallets/6666666666")


def test_the_image_s_health_check_passes_while_the_backend_serves(up: SimpleNamespace) -> None:
    check = probe(dockerfile("HEALTHCHECK")[0])
    assert up.run(BACKEND, check, subprocess.run).returncode == 0
    elsewhere = [word.replace("/healthz", "/nowhere") for word in check]
    assert up.run(BACKEND, elsewhere, subprocess.run, stderr=subprocess.DEVNULL).returncode != 0


def test_the_database_asks_the_backend_for_its_password(up: SimpleNamespace) -> None:
    url = f"postgresql://wallet_service@127.0.0.1:{up.postgres.port}/wallet"
    ran = subprocess.run(
        [BINARIES / "psql", "-c", "select 1", url], env={"PGPASSWORD": "guess"}, capture_output=True, text=True
    )
    assert "password authentication failed" in ran.stderr


def test_the_backend_s_login_is_a_member_of_wallet_app_and_nothing_else(up: SimpleNamespace) -> None:
    assert BACKEND["environment"]["DATABASE_URL"].startswith("postgres://wallet_service@database:5432/")
    roles = "select string_agg(r.rolname, ',') from pg_auth_members m join pg_roles r on r.oid = m.roleid"
    assert up.postgres.psql("wallet", "-c", f"{roles} where m.member = 'wallet_service'::regrole") == "wallet_app"
    powers = "rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls"
    assert up.postgres.psql("wallet", "-c", f"select {powers} from pg_roles where rolname = 'wallet_service'") == "f"
    owned = "select count(*) from pg_class where relowner = 'wallet_service'::regrole"
    assert up.postgres.psql("wallet", "-c", owned) == "0"
