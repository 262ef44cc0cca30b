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

from app.server.embedded import BINARIES, Postgres
from app.settings import Settings

CHECKOUT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((CHECKOUT / "compose.yaml").read_text())
DATABASE, MIGRATE, BACKEND = (COMPOSE["services"][name] for name in ("database", "migrate", "backend"))
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", (CHECKOUT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]
WALLETS = ["1111111111", "2222222222", "3333333333", "4444444444", "5555555555"]
PATH = os.pathsep.join([str(Path(sys.executable).parent), str(BINARIES), os.defpath])
TESTDATA = ["-d", "db/testdata", "--migrations-table", "wallet_testdata_migrations"]


def dockerfile(instruction: str) -> list[str]:
    """Return the arguments of every such instruction, in order."""
    return [arguments for name, arguments in INSTRUCTIONS if name == instruction]


def interpolate(text: str, variables: dict[str, str]) -> str:
    """Replace ${NAME:-default} and $$ as compose does."""
    return re.sub(
        r"\$\{(\w+):-([^}]*)\}|\$\$",
        lambda found: (variables.get(found[1]) or found[2]) if found[1] else "$",
        text,
    )


def environment(service: dict[str, Any], variables: dict[str, str]) -> dict[str, str]:
    """Return the environment that compose gives to a container of our image."""
    image = dict(pair.split("=", 1) for arguments in dockerfile("ENV") for pair in shlex.split(arguments))
    given = {name: value for name, value in service["environment"].items() if value is not None}
    passed_on = {name: variables[name] for name in service["environment"].keys() - given.keys() if name in variables}
    return image | {name: interpolate(value, variables) for name, value in given.items()} | passed_on


def probe(test: str | list[str]) -> list[str]:
    """Return the command of a health check in the form that needs no shell."""
    command = json.loads(test.split(" CMD ", 1)[1]) if isinstance(test, str) else test[1:]
    return [str(word) for word in command]


def test_compose_accepts_the_file() -> None:
    program = shutil.which("check-jsonschema", path=PATH)
    assert program is not None
    subprocess.run([program, "--builtin-schema", "vendor.compose-spec", CHECKOUT / "compose.yaml"], check=True)


def test_the_database_is_5433_and_the_backend_8000_for_this_machine_only() -> None:
    assert DATABASE["ports"] == ["127.0.0.1:5433:5432"]
    assert [interpolate(port, {}) for port in BACKEND["ports"]] == ["127.0.0.1:8000:8000"]
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


def test_every_setting_of_the_readme_reaches_the_container_from_the_shell_or_is_the_published_address() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| .*? \|", (CHECKOUT / "README.md").read_text(), re.MULTILINE)
    variables = {name: f"a {name}" for name in [*rows, *BACKEND["environment"]]}
    published = {name for port in BACKEND["ports"] for name in re.findall(r"\$\{(\w+)", port)}
    assert published == {"HOST", "PORT"}
    reached = {name for name, value in environment(BACKEND, variables).items() if value == f"a {name}"}
    # Compose's service has compose's database, and with a DATABASE_URL there is no data folder.
    assert reached == set(rows) - published - {"DATABASE_URL", "WALLET_DATA_DIR"}


def test_docker_waits_longer_than_the_service_does_for_requests_in_flight() -> None:
    for seconds in ("", "45"):
        grace = re.fullmatch(r"(\d+)m(\d+)s", interpolate(BACKEND["stop_grace_period"], {"SHUTDOWN_TIMEOUT": seconds}))
        assert grace is not None
        assert int(grace[1]) * 60 + int(grace[2]) > float(seconds or Settings().shutdown_timeout) + 10


def test_nothing_is_used_that_docker_20_10_does_not_know() -> None:
    assert "start-interval" not in dockerfile("HEALTHCHECK")[0]
    assert "configs" not in COMPOSE
    assert all("start_interval" not in service.get("healthcheck", {}) for service in COMPOSE["services"].values())


def test_every_container_is_hardened_and_its_log_is_bounded() -> None:
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {"max-size", "max-file"} <= service["logging"]["options"].keys()
    for service in (MIGRATE, BACKEND):
        assert (service["init"], service["read_only"], service["tmpfs"]) == (True, True, "/tmp")
        assert "cap_add" not in service


def test_a_signal_is_heard_before_the_imports_that_take_long() -> None:
    """The kernel drops a signal to a container's first process that has no handler for it."""
    script = """if True:
        import importlib.abc, signal, sys
        from app.__main__ import main

        class Watching(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "app.server.supervisor":
                    sys.exit(0 if callable(signal.getsignal(signal.SIGTERM)) else "deaf")

        sys.meta_path.insert(0, Watching())
        main([])"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, timeout=20)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_file_of_passwords_stays_out_of_git_and_of_the_image() -> None:
    assert ".env" in (CHECKOUT / ".gitignore").read_text().splitlines()
    assert "**/.env" in (CHECKOUT / ".dockerignore").read_text().splitlines()


def test_what_keeps_running_has_a_health_check() -> None:
    assert probe(DATABASE["healthcheck"]["test"])[0] == "pg_isready"
    assert "--host=127.0.0.1" in probe(DATABASE["healthcheck"]["test"])
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
        self.start()
        self.psql("postgres", "-c", f"create database {settings['POSTGRES_DB']}")
        file = self.home / "password.sql"
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
        pytest.param(
            {"POSTGRES_PASSWORD": "a b'c\"%40$x", "WALLET_DB_PASSWORD": "p@ss:/?#%'\\$y"}, id="awkward passwords"
        ),
    ],
)
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What `docker compose up` does: a new database, the migrations, then the backend, each in its turn."""
    variables: dict[str, str] = request.param
    home = tmp_path_factory.mktemp("compose")
    folder = copied(home / "image")
    postgres = TcpPostgres(home / "database", free_port())
    port = free_port()

    def run(
        service: dict[str, Any],
        command: list[str],
        start: Callable[..., Any],
        variables: dict[str, str] = variables,
        **arguments: Any,
    ) -> Any:
        settings = environment(service, variables) | {"PATH": PATH, "HOST": "127.0.0.1", "PORT": str(port)}
        settings["DATABASE_URL"] = settings["DATABASE_URL"].replace("@database:5432", f"@127.0.0.1:{postgres.port}")
        command = [interpolate(word, variables).replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in command]
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
            yield SimpleNamespace(postgres=postgres, backend=backend, port=port, run=run, variables=variables)
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


def test_a_ledger_with_wallets_gets_no_others_whatever_it_says_of_demonstrations(up: SimpleNamespace) -> None:
    rename = "alter table public.{} rename to {}"
    up.postgres.psql("wallet", "-c", rename.format("wallet_testdata_migrations", "kept"))
    try:
        assert up.run(MIGRATE, MIGRATE["command"], subprocess.run).returncode == 0
        demonstrated = "select to_regclass('public.wallet_testdata_migrations') is not null"
        assert up.postgres.psql("wallet", "-c", demonstrated) == "f"
    finally:
        up.postgres.psql("wallet", "-c", rename.format("kept", "wallet_testdata_migrations"))


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


def login(up: SimpleNamespace, password: str) -> str:
    """Connect as the backend's login; return what psql says."""
    url = f"postgresql://wallet_service@127.0.0.1:{up.postgres.port}/wallet"
    ran = subprocess.run(
        [BINARIES / "psql", "-qtAc", "select 1", url], env={"PGPASSWORD": password}, capture_output=True, text=True
    )
    return (ran.stdout + ran.stderr).strip()


def test_a_login_that_has_lost_its_rights_has_them_again(up: SimpleNamespace) -> None:
    up.postgres.psql("wallet", "-c", "revoke wallet_app from wallet_service")
    up.run(MIGRATE, MIGRATE["command"], subprocess.run, check=True)
    member = "select pg_has_role('wallet_service', 'wallet_app', 'member')"
    assert up.postgres.psql("wallet", "-c", member) == "t"


def test_another_password_of_the_backend_is_good_from_the_next_start_on(up: SimpleNamespace) -> None:
    before = interpolate(BACKEND["environment"]["PGPASSWORD"], up.variables)
    assert login(up, before) == "1"
    try:
        up.run(
            MIGRATE,
            MIGRATE["command"],
            subprocess.run,
            check=True,
            variables=up.variables | {"WALLET_DB_PASSWORD": "new"},
        )
        assert login(up, "new") == "1"
        assert "password authentication failed" in login(up, before)
    finally:
        up.run(MIGRATE, MIGRATE["command"], subprocess.run, check=True)


def test_the_command_of_the_readme_makes_a_key(up: SimpleNamespace) -> None:
    readme = (CHECKOUT / "README.md").read_text()
    [line] = re.findall(r"^docker compose run --rm migrate (python -m app key .*)$", readme, re.MULTILINE)
    made = up.run(MIGRATE, line.split(), subprocess.run, check=True, stdout=subprocess.PIPE, text=True)
    assert re.fullmatch(r"wk_[A-Za-z0-9_-]{43}\n", made.stdout)
    scopes = up.postgres.psql("wallet", "-c", "select scopes from wallet.list_keys() where name = 'shop'")
    assert scopes == "{deposit,read}"


@pytest.mark.parametrize(
    ("published", "starts"),
    [
        ({}, True),
        ({"HOST": ""}, True),
        ({"HOST": "127.0.0.1"}, True),
        ({"HOST": "127.1.2.3"}, True),
        ({"HOST": "[::1]"}, True),
        ({"HOST": "0.0.0.0"}, False),
        ({"HOST": "[::]"}, False),
        ({"HOST": "192.0.2.1"}, False),
        ({"HOST": "0.0.0.0", "ACCESS": ""}, False),
        ({"HOST": "0.0.0.0", "ACCESS": "keys"}, True),
        ({"HOST": "0.0.0.0", "ACCESS": "open"}, True),
    ],
)
def test_what_is_published_for_others_is_open_only_if_somebody_says_so(published: dict[str, str], starts: bool) -> None:
    """A service that may start gets as far as its database, which is not there."""
    settings = environment(BACKEND, published) | {"PATH": PATH, "PORT": str(free_port())}
    assert settings["HOST"] == "0.0.0.0"
    settings["DATABASE_URL"] = "postgres://wallet_service@127.0.0.1:1/wallet?sslmode=disable"
    command = [interpolate(word, published) for word in BACKEND["command"]]
    ran = subprocess.run(command, cwd=CHECKOUT, env=settings, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    [line] = ran.stderr.splitlines()
    assert ("cannot reach the database" in line) is starts
    assert ("set ACCESS=keys" in line) is not starts


def test_demonstration_wallets_that_were_rolled_back_stay_away(up: SimpleNamespace) -> None:
    dbmate = ["dbmate", "--env-file", "dbmate.env", *TESTDATA]
    up.run(MIGRATE, [*dbmate, "rollback"], subprocess.run, check=True)
    try:
        up.run(MIGRATE, MIGRATE["command"], subprocess.run, check=True)
        assert up.postgres.psql("wallet", "-c", "select count(*) from wallet.wallet") == "0"
    finally:
        up.run(MIGRATE, [*dbmate, "migrate"], subprocess.run, check=True)


def test_the_migration_waits_for_a_database_that_is_not_there_yet(up: SimpleNamespace) -> None:
    up.postgres.stop()
    migrating = up.run(MIGRATE, MIGRATE["command"], subprocess.Popen)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            migrating.wait(1)
    finally:
        up.postgres.start()
    assert migrating.wait(20) == 0
