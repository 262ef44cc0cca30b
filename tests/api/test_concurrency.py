"""Many clients at once: whoever comes first, the books are right."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Iterator
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient

from tests.api.door import apply, balance, create, deposit, history, problem, put, transfer, withdraw

A = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
DUPLICATE = (400, "duplicate_operation")
NO_MONEY = (400, "insufficient_funds")
APPLIED = (200, "")
CREATED = (201, "")


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


async def test_64_clients_lose_nothing_and_double_nothing(client: TestClient) -> None:
    await create(client, {"w": 500})
    applied: dict[str, int] = {}
    refused: set[str] = set()

    async def one_client(number: int) -> None:
        chance = random.Random(number)
        for _ in range(15):
            operation, amount = uuid4(), chance.randint(1, 300)
            operation_type = chance.choice(["DEPOSIT", "WITHDRAW"])
            answer = await apply(client, "w", operation_type, amount, operation)
            if answer.status == 200:
                applied[await answer.json()] = amount if operation_type == "DEPOSIT" else -amount
            else:
                await problem(answer, *NO_MONEY)
                refused.add(str(operation))

    await asyncio.gather(*(one_client(number) for number in range(64)))

    assert len(applied) + len(refused) == 64 * 15
    recorded = await history(client, "w")
    moved = {
        o["operation_uuid"]: o["amount"] if o["operation_type"] == "DEPOSIT" else -o["amount"] for o in recorded[1:]
    }
    assert moved == applied
    assert await balance(client, "w") == 500 + sum(applied.values())
    assert [operation["seq"] for operation in recorded] == list(range(1, len(applied) + 2))


async def test_5_of_16_withdrawals_share_money_for_5(client: TestClient) -> None:
    await create(client, {"w": 54})

    outcomes = await at_once(*(withdraw(client, "w", 10) for _ in range(16)))

    assert outcomes == {APPLIED: 5, NO_MONEY: 11}
    assert await balance(client, "w") == 4
    assert len(await history(client, "w")) == 1 + 5


async def test_one_of_16_requests_with_one_uuid_succeeds_on_one_wallet(client: TestClient) -> None:
    await create(client, {"w": 100})

    outcomes = await at_once(*(withdraw(client, "w", 10, A) for _ in range(16)))

    assert outcomes == {APPLIED: 1, DUPLICATE: 15}
    assert await balance(client, "w") == 90


async def test_one_of_16_requests_with_one_uuid_succeeds_on_16_wallets(client: TestClient) -> None:
    wallets = {f"w{number}": 100 for number in range(16)}
    await create(client, wallets)

    outcomes = await at_once(*(deposit(client, wallet, 10, A) for wallet in wallets))

    assert outcomes == {APPLIED: 1, DUPLICATE: 15}
    assert sorted([await balance(client, wallet) for wallet in wallets]) == [100] * 15 + [110]


async def test_one_of_16_requests_with_one_uuid_and_a_shared_last_coin_succeeds(client: TestClient) -> None:
    await create(client, {"w": 10})

    outcomes = await at_once(*(withdraw(client, "w", 10, A) for _ in range(16)))

    assert outcomes == {APPLIED: 1, DUPLICATE: 15}
    assert await balance(client, "w") == 0


async def test_a_name_is_given_to_one_of_16_who_ask_for_it(client: TestClient) -> None:
    outcomes = await at_once(*(client.post("/api/v1/wallets", json={"uuid": "w"}) for _ in range(16)))

    assert outcomes == {CREATED: 1, (400, "wallet_exists"): 15}


async def test_64_clients_put_one_operation_and_one_applies_it(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0})

    answers = await asyncio.gather(
        *(put(client, "w", "TRANSFER", 10, A, counterparty_uuid="v", metadata={"a": 1}) for _ in range(64))
    )

    assert Counter(answer.status for answer in answers) == {201: 1, 200: 63}
    recorded = (await history(client, "w"))[-1]
    assert [await answer.json() for answer in answers] == [recorded] * 64
    assert (await balance(client, "w"), await balance(client, "v")) == (90, 10)


async def test_opposing_transfers_of_64_clients_move_what_they_say(client: TestClient) -> None:
    names = [f"w{number}" for number in range(8)]
    await create(client, dict.fromkeys(names, 100))
    moved: Counter[str] = Counter()

    async def one_client(number: int) -> None:
        chance = random.Random(number)
        for _ in range(10):
            payer, payee = chance.sample(names, 2)
            amount = chance.randint(1, 60)
            if chance.random() < 0.3:
                back = {"operation_type": "TRANSFER", "operation_uuid": str(uuid4()), "amount": 1}
                there = back | {"operation_uuid": str(uuid4()), "amount": amount}
                items = [
                    there | {"wallet_uuid": payer, "counterparty_uuid": payee},
                    back | {"wallet_uuid": payee, "counterparty_uuid": payer},
                ]
                wanted = {"operations": items, "atomic": True}
                while (answer := await client.post("/api/v1/operations", json=wanted)).status == 429:
                    await asyncio.sleep(0.01)
                results = (await answer.json())["results"]
                assert len({result["applied"] for result in results}) == 1
                net = amount - 1 if results[0]["applied"] else 0
            else:
                answer = await transfer(client, payer, payee, amount)
                net = amount if answer.status == 200 else 0
                if not net:
                    await problem(answer, *NO_MONEY)
            moved[payer] -= net
            moved[payee] += net

    await asyncio.gather(*(one_client(number) for number in range(64)))

    assert {name: await balance(client, name) for name in names} == {name: 100 + moved[name] for name in names}
    assert sum([await balance(client, name) for name in names]) == 800


async def test_a_uuid_is_one_operation_as_a_transfer_and_as_a_deposit_at_both_wallets(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 100})

    outcomes = await at_once(
        *(
            request
            for _ in range(8)
            for request in (
                transfer(client, "w", "v", 10, A),
                transfer(client, "v", "w", 10, A),
                deposit(client, "w", 10, A),
                deposit(client, "v", 10, A),
            )
        )
    )

    assert outcomes == {APPLIED: 1, DUPLICATE: 31}
