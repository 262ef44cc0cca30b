"""The commands of db/README.md's "Operating it" are run as they stand there: migrations, backup and restore."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import namedtuple_row

from app.server.embedded import BINARIES, NOBODY, Postgres
from app.server.migrations import LOGIN, dbmate
from app.settings import CHECKOUT
from tests.api.test_process import Service, Start, start, wait_until
from tests.conftest import environment_with, open_folder
from tests.db.test_migrations import catalogue

__all__ = ["start"]  # a fixture

README = (CHECKOUT / "db" / "README.md").read_text()
OLDEST = Path("/usr/lib/postgresql/15/bin")
"""Where Debian keeps a PostgreSQL that is older than the embedded one."""
OLDER = BINARIES.parents[1] / "pginstall" / "bin"
"""The PostgreSQL 16 that lies beside the embedded one."""
PROGRAMS = ("pg_dumpall", "pg_dump", "pg_restore", "createdb", "psql", "pg_basebackup")

pytestmark = pytest.mark.skipif(
    not all((BINARIES / program).exists() for program in PROGRAMS),
    reason=f"{BINARIES} does not have all of {', '.join(PROGRAMS)}",
)


def blocks(heading: str) -> list[str]:
    """Return the sh blocks below a heading of the README."""
    _, found, section = README.partition(f"\n### {heading}\n")
    assert found, heading
    return re.findall(r"^```sh\n(.*?)^```$", section.partition("\n#")[0], re.DOTALL | re.MULTILINE)


def commands(heading: str) -> str:
    """Return the sh block below a heading that has one."""
    [block] = blocks(heading)
    return block


def run(
    script: str, folder: Path, server: Postgres | None = None, check: bool = True, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run commands in a folder, with the server that is meant and with its programs."""
    programs = [str(server.binaries if server else BINARIES), str(Path(sys.executable).parent)]
    environment = environment_with(
        PATH=os.pathsep.join([*programs, os.environ["PATH"]]),
        PGHOST=str(server.socket_dir) if server else "",
        PGPORT="5432",
        PGUSER="postgres",
    )
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0 or not check, ran.stderr
    return ran


def lines(*scripts: str) -> str:
    """Return scripts as one that ends with the first command that fails."""
    return "\n".join(["set -e", *scripts])


class Books:
    """What a database says of its wallets: balances and operations, which are right."""

    def __init__(self, url: str) -> None:
        with psycopg.connect(url, row_factory=namedtuple_row) as connection:
            connection.execute("set transaction isolation level repeatable read")
            assert connection.execute("select * from wallet.verify()").fetchall() == []
            self.wallets = connection.execute("select * from wallet.balance order by uuid").fetchall()
            self.operations = connection.execute("select * from wallet.operation order by wallet_uuid, seq").fetchall()


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Postgres]:
    """A server where nothing is yet, no roles of ours either."""
    postgres = Postgres(tmp_path / "new server", "fsync=off")
    postgres.start()
    yield postgres
    postgres.stop()


@contextlib.contextmanager
def migrated_server(binaries: Path, home: Path) -> Iterator[Postgres]:
    """A server of some version with a migrated database and the service's login; it may be stopped and started."""
    if not (binaries / "postgres").exists():
        pytest.skip(f"there is no PostgreSQL in {binaries}")
    postgres = Postgres(home, "fsync=off", binaries=binaries)
    postgres.start()
    with psycopg.connect(postgres.url("postgres", "postgres"), autocommit=True) as connection:
        connection.execute("create database wallet")
    dbmate(postgres.url("postgres"), "migrations", "migrate")
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f"create role {LOGIN} login in role wallet_app")
    try:
        yield postgres
    finally:
        postgres.stop()


@pytest.fixture(params=[BINARIES, OLDEST], ids=["same_version", "from_version_15"])
def old_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A server with a migrated database in which wallet `w` holds 500, by seven operations."""
    with migrated_server(request.param, open_folder(tmp_path_factory, "old")) as postgres:
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
            connection.execute("select wallet.create_wallet('w')")
            for amount in (100, 50, 50, 100, 100, 60, 40):
                connection.execute("select wallet.apply_operation('w', %s, 'DEPOSIT', %s)", [uuid4(), amount])
        yield postgres


# Migrations


def test_ci_migrates_and_is_told_whether_that_is_all(new_server: Postgres, tmp_path: Path) -> None:
    migrate, status = commands("Migrations in CI").splitlines()
    url = new_server.url("postgres")

    def exit_code(command: str, url: str = url) -> int:
        return run(command, CHECKOUT, check=False, DATABASE_URL=url).returncode

    run("createdb wallet", tmp_path, new_server)
    assert exit_code(status) == 1
    assert exit_code(migrate) == 0
    assert exit_code(status) == 0
    assert exit_code(migrate) == 0
    assert exit_code("dbmate --env-file dbmate.env rollback") == 0
    assert exit_code(status) == 1
    assert exit_code(status, f"postgres://nobody@/wallet?host={tmp_path}&sslmode=disable") == 2


# Dump and restore


def test_a_restored_database_is_the_same_and_the_service_goes_on(
    old_server: Postgres, new_server: Postgres, tmp_path: Path, start: Start
) -> None:
    run(lines(commands("Backup")), tmp_path, old_server)

    ran = run(commands("Restore"), tmp_path, new_server)

    assert re.findall("ERROR: +(.*)", ran.stderr) == ['role "postgres" already exists']
    assert "(0 rows)" in ran.stdout
    before, after = Books(old_server.url("postgres")), Books(new_server.url("postgres"))
    assert (after.wallets, after.operations) == (before.wallets, before.operations)
    assert len(after.operations) == 7
    with (
        psycopg.connect(old_server.url("postgres")) as old,
        psycopg.connect(new_server.url("postgres")) as new,
    ):
        told = catalogue(new)
        if new.info.server_version == old.info.server_version:  # else each words the definitions in its own way
            assert told == catalogue(old)
        assert {owner for _, _, _, owner, _, _ in told["tables"]} == {"wallet_owner"}
    with psycopg.connect(new_server.url(LOGIN)) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("select from wallet.wallet")
    assert run(commands("Migrations in CI"), CHECKOUT, DATABASE_URL=new_server.url("postgres")).returncode == 0

    service = start(DATABASE_URL=new_server.url(LOGIN))
    service.deposit("w", 5)
    assert service.balance("w") == 505
    assert service.ask("/api/v1/wallets", {})[1]["id"] == 2
    assert Books(new_server.url("postgres")).operations[-1][3] == 8


def test_without_the_roles_a_restore_fails(old_server: Postgres, new_server: Postgres, tmp_path: Path) -> None:
    run(lines(commands("Backup")), tmp_path, old_server)
    without_roles = [line for line in commands("Restore").splitlines() if "roles.sql" not in line]
    assert len(without_roles) == len(commands("Restore").splitlines()) - 1

    ran = run(lines(*without_roles), tmp_path, new_server, check=False)

    assert ran.returncode != 0
    assert 'role "wallet_owner" does not exist' in ran.stderr


# A copy of a server at work


def test_a_copy_of_a_server_at_work_holds_all_that_was_answered_before(start: Start, tmp_path: Path) -> None:
    service = start()
    *copying, serving = commands("Backup of a whole server").splitlines()
    answered: list[UUID] = []
    stop = threading.Event()

    def client(wallet: str) -> None:
        while not stop.is_set():
            operation = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1}
            if service.ask(f"/api/v1/wallets/{wallet}/operation", operation)[0] == 200:
                answered.append(UUID(operation["operation_uuid"]))

    clients = [threading.Thread(target=client, args=[wallet]) for wallet in ("1111111111", "2222222222")]
    for thread in clients:
        thread.start()
    try:
        wait_until(lambda: len(answered) > 100)
        before = set(answered)
        run(lines(*copying), tmp_path, PGHOST=service.server()[1])
        during = len(answered)
        wait_until(lambda: len(answered) > during + 100)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert during > len(before)
    original = Books(service.url())
    service.stop()

    assert serving == "WALLET_DATA_DIR=copy .venv/bin/python -m app"
    copy = start(tmp_path / "copy")

    copied = Books(copy.url())
    last = {wallet.uuid: wallet.seq for wallet in copied.wallets}
    assert copied.operations == [row for row in original.operations if row.seq <= last[row.wallet_uuid]]
    assert before <= {row.operation_uuid for row in copied.operations}
    copy.deposit("1111111111", 1)
    assert Books(copy.url()).wallets[0].seq == last["1111111111"] + 1


# Recovery


def test_after_recovery_to_just_before_a_mistake_the_books_agree_and_repeats_are_applied_once(
    old_server: Postgres, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    backup, folder = open_folder(tmp_path_factory, "backup"), open_folder(tmp_path_factory, "recovery")
    (backup / "wal").mkdir()
    (backup / "wal").chmod(0o777)
    (folder / "restored").mkdir()
    archive, copy, switch, restore, look, go_on = (
        block.replace("/backup", str(backup)) for block in blocks("Recovery to a point in time")
    )
    run(archive, folder, old_server)
    old_server.stop()
    old_server.start()
    service = start(DATABASE_URL=old_server.url(LOGIN))

    def operation(kind: str) -> dict[str, object]:
        return {"operation_uuid": str(uuid4()), "operation_type": kind, "amount": 10}

    def answers(service: Service, operations: Iterable[dict[str, object]]) -> list[int]:
        return [service.ask("/api/v1/wallets/w/operation", operation)[0] for operation in operations]

    early, late, lost = ([operation("DEPOSIT"), operation("WITHDRAW"), operation("DEPOSIT")] for _ in range(3))
    assert answers(service, early) == [200] * 3
    run(copy, folder, old_server)
    assert answers(service, late) == [200] * 3
    before = Books(old_server.url("postgres"))
    with psycopg.connect(old_server.url("postgres"), autocommit=True) as superuser:
        [[moment]] = superuser.execute("select clock_timestamp()::text").fetchall()
        superuser.execute("delete from wallet.operation where operation_type = 'WITHDRAW'")
        assert superuser.execute("select * from wallet.verify()").fetchall()
    assert answers(service, lost) == [200] * 3
    service.stop()

    [segment] = re.findall("[0-9A-F]{24}", run(switch, folder, old_server).stdout)
    with psycopg.connect(old_server.url("postgres"), autocommit=True) as superuser:
        archived = "select last_archived_wal >= %s from pg_stat_archiver"
        wait_until(lambda: superuser.execute(archived, [segment]).fetchall() == [(True,)])
    assert "2026-12-01 09:29:59+00" in restore
    run(lines(restore.replace("2026-12-01 09:29:59+00", moment)), folder, old_server)
    (folder / "restored").chmod(0o711)
    restored = Postgres(folder / "restored", "fsync=off", binaries=old_server.binaries)
    restored.start()
    try:
        assert "(0 rows)" in run(look, folder, restored).stdout
        after = Books(restored.url("postgres"))
        assert (after.wallets, after.operations) == (before.wallets, before.operations)
        run(go_on, folder, restored)
        with psycopg.connect(restored.url("postgres"), autocommit=True) as connection:
            wait_until(lambda: connection.execute("select pg_is_in_recovery()").fetchall() == [(False,)])

        service = start(DATABASE_URL=restored.url(LOGIN))
        assert answers(service, [*early, *late, *lost]) == [400] * 6 + [200] * 3
        assert answers(service, lost) == [400] * 3
        assert service.balance("w") == 500 + 3 * 10
        assert len(Books(restored.url("postgres")).operations) == 7 + 3 * 3
        service.stop()
    finally:
        restored.stop()


# Upgrades of PostgreSQL


@pytest.mark.parametrize("old_server", [OLDER], ids=["from_version_16"], indirect=True)
def test_pg_upgrade_keeps_everything_and_the_service_goes_on(
    old_server: Postgres, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upgrade, analyze = blocks("Upgrading PostgreSQL with pg_upgrade")
    folder = open_folder(tmp_path_factory, "upgrade")
    (folder / "new").mkdir(mode=0o711)
    old, new = (enterable(binaries, folder) for binaries in (OLDER, BINARIES))
    before = Books(old_server.url("postgres"))
    with psycopg.connect(old_server.url("postgres"), autocommit=True) as connection:
        connection.execute("analyze")
    old_server.stop()
    if os.geteuid() == 0:
        for path in (folder, folder / "new"):
            os.chown(path, NOBODY, NOBODY)

    places = {"/usr/lib/postgresql/16/bin": old, "/var/lib/postgresql/16/main": old_server.data}
    for named, place in places.items():
        assert named in upgrade
        upgrade = upgrade.replace(named, shlex.quote(str(place)))
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    path = os.pathsep.join([str(new), os.environ["PATH"]])
    ran = subprocess.run(
        ["bash", "-ec", upgrade], cwd=folder, env=environment_with(PATH=path), capture_output=True, text=True, **user
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr

    upgraded = Postgres(folder / "new", "fsync=off")
    if os.geteuid() == 0:
        os.chown(folder / "new", 0, 0)
    upgraded.start()
    try:
        with psycopg.connect(upgraded.url("postgres"), autocommit=True) as connection:
            statistics = "select count(*) from pg_stats where schemaname = 'wallet' and tablename = 'operation'"
            [[columns]] = connection.execute(statistics).fetchall()
            assert columns > 5
            assert {owner for _, _, _, owner, _, _ in catalogue(connection)["tables"]} == {"wallet_owner"}
        assert "(0 rows)" in run(lines(analyze), folder, upgraded).stdout
        after = Books(upgraded.url("postgres"))
        assert (after.wallets, after.operations) == (before.wallets, before.operations)
        assert run(commands("Migrations in CI"), CHECKOUT, DATABASE_URL=upgraded.url("postgres")).returncode == 0
        service = start(DATABASE_URL=upgraded.url(LOGIN))
        service.deposit("w", 5)
        assert service.balance("w") == 505
        assert service.ask("/api/v1/wallets", {})[1]["id"] == 2
        with psycopg.connect(upgraded.url("postgres")) as connection, pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("update wallet.operation set balance_after = -1")
        service.stop()
    finally:
        upgraded.stop()


def enterable(binaries: Path, folder: Path) -> Path:
    """Return the programs of an embedded version where every user can run them: a copy, if need be."""
    if all(parent.stat().st_mode & 0o001 for parent in binaries.parents):
        return binaries
    package = binaries.parents[1]
    shutil.copytree(binaries.parent, folder / package.name / binaries.parent.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(libraries, folder / libraries.name, symlinks=True, dirs_exist_ok=True)
    return folder / package.name / binaries.parent.name / binaries.name
