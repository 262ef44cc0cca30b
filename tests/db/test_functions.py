"""Each function of schema wallet by itself: what it returns, what it refuses, in what words."""

import random
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.cases import MAX, MESSAGES, A, B, C, D, Request, deposit, withdraw
from tests.db.door import apply, apply_all, balances, call, create, outcome

NAME_FAULT = "wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
BAD_NAMES = ["", "w" * 65, "\N{MONEY BAG}", "a b", "a/b", "w\n", "é", "٣"]


def refusal(connection: psycopg.Connection, function: str, *arguments: object) -> tuple[str | None, str | None]:
    """Return the SQLSTATE and the message with which a function refuses its arguments."""
    with pytest.raises(psycopg.Error) as refused:
        call(connection, function, *arguments)
    return refused.value.sqlstate, refused.value.diag.message_primary


# Wallets


def test_a_new_wallet_is_empty_and_has_the_next_id(service: psycopg.Connection) -> None:
    first, second = call(service, "create_wallet", "mine")[0], call(service, "create_wallet", "yours")[0]
    assert first._fields == ("uuid", "id", "balance", "seq", "created_at")
    assert first[:4] == ("mine", 1, 0, 0)
    assert second[:4] == ("yours", 2, 0, 0)
    assert isinstance(first.created_at, datetime)


def test_a_wallet_without_a_chosen_name_gets_a_random_uuid(service: psycopg.Connection) -> None:
    names = [call(service, "create_wallet")[0].uuid, call(service, "create_wallet", None)[0].uuid]
    assert [str(UUID(name)) for name in names] == names
    assert [UUID(name).version for name in names] == [4, 4]
    assert names[0] != names[1]


@pytest.mark.parametrize("name", ["a", "w" * 64, "_", "-", "1111111111", "AZ-az_09"])
def test_a_wallet_may_have_any_good_name(name: str, service: psycopg.Connection) -> None:
    assert call(service, "create_wallet", name)[0].uuid == name
    assert call(service, "get_wallet", name)[0].uuid == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_function_takes_a_bad_name(name: str, service: psycopg.Connection) -> None:
    refused = ("WA400", NAME_FAULT)
    assert refusal(service, "create_wallet", name) == refused
    assert refusal(service, "get_wallet", name) == refused
    assert refusal(service, "apply_operation", name, A, "DEPOSIT", 1) == refused
    assert refusal(service, "get_operation", name, A) == refused
    assert refusal(service, "list_operations", name) == refused
    assert apply_all(service, [deposit(name, A, 1)])[0][1:3] == refused


def test_a_wallet_is_created_once(service: psycopg.Connection) -> None:
    create(service, {"w": 7})
    assert refusal(service, "create_wallet", "w") == ("WA419", MESSAGES["WA419"])
    assert balances(service, ["w"]) == {"w": 7}


def test_a_wallet_shows_its_balance_and_how_many_operations_led_to_it(service: psycopg.Connection) -> None:
    create(service, {"w": 100})
    apply(service, withdraw("w", A, 30))
    outcome(service, withdraw("w", B, 71))
    assert call(service, "get_wallet", "w")[0][:4] == ("w", 1, 70, 2)


def test_a_missing_wallet_is_not_found_by_any_function(service: psycopg.Connection) -> None:
    refused = ("WA404", MESSAGES["WA404"])
    assert refusal(service, "get_wallet", "nobody") == refused
    assert refusal(service, "apply_operation", "nobody", A, "DEPOSIT", 1) == refused
    assert refusal(service, "get_operation", "nobody", A) == refused
    assert refusal(service, "list_operations", "nobody") == refused


# Operations


def test_an_operation_is_the_same_row_from_whichever_function(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    before = service.execute("select clock_timestamp()").fetchone()
    applied = apply(service, deposit("w", A, 50))
    after = service.execute("select clock_timestamp()").fetchone()

    assert applied._fields == (
        "wallet_uuid",
        "operation_type",
        "operation_uuid",
        "seq",
        "amount",
        "balance_after",
        "created_at",
    )
    assert applied[:6] == ("w", "DEPOSIT", A, 1, 50, 50)
    assert before is not None
    assert after is not None
    assert before[0] <= applied.created_at <= after[0]
    assert call(service, "get_operation", "w", A) == [applied]
    assert call(service, "list_operations", "w") == [applied]
    assert apply_all(service, [deposit("w", A, 50)])[0][3:] == applied


def test_an_operation_is_found_only_on_its_own_wallet(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 0})
    apply(service, deposit("w", A, 50))
    assert refusal(service, "get_operation", "v", A) == ("WA414", MESSAGES["WA414"])
    assert refusal(service, "get_operation", "w", B) == ("WA414", MESSAGES["WA414"])


def test_operations_are_listed_newest_first_in_pages(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 1})
    apply_all(service, [deposit("w", uuid4(), 1) for _ in range(7)])

    pages = [call(service, "list_operations", "w", before, 3) for before in (None, 5, 2, 1)]

    assert [[operation.seq for operation in page] for page in pages] == [[7, 6, 5], [4, 3, 2], [1], []]


def test_a_page_has_100_operations_unless_told(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    apply_all(service, [deposit("w", uuid4(), 1) for _ in range(1001)])
    assert len(call(service, "list_operations", "w")) == 100
    assert len(call(service, "list_operations", "w", None, 1000)) == 1000
    assert [operation.seq for operation in call(service, "list_operations", "w", MAX, 1)] == [1001]


@pytest.mark.parametrize("limit", [None, 0, -1, 1001, 2**31 - 1, -(2**31)])
def test_a_page_has_from_1_to_1000_operations(limit: int | None, service: psycopg.Connection) -> None:
    create(service, {"w": 1})
    assert refusal(service, "list_operations", "w", None, limit) == ("WA400", "limit must be from 1 to 1000")


@pytest.mark.parametrize("before", [0, -1, -MAX - 1])
def test_a_page_starts_before_a_seq_that_can_exist(before: int, service: psycopg.Connection) -> None:
    create(service, {"w": 1})
    assert refusal(service, "list_operations", "w", before) == (
        "WA400",
        "before_seq must be from 1 to 9223372036854775807",
    )


# Nulls


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("get_wallet", [None], "wallet_uuid must not be null"),
        ("get_operation", [None, A], "wallet_uuid must not be null"),
        ("get_operation", ["w", None], "operation_uuid must not be null"),
        ("list_operations", [None], "wallet_uuid must not be null"),
        ("apply_operation", [None, A, "DEPOSIT", 1], "wallet_uuid must not be null"),
        ("apply_operation", ["w", None, "DEPOSIT", 1], "operation_uuid must not be null"),
        ("apply_operation", ["w", UUID(int=0), "DEPOSIT", 1], "operation_uuid must not be the nil UUID"),
        ("apply_operation", ["w", A, None, 1], "operation_type must not be null"),
        ("apply_operation", ["w", A, "deposit", 1], "operation_type must be DEPOSIT or WITHDRAW"),
        ("apply_operation", ["w", A, "DEPOSIT", None], "amount must not be null"),
        ("apply_operation", ["w", A, "DEPOSIT", 0], "amount must be from 1 to 9223372036854775807"),
        ("apply_operations", [None, [A], ["DEPOSIT"], [1]], "arrays must not be null"),
        ("apply_operations", [["w"], None, ["DEPOSIT"], [1]], "arrays must not be null"),
        ("apply_operations", [["w"], [A], None, [1]], "arrays must not be null"),
        ("apply_operations", [["w"], [A], ["DEPOSIT"], None], "arrays must not be null"),
    ],
)
def test_a_bad_argument_is_named(
    function: str, arguments: Sequence[object], message: str, service: psycopg.Connection
) -> None:
    create(service, {"w": 5})
    assert refusal(service, function, *arguments) == ("WA400", message)
    assert balances(service, ["w"]) == {"w": 5}


# Batches


def test_each_bad_request_of_a_batch_is_named_and_the_good_one_applied(service: psycopg.Connection) -> None:
    create(service, {"w": 5})
    rows = call(
        service,
        "apply_operations",
        [None, "w", "w", "w", "w", "w", "a b", "nobody"],
        [A, None, A, A, A, UUID(int=0), A, A],
        ["DEPOSIT", "DEPOSIT", None, "DEPOSIT", "DEPOSIT", "DEPOSIT", "DEPOSIT", "DEPOSIT"],
        [1, 1, 1, None, 1, 1, 1, 1],
    )
    assert [row[:3] for row in rows] == [
        (1, "WA400", "wallet_uuid must not be null"),
        (2, "WA400", "operation_uuid must not be null"),
        (3, "WA400", "operation_type must not be null"),
        (4, "WA400", "amount must not be null"),
        (5, None, None),
        (6, "WA400", "operation_uuid must not be the nil UUID"),
        (7, "WA400", NAME_FAULT),
        (8, "WA404", MESSAGES["WA404"]),
    ]
    assert {row[3:] for row in rows if row.sqlstate} == {(None,) * 7}
    assert balances(service, ["w"]) == {"w": 6}


def test_requests_without_an_operation_uuid_are_not_duplicates_of_each_other(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    rows = call(service, "apply_operations", ["w"] * 4, [None, A, A, None], ["DEPOSIT"] * 4, [1] * 4)
    assert [row.sqlstate for row in rows] == ["WA400", None, "WA409", "WA400"]


@pytest.mark.parametrize("short", range(4))
def test_arrays_have_one_length(short: int, service: psycopg.Connection) -> None:
    create(service, {"w": 5})
    arrays: list[list[object]] = [["w", "w"], [A, B], ["DEPOSIT", "DEPOSIT"], [1, 1]]
    arrays[short].pop()
    assert refusal(service, "apply_operations", *arrays) == ("WA400", "arrays must have the same length")
    arrays[short].clear()
    assert refusal(service, "apply_operations", *arrays) == ("WA400", "arrays must have the same length")
    assert balances(service, ["w"]) == {"w": 5}


@pytest.mark.parametrize("nested", range(4))
def test_arrays_have_one_dimension(nested: int, service: psycopg.Connection) -> None:
    create(service, {"w": 5})
    arrays: list[list[object]] = [["w", "w"], [A, B], ["DEPOSIT", "DEPOSIT"], [1, 1]]
    arrays[nested] = [[element] for element in arrays[nested]]
    assert refusal(service, "apply_operations", *arrays) == ("WA400", "arrays must have one dimension")


def test_an_empty_batch_has_no_rows(service: psycopg.Connection) -> None:
    assert call(service, "apply_operations", [], [], [], []) == []


def test_arrays_may_start_at_any_index(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 0})
    rows = service.execute(
        "select ordinal, sqlstate, wallet_uuid, operation_uuid, amount from wallet.apply_operations("
        " '[5:7]={w,v,w}', %s, '[0:2]={DEPOSIT,DEPOSIT,WITHDRAW}', '[-7:-5]={10,20,3}')",
        [[A, B, C]],
    ).fetchall()
    assert rows == [(1, None, "w", A, 10), (2, None, "v", B, 20), (3, None, "w", C, 3)]
    assert balances(service, ["w", "v"]) == {"w": 7, "v": 20}


def test_a_duplicate_in_a_batch_shows_the_recorded_operation_only_on_its_own_wallet(
    service: psycopg.Connection,
) -> None:
    create(service, {"w": 0, "v": 9})
    recorded = apply(service, deposit("w", A, 50))

    rows = apply_all(
        service,
        [
            withdraw("w", A, 70),
            withdraw("v", A, 9),
            withdraw("w", B, 51),
            withdraw("v", B, 9),
            deposit("w", B, 1),
            deposit("v", B, 2),
        ],
    )

    assert [row[:3] for row in rows] == [
        (1, "WA409", MESSAGES["WA409"]),
        (2, "WA409", MESSAGES["WA409"]),
        (3, "WA402", MESSAGES["WA402"]),
        (4, None, None),
        (5, "WA409", MESSAGES["WA409"]),
        (6, "WA409", MESSAGES["WA409"]),
    ]
    assert rows[0][3:] == recorded
    assert rows[3][3:] == rows[5][3:] == call(service, "get_operation", "v", B)[0]
    assert {rows[index][3:] for index in (1, 2, 4)} == {(None,) * 7}


def test_every_operation_of_a_batch_has_the_row_that_the_ledger_has(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 0})
    for requests in ([deposit("v", B, 2), deposit("w", A, 1)], [deposit("v", D, 1), deposit("w", C, 3)] * 2):
        for row in apply_all(service, requests):
            assert row[3:] == call(service, "get_operation", row.wallet_uuid, row.operation_uuid)[0]


@pytest.mark.parametrize("repeats", [0, 500], ids=["fresh", "with_repeats"])
def test_a_large_batch_does_what_its_requests_would_do_one_by_one(repeats: int, service: psycopg.Connection) -> None:
    chance = random.Random(2)
    wallets = {f"w{number}": chance.randrange(50) for number in range(200)}
    create(service, wallets)
    requests = [
        Request(chance.choice([*wallets]), UUID(int=chance.getrandbits(128)), kind, chance.randrange(1, 100), None)
        for kind in chance.choices(["DEPOSIT", "WITHDRAW"], k=2000 - repeats)
    ]
    requests += [request._replace(amount=1) for request in chance.choices(requests, k=repeats)]
    chance.shuffle(requests)

    expected: list[str | None] = []
    held, known = dict(wallets), set()
    for request in requests:
        change = request.amount if request.type == "DEPOSIT" else -request.amount
        if request.operation in known:
            expected.append("WA409")
        elif held[request.wallet] + change < 0:
            expected.append("WA402")
        else:
            expected.append(None)
            held[request.wallet] += change
            known.add(request.operation)
    rows = apply_all(service, requests)

    assert [row.ordinal for row in rows] == [*range(1, 2001)]
    assert [row.sqlstate for row in rows] == expected
    assert {None, "WA402"} <= set(expected)
    assert balances(service, wallets) == held
    assert call(service, "verify") == []


def test_a_batch_that_is_rolled_back_leaves_nothing(service: psycopg.Connection) -> None:
    create(service, {"w": 5})
    with service.transaction(force_rollback=True):
        assert [row.sqlstate for row in apply_all(service, [deposit("w", A, 1), deposit("w", A, 1)])] == [None, "WA409"]
    assert balances(service, ["w"]) == {"w": 5}
    assert outcome(service, deposit("w", A, 1)) is None


def test_operations_in_one_transaction_see_each_other(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    with service.transaction():
        apply_all(service, [deposit("w", A, 5)])
        apply(service, withdraw("w", B, 5))
        assert [row.sqlstate for row in apply_all(service, [withdraw("w", B, 5), withdraw("w", C, 5)])] == [
            "WA409",
            "WA402",
        ]
    assert call(service, "verify") == []
