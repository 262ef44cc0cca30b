"""What a call does under a lock_timeout, and what the database refuses to one request of a batch."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import psycopg
import pytest

from app.calls.refusals import LOCKED, REFUSED
from tests.cases import A, B, C, Request, deposit, transfer, withdraw
from tests.cases import hold as request_hold
from tests.db.door import apply, apply_all, balances, call, create, outcome
from tests.db.test_concurrency import hold, lock, pool, session, wait_until_blocked

__all__ = ["lock", "pool", "session"]

WALLETS = [f"w{number}" for number in range(10)]


@pytest.fixture
def hasty(session: Callable[[], psycopg.Connection]) -> psycopg.Connection:
    """A connection of the service that waits 200 ms for a lock, at most."""
    connection = session()
    connection.execute("set lock_timeout = '200ms'")
    return connection


def check(connection: psycopg.Connection, *requests: Request) -> None:
    """Apply a batch and see that each outcome is the one that its request names."""
    rows = apply_all(connection, requests)
    assert [row.sqlstate for row in rows] == [request.outcome for request in requests]
    assert [row.ordinal for row in rows] == list(range(1, len(requests) + 1))
    for row in rows:
        if row.sqlstate == "55P03":
            assert (row.message, row.wallet_uuid, row.seq) == (LOCKED, None, None)


def fresh(wallet: str, outcome: str | None = None) -> Request:
    return deposit(wallet, uuid4(), 1, outcome)


# A wallet that stays locked


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with others"])
def test_requests_for_a_locked_wallet_are_told_so_and_the_others_applied(
    alone: bool, hasty: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(hasty, {"a": 0, "b": 100, "c": 0})
    apply(hasty, deposit("b", A, 5))
    hold(lock, "b")
    began = time.monotonic()

    others = [] if alone else [fresh("a"), fresh("nobody", "WA404"), fresh("c"), withdraw("c", uuid4(), 9, "WA402")]
    check(
        hasty,
        fresh("b", "55P03"),
        *others,
        deposit("b", A, 5, "WA409"),
        deposit("b", uuid4(), -1, "WA400"),
        withdraw("b", uuid4(), 1000, "55P03"),
    )

    assert time.monotonic() - began < 1
    lock.rollback()
    assert balances(hasty, "bc") == {"b": 105, "c": 0 if alone else 1}
    assert call(hasty, "verify") == []


def test_one_operation_on_a_locked_wallet_is_told_so_unless_it_is_a_repeat(
    hasty: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(hasty, {"a": 0})
    apply(hasty, deposit("a", A, 5))
    hold(lock, "a")
    with pytest.raises(psycopg.Error) as locked:
        apply(hasty, deposit("a", B, 5))
    assert (locked.value.sqlstate, locked.value.diag.message_primary) == ("55P03", LOCKED)
    assert outcome(hasty, deposit("a", A, 5)) == "WA409"


def test_without_a_lock_timeout_a_call_waits(
    service: psycopg.Connection, superuser: psycopg.Connection, lock: psycopg.Connection, pool: ThreadPoolExecutor
) -> None:
    create(service, {"a": 0, "b": 0})
    hold(lock, "b")
    waiting = pool.submit(apply_all, service, [fresh("a"), fresh("b")])
    wait_until_blocked(superuser, service)
    time.sleep(0.5)
    assert not waiting.done()
    lock.rollback()
    assert [row.sqlstate for row in waiting.result()] == [None, None]


def test_a_call_that_waits_for_a_wallet_holds_no_other(
    hasty: psycopg.Connection,
    service: psycopg.Connection,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
    pool: ThreadPoolExecutor,
) -> None:
    create(hasty, {"a": 0, "b": 0, "c": 0})
    hasty.execute("set lock_timeout = '20s'")
    hold(lock, "b")
    waiting = pool.submit(apply_all, hasty, [fresh(wallet) for wallet in "abc"])
    wait_until_blocked(superuser, hasty)

    service.execute("set lock_timeout = '1ms'")
    assert [outcome(service, fresh(wallet)) for wallet in "ac"] == [None, None]

    lock.rollback()
    assert [row.sqlstate for row in waiting.result()] == [None, None, None]
    assert balances(service, "abc") == {"a": 2, "b": 1, "c": 2}


def test_who_never_names_the_locked_wallet_never_hears_of_it(
    session: Callable[[], psycopg.Connection], lock: psycopg.Connection, pool: ThreadPoolExecutor
) -> None:
    connections = [session() for _ in range(8)]
    create(connections[0], {**dict.fromkeys(WALLETS, 0), "x": 0})
    hold(lock, "x")
    until = time.monotonic() + 3

    def batches(number: int) -> Counter[str | None]:
        connection, told = connections[number], Counter[str | None]()
        connection.execute("set lock_timeout = '200ms'")
        while time.monotonic() < until:
            wanted = [*WALLETS[number % 3 :: 2], *(["x"] if number < 2 else [])]
            told.update(row.sqlstate for row in apply_all(connection, map(fresh, wanted)))
        return told

    told = list(pool.map(batches, range(8)))
    assert all(one["55P03"] for one in told[:2])
    assert [set(one) for one in told[2:]] == [{None}] * 6
    lock.rollback()
    total = sum(one[None] for one in told)
    assert sum(balances(connections[0], WALLETS).values()) == total
    assert call(connections[0], "verify") == []


@pytest.mark.parametrize("requests", [[fresh("a")], [fresh("a"), fresh("b")]], ids=["one wallet", "two"])
def test_no_call_waits_longer_for_the_table_of_the_wallets(
    requests: list[Request], hasty: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(hasty, {"a": 0, "b": 0})
    lock.execute("lock table wallet.wallet in exclusive mode")
    began = time.monotonic()
    for ask in (lambda: apply_all(hasty, requests), lambda: apply(hasty, transfer("a", "b", uuid4(), 1))):
        with pytest.raises(psycopg.errors.LockNotAvailable):
            ask()
    assert time.monotonic() - began < 2


def test_the_caller_s_lock_timeout_is_what_it_was(
    hasty: psycopg.Connection, lock: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(hasty, {"a": 0, "b": 0, "c": 0})
    hold(lock, "b")
    superuser.execute("alter table wallet.operation add constraint small check (wallet_uuid <> 'c') not valid")
    with hasty.transaction():
        apply_all(hasty, [fresh(wallet) for wallet in "abcabc"])
        assert hasty.execute("show lock_timeout").fetchone() == ("200ms",)
    assert hasty.execute("show lock_timeout").fetchone() == ("200ms",)
    assert balances(hasty, "abc") == {"a": 2, "b": 0, "c": 0}


# An operation in flight


def test_an_operation_in_flight_elsewhere_costs_its_own_request_only(
    hasty: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(hasty, {"a": 0, "b": 0, "c": 0})
    apply(lock, deposit("c", C, 1))
    began = time.monotonic()
    check(hasty, fresh("a"), deposit("b", C, 1, "55P03"), fresh("b"), deposit("a", A, 1), fresh("a"))
    assert outcome(hasty, deposit("b", C, 1)) == "55P03"
    assert time.monotonic() - began < 1
    lock.commit()
    assert outcome(hasty, deposit("b", C, 1)) == "WA409"
    assert balances(hasty, "abc") == {"a": 3, "b": 1, "c": 1}
    assert call(hasty, "verify") == []


# What the database refuses


@pytest.mark.parametrize("count", [1, 2, 3, 64, 257])
@pytest.mark.parametrize("lock_timeout", ["0", "200ms"])
def test_what_the_database_refuses_is_refused_to_its_own_request(
    count: int, lock_timeout: str, service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"a": 0, "w": 0})
    service.execute(f"set lock_timeout = '{lock_timeout}'".encode())
    superuser.execute("""
        create function public.refuse() returns trigger language plpgsql as $$ begin raise exception 'no more'; end $$;
        create trigger refuse before insert on wallet.operation
          for each row when (new.wallet_uuid = 'w') execute function public.refuse()""")
    said: list[tuple[str | None, str | None]] = []
    service.add_notice_handler(lambda one: said.append((one.sqlstate, one.message_primary)))
    place = count // 3

    requests = [fresh("a") for _ in range(count)]
    requests[place] = fresh("w", "P0001")
    if count > 2:
        requests[-1] = requests[0]._replace(outcome="WA409")
    rows = apply_all(service, requests)

    assert [row.sqlstate for row in rows] == [request.outcome for request in requests]
    assert (rows[place].message, rows[place].seq, rows[place].balance_after) == (REFUSED, None, None)
    assert said == [("P0001", "no more")]
    applied = [row for row in rows if row.sqlstate is None]
    assert [row.balance_after for row in applied] == list(range(1, len(applied) + 1))
    assert balances(service, "aw") == {"a": len(applied), "w": 0}
    assert call(service, "verify") == []


def test_what_another_unique_index_refuses_is_no_duplicate(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"a": 5, "b": 0})
    superuser.execute("create unique index one on wallet.operation (wallet_uuid) where wallet_uuid = 'a'")
    check(service, fresh("b"), fresh("a", "23505"), fresh("b"))
    assert outcome(service, fresh("a")) == "23505"
    assert balances(service, "ab") == {"a": 5, "b": 2}


CAP = "alter table wallet.operation add constraint cap check (balance_after <= 10 and held_after <= 5) not valid"
NO_W = "alter table wallet.wallet add constraint no_w check (uuid <> 'w') not valid"


def test_a_repeat_is_told_so_although_the_database_would_refuse_it_now(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 20, "v": 20})
    made = [deposit("w", A, 5, "WA409"), transfer("w", "v", B, 5, "WA409"), request_hold("w", C, 6, "WA409")]
    assert [row.sqlstate for row in apply_all(service, made)] == [None] * 3
    superuser.execute(CAP)
    superuser.execute(NO_W)

    check_one_by_one(service, *made)
    check(service, *made)
    check(service, made[2], deposit("v", uuid4(), 1, "23514"), made[0], withdraw("v", uuid4(), 15), made[1])
    assert [row.sqlstate for row in apply_all(service, made, atomic=True)] == ["WA409"] * 3
    with pytest.raises(psycopg.Error) as exists:
        call(service, "create_wallet", "w")
    assert exists.value.sqlstate == "WA419"


# Transfers


@pytest.mark.parametrize("locked", ["b", "c"], ids=["payer", "payee"])
def test_a_transfer_with_a_locked_wallet_is_told_so_unless_it_is_a_repeat(
    locked: str, hasty: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(hasty, {"a": 0, "b": 100, "c": 0, "d": 9})
    apply(hasty, transfer("b", "c", A, 5))
    hold(lock, locked)

    for door in (check, check_one_by_one):
        door(
            hasty,
            transfer("b", "c", uuid4(), 5, "55P03"),
            transfer("b", "c", A, 5, "WA409"),
            transfer("b", "nobody", uuid4(), 5, "WA404"),
            transfer("nobody", "c", uuid4(), 5, "WA404"),
            transfer("b", "a b", uuid4(), 5, "WA400"),
            transfer("d", "a", uuid4(), 1),
        )

    lock.rollback()
    assert balances(hasty, "abcd") == {"a": 2, "b": 95, "c": 5, "d": 7}


def check_one_by_one(connection: psycopg.Connection, *requests: Request) -> None:
    assert [outcome(connection, request) for request in requests] == [request.outcome for request in requests]


@pytest.mark.parametrize("do", [apply, lambda c, r: apply_all(c, [r])], ids=["operation", "batch"])
def test_a_transfer_that_waits_for_one_wallet_does_not_hold_the_other(
    do: Callable[[psycopg.Connection, Request], object],
    hasty: psycopg.Connection,
    service: psycopg.Connection,
    superuser: psycopg.Connection,
    lock: psycopg.Connection,
    pool: ThreadPoolExecutor,
) -> None:
    create(hasty, {"a": 0, "b": 1})
    hasty.execute("set lock_timeout = '20s'")
    hold(lock, "b")
    waiting = pool.submit(do, hasty, transfer("b", "a", uuid4(), 1))
    wait_until_blocked(superuser, hasty)

    service.execute("set lock_timeout = '1ms'")
    assert outcome(service, fresh("a")) is None

    lock.rollback()
    waiting.result()
    assert balances(service, "ab") == {"a": 2, "b": 0}


# All or nothing


def test_an_atomic_batch_with_a_locked_wallet_applies_nothing(
    hasty: psycopg.Connection, lock: psycopg.Connection
) -> None:
    create(hasty, {"a": 0, "b": 0})
    hold(lock, "b")
    requests = [fresh("a"), fresh("b"), fresh("a")]
    rows = apply_all(hasty, requests, atomic=True)
    assert [row.sqlstate for row in rows] == ["WA425", "55P03", "WA425"]
    lock.rollback()
    assert balances(hasty, "ab") == {"a": 0, "b": 0}
    assert [row.sqlstate for row in apply_all(hasty, requests, atomic=True)] == [None] * 3


def test_an_atomic_batch_of_which_the_database_refuses_one_request_applies_nothing(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"a": 0, "b": 0})
    superuser.execute("alter table wallet.operation add constraint small check (amount < 5)")
    requests = [fresh("a"), deposit("b", uuid4(), 5), fresh("b"), deposit("a", uuid4(), 0)]
    rows = apply_all(service, requests, atomic=True)
    assert [row.sqlstate for row in rows] == ["WA425", "23514", "WA425", "WA400"]
    assert rows[1].message == REFUSED
    assert balances(service, "ab") == {"a": 0, "b": 0}
