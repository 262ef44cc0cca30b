"""Many at once. Overlap is provoked: somebody holds a lock, the others are seen waiting, then it is let go."""

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import IsolationLevel

from tests.cases import MESSAGES, A, B, C, D, Request, deposit, transfer, withdraw
from tests.db.door import apply, apply_all, balances, call, create, operation, outcome

T = TypeVar("T")
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
    with ThreadPoolExecutor(64) as executor:
        yield executor


@pytest.fixture
def lock(superuser: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A connection with which a test holds wallets locked."""
    with psycopg.connect(superuser.info.dsn) as connection:
        yield connection


def hold(lock: psycopg.Connection, *wallets: str) -> None:
    lock.execute("select from wallet.wallet where uuid = any(%s) order by uuid for update", [list(wallets)])


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


def all_at_once(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]]) -> list[T]:
    """Run the tasks in threads that start together."""
    tasks = list(tasks)
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], T]) -> T:
        start.wait()
        return task()

    return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def outcomes(future: Future[list[Any]]) -> list[str | None]:
    """Return each request's SQLSTATE. Raises what the batch raised: 40P01 of a deadlock, for one."""
    return [row.sqlstate for row in future.result()]


# One wallet, many clients


def test_64_clients_on_one_wallet_lose_and_double_nothing(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    create(service, {"w": 1000})
    chance = random.Random(1)
    plans = [
        [
            Request("w", uuid4(), chance.choice(["DEPOSIT", "WITHDRAW"]), chance.randrange(1, 50), None)
            for _ in range(20)
        ]
        for _ in range(64)
    ]

    def work(connection: psycopg.Connection, plan: list[Request]) -> list[Request]:
        return [request for request in plan if outcome(connection, request) is None]

    sessions = [session() for _ in plans]
    worked = all_at_once(pool, [partial(work, *client) for client in zip(sessions, plans, strict=True)])
    applied = [request for requests in worked for request in requests]

    wallet = call(service, "get_wallet", "w")[0]
    change = sum(request.amount if request.type == "DEPOSIT" else -request.amount for request in applied)
    assert wallet.balance == 1000 + change
    assert wallet.seq == 1 + len(applied)
    listed = [
        *call(service, "list_operations", "w", None, 1000),
        *call(service, "list_operations", "w", wallet.seq - 999, 1000),
    ]
    assert [operation.seq for operation in listed] == [*range(wallet.seq, 0, -1)]
    assert {operation.operation_uuid for operation in listed[:-1]} == {request.operation for request in applied}
    assert call(service, "verify") == []


def test_of_16_withdrawals_that_race_for_money_for_5_exactly_5_succeed(
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
) -> None:
    create(service, {"w": 50})
    sessions = [session() for _ in range(16)]
    hold(lock, "w")
    racing = [pool.submit(outcome, connection, withdraw("w", uuid4(), 10)) for connection in sessions]
    wait_until_blocked(superuser, *sessions)
    lock.rollback()

    assert sorted(future.result() or "applied" for future in racing) == ["WA402"] * 11 + ["applied"] * 5
    assert balances(service, ["w"]) == {"w": 0}
    assert call(service, "verify") == []


# One operation_uuid, many clients


def test_one_operation_sent_by_16_clients_at_once_is_applied_once(
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
) -> None:
    create(service, {"w": 100})
    sessions = [session() for _ in range(16)]
    hold(lock, "w")
    racing = [pool.submit(outcome, connection, withdraw("w", A, 100)) for connection in sessions]
    wait_until_blocked(superuser, *sessions)
    lock.rollback()

    assert sorted(future.result() or "applied" for future in racing) == ["WA409"] * 15 + ["applied"]
    assert balances(service, ["w"]) == {"w": 0}
    assert call(service, "verify") == []


@pytest.mark.parametrize("ends", ["committed", "rolled back"])
def test_one_operation_named_by_16_clients_for_16_wallets_is_applied_once(
    ends: str, service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    wallets = [f"w{number}" for number in range(17)]
    create(service, dict.fromkeys(wallets, 10))
    first, sessions = session(), [session() for _ in range(16)]
    first.autocommit = False
    apply(first, withdraw("w16", A, 10))
    racing = [
        pool.submit(outcome, connection, withdraw(wallet, A, 10))
        for connection, wallet in zip(sessions, wallets, strict=False)
    ]
    wait_until_blocked(superuser, *sessions)
    first.commit() if ends == "committed" else first.rollback()

    refused = [future.result() for future in racing]
    assert refused.count("WA409") == (16 if ends == "committed" else 15)
    assert refused.count(None) == (0 if ends == "committed" else 1)
    assert sorted(balances(service, wallets).values()) == [0] + [10] * 16
    assert call(service, "verify") == []


# Batches against each other


def test_batches_over_the_same_wallets_in_opposite_order_do_not_deadlock(
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
) -> None:
    wallets = [f"w{number}" for number in range(10)]
    create(service, dict.fromkeys(wallets, 10))
    one, other = session(), session()
    # While the wallet in the middle is held, batches that locked in their own order would hold one half each.
    hold(lock, "w5")
    forth = pool.submit(apply_all, one, [withdraw(wallet, uuid4(), 1) for wallet in wallets])
    back = pool.submit(apply_all, other, [withdraw(wallet, uuid4(), 1) for wallet in reversed(wallets)])
    wait_until_blocked(superuser, one, other)
    lock.rollback()

    assert outcomes(forth) == outcomes(back) == [None] * 10
    assert balances(service, wallets) == dict.fromkeys(wallets, 8)


def test_batches_with_the_same_operations_in_opposite_order_do_not_deadlock(
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
) -> None:
    create(service, {"w": 0, "v": 0, "u": 0})
    operations = sorted(uuid4() for _ in range(10))
    one, other, third = session(), session(), session()
    # While the operation in the middle is being recorded, batches inserting in their own order would hold a half each.
    third.autocommit = False
    apply(third, deposit("u", operations[5], 1))
    forth = pool.submit(apply_all, one, [deposit("w", operation, 1) for operation in operations])
    back = pool.submit(apply_all, other, [deposit("v", operation, 1) for operation in reversed(operations)])
    wait_until_blocked(superuser, one, other)
    third.rollback()

    assert sorted([outcomes(forth), outcomes(back)], key=str) == [["WA409"] * 10, [None] * 10]
    assert sorted(balances(service, ["w", "v"]).values()) == [0, 10]
    assert call(service, "verify") == []


def test_of_two_batches_that_deadlock_since_one_is_in_halves_one_is_applied_and_the_other_may_be_sent_again(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    """The halves insert D before C, the other batch C before D; between the two, the first waits for B."""
    create(service, {"w": 0, "v": 0, "u": 0})
    superuser.execute("alter table wallet.operation add constraint small check (amount < 5)")
    halved = [deposit("w", D, 1), deposit("w", A, 5), deposit("w", B, 1), deposit("w", C, 1)]
    whole = [deposit("v", C, 1), deposit("v", D, 1)]
    one, other, third = session(), session(), session()
    third.autocommit = False
    apply(third, deposit("u", B, 1))
    in_halves = pool.submit(apply_all, one, halved)
    wait_until_blocked(superuser, one)
    as_a_whole = pool.submit(apply_all, other, whole)
    wait_until_blocked(superuser, one, other)
    third.rollback()

    errors = {future: future.exception() for future in (in_halves, as_a_whole)}
    [deadlock] = [error for error in errors.values() if error is not None]
    assert isinstance(deadlock, psycopg.errors.DeadlockDetected)
    if errors[in_halves] is None:
        assert outcomes(in_halves) == [None, "23514", None, None]
        assert [row.sqlstate for row in apply_all(other, whole)] == ["WA409"] * 2
    else:
        assert outcomes(as_a_whole) == [None] * 2
        assert [row.sqlstate for row in apply_all(one, halved)] == ["WA409", "23514", None, "WA409"]
    assert sum(balances(service, "wv").values()) == 3
    assert call(service, "verify") == []


def test_many_batches_over_the_same_wallets_and_operations_never_deadlock(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    wallets = [f"w{number}" for number in range(8)]
    create(service, dict.fromkeys(wallets, 0))
    chance = random.Random(3)
    operations = [UUID(int=chance.getrandbits(128)) for _ in range(200)]
    batches = [
        [deposit(chance.choice(wallets), chance.choice(operations), 1) for _ in range(20)] for _ in range(8 * 20)
    ]
    sessions = [session() for _ in range(8)]

    def work(connection: psycopg.Connection, number: int) -> int:
        return sum(row.sqlstate is None for batch in batches[number::8] for row in apply_all(connection, batch))

    applied = all_at_once(pool, [partial(work, connection, number) for number, connection in enumerate(sessions)])

    named = {request.operation for batch in batches for request in batch}
    assert sum(applied) == len(named) == sum(balances(service, wallets).values())
    assert call(service, "verify") == []


# Duplicates that are not committed yet


@pytest.mark.parametrize("wallet", ["w", "v"], ids=["on_the_same_wallet", "on_another_wallet"])
def test_a_batch_waits_for_an_uncommitted_duplicate_and_applies_the_rest(
    wallet: str, service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 10, "v": 10})
    first, second = session(), session()
    first.autocommit = False
    recorded = apply(first, withdraw(wallet, B, 10))
    batch = pool.submit(apply_all, second, [deposit("w", A, 1), withdraw("w", B, 1), withdraw("w", C, 1)])
    wait_until_blocked(superuser, second)
    first.commit()

    rows = batch.result()
    assert [row.sqlstate for row in rows] == [None, "WA409", None]
    assert rows[1].message == MESSAGES["WA409"]
    assert operation(rows[1]) == (recorded if wallet == "w" else (None,) * 12)
    assert rows[1].same_request is False
    assert call(service, "verify") == []


def test_a_batch_applies_what_another_session_rolls_back(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 10, "v": 10})
    first, second = session(), session()
    first.autocommit = False
    apply(first, withdraw("v", B, 10))
    batch = pool.submit(apply_all, second, [deposit("w", A, 1), withdraw("w", B, 1)])
    wait_until_blocked(superuser, second)
    first.rollback()

    assert outcomes(batch) == [None, None]
    assert balances(service, ["w", "v"]) == {"w": 10, "v": 10}


def test_a_batch_outlives_duplicates_that_are_committed_one_after_another(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 0, "v": 0, "u": 0})
    one, other, batching = session(), session(), session()
    one.autocommit = other.autocommit = False
    apply(one, deposit("v", A, 1))
    apply(other, deposit("u", C, 1))
    batch = pool.submit(apply_all, batching, [deposit("w", operation, 1) for operation in (D, C, B, A)])
    wait_until_blocked(superuser, batching)
    one.commit()
    while superuser.execute("select pg_blocking_pids(%s)", [batching.info.backend_pid]).fetchone() != (
        [other.info.backend_pid],
    ):
        assert not batch.done()
    other.commit()

    assert outcomes(batch) == [None, "WA409", None, "WA409"]
    assert balances(service, ["w"]) == {"w": 2}
    assert call(service, "verify") == []


def test_an_operation_waits_for_a_batch_with_the_same_operation_uuid(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 10, "v": 10})
    first, second, third = session(), session(), session()
    first.autocommit = False
    apply_all(first, [withdraw("w", A, 10), deposit("w", B, 1)])
    same_wallet = pool.submit(outcome, second, withdraw("w", A, 10))
    other_wallet = pool.submit(outcome, third, withdraw("v", A, 10))
    wait_until_blocked(superuser, second, third)
    first.commit()

    assert same_wallet.result() == other_wallet.result() == "WA409"
    assert balances(service, ["w", "v"]) == {"w": 1, "v": 10}
    assert call(service, "verify") == []


# A call that comes too late


@pytest.mark.parametrize(("function", "recorded"), [("apply_operation", [2]), ("apply_operations", [2, 3])])
def test_a_call_that_waits_beyond_its_last_moment_applies_nothing(
    function: str,
    recorded: list[int],
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    lock: psycopg.Connection,
) -> None:
    create(service, {"w": 100})
    arguments = "'w', %(a)s, 'DEPOSIT', 5"
    if function == "apply_operations":
        arguments = "array['w', 'w'], array[%(a)s, %(b)s]::uuid[], array['DEPOSIT', 'DEPOSIT'], array[5, 5]::bigint[]"
    query = (
        f"select seq from wallet.{function}({arguments})"
        " where case when clock_timestamp() < %(until)s then true else wallet.raise_too_late() end"
    )

    def apply_before(seconds: float) -> list[Any]:
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        return late.execute(query, {"a": A, "b": B, "until": until}).fetchall()

    late = session()
    hold(lock, "w")
    waiting = pool.submit(apply_before, 1)
    wait_until_blocked(service, late)
    time.sleep(1.1)
    lock.rollback()

    with pytest.raises(psycopg.errors.QueryCanceled):
        waiting.result()
    assert balances(service, ["w"]) == {"w": 100}
    assert [seq for (seq,) in apply_before(60)] == recorded


# Isolation


@pytest.mark.parametrize("isolation", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
@pytest.mark.parametrize("do", [apply, lambda c, r: apply_all(c, [r])], ids=["operation", "batch"])
def test_an_old_snapshot_is_never_taken_for_the_state(
    do: Callable[[psycopg.Connection, Request], object],
    isolation: IsolationLevel,
    service: psycopg.Connection,
    session: Session,
) -> None:
    create(service, {"w": 10})
    old = session()
    old.autocommit = False
    old.isolation_level = isolation
    with pytest.raises(psycopg.errors.FeatureNotSupported) as refused:
        do(old, withdraw("w", A, 1))
    assert refused.value.diag.message_hint is not None
    assert "read committed" in refused.value.diag.message_hint
    assert balances(service, ["w"]) == {"w": 10}


def test_a_balance_is_what_it_is_after_the_lock(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 10, "v": 0})
    first, *others = session(), session(), session(), session()
    first.autocommit = False
    apply(first, withdraw("w", A, 10))
    waiting = [
        pool.submit(outcome, others[0], withdraw("w", B, 10)),
        pool.submit(outcome, others[1], transfer("w", "v", C, 10)),
        pool.submit(lambda: apply_all(others[2], [withdraw("w", D, 10)])[0].sqlstate),
    ]
    wait_until_blocked(superuser, *others)
    first.commit()
    assert [future.result() for future in waiting] == ["WA402"] * 3
    assert balances(service, "wv") == {"w": 0, "v": 0}


# Transfers


@pytest.fixture
def no_deadlock(server: SimpleNamespace) -> Iterator[None]:
    """Fails a test during which the server's log tells of a deadlock."""
    log = server.postgres.log
    before = log.read_text().count("deadlock detected")
    yield
    assert log.read_text().count("deadlock detected") == before


Door = Callable[[psycopg.Connection, list[Request]], object]
DOORS = pytest.mark.parametrize(
    "do",
    [lambda c, requests: [apply(c, request) for request in requests], apply_all, partial(apply_all, atomic=True)],
    ids=["one_by_one", "batch", "atomic"],
)
LOCK_TIMEOUTS = pytest.mark.parametrize("lock_timeout", ["0", "20s"])


@DOORS
@LOCK_TIMEOUTS
@pytest.mark.parametrize("ring", ["wv", "wvu"], ids=["opposing", "ring_of_three"])
@pytest.mark.usefixtures("no_deadlock")
def test_transfers_in_a_ring_never_deadlock(
    ring: str,
    lock_timeout: str,
    do: Door,
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
) -> None:
    create(service, dict.fromkeys(ring, 10))
    sessions = [session() for _ in ring]
    for connection in sessions:
        connection.execute(f"set lock_timeout = '{lock_timeout}'".encode())
    # While one wallet is held, whoever locks the payer first holds it and waits for the payee.
    for held in ring:
        hold(lock, held)
        waiting = [
            pool.submit(do, connection, [transfer(payer, payee, uuid4(), 1)])
            for connection, payer, payee in zip(sessions, ring, ring[1:] + ring[0], strict=True)
        ]
        blocked = [
            connection
            for connection, payer, payee in zip(sessions, ring, ring[1:] + ring[0], strict=True)
            if held in (payer, payee)
        ]
        wait_until_blocked(superuser, *blocked)
        lock.rollback()
        for future in waiting:
            future.result()
    assert balances(service, ring) == dict.fromkeys(ring, 10)
    assert call(service, "verify") == []


@DOORS
@pytest.mark.usefixtures("no_deadlock")
def test_64_clients_that_pay_each_other_over_8_wallets_lose_and_double_nothing(
    do: Door, service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    wallets = [f"w{number}" for number in range(8)]
    create(service, dict.fromkeys(wallets, 1000))
    chance = random.Random(4)

    def some_transfers() -> list[Request]:
        return [transfer(*chance.sample(wallets, 2), uuid4(), chance.randrange(1, 10)) for _ in range(8)]

    plans = [some_transfers() for _ in range(64)]
    clients = zip([session() for _ in plans], plans, strict=True)
    all_at_once(pool, [partial(do, *client) for client in clients])

    held = dict.fromkeys(wallets, 1000)
    for request in [request for plan in plans for request in plan]:
        held[request.wallet] -= request.amount
        held[str(request.counterparty)] += request.amount
    assert balances(service, wallets) == held
    assert call(service, "verify") == []


@pytest.mark.usefixtures("no_deadlock")
def test_batches_of_transfers_in_opposite_orders_never_deadlock(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor
) -> None:
    wallets = [f"w{number}" for number in range(10)]
    create(service, dict.fromkeys(wallets, 100))
    forth = list(pairwise(wallets))
    back = [(payee, payer) for payer, payee in reversed(forth)]

    def work(connection: psycopg.Connection, pairs: list[tuple[str, str]]) -> None:
        for _ in range(20):
            rows = apply_all(connection, [transfer(*pair, uuid4(), 1) for pair in pairs])
            assert {row.sqlstate for row in rows} == {None}

    sessions = [session() for _ in range(8)]
    for connection in sessions[4:]:
        connection.execute("set lock_timeout = '20s'")
    all_at_once(pool, [partial(work, one, [forth, back][number % 2]) for number, one in enumerate(sessions)])
    assert balances(service, wallets) == dict.fromkeys(wallets, 100)
    assert call(service, "verify") == []


@pytest.mark.parametrize("ends", ["committed", "rolled back"])
@pytest.mark.parametrize("first_is", ["transfer", "deposit"])
def test_of_a_transfer_and_a_deposit_with_one_operation_uuid_one_wins(
    first_is: str,
    ends: str,
    service: psycopg.Connection,
    session: Session,
    pool: ThreadPoolExecutor,
    superuser: psycopg.Connection,
) -> None:
    create(service, {"w": 10, "v": 0, "u": 0})
    requests = [transfer("w", "v", A, 10), deposit("u", A, 3)]
    if first_is == "deposit":
        requests.reverse()
    first, second, third = session(), session(), session()
    first.autocommit = False
    apply(first, requests[0])
    racing = [
        pool.submit(outcome, second, requests[1]),
        pool.submit(lambda: apply_all(third, [requests[1]])[0].sqlstate),
    ]
    wait_until_blocked(superuser, second, third)
    first.commit() if ends == "committed" else first.rollback()

    won = requests[0] if ends == "committed" else requests[1]
    assert sorted(str(future.result()) for future in racing) == (
        ["WA409", "WA409"] if ends == "committed" else ["None", "WA409"]
    )
    moved = {"w": 0, "v": 10, "u": 0} if won.type == "TRANSFER" else {"w": 10, "v": 0, "u": 3}
    assert balances(service, "wvu") == moved
    assert call(service, "verify") == []


@pytest.mark.parametrize("who", ["payer", "payee"])
def test_an_operation_waits_for_a_transfer_that_touches_its_wallet(
    who: str, service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 10, "v": 0})
    first, second = session(), session()
    first.autocommit = False
    apply(first, transfer("w", "v", A, 10))
    racing = pool.submit(outcome, second, withdraw("w" if who == "payer" else "v", B, 10))
    wait_until_blocked(superuser, second)
    first.commit()
    assert racing.result() == ("WA402" if who == "payer" else None)


def test_a_reader_never_sees_money_in_both_wallets_or_in_neither(
    service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 100, "v": 100})
    done = threading.Event()

    def pay(connection: psycopg.Connection, payer: str, payee: str) -> None:
        for _ in range(150):
            outcome(connection, transfer(payer, payee, uuid4(), 7))
            apply_all(connection, [transfer(payer, payee, uuid4(), 1), transfer(payee, payer, uuid4(), 1)])

    def read(query: str) -> tuple[set[int], int]:
        seen, reads = set(), 0
        with psycopg.connect(superuser.info.dsn, autocommit=True) as reader:
            while not done.is_set():
                row = reader.execute(query.encode()).fetchone()
                assert row is not None
                seen.add(row[0])
                reads += 1
        return seen, reads

    readers = [
        pool.submit(read, query)
        for query in (
            "select sum(balance)::int from wallet.balance",
            "select (g.w).balance + (g.v).balance from "
            "(select wallet.get_wallet('w') as w, wallet.get_wallet('v') as v offset 0) as g",
        )
    ]
    all_at_once(pool, [partial(pay, session(), *pair) for pair in ("wv", "vw")])
    done.set()
    for reader in readers:
        seen, reads = reader.result()
        assert seen == {200}
        assert reads > 50
    assert call(service, "verify") == []


# Time


def test_time_never_goes_back_within_a_wallet(service: psycopg.Connection, superuser: psycopg.Connection) -> None:
    create(service, {"w": 10, "v": 0, "u": 0})
    superuser.execute("update wallet.operation set created_at = created_at + interval '1 hour' where wallet_uuid = 'w'")
    ahead = call(service, "get_wallet", "w")[0].updated_at

    paid = apply(service, transfer("w", "v", A, 1))
    rows = apply_all(
        service, [deposit("u", B, 1), transfer("u", "v", C, 1), deposit("u", D, 1), deposit("w", uuid4(), 1)]
    )

    assert paid.created_at == ahead
    assert [row.created_at == ahead for row in rows] == [False, True, True, True]
    for wallet in "wvu":
        times = [one.created_at for one in call(service, "list_operations", wallet)]
        assert times == sorted(times, reverse=True)
    for one in (A, C):
        [received] = call(service, "get_operation", "v", one)
        assert received.created_at == ahead
    assert call(service, "verify") == []


# Creation


@pytest.mark.parametrize("ends", ["committed", "rolled back"])
def test_one_name_chosen_by_two_clients_at_once_becomes_one_wallet(
    ends: str, service: psycopg.Connection, session: Session, pool: ThreadPoolExecutor, superuser: psycopg.Connection
) -> None:
    first, second = session(), session()
    first.autocommit = False
    call(first, "create_wallet", "mine")
    create_second = pool.submit(call, second, "create_wallet", "mine")
    wait_until_blocked(superuser, second)
    if ends == "committed":
        first.commit()
        error = create_second.exception()
        assert isinstance(error, psycopg.Error)
        assert error.sqlstate == "WA419"
    else:
        first.rollback()
        assert create_second.result()[0].uuid == "mine"
    assert balances(service, ["mine"]) == {"mine": 0}


def test_the_audit_waits_for_nobody(service: psycopg.Connection, session: Session, lock: psycopg.Connection) -> None:
    create(service, {"w": 10})
    writing = session()
    writing.autocommit = False
    apply(writing, withdraw("w", A, 1))
    service.execute("set lock_timeout = '1ms'")
    assert call(service, "verify") == []
