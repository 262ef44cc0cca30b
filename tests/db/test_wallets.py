"""Wallets: their currency, their status, and lists of them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.cases import MESSAGES, A, deposit, withdraw
from tests.conftest import url_of
from tests.db.door import apply, call, create
from tests.db.test_functions import BAD_NAMES, refusal
from tests.db.test_moments import pages_read
from tests.db.test_verify import transfer

STATUSES = ["OPEN", "FROZEN", "CLOSED"]
COLUMNS = ("uuid", "id", "currency", "status", "balance", "held", "available", "seq", "created_at", "updated_at")


def test_a_wallet_is_the_same_row_from_whichever_function(service: psycopg.Connection) -> None:
    [created] = call(service, "create_wallet", "w", "EUR")
    assert created._fields == COLUMNS
    assert created[:8] == ("w", 1, "EUR", "OPEN", 0, 0, 0, 0)
    assert created.updated_at == created.created_at
    assert call(service, "get_wallet", "w") == [created]
    assert call(service, "list_wallets") == [created]
    assert call(service, "set_status", "w", "OPEN") == [created]

    applied = apply(service, deposit("w", A, 70))
    [wallet] = call(service, "get_wallet", "w")
    assert wallet == created._replace(balance=70, available=70, seq=1, updated_at=applied.created_at)
    assert call(service, "list_wallets") == [wallet]
    assert call(service, "set_status", "w", "OPEN") == [wallet]


# Currency


@pytest.mark.parametrize("currency", ["EUR", "A1B2C3D4E5F6", "000", None])
def test_a_wallet_may_have_any_good_currency(currency: str | None, service: psycopg.Connection) -> None:
    assert call(service, "create_wallet", "w", currency)[0].currency == currency
    assert call(service, "get_wallet", "w")[0].currency == currency


@pytest.mark.parametrize("currency", ["", "EU", "eur", "EUR ", "EUR\n", "A" * 13, "E€R", "É" * 3, "E-R"])
def test_a_bad_currency_is_refused(currency: str, service: psycopg.Connection) -> None:
    refused = ("WA400", "currency must be 3 to 12 characters of A-Z and 0-9")
    assert refusal(service, "create_wallet", "w", currency) == refused
    assert call(service, "list_wallets") == []


# Lists


NAMES = ["-", "1", "A", "B-1", "B-10", "B-2", "B0", "B_1", "_", "a", "b-1", "z"]
"""In the order of their bytes."""


def listed(connection: psycopg.Connection, *arguments: object) -> list[str]:
    return [wallet.uuid for wallet in call(connection, "list_wallets", *arguments)]


@pytest.fixture
def named(service: psycopg.Connection) -> psycopg.Connection:
    """The service's connection to a database with wallets of these names."""
    create(service, dict.fromkeys(reversed(NAMES), 1))
    return service


def test_wallets_are_listed_by_the_bytes_of_their_names(named: psycopg.Connection) -> None:
    assert sorted(NAMES) == NAMES
    assert listed(named) == NAMES
    assert listed(named, None, 1000, "") == NAMES


def test_wallets_are_listed_in_pages(named: psycopg.Connection) -> None:
    found: list[str] = []
    while page := listed(named, found[-1] if found else None, 5):
        found += page
    assert found == NAMES


@pytest.mark.parametrize("after", ["0", "B", "B-1", "B-1-", "Zebra", "zz", "a" * 64])
def test_a_list_begins_after_a_name_whether_it_exists_or_not(after: str, named: psycopg.Connection) -> None:
    assert listed(named, after) == [name for name in NAMES if name > after]


@pytest.mark.parametrize("prefix", ["B", "B-", "B-1", "B-10", "b", "-", "_", "z", "zz", "C"])
def test_a_prefix_is_matched_byte_for_byte(prefix: str, named: psycopg.Connection) -> None:
    beginning = [name for name in NAMES if name.startswith(prefix)]
    assert listed(named, None, 100, prefix) == beginning
    assert listed(named, "B-1", 100, prefix) == [name for name in beginning if name > "B-1"]
    assert listed(named, None, 1, prefix) == beginning[:1]


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name])
def test_a_list_takes_no_bad_name(name: str, service: psycopg.Connection) -> None:
    allowed = "must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
    assert refusal(service, "list_wallets", name) == ("WA400", f"after {allowed}")
    assert refusal(service, "list_wallets", None, 100, name) == ("WA400", f"prefix {allowed}")


@pytest.mark.parametrize("limit", [None, 0, -1, 1001, 2**31 - 1])
def test_a_list_has_from_1_to_1000_wallets(limit: int | None, service: psycopg.Connection) -> None:
    assert refusal(service, "list_wallets", None, limit) == ("WA400", "limit must be from 1 to 1000")


def test_a_list_reads_no_wallets_but_its_own(superuser: psycopg.Connection, service: psycopg.Connection) -> None:
    """Plans that were made while the tables were empty serve a hundred thousand wallets."""
    calls: list[list[object]] = [
        [None, 10],
        ["w5", 10],
        [None, 10, "w5"],
        ["w50", 10, "w5"],
        ["w4", 10, "w99999"],
        ["w6", 10, "w5"],
    ]
    for arguments in calls * 6:
        pages_read(service, "list_wallets", arguments)
    superuser.execute("insert into wallet.wallet (uuid) select 'w' || n from generate_series(1, 100000) as n")
    superuser.execute("""
        insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
        select 'w' || n, 'DEPOSIT', md5(n::text)::uuid, 1, 1, 1 from generate_series(1, 100000) as n""")

    for arguments in calls:
        assert min(pages_read(service, "list_wallets", arguments) for _ in range(3)) <= 10 * 10, arguments


# Status


@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("after", STATUSES)
def test_every_change_of_status_is_allowed(before: str, after: str, service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 0})
    call(service, "set_status", "w", before)
    assert call(service, "set_status", "w", after)[0].status == after
    assert call(service, "get_wallet", "w")[0].status == after
    assert call(service, "get_wallet", "v")[0].status == "OPEN"


@pytest.mark.parametrize("before", ["OPEN", "FROZEN"])
def test_only_an_empty_wallet_is_closed(before: str, service: psycopg.Connection) -> None:
    create(service, {"w": 7})
    call(service, "set_status", "w", before)
    assert refusal(service, "set_status", "w", "CLOSED") == ("WA417", MESSAGES["WA417"])
    assert call(service, "get_wallet", "w")[0].status == before

    call(service, "set_status", "w", "OPEN")
    apply(service, withdraw("w", A, 7))
    assert call(service, "set_status", "w", "CLOSED")[0].status == "CLOSED"


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["nobody", "OPEN"], ("WA404", MESSAGES["WA404"])),
        (["nobody", "open"], ("WA400", "status must be OPEN, FROZEN or CLOSED")),
        (["w", ""], ("WA400", "status must be OPEN, FROZEN or CLOSED")),
        (["w", None], ("WA400", "status must not be null")),
        ([None, "OPEN"], ("WA400", "wallet_uuid must not be null")),
        (["a b", "OPEN"], ("WA400", "wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -")),
    ],
)
def test_a_bad_change_of_status_is_refused(
    arguments: list[Any], refused: tuple[str, str], service: psycopg.Connection
) -> None:
    create(service, {"w": 0})
    assert refusal(service, "set_status", *arguments) == refused
    assert call(service, "get_wallet", "w")[0].status == "OPEN"


def blocked(superuser: psycopg.Connection, by: psycopg.Connection) -> None:
    """Wait until somebody waits for a lock that this connection has."""
    waiting = "select from pg_stat_activity where %s = any(pg_blocking_pids(pid))"
    deadline = time.monotonic() + 30
    while not superuser.execute(waiting, [by.info.backend_pid]).fetchall():
        assert time.monotonic() < deadline


def test_a_wallet_that_a_deposit_under_way_fills_is_not_closed(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 0})
    with ThreadPoolExecutor(1) as pool:
        with psycopg.connect(url_of(superuser, "postgres")) as depositor:
            apply(depositor, deposit("w", A, 5))
            closing = pool.submit(refusal, service, "set_status", "w", "CLOSED")
            blocked(superuser, depositor)
        assert closing.result(30) == ("WA417", MESSAGES["WA417"])


def test_no_status_waits_longer_than_the_lock_timeout(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 0})
    service.execute("set lock_timeout = '50ms'")
    with psycopg.connect(url_of(superuser, "postgres")) as other:
        apply(other, deposit("w", A, 5))
        assert refusal(service, "set_status", "w", "FROZEN") == (
            "55P03",
            "Wallet is locked by another transaction: not applied",
        )


def test_no_wallet_waits_longer_than_the_lock_timeout_for_another_of_its_name(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    service.execute("set lock_timeout = '50ms'")
    with psycopg.connect(url_of(superuser, "postgres")) as other:
        call(other, "create_wallet", "v")
        assert refusal(service, "create_wallet", "v")[0] == "55P03"


# Deadlines and isolation


def test_a_call_that_comes_too_late_is_taken_back(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    late, in_time = datetime.now(UTC) - timedelta(seconds=1), datetime.now(UTC) + timedelta(minutes=5)

    assert refusal(service, "create_wallet", "v", None, late)[0] == "57014"
    assert refusal(service, "set_status", "w", "FROZEN", late)[0] == "57014"
    assert [(wallet.uuid, wallet.status) for wallet in call(service, "list_wallets")] == [("w", "OPEN")]

    assert call(service, "create_wallet", "v", None, in_time)[0].uuid == "v"
    assert call(service, "set_status", "w", "FROZEN", in_time)[0].status == "FROZEN"


@pytest.mark.parametrize("function", ["create_wallet", "set_status"])
def test_a_deadline_that_passes_while_a_call_waits_for_a_lock_counts(
    function: str, service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 0})
    with ThreadPoolExecutor(1) as pool:
        with psycopg.connect(url_of(superuser, "postgres")) as other:
            call(other, "create_wallet", "v")
            call(other, "set_status", "w", "FROZEN")
            deadline = datetime.now(UTC) + timedelta(seconds=0.3)
            arguments = ("v", None, deadline) if function == "create_wallet" else ("w", "CLOSED", deadline)
            called = pool.submit(refusal, service, function, *arguments)
            blocked(superuser, other)
            threading.Event().wait((deadline - datetime.now(UTC)).total_seconds() + 0.1)
            other.rollback()
        assert called.result(30)[0] == "57014"
    assert [(wallet.uuid, wallet.status) for wallet in call(service, "list_wallets")] == [("w", "OPEN")]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_wallets_are_changed_under_read_committed_only(level: str, service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    service.execute(f"set default_transaction_isolation = '{level}'")
    assert refusal(service, "create_wallet", "v")[0] == "0A000"
    assert refusal(service, "set_status", "w", "FROZEN")[0] == "0A000"
    assert call(service, "get_wallet", "w")[0].status == "OPEN"


# Looking up an operation


def test_a_payee_finds_its_own_side_of_a_transfer(superuser: psycopg.Connection, service: psycopg.Connection) -> None:
    create(service, {"payer": 9, "payee": 0, "other": 0})
    transfer(service, "payer", "payee", A, 4)

    [sent], [received] = (call(service, "get_operation", wallet, A) for wallet in ("payer", "payee"))
    assert (sent.operation_type, sent.wallet_uuid, sent.counterparty_uuid) == ("TRANSFER", "payer", "payee")
    assert (received.operation_type, received.wallet_uuid, received.counterparty_uuid) == ("RECEIVE", "payee", "payer")
    assert refusal(service, "get_operation", "other", A) == ("WA414", MESSAGES["WA414"])
