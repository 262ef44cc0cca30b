"""The past: a wallet as it was at a moment, the operations between two, and what finding them costs."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.cases import A, B, deposit
from tests.db.door import apply, call, create

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
INSTANT = timedelta(microseconds=1)


def fill(superuser: psycopg.Connection, wallet: str, operations: int) -> None:
    """Give a wallet deposits of 1, the first a second after noon and one each second from then on.

    Their names ascend: a million in any order take half as long again.
    """
    superuser.execute(
        """
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at)
        select
          %(wallet)s, 'DEPOSIT', overlay(md5(%(wallet)s) placing lpad(to_hex(n), 8, '0') from 1)::uuid, n, 1, n,
          %(noon)s + n * interval '1 second'
        from generate_series(1, %(operations)s) as n""",
        {"wallet": wallet, "noon": NOON, "operations": operations},
    )


@pytest.fixture
def ten(superuser: psycopg.Connection, service: psycopg.Connection) -> psycopg.Connection:
    """The service's connection to a database whose wallet w has ten deposits of 1, one a second."""
    create(service, {"w": 0, "v": 5})
    fill(superuser, "w", 10)
    return service


def at(connection: psycopg.Connection, moment: datetime | str) -> Any:
    return call(connection, "get_wallet", "w", moment)[0]


def seqs(connection: psycopg.Connection, *arguments: object) -> list[int]:
    return [row.seq for row in call(connection, "list_operations", "w", *arguments)]


@pytest.mark.parametrize("seq", range(1, 11))
def test_a_wallet_at_a_moment_is_what_its_last_operation_until_then_left(seq: int, ten: psycopg.Connection) -> None:
    moment = NOON + seq * SECOND
    for then in (moment, moment + INSTANT, moment + SECOND - INSTANT):
        wallet = at(ten, then)
        assert (wallet.balance, wallet.held, wallet.available, wallet.seq) == (seq, 0, seq, seq)
        assert wallet.updated_at == moment
    assert at(ten, moment - INSTANT).seq == seq - 1


@pytest.mark.parametrize("moment", [NOON, NOON + SECOND - INSTANT, "-infinity", "4713-01-01 BC"])
def test_before_its_first_operation_a_wallet_was_empty(moment: datetime | str, ten: psycopg.Connection) -> None:
    now, then = call(ten, "get_wallet", "w")[0], at(ten, moment)
    assert (then.balance, then.available, then.seq, then.updated_at) == (0, 0, 0, now.created_at)
    assert (then.uuid, then.id, then.created_at) == (now.uuid, now.id, now.created_at)


@pytest.mark.parametrize("moment", [None, NOON + 10 * SECOND, NOON + timedelta(days=9), "infinity"])
def test_since_its_last_operation_a_wallet_is_as_it_is_now(
    moment: datetime | str | None, ten: psycopg.Connection
) -> None:
    assert call(ten, "get_wallet", "w", moment) == call(ten, "get_wallet", "w")
    assert call(ten, "get_wallet", "w")[0].balance == 10


def test_a_wallet_without_operations_is_empty_at_every_moment(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    [now] = call(service, "get_wallet", "w")
    assert [at(service, moment) for moment in (NOON, "infinity", "-infinity")] == [now] * 3


def test_of_several_operations_at_one_moment_the_last_counts(
    ten: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    superuser.execute("update wallet.operation set created_at = %s where seq between 3 and 7", [NOON + 3 * SECOND])
    assert at(ten, NOON + 3 * SECOND).seq == 7
    assert at(ten, NOON + 3 * SECOND - INSTANT).seq == 2
    assert seqs(ten, None, 100, NOON + 3 * SECOND, NOON + 3 * SECOND + INSTANT) == [7, 6, 5, 4, 3]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (NOON + 3 * SECOND, NOON + 6 * SECOND, [5, 4, 3]),
        (NOON + 3 * SECOND + INSTANT, NOON + 6 * SECOND + INSTANT, [6, 5, 4]),
        (None, NOON + 3 * SECOND, [2, 1]),
        (NOON + 9 * SECOND, None, [10, 9]),
        ("-infinity", "infinity", [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (NOON + 10 * SECOND + INSTANT, None, []),
        (None, NOON + SECOND, []),
        (NOON + 5 * SECOND, NOON + 5 * SECOND, []),
        (NOON + 6 * SECOND, NOON + 3 * SECOND, []),
    ],
)
def test_a_statement_has_its_beginning_and_not_its_end(
    first: datetime | str | None, last: datetime | str | None, expected: list[int], ten: psycopg.Connection
) -> None:
    assert seqs(ten, None, 100, first, last) == expected


def test_a_statement_comes_in_pages(ten: psycopg.Connection) -> None:
    window = (NOON + 3 * SECOND, NOON + 9 * SECOND)
    pages = [seqs(ten, before, 2, *window) for before in (None, 7, 5, 3)]
    assert pages == [[8, 7], [6, 5], [4, 3], []]
    assert seqs(ten, 10, 100, *window) == [8, 7, 6, 5, 4, 3]


def test_what_the_functions_apply_is_found_at_its_moment(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    first, second = apply(service, deposit("w", A, 5)), apply(service, deposit("w", B, 7))
    assert at(service, first.created_at).balance == 5
    assert at(service, second.created_at).balance == 12
    assert call(service, "list_operations", "w", None, 100, second.created_at) == [second]


# Cost


def pages_read(connection: psycopg.Connection, function: str, arguments: Sequence[object]) -> int:
    """Return how many pages of tables and indexes a call looks at; also those of catalogs, if it plans anew."""
    places = ", ".join(["%s"] * len(arguments))
    query = f"explain (analyze, buffers, format json) select * from wallet.{function}({places})"
    [[[explained]]] = connection.execute(query.encode(), arguments).fetchall()
    return explained["Plan"]["Shared Hit Blocks"] + explained["Plan"]["Shared Read Blocks"]


def test_the_cost_of_the_past_is_logarithmic_in_the_history(
    superuser: psycopg.Connection, service: psycopg.Connection
) -> None:
    """Plans that were made while the tables were empty serve a wallet of a million operations beside a short one."""
    million = 1_000_000
    create(service, {"w": 0, "short": 0})
    calls: list[tuple[str, list[object]]] = [
        (function, [wallet, *rest])
        for moment in (NOON, NOON + 2 * SECOND, NOON + million // 3 * SECOND, NOON + (million - 2) * SECOND)
        for wallet in ("w", "short")
        for function, rest in (
            ("get_wallet", [moment]),
            ("list_operations", [None, 10, moment, None]),
            ("list_operations", [None, 10, None, moment]),
            ("list_operations", [None, 10, moment, moment + 5 * SECOND]),
            ("list_operations", [5, 10, moment, None]),
        )
    ]
    calls += [("get_wallet", ["w"]), ("list_operations", ["w", None, 10])]
    calls += [("get_operation", ["w", "7c3bc9e0-0000-4000-8000-000000000000"])]
    for function, arguments in calls * 2:
        if function != "get_operation":
            pages_read(service, function, arguments)
    fill(superuser, "w", million)
    fill(superuser, "short", 100)
    [[operation]] = superuser.execute("select operation_uuid from wallet.operation where seq = 700000").fetchall()
    calls[-1] = ("get_operation", ["w", operation])

    cost = {
        (function, *map(str, arguments)): min(pages_read(service, function, arguments) for _ in range(3))
        for function, arguments in calls
    }

    searches = {"get_wallet": 1, "list_operations": 2}
    for (function, *arguments), pages in cost.items():
        # 2 ** 20 is more than a million; a probe goes down the index (4 pages) to one row of the table
        assert pages <= 20 + searches.get(function, 0) * 21 * 5, (function, arguments)
    assert max(pages for (_, wallet, *_), pages in cost.items() if wallet == "short") < 120
    assert cost["get_wallet", "w"] <= 20
    assert cost["list_operations", "w", "None", "10"] <= 20
    assert cost["get_operation", "w", str(operation)] <= 20
