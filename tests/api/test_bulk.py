"""The bulk request: each operation has its own outcome, as if they had been asked for one after another."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.calls import dispatch, lane
from app.calls.dispatch import BULK
from app.settings import Settings
from app.web.application import make_app
from app.web.body import BULK_BODY_LIMIT
from tests.api.door import MAX, balance, create, deposit, history, problem, withdraw
from tests.api.test_lanes import locked, through, until, waiting_backends
from tests.proxy import Point, Proxy

A, B, C, D, E, F = (UUID(f"{letter * 8}-0000-4000-8000-000000000000") for letter in "abcdef")


@pytest.fixture(autouse=True)
def _right_books(superuser: psycopg.Connection) -> Iterator[None]:
    yield
    assert superuser.execute("select * from wallet.verify()").fetchall() == []


@pytest.fixture
async def lossy(proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient) -> TestClient:
    """A client of an app that reaches PostgreSQL through the proxy."""
    return await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser))))


def item(wallet: str, operation_type: str, amount: int, operation: UUID | None = None) -> dict[str, Any]:
    return {
        "wallet_uuid": wallet,
        "operation_uuid": str(operation or uuid4()),
        "operation_type": operation_type,
        "amount": amount,
    }


async def bulk(client: TestClient, operations: list[dict[str, Any]]) -> ClientResponse:
    return await client.post("/api/v1/operations", json={"operations": operations})


async def results(client: TestClient, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ask for operations, and return the results without the operations' names, which are checked."""
    answer = await bulk(client, operations)
    assert answer.status == 200
    body = await answer.json()
    assert list(body) == ["results"]
    assert [one.pop("operation_uuid") for one in body["results"]] == [one["operation_uuid"] for one in operations]
    for one in body["results"]:
        if "operation" in one:
            datetime.fromisoformat(one["operation"].pop("created_at"))
    return body["results"]


def success(balance_after: int, seq: int) -> dict[str, Any]:
    return {"applied": True, "balance_after": balance_after, "held_after": 0, "seq": seq}


def refusal(code: str, detail: str) -> dict[str, Any]:
    return {"applied": False, "code": code, "detail": detail}


FOREIGN = refusal("duplicate_operation", "Transaction already exists")
"""A duplicate of another wallet's operation."""


def duplicate(operation: dict[str, Any], balance_after: int, seq: int, *, same_request: bool = True) -> dict[str, Any]:
    """What a duplicate of the same wallet is told, without the time: the operation that is recorded."""
    return FOREIGN | {
        "operation": operation | {"balance_after": balance_after, "held_after": 0, "seq": seq},
        "same_request": same_request,
    }


NO_MONEY = refusal("insufficient_funds", "Not enough money")


async def test_results_come_in_order_each_with_its_own_outcome(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0, "full": MAX})
    await deposit(client, "v", 5, F)

    told = await results(
        client,
        [
            item("w", "DEPOSIT", 50, A),
            item("v", "WITHDRAW", 6, B),
            item("nobody", "DEPOSIT", 1, C),
            item("full", "DEPOSIT", 1, D),
            item("v", "DEPOSIT", 5, F),
            item("w", "WITHDRAW", 150, E),
        ],
    )

    assert told == [
        success(150, 2),
        NO_MONEY,
        refusal("wallet_not_found", "Wallet not found"),
        refusal("balance_out_of_range", "Balance out of range"),
        duplicate(item("v", "DEPOSIT", 5, F), 5, 1),
        success(0, 3),
    ]
    assert [await balance(client, wallet) for wallet in ("w", "v", "full")] == [0, 5, MAX]


async def test_the_third_succeeds_because_the_first_did(client: TestClient) -> None:
    await create(client, {"w": 0, "v": 5})

    told = await results(
        client,
        [item("w", "DEPOSIT", 70), item("v", "WITHDRAW", 5), item("w", "WITHDRAW", 70), item("w", "WITHDRAW", 1)],
    )

    assert told == [success(70, 1), success(0, 2), success(0, 2), NO_MONEY]


async def test_an_operation_twice_in_a_request_succeeds_once(client: TestClient) -> None:
    await create(client, {"w": 0, "v": 0})

    told = await results(
        client,
        [
            item("w", "WITHDRAW", 5, A),
            item("w", "DEPOSIT", 5, A),
            item("w", "DEPOSIT", 5, A),
            item("w", "DEPOSIT", 6, A),
            item("v", "DEPOSIT", 5, A),
        ],
    )

    recorded = item("w", "DEPOSIT", 5, A)
    assert told == [
        NO_MONEY,
        success(5, 1),
        duplicate(recorded, 5, 1),
        duplicate(recorded, 5, 1, same_request=False),
        FOREIGN,
    ]
    assert [await balance(client, wallet) for wallet in ("w", "v")] == [5, 0]


async def test_a_request_sent_again_is_told_that_each_exists(client: TestClient) -> None:
    await create(client, {"w": 100})
    operations = [item("w", "WITHDRAW", 100), item("w", "DEPOSIT", 7)]
    assert await results(client, operations) == [success(0, 2), success(7, 3)]

    assert await results(client, operations) == [duplicate(operations[0], 0, 2), duplicate(operations[1], 7, 3)]
    assert await balance(client, "w") == 7


async def test_no_operations_have_no_results(client: TestClient) -> None:
    assert await results(client, []) == []


async def test_a_spelling_of_an_operation_uuid_is_answered_in_canonical_form(client: TestClient) -> None:
    await create(client, {"w": 0})

    answer = await bulk(client, [item("w", "DEPOSIT", 5, A) | {"operation_uuid": A.hex.upper()}])

    assert (await answer.json())["results"] == [{"operation_uuid": str(A), **success(5, 1)}]


async def test_a_request_may_hold_10_000_operations(client: TestClient) -> None:
    wallets = ["w" * 64, *(f"{number:0>64}" for number in range(9))]
    await create(client, dict.fromkeys(wallets, 0))
    operations = [item(wallets[number % 10], "DEPOSIT", number + 1) for number in range(9_999)]
    operations.append(item(wallets[0], "WITHDRAW", MAX))

    *told, overdraft = await results(client, operations)

    held = dict.fromkeys(wallets, 0)
    for number, (operation, result) in enumerate(zip(operations, told, strict=False)):
        held[operation["wallet_uuid"]] += operation["amount"]
        assert result == success(held[operation["wallet_uuid"]], number // 10 + 1)
    assert overdraft == NO_MONEY
    assert {wallet: await balance(client, wallet) for wallet in wallets} == held


async def test_a_request_never_holds_10_001_operations(client: TestClient) -> None:
    await create(client, {"w": 100})

    told = await problem(await bulk(client, [item("w", "DEPOSIT", 1) for _ in range(10_001)]), 400, "invalid_request")

    assert told["errors"][0]["loc"] == ["body", "operations"]
    assert await balance(client, "w") == 100


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"amount": 0}, "amount"),
        ({"amount": -1}, "amount"),
        ({"amount": 1.5}, "amount"),
        ({"amount": True}, "amount"),
        ({"amount": "1"}, "amount"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": 1800000000}, "expires_at"),
        ({"hold_uuid": "a"}, "hold_uuid"),
        ({"amount": 2**63}, "amount"),
        ({"operation_type": "deposit"}, "operation_type"),
        ({"operation_uuid": "a"}, "operation_uuid"),
        ({"wallet_uuid": ""}, "wallet_uuid"),
        ({"wallet_uuid": "w" * 65}, "wallet_uuid"),
        ({"wallet_uuid": "w\n"}, "wallet_uuid"),
        ({"wallet_uuid": "a wallet"}, "wallet_uuid"),
        ({"wallet_uuid": "w\0"}, "wallet_uuid"),
        ({"wallet_uuid": 1}, "wallet_uuid"),
        ({"note": "rent"}, "note"),
    ],
)
async def test_a_wrong_operation_is_named_by_its_index_and_nothing_is_applied(
    wrong: dict[str, Any], field: str, client: TestClient
) -> None:
    await create(client, {"w": 100})
    operations = [item("w", "DEPOSIT", 1) for _ in range(5)]
    operations[3] |= wrong

    told = await problem(await bulk(client, operations), 400, "invalid_request")

    [error] = told["errors"]
    assert error["loc"] == ["body", "operations", 3, field]
    assert error["msg"]
    assert error["type"]
    assert await balance(client, "w") == 100


@pytest.mark.parametrize("field", ["wallet_uuid", "operation_uuid", "operation_type"])
async def test_a_missing_field_is_named_with_its_index_and_nothing_is_applied(field: str, client: TestClient) -> None:
    await create(client, {"w": 100})
    operations = [item("w", "DEPOSIT", 1) for _ in range(5)]
    del operations[4][field]

    told = await problem(await bulk(client, operations), 400, "invalid_request")

    assert [(error["loc"], error["type"]) for error in told["errors"]] == [
        (["body", "operations", 4, field], "missing")
    ]
    assert await balance(client, "w") == 100


@pytest.mark.parametrize(
    ("body", "location"),
    [
        (b"", ["body"]),
        (b"[]", ["body"]),
        (b"{}", ["body", "operations"]),
        (b'{"operations": null}', ["body", "operations"]),
        (b'{"operations": {}}', ["body", "operations"]),
        (b'{"operations": [1]}', ["body", "operations", 0]),
        (b'{"operations": [], "more": 1}', ["body", "more"]),
        (b'{"operations": [', ["body"]),
        (b"[" * 100_000, ["body"]),
    ],
)
async def test_a_body_of_another_shape_is_refused(body: bytes, location: list[str | int], client: TestClient) -> None:
    answer = await client.post("/api/v1/operations", data=body, headers={"Content-Type": "application/json"})

    assert [error["loc"] for error in (await problem(answer, 400, "invalid_request"))["errors"]] == [location]


async def chunked(body: bytes) -> Any:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


@pytest.mark.parametrize("send", [bytes, chunked], ids=["declared_length", "chunked"])
async def test_a_body_has_a_limit_of_its_own(send: Any, client: TestClient) -> None:
    await create(client, {"w": 0})
    body = b'{"operations": [%b]}' % str(item("w", "DEPOSIT", 1)).replace("'", '"').encode()
    headers = {"Content-Type": "application/json"}

    fits = await client.post("/api/v1/operations", data=send(body.ljust(BULK_BODY_LIMIT)), headers=headers)
    assert fits.status == 200
    too_large = await client.post("/api/v1/operations", data=send(body.ljust(BULK_BODY_LIMIT + 1)), headers=headers)

    await problem(too_large, 413, "body_too_large")
    assert len(await history(client, "w")) == 1


async def test_names_and_amounts_arrive_as_they_are(client: TestClient) -> None:
    names = ["NULL", "null", "-", "_", "0", "-1", "w" * 64]
    await create(client, dict.fromkeys(names, 0))

    told = await results(client, [item(name, "DEPOSIT", MAX - number) for number, name in enumerate(names)])

    assert told == [success(MAX - number, 1) for number in range(len(names))]
    assert [await balance(client, name) for name in names] == [MAX - number for number in range(len(names))]


async def test_bulk_and_single_requests_for_one_wallet_at_once_keep_the_books(client: TestClient) -> None:
    await create(client, {"w": 0, "v": 0})
    moved = dict.fromkeys(("w", "v"), 0)
    choice = random.Random(4)

    async def single() -> None:
        wallet, amount = choice.choice(["w", "v"]), choice.randrange(1, 100)
        ask = choice.choice([deposit, withdraw])
        answer = await ask(client, wallet, amount)
        if answer.status == 200:
            moved[wallet] += amount if ask is deposit else -amount
        else:
            await problem(answer, 400, "insufficient_funds")

    async def many() -> None:
        operations = [
            item(choice.choice(["w", "v"]), choice.choice(["DEPOSIT", "WITHDRAW"]), choice.randrange(1, 100))
            for _ in range(choice.randrange(1, 200))
        ]
        for operation, result in zip(operations, await results(client, operations), strict=True):
            if result["applied"]:
                signed = operation["amount"] if operation["operation_type"] == "DEPOSIT" else -operation["amount"]
                moved[operation["wallet_uuid"]] += signed
            else:
                assert result == NO_MONEY

    await asyncio.gather(*(ask() for _ in range(25) for ask in (single, single, single, single, many)))

    assert {wallet: await balance(client, wallet) for wallet in moved} == moved


async def test_one_bulk_request_twice_at_once_is_applied_once(client: TestClient) -> None:
    await create(client, {"w": 0})
    operations = [item("w", "DEPOSIT", amount) for amount in range(1, 501)]
    shuffled = random.Random(4).sample(operations, len(operations))

    first, second = await asyncio.gather(results(client, operations), results(client, shuffled))

    assert sorted(sum(result["applied"] for result in told) for told in (first, second)) == [0, 500]
    assert await balance(client, "w") == 500 * 501 // 2


@pytest.mark.parametrize("point", Point)
async def test_a_lost_bulk_call_answers_what_was_applied(point: Point, proxy: Proxy, lossy: TestClient) -> None:
    await create(lossy, {"w": 100, "v": 0})
    operations = [item("w", "WITHDRAW", 100, A), item("v", "DEPOSIT", 1, B), item("w", "DEPOSIT", 5, C)]
    repeated = [*operations, item("w", "DEPOSIT", 5, C), item("v", "WITHDRAW", 2, D)]
    cut = proxy.cut_next(b"wallet.apply_operations", point)

    told = await results(lossy, repeated)

    assert cut.done()
    assert told == [success(0, 2), success(1, 1), success(5, 3), duplicate(operations[2], 5, 3), NO_MONEY]
    assert await results(lossy, operations) == [
        duplicate(operation, balance_after, seq)
        for operation, (balance_after, seq) in zip(operations, [(0, 2), (1, 1), (5, 3)], strict=True)
    ]
    assert [await balance(lossy, wallet) for wallet in ("w", "v")] == [5, 1]


def waiting(client: TestClient) -> int:
    """Return the number of bulk requests that wait for a call."""
    return len(client.app[BULK]._waiting)


@contextlib.asynccontextmanager
async def two_calls(client: TestClient, superuser: psycopg.Connection) -> AsyncIterator[None]:
    """Keep bulk requests waiting: both calls wait for wallet `pilot`."""
    with locked(superuser, "pilot"):
        ahead = []
        for calls in (1, 2):
            ahead.append(asyncio.create_task(bulk(client, [item("pilot", "DEPOSIT", 1)])))
            await until(lambda calls=calls: waiting_backends(superuser) == calls)
        yield
    assert [(await answer).status for answer in ahead] == [200, 200]


async def in_one_call(
    client: TestClient, superuser: psycopg.Connection, *requests: list[dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    """Ask for operations in bulk requests that wait together, in this order, and return the results of each."""
    asked: list[asyncio.Task[list[dict[str, Any]]]] = []
    async with two_calls(client, superuser):
        for operations in requests:
            asked.append(asyncio.create_task(results(client, operations)))
            await until(lambda: waiting(client) == len(asked))
    return await asyncio.gather(*asked)


@pytest.mark.parametrize(("batch", "calls"), [(4096, [9]), (6, [6, 3]), (5, [3, 3, 3]), (2, [3, 3, 3])])
async def test_bulk_requests_that_wait_share_a_call(
    batch: int,
    calls: list[int],
    superuser: psycopg.Connection,
    database_url: str,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "BULK_BATCH", batch)
    client = await aiohttp_client(make_app(Settings(database_url=database_url)))
    await create(client, {"pilot": 0, "w": 0})
    operations = [uuid4() for _ in range(9)]

    items = [item("w", "DEPOSIT", 1, operation) for operation in operations]
    for told in await in_one_call(client, superuser, items[:3], items[3:6], items[6:]):
        assert [result["applied"] for result in told] == [True] * 3
    query = "select count(*) from wallet.operation where operation_uuid = any(%s) group by created_at"
    assert sorted((count for (count,) in superuser.execute(query, [operations])), reverse=True) == calls


async def test_the_refusals_of_bulk_requests_that_share_a_call_are_each_told_to_the_right_one(
    superuser: psycopg.Connection, client: TestClient
) -> None:
    await create(client, {"pilot": 0, "w": 1})
    first = [item("w", "WITHDRAW", 2), item("w", "DEPOSIT", 3, A)]
    second = [item("w", "DEPOSIT", 3, A), item("w", "WITHDRAW", 2)]

    told = await in_one_call(client, superuser, first, second)

    assert told == [[NO_MONEY, success(4, 2)], [duplicate(second[0], 4, 2), success(2, 3)]]
    assert len({operation["created_at"] for operation in await history(client, "w")}) == 2  # the first held the money


@pytest.mark.parametrize("point", Point)
async def test_a_lost_call_that_bulk_requests_shared_answers_each_what_was_applied(
    point: Point, proxy: Proxy, superuser: psycopg.Connection, lossy: TestClient
) -> None:
    await create(lossy, {"pilot": 0, "w": 100})
    first = [item("w", "WITHDRAW", 100, A), item("w", "DEPOSIT", 1, B)]
    second = [item("w", "WITHDRAW", 200, C), item("w", "DEPOSIT", 5, D)]
    cut = proxy.cut_next(b"wallet.apply_operations", point)

    told = await in_one_call(lossy, superuser, first, second)

    assert cut.done()
    assert told == [[success(0, 2), success(1, 3)], [NO_MONEY, success(6, 4)]]
    assert await balance(lossy, "w") == 6


async def test_what_shares_a_call_with_an_overdue_bulk_request_goes_on(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, request_deadline=2)))
    await create(client, {"pilot": 0, "a": 0, "w": 0})
    with locked(superuser, "a"):
        async with two_calls(client, superuser):
            first = asyncio.create_task(bulk(client, [item("a", "DEPOSIT", 1), item("w", "DEPOSIT", 2)]))
            await asyncio.sleep(1)  # it is older by half of its deadline
            second = asyncio.create_task(results(client, [item("w", "DEPOSIT", 3), item("w", "WITHDRAW", 4)]))
            await until(lambda: waiting(client) == 2)
        await problem(await first, 503, "unavailable")
        assert await second == [success(3, 1), NO_MONEY]


@contextlib.asynccontextmanager
async def call_under_way(client: TestClient, superuser: psycopg.Connection) -> AsyncIterator[None]:
    """Keep one call of three operations waiting for wallet `w`."""
    with locked(superuser, "w"):
        three = [item("w", "DEPOSIT", 1) for _ in range(3)]
        call = asyncio.create_task(bulk(client, three))
        await until(lambda: waiting_backends(superuser) == 1)
        yield
        assert not call.done()
    assert (await call).status == 200


@pytest.mark.parametrize(("batch", "enough"), [(4096, 3), (2, 2)])
async def test_a_second_call_waits_for_as_much_as_the_first_one_carries(
    batch: int,
    enough: int,
    superuser: psycopg.Connection,
    database_url: str,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane, "LINGER", 3600)
    monkeypatch.setattr(dispatch, "BULK_BATCH", batch)
    client = await aiohttp_client(make_app(Settings(database_url=database_url)))
    await create(client, {"w": 0, "v": 0})
    async with call_under_way(client, superuser):
        few = [asyncio.create_task(bulk(client, [item("v", "DEPOSIT", 1)])) for _ in range(enough - 1)]
        await until(lambda: waiting(client) == enough - 1)
        await asyncio.sleep(0.1)
        assert waiting(client) == enough - 1

        few.append(asyncio.create_task(bulk(client, [item("v", "DEPOSIT", 1)])))
        assert [(await answer).status for answer in few] == [200] * enough


async def test_a_full_queue_waits_for_nobody(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "LINGER", 3600)
    client = await aiohttp_client(make_app(Settings(database_url=database_url, bulk_queue=1)))
    await create(client, {"w": 0, "v": 0})
    async with call_under_way(client, superuser), asyncio.timeout(5):  # half of the deadline
        assert (await bulk(client, [item("v", "DEPOSIT", 1)])).status == 200


async def test_an_atomic_request_waits_for_nobody_to_join_it(
    superuser: psycopg.Connection, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "LINGER", 3600)
    await create(client, {"w": 0, "v": 0})
    wanted = {"operations": [item("v", "DEPOSIT", 1)], "atomic": True}
    async with call_under_way(client, superuser), asyncio.timeout(5):  # half of the deadline
        assert (await client.post("/api/v1/operations", json=wanted)).status == 200


async def test_a_second_call_goes_when_the_first_one_is_over(
    superuser: psycopg.Connection, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "LINGER", 3600)
    await create(client, {"w": 0, "v": 0})
    async with call_under_way(client, superuser):
        second = asyncio.create_task(bulk(client, [item("v", "DEPOSIT", 1)]))
        await until(lambda: waiting(client) == 1)
    async with asyncio.timeout(5):  # half of the deadline
        assert (await second).status == 200


async def test_a_second_call_waits_no_more_than_a_moment(superuser: psycopg.Connection, client: TestClient) -> None:
    await create(client, {"w": 0, "v": 0})
    async with call_under_way(client, superuser), asyncio.timeout(5):  # half of the deadline
        assert (await bulk(client, [item("v", "DEPOSIT", 1)])).status == 200


async def test_one_bulk_request_too_many_is_told_at_once(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, bulk_queue=3)))
    await create(client, {"pilot": 0, "w": 0})

    async with two_calls(client, superuser):
        accepted = [asyncio.create_task(bulk(client, [item("w", "DEPOSIT", 1)])) for _ in range(3)]
        await until(lambda: waiting(client) == 3)
        async with asyncio.timeout(5):  # half of the deadline
            refused = await asyncio.gather(*(bulk(client, [item("w", "DEPOSIT", 1000)]) for _ in range(5)))

    for answer in refused:
        await problem(answer, 429, "overloaded")
        assert int(answer.headers["Retry-After"]) > 0
    assert [(await answer).status for answer in accepted] == [200] * 3
    assert await balance(client, "w") == 3
