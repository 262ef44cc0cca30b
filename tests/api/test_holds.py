"""Holds over REST: what the table of cases does not show."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient

from tests.api.door import (
    apply,
    balance,
    capture,
    create,
    deposit,
    held,
    history,
    hold,
    hold_for_a_moment,
    is_due,
    path,
    problem,
    put,
    release,
    withdraw,
)

X, Y, A, B, C = (UUID(f"{letter * 8}-0000-4000-8000-00000000000{letter}") for letter in "efabc")
CLOSED = (400, "hold_closed")


@pytest.fixture(autouse=True)
def right_books(service: psycopg.Connection) -> Iterator[None]:
    yield
    assert service.execute("select * from wallet.verify()").fetchall() == []


async def at_once(*requests: Awaitable[ClientResponse]) -> Counter[tuple[int, str]]:
    """Send requests together and count what comes back, by status and code."""
    outcomes: Counter[tuple[int, str]] = Counter()
    for answer in await asyncio.gather(*requests):
        body = await answer.json(content_type=None)
        outcomes[answer.status, body["code"] if answer.status >= 400 else ""] += 1
    return outcomes


async def holds(client: TestClient, wallet: str, **query: int) -> Any:
    answer = await client.get(path(wallet, "/holds"), params=query)
    assert answer.status == 200
    return await answer.json()


# Reads


async def test_what_is_held_is_shown_beside_the_balance(client: TestClient) -> None:
    await create(client, {"w": 100})
    await hold(client, "w", 60, X)

    assert await (await client.get(path("w"))).json() == {"id": 1, "uuid": "w", "balance": 100}
    told = await (await client.get(path("w", "/balance"))).json()
    assert (told["balance"], told["held"], told["available"], told["seq"]) == (100, 60, 40, 2)
    for listed in (await (await client.get("/api/v1/wallets")).json())["wallets"]:
        assert listed == told
    assert await (await client.patch(path("w"), json={"status": "FROZEN"})).json() == told | {"status": "FROZEN"}
    assert await (await client.put(path("w"))).json() == told | {"status": "FROZEN"}


async def test_a_hold_and_its_capture_are_shown_with_what_they_have(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0})
    until = "2099-12-31T22:59:59.000001+01:00"

    made = await put(client, "w", "HOLD", 60, X, expires_at=until, metadata={"order": 1})
    captured = await put(client, "w", "TRANSFER", 50, A, hold_uuid=X.hex.upper(), counterparty_uuid="v")

    assert (made.status, captured.status) == (201, 201)
    one, two = await made.json(), await captured.json()
    assert one == {
        "operation_uuid": str(X),
        "wallet_uuid": "w",
        "operation_type": "HOLD",
        "amount": 60,
        "balance_after": 100,
        "held_after": 60,
        "seq": 2,
        "created_at": one["created_at"],
        "expires_at": "2099-12-31T21:59:59.000001Z",
        "metadata": {"order": 1},
    }
    assert two == {
        "operation_uuid": str(A),
        "wallet_uuid": "w",
        "operation_type": "TRANSFER",
        "amount": 50,
        "balance_after": 50,
        "held_after": 0,
        "seq": 3,
        "created_at": two["created_at"],
        "counterparty_uuid": "v",
        "hold_uuid": str(X),
    }
    assert (await history(client, "w"))[1:] == [one, two]
    assert "hold_uuid" not in (await history(client, "v"))[0]


@pytest.mark.parametrize("until", ["9999-12-31T23:59:59.999999Z", "2099-01-01T00:00:00Z", "2099-01-01T00:00:00.5Z"])
async def test_an_expiry_comes_back_as_it_was_given(client: TestClient, until: str) -> None:
    await create(client, {"w": 100})
    assert (await (await put(client, "w", "HOLD", 1, X, expires_at=until)).json())["expires_at"] == until
    assert (await holds(client, "w"))["holds"][0]["expires_at"] == until


async def test_the_same_expiry_in_another_zone_is_the_same_request(client: TestClient) -> None:
    await create(client, {"w": 100})
    made = await put(client, "w", "HOLD", 60, X, expires_at="2099-01-01T12:00:00Z")
    again = await put(client, "w", "HOLD", 60, X, expires_at="2099-01-01t15:00:00.000+03:00")
    other = await put(client, "w", "HOLD", 60, X, expires_at="2099-01-01T12:00:00.000001Z")
    never = await put(client, "w", "HOLD", 60, X)
    assert (made.status, again.status, other.status, never.status) == (201, 200, 409, 409)
    assert await again.json() == await made.json()


async def test_an_expiry_that_is_past_is_refused_however_long_ago(client: TestClient) -> None:
    await create(client, {"w": 100})
    for until in ("0001-01-01T00:00:00Z", "2020-01-01T00:00:00Z"):
        await problem(await hold(client, "w", 1, X, expires_at=until), *CLOSED)


@pytest.mark.parametrize("count", [0, 6, 7, 8])
async def test_pages_of_holds_follow_each_other_to_the_newest(client: TestClient, count: int) -> None:
    await create(client, {"w": 100, "v": 5})
    await hold(client, "v", 5, Y)
    await hold(client, "w", 1, X)
    await capture(client, "w", 1, X)
    for amount in range(1, count + 1):
        await hold(client, "w", amount, uuid4())

    found: list[Any] = []
    query = {"limit": 3}
    while True:
        page = await holds(client, "w", **query)
        assert len(page["holds"]) <= 3
        found += page["holds"]
        if page["next"] is None:
            break
        query["after"] = page["next"]

    recorded = [one for one in await history(client, "w") if one["operation_uuid"] != str(X)][-count:] if count else []
    assert found == [
        {"hold_uuid": one["operation_uuid"], "expires_at": None}
        | {name: one[name] for name in ("seq", "amount", "created_at")}
        for one in recorded
        if one["operation_type"] == "HOLD"
    ]
    assert [one["amount"] for one in found] == list(range(1, count + 1))


async def test_the_holds_of_nobody_are_not_found(client: TestClient) -> None:
    await problem(await client.get(path("nobody", "/holds")), 404, "wallet_not_found")


async def test_from_its_expiry_on_a_hold_is_over_in_every_answer(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0})
    await hold(client, "w", 10, Y)
    until = await hold_for_a_moment(client, {"wallet_uuid": "w", "operation_uuid": str(X), "amount": 60}, seconds=2)
    assert await held(client, "w") == 70
    asked = {"expires_at": until.isoformat()}
    made = await (await client.get(path("w", f"/operations/{X}"))).json()

    await is_due(client, "w", 10)

    assert datetime.now(UTC) >= until
    assert [one["hold_uuid"] for one in (await holds(client, "w"))["holds"]] == [str(Y)]
    assert (await (await client.get("/api/v1/wallets")).json())["wallets"][1]["available"] == 90
    assert await held(client, "w", at=(until - timedelta(microseconds=1)).isoformat()) == 70
    assert await held(client, "w", at=until.isoformat()) == 10
    await problem(await capture(client, "w", 60, X), *CLOSED)
    await problem(await release(client, "w", X), *CLOSED)
    again = await put(client, "w", "HOLD", 60, X, **asked)
    assert (again.status, await again.json()) == (200, made)
    assert [one["operation_type"] for one in await history(client, "w")] == ["DEPOSIT", "HOLD", "HOLD"]

    assert (await withdraw(client, "w", 90)).status == 200

    *_, expired, last = await history(client, "w")
    assert (last["operation_type"], last["balance_after"], last["held_after"]) == ("WITHDRAW", 10, 10)
    assert expired == {
        "operation_uuid": str(X),
        "wallet_uuid": "w",
        "operation_type": "EXPIRE",
        "amount": 60,
        "balance_after": 100,
        "held_after": 10,
        "seq": 4,
        "created_at": made["expires_at"],
        "hold_uuid": str(X),
    }
    assert await (await client.get(path("w", f"/operations/{X}"))).json() == made
    await problem(await capture(client, "w", 60, X), *CLOSED)


# Races


async def test_64_clients_capture_one_hold_and_one_does(client: TestClient) -> None:
    await create(client, {"w": 100})
    await hold(client, "w", 60, X)

    outcomes = await at_once(*(put(client, "w", "WITHDRAW", 60, uuid4(), hold_uuid=str(X)) for _ in range(64)))

    assert outcomes == {(201, ""): 1, CLOSED: 63}
    assert (await balance(client, "w"), await held(client, "w")) == (40, 0)


async def test_64_clients_put_one_capture_and_one_applies_it(client: TestClient) -> None:
    await create(client, {"w": 100})
    await hold(client, "w", 60, X)

    outcomes = await at_once(*(put(client, "w", "WITHDRAW", 50, A, hold_uuid=str(X)) for _ in range(64)))

    assert outcomes == {(201, ""): 1, (200, ""): 63}
    assert (await balance(client, "w"), await held(client, "w")) == (50, 0)


async def test_of_captures_and_releases_one_ends_the_hold(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0})
    names = [uuid4() for _ in range(20)]
    for name in names:
        await hold(client, "w", 5, name)

    async def race(name: UUID) -> Counter[tuple[int, str]]:
        item = {"operation_type": "TRANSFER", "amount": 4, "counterparty_uuid": "v", "hold_uuid": str(name)}
        bulk = {"operations": [item | {"wallet_uuid": "w", "operation_uuid": str(uuid4())}]}
        *single, shared = await asyncio.gather(
            capture(client, "w", 5, name),
            release(client, "w", name),
            capture(client, "w", 3, name),
            client.post("/api/v1/operations", json=bulk),
        )
        [result] = (await shared.json())["results"]
        outcomes = Counter[tuple[int, str]]()
        for answer in single:
            outcomes[answer.status, "" if answer.status == 200 else (await problem(answer, *CLOSED))["code"]] += 1
        outcomes[(200, "") if result["applied"] else (400, result["code"])] += 1
        return outcomes

    assert await asyncio.gather(*map(race, names)) == [{(200, ""): 1, CLOSED: 3}] * 20
    ends = [one for one in await history(client, "w") if "hold_uuid" in one]
    assert {one["hold_uuid"] for one in ends} == set(map(str, names))
    assert len(ends) == 20
    assert await held(client, "w") == 0
    taken = sum(one["amount"] for one in ends if one["operation_type"] != "RELEASE")
    assert await balance(client, "w") == 100 - taken


async def test_a_capture_before_the_expiry_succeeds_and_one_after_it_does_not(client: TestClient) -> None:
    await create(client, {"w": 100})
    names = [uuid4() for _ in range(40)]
    asked = [{"wallet_uuid": "w", "operation_uuid": str(name), "amount": 1} for name in names]
    until = await hold_for_a_moment(client, *asked, seconds=1)

    captured = Counter[tuple[int, str]]()
    for name in names:  # one after another, past the moment
        answer = await put(client, "w", "WITHDRAW", 1, uuid4(), hold_uuid=str(name))
        told = await answer.json(content_type=None)
        captured[answer.status, told.get("code", "")] += 1
        if answer.status == 201:
            assert datetime.fromisoformat(told["created_at"]) < until
        else:
            assert datetime.now(UTC) >= until
        await asyncio.sleep(0.05)

    assert captured.keys() == {(201, ""), CLOSED}
    assert await balance(client, "w") == 100 - captured[201, ""]
    assert await held(client, "w") == 0


async def test_64_clients_hold_and_capture_and_release_and_nothing_is_lost(client: TestClient) -> None:
    await create(client, {"w": 640})
    taken = 0

    async def one_client(number: int) -> None:
        nonlocal taken
        for turn in range(6):
            name = uuid4()
            answer = await hold(client, "w", 10, name)
            if answer.status != 200:
                await problem(answer, 400, "insufficient_funds")
            elif (number + turn) % 3 == 0:
                assert (await release(client, "w", name)).status == 200
            else:
                assert (await capture(client, "w", 3, name)).status == 200
                taken += 3

    await asyncio.gather(*map(one_client, range(64)))

    assert taken > 0
    assert (await balance(client, "w"), await held(client, "w")) == (640 - taken, 0)


# In bulk


def item(operation_type: str, operation: UUID, amount: int | None = None, **more: Any) -> dict[str, Any]:
    names = {"wallet_uuid": "w", "operation_uuid": str(operation), "operation_type": operation_type}
    return names | ({} if amount is None else {"amount": amount}) | more


async def bulk(client: TestClient, *items: dict[str, Any], atomic: bool = False) -> list[dict[str, Any]]:
    answer = await client.post("/api/v1/operations", json={"operations": items, "atomic": atomic})
    assert answer.status == 200
    results = (await answer.json())["results"]
    return [{name: value for name, value in result.items() if name != "operation_uuid"} for result in results]


async def test_a_hold_its_capture_and_a_fee_go_together(client: TestClient) -> None:
    await create(client, {"w": 100, "shop": 0, "fees": 0})
    items = (
        item("HOLD", X, 95),
        item("TRANSFER", A, 90, counterparty_uuid="shop", hold_uuid=str(X)),
        item("TRANSFER", B, 5, counterparty_uuid="fees"),
    )

    results = await bulk(client, *items, atomic=True)

    assert results == [
        {"applied": True, "balance_after": 100, "held_after": 95, "seq": 2},
        {"applied": True, "balance_after": 10, "held_after": 0, "seq": 3},
        {"applied": True, "balance_after": 5, "held_after": 0, "seq": 4},
    ]
    again = await bulk(client, *items, atomic=True)
    assert [(result["code"], result["same_request"]) for result in again] == [("duplicate_operation", True)] * 3
    assert [await balance(client, wallet) for wallet in ("w", "shop", "fees")] == [5, 90, 5]


async def test_where_the_fee_cannot_be_paid_nothing_is_held(client: TestClient) -> None:
    await create(client, {"w": 100, "shop": 0, "fees": 0})
    results = await bulk(
        client,
        item("HOLD", X, 99),
        item("TRANSFER", A, 99, counterparty_uuid="shop", hold_uuid=str(X)),
        item("TRANSFER", B, 5, counterparty_uuid="fees"),
        atomic=True,
    )

    assert [result["code"] for result in results] == ["not_applied", "not_applied", "insufficient_funds"]
    assert (await balance(client, "w"), await held(client, "w"), await balance(client, "shop")) == (100, 0, 0)
    await problem(await capture(client, "w", 1, X), 404, "hold_not_found")


async def test_what_a_type_does_not_take_is_refused_to_its_own_request(client: TestClient) -> None:
    await create(client, {"w": 100})
    nil = str(UUID(int=0))

    results = await bulk(
        client,
        item("HOLD", X, 10),
        item("DEPOSIT", A),
        item("DEPOSIT", A, 1, hold_uuid=str(X)),
        item("WITHDRAW", A, 1, expires_at="2099-01-01T00:00:00Z"),
        item("WITHDRAW", A, 1, hold_uuid=nil),
        item("RELEASE", A, 10, hold_uuid=str(X)),
        item("RELEASE", A),
        item("HOLD", A, 1, counterparty_uuid="v"),
        item("RELEASE", A, hold_uuid=str(X)),
    )

    assert [result["applied"] for result in results] == [True, *[False] * 7, True]
    assert {result["code"] for result in results[1:-1]} == {"invalid_request"}
    assert results[1]["detail"] == "amount must not be null"
    assert results[-1]["held_after"] == 0


async def test_what_shares_a_call_with_a_bad_request_is_applied(client: TestClient) -> None:
    await create(client, {"w": 100})
    answers = await asyncio.gather(
        *(apply(client, "w", "DEPOSIT", None) for _ in range(8)), *(hold(client, "w", 1, uuid4()) for _ in range(8))
    )
    for answer in answers[:8]:
        assert (await problem(answer, 400, "invalid_request"))["detail"] == "amount must not be null"
    assert [answer.status for answer in answers[8:]] == [200] * 8
    assert await held(client, "w") == 8


async def test_money_that_comes_in_ends_what_is_due(client: TestClient) -> None:
    await create(client, {"w": 100})
    await hold_for_a_moment(client, {"wallet_uuid": "w", "operation_uuid": str(X), "amount": 60})
    await is_due(client, "w")

    await deposit(client, "w", 1, C)

    assert [(one["operation_type"], one["held_after"]) for one in await history(client, "w")][2:] == [
        ("EXPIRE", 0),
        ("DEPOSIT", 0),
    ]
