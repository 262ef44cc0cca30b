"""Each function of schema wallet by itself: what it returns, what it refuses, in what words."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.cases import MAX, MESSAGES, A, B, C, D, Request, deposit, transfer, withdraw
from tests.db.door import apply, apply_all, balances, call, create, operation, outcome

NAME_FAULT = "wallet_uuid must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
HOLD_FAULT = "hold_uuid must be null but for WITHDRAW, TRANSFER and RELEASE"
MOMENT = datetime(2100, 1, 1, tzinfo=UTC)
BAD_NAMES = ["", "w" * 65, "\N{MONEY BAG}", "a b", "a/b", "w\n", "é", "٣"]


def refusal(connection: psycopg.Connection, function: str, *arguments: object) -> tuple[str | None, str | None]:
    """Return the SQLSTATE and the message with which a function refuses its arguments."""
    with pytest.raises(psycopg.Error) as refused:
        call(connection, function, *arguments)
    return refused.value.sqlstate, refused.value.diag.message_primary


# Wallets


def test_a_new_wallet_is_empty_and_has_the_next_id(service: psycopg.Connection) -> None:
    first, second = call(service, "create_wallet", "mine")[0], call(service, "create_wallet", "yours")[0]
    assert first._fields == (
        "uuid",
        "id",
        "currency",
        "status",
        "balance",
        "held",
        "available",
        "seq",
        "created_at",
        "updated_at",
    )
    assert (first.uuid, first.id, second.uuid, second.id) == ("mine", 1, "yours", 2)
    assert (first.currency, first.status) == (None, "OPEN")
    assert (first.balance, first.held, first.available, first.seq) == (0, 0, 0, 0)
    assert isinstance(first.created_at, datetime)
    assert first.updated_at == first.created_at


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
    assert refusal(service, "list_holds", name) == refused
    assert refusal(service, "expire_holds", name) == refused
    assert apply_all(service, [deposit(name, A, 1)])[0][1:3] == refused


def test_a_wallet_is_created_once(service: psycopg.Connection) -> None:
    create(service, {"w": 7})
    assert refusal(service, "create_wallet", "w") == ("WA419", MESSAGES["WA419"])
    assert balances(service, ["w"]) == {"w": 7}


def test_a_wallet_shows_its_balance_and_how_many_operations_led_to_it(service: psycopg.Connection) -> None:
    create(service, {"w": 100})
    apply(service, withdraw("w", A, 30))
    outcome(service, withdraw("w", B, 71))
    wallet = call(service, "get_wallet", "w")[0]
    assert (wallet.balance, wallet.held, wallet.available, wallet.seq) == (70, 0, 70, 2)
    assert wallet.updated_at == call(service, "get_operation", "w", A)[0].created_at


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
        "held_after",
        "counterparty_uuid",
        "hold_uuid",
        "expires_at",
        "metadata",
    )
    assert applied._replace(created_at=None) == ("w", "DEPOSIT", A, 1, 50, 50, None, 0, None, None, None, None)
    assert before is not None
    assert after is not None
    assert before[0] <= applied.created_at <= after[0]
    assert call(service, "get_operation", "w", A) == [applied]
    assert call(service, "list_operations", "w") == [applied]
    assert operation(apply_all(service, [deposit("w", A, 50)])[0]) == applied


def test_an_operation_is_found_only_on_its_own_wallet(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 0})
    apply(service, deposit("w", A, 50))
    assert refusal(service, "get_operation", "v", A) == ("WA414", MESSAGES["WA414"])
    assert refusal(service, "get_operation", "w", B) == ("WA414", MESSAGES["WA414"])


def test_operations_are_listed_newest_first_in_pages(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 1})
    apply_all(service, [deposit("w", uuid4(), 1) for _ in range(7)])

    pages = [call(service, "list_operations", "w", before, 3) for before in (None, 5, 2, 1)]

    assert [[one.seq for one in page] for page in pages] == [[7, 6, 5], [4, 3, 2], [1], []]


def test_a_page_has_100_operations_unless_told(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    apply_all(service, [deposit("w", uuid4(), 1) for _ in range(1001)])
    assert len(call(service, "list_operations", "w")) == 100
    assert len(call(service, "list_operations", "w", None, 1000)) == 1000
    assert [one.seq for one in call(service, "list_operations", "w", MAX, 1)] == [1001]


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
        (
            "apply_operation",
            ["w", A, "deposit", 1],
            "operation_type must be DEPOSIT, WITHDRAW, TRANSFER, HOLD or RELEASE",
        ),
        ("apply_operation", ["w", A, "DEPOSIT", None], "amount must not be null"),
        ("apply_operation", ["w", A, "DEPOSIT", 0], "amount must be from 1 to 9223372036854775807"),
        ("apply_operations", [None, [A], ["DEPOSIT"], [1]], "arrays must not be null"),
        ("apply_operations", [["w"], None, ["DEPOSIT"], [1]], "arrays must not be null"),
        ("apply_operations", [["w"], [A], None, [1]], "arrays must not be null"),
        ("apply_operations", [["w"], [A], ["DEPOSIT"], None], "arrays must not be null"),
        ("apply_operations", [[], [], [], [], None, None, None, None, None], "atomic must not be null"),
        ("apply_operation", ["w", A, "TRANSFER", 1], "counterparty_uuid must not be null for TRANSFER"),
        ("apply_operation", ["w", A, "DEPOSIT", 1, "v"], "counterparty_uuid must be null but for TRANSFER"),
        ("apply_operation", ["w", A, "TRANSFER", 1, "w"], "counterparty_uuid must be another wallet"),
        ("apply_operation", ["w", A, "TRANSFER", 1, "a b"], NAME_FAULT.replace("wallet_uuid", "counterparty_uuid")),
        ("apply_operation", ["w", A, "DEPOSIT", 1, None, B], HOLD_FAULT),
        ("apply_operation", ["w", A, "HOLD", 1, None, B], HOLD_FAULT),
        ("apply_operation", ["w", A, "HOLD", None], "amount must not be null"),
        ("apply_operation", ["w", A, "HOLD", 1, "v"], "counterparty_uuid must be null but for TRANSFER"),
        ("apply_operation", ["w", A, "RELEASE", 1, None, B], "amount must be null for RELEASE"),
        ("apply_operation", ["w", A, "RELEASE"], "hold_uuid must not be null for RELEASE"),
        ("apply_operation", ["w", A, "WITHDRAW", 1, None, UUID(int=0)], "hold_uuid must not be the nil UUID"),
        ("apply_operation", ["w", A, "DEPOSIT", 1, None, None, MOMENT], "expires_at must be null but for HOLD"),
        ("list_holds", [None], "wallet_uuid must not be null"),
        ("expire_holds", [None], "wallet_uuid must not be null"),
        ("apply_operation", ["w", A, "DEPOSIT", 1, None, None, None, "[]"], "metadata must be an object"),
        ("apply_operation", ["w", A, "DEPOSIT", 1, None, None, None, "null"], "metadata must be an object"),
        (
            "apply_operation",
            ["w", A, "DEPOSIT", 1, None, None, None, f'{{"a": "{"x" * 2040}"}}'],
            "metadata must have at most 2048 octets as text",
        ),
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
    assert {(row.same_request, *operation(row)) for row in rows if row.sqlstate} == {(None,) * 13}
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
    assert operation(rows[0]) == recorded
    assert operation(rows[3]) == operation(rows[5]) == call(service, "get_operation", "v", B)[0]
    assert {operation(rows[index]) for index in (1, 2, 4)} == {(None,) * 12}
    assert [row.same_request for row in rows] == [False, False, None, True, False, False]


def test_every_operation_of_a_batch_has_the_row_that_the_ledger_has(service: psycopg.Connection) -> None:
    create(service, {"w": 0, "v": 0})
    for requests in ([deposit("v", B, 2), deposit("w", A, 1)], [deposit("v", D, 1), deposit("w", C, 3)] * 2):
        for row in apply_all(service, requests):
            assert operation(row) == call(service, "get_operation", row.wallet_uuid, row.operation_uuid)[0]


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


# The same request


WHOLE = transfer("w", "v", A, 5, metadata={"note": "rent", "n": [1, 2.50]})


@pytest.mark.parametrize(
    ("request_", "same"),
    [
        (WHOLE, True),
        (WHOLE._replace(metadata={"n": [1, 2.5], "note": "rent"}), True),
        (WHOLE._replace(metadata={"note": "rent", "n": [2.5, 1]}), False),
        (WHOLE._replace(metadata=None), False),
        (WHOLE._replace(amount=6), False),
        (WHOLE._replace(counterparty="u"), False),
        (WHOLE._replace(type="WITHDRAW", counterparty=None), False),
        (WHOLE._replace(wallet="v", counterparty="w"), False),
        (WHOLE._replace(wallet="u"), False),
        (deposit("v", A, 5, metadata=WHOLE.metadata), False),
    ],
)
def test_a_repeat_is_the_same_request_only_if_all_of_it_is(
    request_: Request, same: bool, service: psycopg.Connection
) -> None:
    create(service, {"w": 9, "v": 9, "u": 9})
    recorded = apply(service, WHOLE)
    for atomic in (False, True):
        [row] = apply_all(service, [request_], atomic)
        assert (row.sqlstate, row.same_request) == ("WA409", same)
        assert operation(row) == (recorded if request_.wallet == "w" else (None,) * 12)


@pytest.mark.parametrize(("first", "again"), [({}, None), (None, {}), ({}, {})])
def test_empty_metadata_is_none(first: object, again: object, service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    assert apply(service, deposit("w", A, 1, metadata=first)).metadata is None
    assert [row.metadata for row in apply_all(service, [deposit("w", B, 1, metadata=first)])] == [None]
    rows = apply_all(service, [deposit("w", one, 1, metadata=again) for one in (A, B)])
    assert [row.same_request for row in rows] == [True, True]


def test_both_rows_of_a_transfer_tell_of_it(service: psycopg.Connection) -> None:
    create(service, {"w": 9, "v": 1})
    one, [row] = apply(service, WHOLE), apply_all(service, [WHOLE._replace(operation=B, amount=2)])
    for paid, after in ((one, (4, 6)), (row, (2, 8))):
        [received] = call(service, "get_operation", "v", paid.operation_uuid)
        assert (paid.wallet_uuid, paid.operation_type, paid.counterparty_uuid) == ("w", "TRANSFER", "v")
        assert (received.wallet_uuid, received.operation_type, received.counterparty_uuid) == ("v", "RECEIVE", "w")
        assert (paid.balance_after, received.balance_after) == after
        assert (received.amount, received.metadata, received.created_at) == (
            paid.amount,
            paid.metadata,
            paid.created_at,
        )
    assert [call(service, "get_wallet", wallet)[0].seq for wallet in "wv"] == [3, 3]


# All or nothing


def test_an_atomic_batch_that_is_sent_again_is_recognised(service: psycopg.Connection) -> None:
    create(service, {"w": 100, "v": 0})
    requests = [transfer("w", "v", A, 60), deposit("w", B, 5), withdraw("v", C, 60)]
    applied = apply_all(service, requests, atomic=True)
    repeated = apply_all(service, requests, atomic=True)

    assert [row.sqlstate for row in applied] == [None] * 3
    assert [(row.sqlstate, row.same_request) for row in repeated] == [("WA409", True)] * 3
    assert [operation(row) for row in repeated] == [operation(row) for row in applied]
    assert balances(service, "wv") == {"w": 45, "v": 0}


def test_in_a_refused_atomic_batch_duplicates_are_told_and_the_innocent_leave_nothing(
    service: psycopg.Connection,
) -> None:
    create(service, {"w": 10, "v": 0})
    recorded = apply(service, deposit("w", A, 1))
    requests = [
        deposit("w", A, 1),
        transfer("w", "v", B, 11),
        transfer("w", "v", B, 11),
        withdraw("v", C, 12),
        deposit("v", D, 1),
    ]
    rows = apply_all(service, requests, atomic=True)

    assert [(row.sqlstate, row.same_request) for row in rows] == [
        ("WA409", True),
        ("WA425", None),
        ("WA409", None),
        ("WA402", None),
        ("WA425", None),
    ]
    assert [operation(row) for row in rows] == [recorded, *[(None,) * 12] * 4]
    assert balances(service, "wv") == {"w": 11, "v": 0}
    assert [outcome(service, request) for request in requests[1:3]] == [None, "WA409"]
    assert call(service, "verify") == []


def test_an_empty_atomic_batch_has_no_rows(service: psycopg.Connection) -> None:
    assert call(service, "apply_operations", [], [], [], [], None, None, None, None, True) == []


# A last moment


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("apply_operation", ["w", A, "DEPOSIT", 5, None, None, None, None]),
        ("apply_operations", [["w"], [A], ["DEPOSIT"], [5], None, None, None, None, False]),
        ("apply_operations", [["w"], [A], ["DEPOSIT"], [5], None, None, None, None, True]),
    ],
)
def test_a_call_after_its_last_moment_is_taken_back(
    function: str, arguments: list[object], service: psycopg.Connection
) -> None:
    create(service, {"w": 1})
    now = datetime.now(UTC)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call(service, function, *arguments, now - timedelta(seconds=1))
    assert balances(service, ["w"]) == {"w": 1}
    assert call(service, function, *arguments, now + timedelta(minutes=1))[0].balance_after == 6


def test_no_function_that_turns_a_kind_of_plan_off_is_compiled_for_it(superuser: psycopg.Connection) -> None:
    """Before PostgreSQL 18 such a plan costs 1e10 where there is no other, and JIT compiles what costs 1e5."""
    compiled = superuser.execute(
        "select proname from pg_proc where pronamespace = 'wallet'::regnamespace"
        " and array_to_string(proconfig, ' ') ~ 'enable_' and not proconfig @> '{jit=off}'"
    ).fetchall()
    assert compiled == []


def test_no_session_keeps_a_plan_that_reads_the_whole_ledger(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    """It has planned its calls when the ledger was empty, and known to be."""
    superuser.execute("vacuum analyze wallet.operation")
    create(service, {"w": 0, "v": 0})
    calls = (
        ("apply_operation", "w", "{uuid}", "DEPOSIT", 5),
        ("apply_operation", "w", "{uuid}", "TRANSFER", 1, "v"),
        ("get_wallet", "w"),
        ("get_wallet", "w", datetime(2020, 1, 1, tzinfo=UTC)),
        ("get_operation", "w", A),
        ("list_operations", "w"),
        ("list_operations", "w", None, 100, datetime(2020, 1, 1, tzinfo=UTC), datetime.now(UTC)),
        ("list_wallets",),
        ("set_status", "v", "OPEN"),
        ("create_wallet",),
    )
    scans = "select seq_scan from pg_stat_xact_all_tables where relid = 'wallet.operation'::regclass"
    deposit_a = deposit("w", A, 5)
    with service.transaction():
        apply(service, deposit_a)
        apply_all(service, [deposit("w", B, 5), transfer("w", "v", C, 5)])
        for _ in range(7):
            for function, *arguments in calls:
                call(service, function, *(uuid4() if argument == "{uuid}" else argument for argument in arguments))
        assert service.execute(scans).fetchall() == [(0,)]
