"""db/README.md's "Change data capture" is run as it stands there: the ledger is followed by logical decoding."""

import os
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from app.server.embedded import BINARIES, Postgres
from app.server.migrations import LOGIN
from tests.api.test_process import wait_until
from tests.cases import Request, deposit
from tests.conftest import open_folder
from tests.db.door import apply, apply_all, call
from tests.proof.stand import signal_tree
from tests.test_operating import OLDEST, blocks, migrated_server, run

WALLETS = ("a", "b", "c", "d")
START, PUBLISH = blocks("Change data capture")
PUBLISHED = "\n".join(line for line in PUBLISH.splitlines() if "slot" not in line)
"""The publication and the role, without the slot."""
FAILOVER, STANDBY, PROMOTE, NEW_SLOT = blocks("Change data capture across a failover")

pytestmark = pytest.mark.skipif(not (BINARIES / "psql").exists(), reason=f"{BINARIES} has no psql")


class Follower:
    """A consumer as the README describes it, with all that it keeps: the operations of each wallet."""

    def __init__(self) -> None:
        self.ledger: dict[str, list[dict[str, str | None]]] = {wallet: [] for wallet in WALLETS}
        self.repeated = 0
        self.columns: list[str] = []

    def follow(self, connection: psycopg.Connection, *, crash: bool = False) -> int:
        """Take what the slot has and confirm it, unless it crashes in between; return how many rows came."""
        peek = "select data from pg_logical_slot_peek_binary_changes('operations', null, 500, {})".format(
            "'proto_version', '1', 'publication_names', 'operations'"
        )
        transaction: list[dict[str, str | None]] = []
        came, end = 0, 0
        for (message,) in connection.execute(peek):
            match message[:1]:
                case b"R":
                    self.columns = columns(message)
                case b"I":
                    transaction.append(dict(zip(self.columns, values(message), strict=True)))
                case b"C":
                    [end] = struct.unpack_from("!q", message, 10)
                    came += len(transaction)
                    for operation in sorted(transaction, key=lambda one: int(one["seq"] or 0)):
                        self.take(operation)
                    transaction = []
                case kind:
                    assert kind in (b"B", b"O", b"Y"), "neither a new operation nor what stands around it"
        assert transaction == []
        if end and not crash:
            connection.execute("select pg_replication_slot_advance('operations', '0/0'::pg_lsn + %s)", [end])
        return came

    def take(self, operation: dict[str, str | None]) -> None:
        """Keep an operation, if it is no repeat of one that is there."""
        known, seq = self.ledger[operation["wallet_uuid"] or ""], int(operation["seq"] or 0)
        assert seq <= len(known) + 1, "a gap"
        if seq <= len(known):
            assert known[seq - 1]["operation_uuid"] == operation["operation_uuid"]
            self.repeated += 1
        else:
            known.append(operation)

    def catch_up(self, connection: psycopg.Connection) -> None:
        """Read from the ledger what is above the last `seq` of each wallet."""
        with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            for wallet, known in self.ledger.items():
                above = "select * from wallet.operation where wallet_uuid = %s and seq > %s order by seq"
                for row in cursor.execute(above, [wallet, len(known)]):
                    self.take({name: None if value is None else str(value) for name, value in row.items()})

    def has(self, connection: psycopg.Connection) -> bool:
        """Tell whether it keeps exactly what the ledger holds."""
        query = "select wallet_uuid, seq::text, operation_uuid::text, operation_type, amount::text, balance_after::text"
        rows = connection.execute(f"{query} from wallet.operation order by wallet_uuid, operation.seq").fetchall()
        names = ("wallet_uuid", "seq", "operation_uuid", "operation_type", "amount", "balance_after")
        kept = [tuple(one[name] for name in names) for wallet in WALLETS for one in self.ledger[wallet]]
        return kept == rows


def columns(message: bytes) -> list[str]:
    """Return the names of the columns that a Relation message tells of (PostgreSQL, logical replication messages)."""
    _, _, rest = message[5:].split(b"\0", 2)
    [count] = struct.unpack_from("!h", rest, 1)
    names, at = [], 3
    for _ in range(count):
        end = rest.index(b"\0", at + 1)
        names.append(rest[at + 1 : end].decode())
        at = end + 9
    return names


def values(message: bytes) -> list[str | None]:
    """Return the values of an Insert message, in the order of the columns."""
    found: list[str | None] = []
    at = 8
    while at < len(message):
        if message[at : at + 1] == b"n":
            found.append(None)
            at += 1
        else:
            [length] = struct.unpack_from("!i", message, at + 1)
            found.append(message[at + 5 : at + 5 + length].decode())
            at += 5 + length
    return found


class Clients:
    """Clients that move money over SQL until they are stopped, and ask again when an answer was lost."""

    def __init__(self, url: Callable[[], str]) -> None:
        self.url = url
        self.applied = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=[seed]) for seed in range(3)]

    def _work(self, seed: int) -> None:
        choice = random.Random(seed)
        asked: list[Request] = []
        while not self._stop.is_set():
            try:
                with psycopg.connect(self.url(), autocommit=True) as connection:
                    while not self._stop.is_set():
                        asked = asked or [self._request(choice) for _ in range(choice.choice((1, 1, 5, 20)))]
                        self.applied += sum(row.sqlstate is None for row in apply_all(connection, asked))
                        asked = []
            except psycopg.OperationalError:
                self._stop.wait(0.05)

    @staticmethod
    def _request(choice: random.Random) -> Request:
        payer, payee = choice.sample(WALLETS, 2)
        kind = choice.choice(("DEPOSIT", "DEPOSIT", "TRANSFER"))
        return Request(payer, uuid4(), kind, choice.randint(1, 9), counterparty=payee if kind == "TRANSFER" else None)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def progress(self) -> None:
        """Wait until they have done some more."""
        enough = self.applied + 300
        wait_until(lambda: self.applied >= enough)


@pytest.fixture(params=[BINARIES, OLDEST], ids=["embedded_version", "version_15"])
def primary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Iterator[Postgres]:
    """A migrated server with some empty wallets, as the first block of the recipe and a restart leave it."""
    with migrated_server(request.param, open_folder(tmp_path_factory, "primary")) as postgres:
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
            for wallet in WALLETS:
                call(connection, "create_wallet", wallet)
        run(START, tmp_path, postgres)
        postgres.stop()
        postgres.start()
        yield postgres


@pytest.fixture
def standby(primary: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A standby of the primary that follows it: by the recipe of 17 and later, or as any before."""
    folder = open_folder(tmp_path_factory, "standby")
    if primary.binaries == BINARIES:
        run(FAILOVER, folder, primary)
        run(PUBLISHED, folder, primary)
        run(STANDBY, folder, primary)
    else:
        run(PUBLISH, folder, primary)
        run("pg_basebackup --pgdata=standby/postgres --checkpoint=fast --write-recovery-conf", folder, primary)
    (folder / "standby").chmod(0o711)
    postgres = Postgres(folder / "standby", "fsync=off", binaries=primary.binaries)
    postgres.start()
    yield postgres
    postgres.stop()


def connect(postgres: Postgres, user: str = "postgres") -> psycopg.Connection:
    """Connect as a user; a statement that waits for what does not come fails."""
    return psycopg.connect(postgres.url(user), autocommit=True, options="-c statement_timeout=20s")


def follow_all(follower: Follower, postgres: Postgres) -> None:
    """Take all that the slot has, once no client is at work any more."""
    with connect(postgres, "follower") as connection:
        while follower.follow(connection):
            pass


def check(follower: Follower, postgres: Postgres) -> None:
    """Compare what the consumer keeps with the ledger, and look at the books."""
    with connect(postgres) as connection:
        assert follower.has(connection)
        assert call(connection, "verify") == []


def test_a_consumer_gets_each_operation_once_and_in_order_while_clients_work(primary: Postgres, tmp_path: Path) -> None:
    run(PUBLISH, tmp_path, primary)
    follower, clients, choice = Follower(), Clients(lambda: primary.url(LOGIN)), random.Random(1)

    with clients.at_work():
        for _ in range(5):
            clients.progress()
            with connect(primary, "follower") as connection:
                follower.follow(connection, crash=choice.random() < 0.5)
    follow_all(follower, primary)

    check(follower, primary)
    assert follower.repeated
    assert sum(map(len, follower.ledger.values())) > clients.applied


def test_the_consumers_role_follows_and_reads_and_changes_nothing(primary: Postgres, tmp_path: Path) -> None:
    run(PUBLISH, tmp_path, primary)
    with connect(primary, LOGIN) as service, pytest.raises(psycopg.errors.InsufficientPrivilege):
        Follower().follow(service)
    with connect(primary, "follower") as connection:
        assert Follower().follow(connection) == 0
        for forbidden in (
            "insert into wallet.wallet (uuid) values ('x')",
            "delete from wallet.operation",
            "select * from wallet.key",
            "select wallet.create_wallet('x')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(forbidden)


def test_a_superuser_who_tampers_with_the_ledger_is_not_stopped_and_not_published(
    primary: Postgres, tmp_path: Path
) -> None:
    run(PUBLISH, tmp_path, primary)
    with connect(primary) as superuser, connect(primary, LOGIN) as service:
        apply(service, deposit("a", uuid4(), 5))
        superuser.execute("update wallet.operation set amount = 6")
        superuser.execute("delete from wallet.operation")
    follower = Follower()
    with connect(primary, "follower") as connection:
        assert follower.follow(connection) == 1
    assert [one["amount"] for one in follower.ledger["a"]] == ["5"]


def test_a_copy_in_another_database_holds_the_ledger(
    primary: Postgres, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run(PUBLISH, tmp_path, primary)
    [copying] = blocks("A copy of the ledger in another database")
    reports = Postgres(open_folder(tmp_path_factory, "reports"), "fsync=off", binaries=primary.binaries)
    reports.start()
    clients = Clients(lambda: primary.url(LOGIN))
    try:
        with clients.at_work():
            clients.progress()
            run("createdb reports", tmp_path, reports)
            run(f"set -e\n{copying}".replace("db.example", str(primary.socket_dir)), tmp_path, reports)
            clients.progress()
        query = "select * from wallet.operation order by wallet_uuid, seq"
        with connect(primary) as original, psycopg.connect(reports.url("postgres", "reports"), autocommit=True) as copy:
            ledger = original.execute(query).fetchall()
            assert len(ledger) > clients.applied
            wait_until(lambda: copy.execute(query).fetchall() == ledger)
            run("psql --command='drop subscription reports' reports", tmp_path, reports)
            assert original.execute("select slot_name from pg_replication_slots").fetchall() == [("operations",)]
    finally:
        reports.stop()


# Failover


newest = pytest.mark.parametrize("primary", [BINARIES], ids=["embedded_version"], indirect=True)
oldest = pytest.mark.parametrize("primary", [OLDEST], ids=["version_15"], indirect=True)


def lose(postgres: Postgres) -> None:
    """Kill -9 every process of a server at once."""
    assert postgres.process is not None
    signal_tree(postgres.process.pid, signal.SIGKILL)
    postgres.process.wait()


def walreceiver(postgres: Postgres) -> int:
    with connect(postgres) as connection:
        found: list[int] = []
        query = "select pid from pg_stat_wal_receiver where status = 'streaming'"
        wait_until(lambda: found.extend(pid for (pid,) in connection.execute(query)) or found)
        return found[0]


@newest
def test_from_version_17_a_consumer_goes_on_with_its_slot_after_a_failover(
    primary: Postgres, standby: Postgres, tmp_path: Path
) -> None:
    servers = [primary]
    follower, clients = Follower(), Clients(lambda: servers[-1].url(LOGIN))
    with connect(standby) as connection:
        safe = "select from pg_replication_slots where slot_name = 'operations' and synced and not temporary"

        def is_safe() -> bool:
            with connect(primary, "follower") as consumer:
                follower.follow(consumer)
            return bool(connection.execute(safe).fetchall())

        with clients.at_work():
            clients.progress()
            wait_until(is_safe, 60)
            clients.progress()
            with connect(primary, "follower") as consumer:
                assert follower.follow(consumer)
                assert follower.follow(consumer)
            lose(primary)
            run(PROMOTE, tmp_path, standby)
            servers.append(standby)
            clients.progress()
    assert not follower.repeated
    follow_all(follower, standby)
    check(follower, standby)
    assert sum(map(len, follower.ledger.values())) > 600


@newest
def test_from_version_17_a_consumer_gets_nothing_that_the_standby_does_not_have(
    primary: Postgres, standby: Postgres, tmp_path: Path
) -> None:
    follower = Follower()
    with connect(primary, LOGIN) as service, connect(primary, "follower") as consumer:
        apply(service, deposit("a", uuid4(), 1))
        assert follower.follow(consumer) == 1
        with stopped(walreceiver(standby)):
            apply(service, deposit("a", uuid4(), 2))
            consumer.execute("set statement_timeout = '500 ms'")
            with pytest.raises(psycopg.errors.QueryCanceled):
                follower.follow(consumer)
        consumer.execute("reset statement_timeout")
        assert follower.follow(consumer) == 1
    assert len(follower.ledger["a"]) == 2


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@oldest
def test_before_version_17_a_consumer_catches_up_from_the_ledger_after_a_failover(
    primary: Postgres, standby: Postgres, tmp_path: Path
) -> None:
    servers = [primary]
    follower, clients = Follower(), Clients(lambda: servers[-1].url(LOGIN))
    with clients.at_work():
        clients.progress()
        with connect(primary, "follower") as consumer:
            assert follower.follow(consumer)
        clients.progress()
    arrived = "select pg_last_wal_replay_lsn() >= %s"
    with connect(primary) as old, connect(standby) as new:
        [[written]] = old.execute("select pg_current_wal_lsn()").fetchall()
        wait_until(lambda: new.execute(arrived, [written]).fetchall() == [(True,)])
    lose(primary)
    run("psql --command='select pg_promote()' postgres", tmp_path, standby)
    servers.append(standby)
    clients = Clients(lambda: servers[-1].url(LOGIN))
    with clients.at_work():
        clients.progress()
        with connect(standby, "follower") as consumer, pytest.raises(psycopg.errors.UndefinedObject):
            follower.follow(consumer)
        run(NEW_SLOT, tmp_path, standby)
        clients.progress()
        with connect(standby, "follower") as consumer:
            follower.catch_up(consumer)
        clients.progress()
    follow_all(follower, standby)
    check(follower, standby)
    assert follower.repeated
