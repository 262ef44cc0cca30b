"""Holds: who ends one when several try, when exactly one is due, and who records it."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.cases import FUTURE, MESSAGES, A, B, C, D, Request, X, Y, deposit, hold, release, transfer, withdraw
from tests.db.door import apply, apply_all, balances, call, create, held, let_expire, operation, outcome
from tests.db.test_moments import pages_read

INSTANT = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
Session = Callable[[], psycopg.Connection]


@pytest.fixture
def session(database_url: str) -> Iterator[Session]:
    """Opens connections of the service, as many as a test asks for."""
    opened = []

    def connect() -> psycopg.Connection:
        opened.append(psycopg.connect(database_url, autocommit=True, options="-c statement_timeout=60s"))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


@pytest.fixture
def lock(superuser: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A connection with which a test holds wallets locked."""
    with psycopg.connect(superuser.info.dsn) as connection:
        yield connection


def wait_until_blocked(observer: psycopg.Connection, *waiting: psycopg.Connection) -> None:
    """Return once every one of these sessions waits for a lock that another session holds."""
    pids = [connection.info.backend_pid for connection in waiting]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        blocked = observer.execute(
            "select count(*) from pg_stat_activity"
            " where pid = any(%s) and wait_event_type = 'Lock' and pg_blocking_pids(pid) <> '{}'",
            [pids],
        ).fetchone()
        if blocked == (len(pids),):
            return
    raise AssertionError("the sessions do not wait for a lock")


def one(connection: psycopg.Connection, request: Request) -> str | None:
    """Apply an operation by apply_operations and return its outcome."""
    return apply_all(connection, [request])[0].sqlstate


def now(connection: psycopg.Connection) -> datetime:
    [moment] = connection.execute("select clock_timestamp()").fetchone() or ()
    return moment


def wallet(connection: psycopg.Connection, uuid: str = "w", at: datetime | None = None) -> Any:
    return call(connection, "get_wallet", uuid, at)[0]


def history(connection: psycopg.Connection, uuid: str = "w") -> list[Any]:
    """Return a wallet's operations, oldest first."""
    return call(connection, "list_operations", uuid)[::-1]


def types(connection: psycopg.Connection, uuid: str = "w") -> list[str]:
    return [row.operation_type for row in history(connection, uuid)]


def open_holds(superuser: psycopg.Connection) -> set[UUID]:
    """Return the holds for which no end is recorded, due or not."""
    return {uuid for (uuid,) in superuser.execute("select hold_uuid from wallet.hold")}


# Each hold has one end

ENDS = {
    "withdrawal": withdraw("w", A, 30, hold=X),
    "transfer": transfer("w", "v", B, 30, hold=X),
    "release": release("w", C, X),
}
each_way = pytest.mark.parametrize("ask", [outcome, one], ids=["apply_operation", "apply_operations"])


@each_way
@pytest.mark.parametrize("second", ENDS)
@pytest.mark.parametrize("first", ENDS)
def test_of_two_ends_that_wait_for_each_other_one_is_recorded(
    first: str,
    second: str,
    ask: Callable[[psycopg.Connection, Request], str | None],
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    lock: psycopg.Connection,
) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 60)])
    lock.execute("select from wallet.wallet where uuid = 'w' for update")
    sessions = [session(), session()]
    ends = [ENDS[first], ENDS[second]._replace(operation=D)]
    futures = [pool.submit(ask, *pair) for pair in zip(sessions, ends, strict=True)]
    wait_until_blocked(service, *sessions)
    lock.commit()

    assert sorted(future.result() or "" for future in futures) == ["", "WA410"]
    assert held(service, ["w"]) == {}
    assert types(service)[:2] == ["DEPOSIT", "HOLD"]
    assert len(types(service)) == 3
    assert call(service, "verify") == []


def test_32_ends_at_once_are_one(
    service: psycopg.Connection, superuser: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 60), hold("w", Y, 40)])
    ends = list(ENDS.values())
    start = threading.Barrier(32)

    def end(number: int, connection: psycopg.Connection) -> list[str | None]:
        request = ends[number % 3]
        start.wait()
        requests = [request._replace(operation=uuid4(), hold=name) for name in ((X, Y), (Y, X))[number % 2]]
        if number % 4 < 2:
            return [outcome(connection, request) for request in requests]
        return [row.sqlstate for row in apply_all(connection, requests)]

    futures = [pool.submit(end, number, session()) for number in range(32)]

    outcomes = [sqlstate for future in futures for sqlstate in future.result()]
    assert (outcomes.count(None), outcomes.count("WA410")) == (2, 62)
    assert held(service, ["w"]) == {}
    assert open_holds(superuser) == set()
    assert call(service, "verify") == []


def test_holds_at_once_never_exceed_what_is_there(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    create(service, {"w": 100})
    start = threading.Barrier(32)

    def reserve(connection: psycopg.Connection) -> str | None:
        start.wait()
        return outcome(connection, hold("w", uuid4(), 10))

    outcomes = [future.result() for future in [pool.submit(reserve, session()) for _ in range(32)]]

    assert (outcomes.count(None), outcomes.count("WA402")) == (10, 22)
    assert held(service, ["w"]) == {"w": 100}
    assert call(service, "verify") == []


@each_way
@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_waits_for_its_wallet_until_the_hold_is_due_comes_too_late(
    end: str,
    ask: Callable[[psycopg.Connection, Request], str | None],
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    lock: psycopg.Connection,
) -> None:
    until = now(service) + timedelta(seconds=1)
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 60, expires_at=until)])
    lock.execute("select from wallet.wallet where uuid = 'w' for update")
    waiting = session()
    future = pool.submit(ask, waiting, ENDS[end])
    wait_until_blocked(service, waiting)
    assert now(service) < until
    lock.execute("select pg_sleep(extract(epoch from %s - clock_timestamp()))", [until])
    lock.commit()

    assert future.result() == "WA410"
    assert held(service, ["w"]) == {}
    assert types(service) == ["DEPOSIT", "HOLD"]
    assert outcome(service, withdraw("w", D, 100)) is None
    assert call(service, "verify") == []


@each_way
def test_a_wallet_that_is_being_frozen_captures_nothing_and_releases(
    ask: Callable[[psycopg.Connection, Request], str | None],
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    lock: psycopg.Connection,
) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 60), hold("w", Y, 40)])
    lock.execute("select wallet.set_status('w', 'FROZEN')")
    sessions = [session(), session(), session()]
    ends = [ENDS["withdrawal"], ENDS["transfer"], release("w", C, Y)]
    futures = [pool.submit(ask, *pair) for pair in zip(sessions, ends, strict=True)]
    wait_until_blocked(service, *sessions)
    lock.commit()

    assert [future.result() for future in futures] == ["WA403", "WA403", None]
    assert held(service, ["w"]) == {"w": 60}
    assert call(service, "verify") == []


def test_an_end_in_a_transaction_that_is_rolled_back_is_none(service: psycopg.Connection) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 60)])
    for end in ENDS.values():
        with service.transaction(force_rollback=True):
            apply(service, end)
            assert held(service, ["w"]) == {}
            assert one(service, withdraw("w", D, 1, hold=X)) == "WA410"
    assert held(service, ["w"]) == {"w": 60}
    assert outcome(service, ENDS["withdrawal"]) is None
    assert call(service, "verify") == []


def test_whatever_32_clients_do_with_holds_the_books_are_right(
    service: psycopg.Connection, superuser: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    wallets = ["w", "v", "u"]
    create(service, dict.fromkeys(wallets, 100))
    names: list[tuple[str, UUID]] = []
    start = threading.Barrier(32)

    def request(chance: random.Random) -> Request:
        uuid, payee = chance.sample(wallets, 2)
        owner, name = chance.choice(names[-50:]) if names else (uuid, uuid4())
        kind, amount = chance.randrange(8), chance.randint(1, 30)
        if kind <= 2:
            names.append((uuid, made := uuid4()))
            soon = timedelta(milliseconds=chance.choice([1, 5, 50, 100_000]))
            return hold(uuid, made, amount, expires_at=chance.choice([None, datetime.now(UTC) + soon]))
        if kind == 3:
            return withdraw(owner, uuid4(), amount, hold=name)
        if kind == 4:
            return transfer(owner, payee if payee != owner else uuid, uuid4(), amount, hold=name)
        if kind == 5:
            return release(owner, uuid4(), name)
        return transfer(uuid, payee, uuid4(), amount) if kind == 6 else deposit(uuid, uuid4(), 1)

    def work(seed: int, connection: psycopg.Connection) -> list[str | None]:
        chance = random.Random(seed)
        start.wait()
        told: list[str | None] = []
        for _ in range(15):
            if seed % 2:
                told.append(outcome(connection, request(chance)))
            else:
                rows = apply_all(connection, [request(chance) for _ in range(8)], atomic=chance.random() < 0.2)
                told += [row.sqlstate for row in rows]
        return told

    futures = [pool.submit(work, seed, session()) for seed in range(32)]
    told = {sqlstate for future in futures for sqlstate in future.result()}

    assert told >= {None, "WA402", "WA410", "WA424"}
    assert told <= {None, "WA400", "WA402", "WA410", "WA424", "WA425"}
    kinds = {kind for (kind,) in superuser.execute("select operation_type from wallet.operation")}
    assert kinds == {"DEPOSIT", "WITHDRAW", "TRANSFER", "RECEIVE", "HOLD", "RELEASE", "EXPIRE"}
    assert call(service, "verify") == []
    for uuid in wallets:
        let_all_expire(service, uuid)
    assert call(service, "verify") == []


def let_all_expire(connection: psycopg.Connection, uuid: str) -> None:
    connection.execute("select pg_sleep(0.06)")
    call(connection, "expire_holds", uuid)
    listed = {row.hold_uuid: row.amount for row in call(connection, "list_holds", uuid, None, 1000)}
    assert sum(listed.values()) == wallet(connection, uuid).held


# Expiry is exact

FIRST = {
    "deposit": deposit("w", A, 1),
    "withdrawal": withdraw("w", A, 1),
    "hold": hold("w", A, 1),
    "payment": transfer("w", "v", A, 1),
    "receipt": transfer("v", "w", A, 1),
    "capture": withdraw("w", A, 1, hold=D),
    "release": release("w", A, D),
}


@pytest.fixture
def due(service: psycopg.Connection) -> list[datetime]:
    """Wallet w has 100, of which 10 are held by X and 20 by Y, both due, and 30 by D, open. Y was due first."""
    create(service, {"w": 100, "v": 100}, holds=[hold("w", D, 30)])
    holds = [hold("w", X, 10), hold("w", Y, 20, metadata={"a": 1})]
    return let_expire(service, holds, timedelta(milliseconds=10))[::-1]


@each_way
@pytest.mark.parametrize("first", FIRST)
def test_the_first_operation_records_what_is_due(
    first: str,
    ask: Callable[[psycopg.Connection, Request], str | None],
    due: list[datetime],
    service: psycopg.Connection,
    superuser: psycopg.Connection,
) -> None:
    assert ask(service, FIRST[first]) is None

    y, x, applied = history(service)[4:]
    for row, name, amount, seq, left, moment in ((y, Y, 20, 5, 40, due[0]), (x, X, 10, 6, 30, due[1])):
        assert (row.operation_type, row.operation_uuid, row.hold_uuid) == ("EXPIRE", name, name)
        assert (row.amount, row.seq, row.balance_after, row.held_after) == (amount, seq, 100, left)
        assert (row.created_at, row.metadata, row.counterparty_uuid, row.expires_at) == (moment, None, None, None)
    assert (applied.operation_uuid, applied.seq) == (A, 7)
    assert applied.created_at >= due[1]
    assert open_holds(superuser) - {A} <= {D}
    assert call(service, "verify") == []

    apply(service, deposit("w", B, 1))
    assert types(service).count("EXPIRE") == 2


def test_one_batch_records_what_is_due_once(
    due: list[datetime], service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    let_expire(service, [hold("v", C, 100)])
    rows = apply_all(
        service,
        [
            withdraw("w", A, 71, "WA402"),
            transfer("v", "w", A, 100),
            withdraw("w", B, 10, "WA410", hold=X),
            withdraw("w", B, 170),
        ],
    )
    assert [row.sqlstate for row in rows] == ["WA402", None, "WA410", None]
    assert types(service)[4:] == ["EXPIRE", "EXPIRE", "RECEIVE", "WITHDRAW"]
    assert types(service, "v") == ["DEPOSIT", "HOLD", "EXPIRE", "TRANSFER"]
    assert open_holds(superuser) == {D}
    assert call(service, "verify") == []


@each_way
@pytest.mark.parametrize(
    "refused",
    [
        withdraw("w", A, 71, "WA402"),
        hold("w", A, 71, "WA402"),
        transfer("w", "v", A, 71, "WA402"),
        transfer("w", "nobody", A, 1, "WA404"),
        withdraw("w", A, 1, "WA410", hold=X),
        release("w", A, Y, "WA410"),
        release("w", A, B, "WA424"),
        hold("w", X, 1, "WA409"),
        hold("w", A, 1, "WA410", expires_at=datetime(2000, 1, 1, tzinfo=UTC)),
        transfer("v", "w", A, 101, "WA402"),
    ],
    ids=lambda request: f"{request.type}_{request.outcome}",
)
def test_what_is_refused_records_nothing(
    refused: Request,
    ask: Callable[[psycopg.Connection, Request], str | None],
    due: list[datetime],
    service: psycopg.Connection,
    superuser: psycopg.Connection,
) -> None:
    before = history(service)
    assert ask(service, refused) == refused.outcome
    assert history(service) == before
    assert open_holds(superuser) == {X, Y, D}
    assert call(service, "verify") == []


def test_an_atomic_batch_that_is_refused_records_nothing(
    due: list[datetime], service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    rows = apply_all(service, [deposit("w", A, 1), withdraw("w", B, 10, hold=X)], atomic=True)
    assert [row.sqlstate for row in rows] == ["WA425", "WA410"]
    assert types(service) == ["DEPOSIT", "HOLD", "HOLD", "HOLD"]
    assert open_holds(superuser) == {X, Y, D}


def test_what_is_due_counts_in_no_read(due: list[datetime], service: psycopg.Connection) -> None:
    state = wallet(service)
    assert (state.balance, state.held, state.available, state.seq) == (100, 30, 70, 4)
    assert call(service, "list_wallets")[1] == state
    assert call(service, "set_status", "w", "OPEN")[0] == state
    assert [row.hold_uuid for row in call(service, "list_holds", "w")] == [D]
    assert call(service, "get_operation", "w", X)[0].operation_type == "HOLD"


def test_a_wallet_at_a_moment_holds_what_was_not_due_by_then(due: list[datetime], service: psycopg.Connection) -> None:
    made = [row.created_at for row in history(service)]

    def holds() -> list[int]:
        moments = [made[0], *(row - INSTANT for row in made[1:3]), made[3]]
        return [wallet(service, at=moment).held for moment in [*moments, *due, *(one - INSTANT for one in due)]]

    before = holds()
    assert before == [0, 0, 30, 60, 40, 30, 60, 40]
    apply(service, deposit("w", A, 1))
    assert holds() == before
    at_once = wallet(service, at=due[0])
    assert (at_once.seq, at_once.updated_at, at_once.available) == (5, due[0], 60)


def test_a_wallet_at_a_moment_to_come_holds_what_will_not_be_due_then(service: psycopg.Connection) -> None:
    create(service, {"w": 100}, holds=[hold("w", X, 10, expires_at=FUTURE), hold("w", Y, 20)])
    held_then = [wallet(service, at=moment).held for moment in (FUTURE - INSTANT, FUTURE)]
    assert held_then == [30, 20]
    assert wallet(service, at=FUTURE).available == 80


def test_an_expiry_is_found_under_its_moment(due: list[datetime], service: psycopg.Connection) -> None:
    window = ("w", None, 100, due[0], due[1] + INSTANT)
    assert call(service, "list_operations", *window) == []
    apply(service, deposit("w", A, 1))
    assert [row.operation_uuid for row in call(service, "list_operations", *window)] == [X, Y]
    assert call(service, "get_operation", "w", X)[0].operation_type == "HOLD"


def test_holds_that_are_due_at_one_moment_expire_in_the_order_of_seq(service: psycopg.Connection) -> None:
    create(service, {"w": 100})
    names = [uuid4() for _ in range(5)]
    let_expire(service, [hold("w", name, 10) for name in names])
    assert [call(service, "expire_holds", "w", limit)[0].expire_holds for limit in (2, 2)] == [2, 2]
    assert wallet(service).held == 0
    assert call(service, "list_holds", "w") == []
    assert outcome(service, withdraw("w", A, 100, hold=names[4])) == "WA410"
    assert outcome(service, withdraw("w", A, 100)) is None
    assert [row.operation_uuid for row in history(service) if row.operation_type == "EXPIRE"] == names
    assert call(service, "verify") == []


def test_a_hold_is_never_due_too_early_nor_too_late(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    """Operations and reads go on without a break while it becomes due."""
    create(service, {"w": 100, "v": 100})
    until = now(service) + timedelta(seconds=1)
    apply(service, hold("w", X, 60, expires_at=until))
    seen: list[tuple[datetime, int, datetime]] = []

    def read(connection: psycopg.Connection) -> None:
        while (before := now(connection)) < until + timedelta(seconds=0.3):
            seen.append((before, wallet(connection).held, now(connection)))

    def write(connection: psycopg.Connection, request: Request) -> None:
        while now(connection) < until + timedelta(seconds=0.3):
            apply_all(connection, [request._replace(operation=uuid4())] * 2)

    tasks = [pool.submit(read, session())]
    tasks += [pool.submit(write, session(), request) for request in (deposit("w", A, 1), transfer("v", "w", A, 1))]
    for task in tasks:
        task.result()

    assert all(amount == 60 for _, amount, after in seen if after < until)
    assert all(amount == 0 for before, amount, _ in seen if before >= until)
    rows = service.execute("select * from wallet.get_operation('w', %s)", [X]).fetchall()
    assert len(rows) == 1
    listed = call(service, "list_operations", "w", None, 1000, until - timedelta(seconds=0.05))[::-1]
    kinds = [row.operation_type for row in listed]
    assert kinds.count("EXPIRE") == 1
    expiry = listed[kinds.index("EXPIRE")]
    assert expiry.created_at == until
    assert all(row.created_at < until and row.held_after == 60 for row in listed[: kinds.index("EXPIRE")])
    assert all(row.created_at >= until and row.held_after == 0 for row in listed[kinds.index("EXPIRE") :])
    assert call(service, "verify") == []


# A clock that goes back


def write_ahead(superuser: psycopg.Connection, uuid: str, moment: datetime) -> None:
    """Give a wallet a deposit of 1 as a clock that was ahead would have: at this moment, in the future."""
    superuser.execute(
        """
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, held_after, created_at)
        select wallet_uuid, 'DEPOSIT', gen_random_uuid(), seq + 1, 1, balance_after + 1, held_after, %s
        from wallet.operation where wallet_uuid = %s order by seq desc limit 1""",
        [moment, uuid],
    )


@each_way
def test_an_operation_that_touches_a_wallet_ahead_of_the_clock_meets_what_is_due_by_then(
    ask: Callable[[psycopg.Connection, Request], str | None],
    service: psycopg.Connection,
    superuser: psycopg.Connection,
) -> None:
    moment = now(service)
    create(service, {"w": 100, "v": 100}, holds=[hold("w", X, 60, expires_at=moment + HOUR)])
    write_ahead(superuser, "v", moment + 2 * HOUR)
    assert ask(service, transfer("w", "v", A, 10, hold=X)) == "WA410"
    assert wallet(service).held == 60
    assert ask(service, transfer("w", "v", A, 100)) is None
    assert types(service) == ["DEPOSIT", "HOLD", "EXPIRE", "TRANSFER"]
    assert [row.created_at - moment for row in history(service)[2:]] == [HOUR, 2 * HOUR]
    assert ask(service, withdraw("w", B, 1, hold=X)) == "WA410"
    assert call(service, "verify") == []


def test_a_batch_ahead_of_the_clock_is_as_its_requests_one_after_another(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    moment = now(service)
    create(service, {"w": 100, "v": 100}, holds=[hold("w", X, 50, expires_at=moment + HOUR), hold("w", Y, 50)])
    write_ahead(superuser, "v", moment + 2 * HOUR)
    rows = apply_all(
        service,
        [
            deposit("w", A, 1),
            withdraw("w", B, 2, "WA402"),
            transfer("v", "w", C, 1),
            withdraw("w", D, 10, "WA410", hold=X),
            withdraw("w", B, 2),
            hold("w", D, 10, expires_at=moment + HOUR),
            withdraw("w", D, 50, hold=Y),
        ],
    )
    assert [row.sqlstate for row in rows] == [None, "WA402", None, "WA410", None, "WA410", None]
    assert types(service)[3:] == ["DEPOSIT", "EXPIRE", "RECEIVE", "WITHDRAW", "WITHDRAW"]
    assert call(service, "verify") == []


def test_a_clock_that_goes_back_brings_no_hold_back(service: psycopg.Connection, superuser: psycopg.Connection) -> None:
    moment = now(service)
    create(service, {"w": 100}, holds=[hold("w", X, 60, expires_at=moment + HOUR)])
    superuser.execute("select wallet.record_expiries('w', %s)", [moment + HOUR])
    write_ahead(superuser, "w", moment + 3 * HOUR)

    assert (wallet(service).held, call(service, "list_holds", "w")) == (0, [])
    assert outcome(service, withdraw("w", A, 60, hold=X)) == "WA410"
    assert outcome(service, hold("w", A, 60, expires_at=moment + 2 * HOUR)) == "WA410"
    assert outcome(service, hold("w", A, 60, expires_at=moment + 4 * HOUR)) is None
    assert wallet(service).held == 60
    assert [row.hold_uuid for row in call(service, "list_holds", "w")] == [A]
    assert outcome(service, withdraw("w", B, 101, hold=A)) == "WA402"
    assert outcome(service, withdraw("w", B, 60, hold=A)) is None
    assert call(service, "verify") == []


# The list, and recording by hand


def test_open_holds_are_listed_oldest_first_in_pages(service: psycopg.Connection) -> None:
    create(service, {"w": 100, "v": 10, "u": 0}, holds=[hold("v", uuid4(), 10)])
    names = [uuid4() for _ in range(5)]
    apply_all(service, [hold("w", name, n + 1, expires_at=FUTURE if n % 2 else None) for n, name in enumerate(names)])
    apply(service, withdraw("w", A, 1, hold=names[0]))
    let_expire(service, [hold("w", Y, 5)])

    pages = [call(service, "list_holds", "w", after, 2) for after in (None, 4, 6)]
    assert [[row.hold_uuid for row in page] for page in pages] == [names[1:3], names[3:], []]
    first = pages[0][0]
    made = call(service, "get_operation", "w", names[1])[0]
    assert first._asdict() == {
        "wallet_uuid": "w",
        "hold_uuid": names[1],
        "seq": 3,
        "amount": 2,
        "expires_at": FUTURE,
        "created_at": made.created_at,
    }
    assert (made.operation_type, made.seq, made.expires_at, made.hold_uuid) == ("HOLD", 3, FUTURE, None)
    assert call(service, "list_holds", "u") == []


def refusal(connection: psycopg.Connection, function: str, *arguments: object) -> tuple[str | None, str | None]:
    with pytest.raises(psycopg.Error) as refused:
        call(connection, function, *arguments)
    return refused.value.sqlstate, refused.value.diag.message_primary


def test_holds_are_listed_and_expired_within_bounds(service: psycopg.Connection) -> None:
    create(service, {"w": 1})
    for limit in (None, 0, 1001, -1):
        assert refusal(service, "list_holds", "w", None, limit) == ("WA400", "limit must be from 1 to 1000")
    for limit in (None, 0, -1):
        assert refusal(service, "expire_holds", "w", limit) == ("WA400", "limit must be from 1 to 2147483647")
    assert refusal(service, "list_holds", "w", -1) == ("WA400", "after_seq must be from 0 to 9223372036854775807")
    for function in ("list_holds", "expire_holds"):
        assert refusal(service, function, "nobody") == ("WA404", MESSAGES["WA404"])
        assert refusal(service, function, None) == ("WA400", "wallet_uuid must not be null")


def test_expiries_are_recorded_by_hand_as_well(due: list[datetime], service: psycopg.Connection) -> None:
    def expire(*limit: int) -> int:
        return call(service, "expire_holds", "w", *limit)[0].expire_holds

    assert (expire(1), types(service)[4:]) == (1, ["EXPIRE"])
    assert (wallet(service).held, history(service)[-1].held_after) == (30, 40)
    assert history(service)[-1].operation_uuid == Y
    assert (expire(), expire(), types(service)[4:]) == (1, 0, ["EXPIRE", "EXPIRE"])
    assert [row.created_at for row in history(service)[4:]] == due
    assert (wallet(service).held, wallet(service).updated_at) == (30, due[1])
    assert call(service, "verify") == []


def test_expiries_are_recorded_under_read_committed_and_no_longer_than_the_lock_timeout(
    due: list[datetime], service: psycopg.Connection, lock: psycopg.Connection
) -> None:
    service.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with service.transaction():
        assert refusal(service, "expire_holds", "w")[0] == "0A000"
    service.isolation_level = None
    lock.execute("select from wallet.wallet where uuid = 'w' for update")
    service.execute("set lock_timeout = '10ms'")
    assert refusal(service, "expire_holds", "w") == ("55P03", "Wallet is locked by another transaction: not applied")


# What goes with a hold


def test_a_capture_is_found_by_payer_and_payee(service: psycopg.Connection) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 60, metadata={"order": 1})])
    paid = apply(service, transfer("w", "v", A, 50, hold=X, metadata={"a": 1}))
    assert (paid.hold_uuid, paid.held_after, paid.balance_after, paid.counterparty_uuid) == (X, 0, 50, "v")
    [received] = call(service, "get_operation", "v", A)
    assert (received.operation_type, received.hold_uuid, received.held_after) == ("RECEIVE", None, 0)
    made = call(service, "get_operation", "w", X)[0]
    assert (made.operation_type, made.held_after, made.metadata) == ("HOLD", 60, {"order": 1})


@each_way
def test_a_release_shows_what_it_gave_back(
    ask: Callable[[psycopg.Connection, Request], str | None], service: psycopg.Connection
) -> None:
    create(service, {"w": 100}, holds=[hold("w", X, 60), hold("w", Y, 7)])
    assert ask(service, release("w", A, X)) is None
    [released] = call(service, "get_operation", "w", A)
    assert (released.amount, released.held_after, released.balance_after, released.hold_uuid) == (60, 7, 100, X)


def test_every_operation_of_a_batch_of_holds_has_the_row_that_the_ledger_has(service: psycopg.Connection) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", D, 10)])
    requests = [
        hold("w", X, 60, expires_at=FUTURE, metadata={"a": 1}),
        hold("w", Y, 20),
        transfer("w", "v", A, 50, hold=X),
        release("w", B, D),
        withdraw("w", C, 1),
    ]
    rows = apply_all(service, requests)
    assert [operation(row) for row in rows] == [
        call(service, "get_operation", "w", request.operation)[0] for request in requests
    ]
    again = apply_all(service, requests)
    assert [(row.sqlstate, row.same_request) for row in again] == [("WA409", True)] * 5
    assert list(map(operation, again)) == list(map(operation, rows))


@pytest.mark.parametrize(
    ("first", "again", "same"),
    [
        (hold("w", A, 5, expires_at=FUTURE), hold("w", A, 5, expires_at=FUTURE.astimezone(timezone(5 * HOUR))), True),
        (hold("w", A, 5, expires_at=FUTURE), hold("w", A, 5, expires_at=FUTURE + INSTANT), False),
        (hold("w", A, 5, expires_at=FUTURE), hold("w", A, 5), False),
        (hold("w", A, 5), hold("w", A, 6), False),
        (withdraw("w", A, 5, hold=X), withdraw("w", A, 5, hold=X), True),
        (withdraw("w", A, 5, hold=X), withdraw("w", A, 5, hold=Y), False),
        (withdraw("w", A, 5, hold=X), withdraw("w", A, 5), False),
        (withdraw("w", A, 5), withdraw("w", A, 5, hold=X), False),
        (release("w", A, X), release("w", A, X), True),
        (release("w", A, X), release("w", A, Y), False),
        (release("w", A, X), release("w", A, X, metadata={"a": 1}), False),
        (release("w", A, X), withdraw("w", A, 10, hold=X), False),
    ],
)
def test_a_repeat_about_a_hold_is_the_same_request_only_if_all_of_it_is(
    first: Request, again: Request, same: bool, service: psycopg.Connection
) -> None:
    create(service, {"w": 100}, holds=[hold("w", X, 10), hold("w", Y, 10)])
    apply(service, first)
    [row] = apply_all(service, [again])
    assert (row.sqlstate, row.same_request, row.operation_uuid) == ("WA409", same, A)


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0001-12-31 23:59:59+00 BC", "10000-01-01 00:00+00"])
def test_a_hold_expires_in_the_years_1_to_9999(moment: str, service: psycopg.Connection) -> None:
    create(service, {"w": 100})
    arguments = ("w", A, "HOLD", 5, None, None, moment)
    refused = ("WA400", "expires_at must be in the years 1 to 9999")
    assert refusal(service, "apply_operation", *arguments) == refused
    assert apply_all(service, [hold("w", A, 5)._replace(expires_at=moment)])[0][1:3] == refused  # type: ignore[arg-type]
    last = hold("w", A, 5, expires_at=datetime.max.replace(tzinfo=UTC))
    assert outcome(service, last) is None


def test_a_wallet_with_a_hold_is_not_closed(service: psycopg.Connection) -> None:
    create(service, {"w": 10, "v": 10}, holds=[hold("w", X, 10)])
    assert refusal(service, "set_status", "w", "CLOSED") == ("WA417", MESSAGES["WA417"])
    apply(service, withdraw("w", A, 10, hold=X))
    assert call(service, "set_status", "w", "CLOSED")[0].held == 0
    assert outcome(service, hold("w", B, 1)) == "WA405"
    assert call(service, "verify") == []


def test_a_wallet_that_stays_locked_costs_only_its_own_captures(
    service: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(service, {"w": 100, "v": 100}, holds=[hold("w", X, 10), hold("v", Y, 10)])
    lock.execute("select from wallet.wallet where uuid = 'v' for update")
    service.execute("set lock_timeout = '20ms'")
    rows = apply_all(
        service, [withdraw("w", A, 5, hold=X), withdraw("v", B, 5, hold=Y), hold("v", C, 1), hold("w", D, 95)]
    )
    assert [row.sqlstate for row in rows] == [None, "55P03", "55P03", None]
    assert outcome(service, withdraw("v", B, 5, hold=Y)) == "55P03"
    lock.rollback()
    assert balances(service, ["w", "v"]) == {"w": 95, "v": 100}
    assert held(service, ["w", "v"]) == {"w": 95, "v": 10}


def test_what_the_database_refuses_in_a_batch_of_holds_is_refused_to_its_own_request(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 100, "v": 0}, holds=[hold("w", X, 10)])
    superuser.execute("alter table wallet.operation add constraint nothing_of_13 check (amount <> 13) not valid")
    rows = apply_all(
        service,
        [
            hold("w", Y, 20),
            withdraw("w", A, 13),
            transfer("w", "v", B, 5, hold=Y),
            release("w", C, X),
            hold("w", D, 13),
        ],
    )
    assert [row.sqlstate for row in rows] == [None, "23514", None, None, "23514"]
    assert open_holds(superuser) == set()
    assert (balances(service, ["w", "v"]), held(service, ["w"])) == ({"w": 95, "v": 5}, {})
    assert call(service, "verify") == []


# Cost


def test_a_wallet_with_many_holds_costs_no_more_than_one_with_few(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    """Plans that were made while there was nothing, and that was known, serve 20,000 open holds."""
    superuser.execute("vacuum analyze wallet.hold, wallet.operation")

    def costs(wallet: str) -> dict[str, int]:
        names = [uuid4() for _ in range(4)]
        one = {
            "hold": hold(wallet, names[0], 1),
            "capture": withdraw(wallet, names[1], 1, hold=names[0]),
            "hold again": hold(wallet, names[2], 1, expires_at=FUTURE),
            "release": release(wallet, names[3], names[2]),
            "deposit": deposit(wallet, uuid4(), 1),
        }
        read = {"get_wallet": [wallet], "list_holds": [wallet, None, 10]}
        return {
            name: pages_read(service, "apply_operation", request.arguments[:7]) for name, request in one.items()
        } | {name: pages_read(service, name, arguments) for name, arguments in read.items()}

    create(service, {"w": 10**6, "few": 10**6}, holds=[hold("few", uuid4(), 1)])
    for wallet in ("few", "w") * 3:
        costs(wallet)
    few = costs("few")
    apply_all(service, [hold("w", uuid4(), 1, expires_at=FUTURE) for _ in range(10_000)])
    apply_all(service, [hold("w", uuid4(), 1) for _ in range(10_000)])
    several = [costs("w") for _ in range(3)]
    many = {name: min(one[name] for one in several) for name in few}
    assert all(many[name] <= few[name] + 40 for name in few), (few, many)
