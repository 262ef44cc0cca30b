"""The service as its HTTP clients call it."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient
from yarl import URL

MAX = 2**63 - 1


def path(wallet: str, below: str = "") -> URL:
    """Return the path of a wallet, or of what lies below it, with whatever the name holds percent-encoded."""
    return URL(f"/api/v1/wallets/{quote(wallet, safe='')}{below}", encoded=True)


async def create(
    client: TestClient,
    wallets: dict[str, int],
    currencies: Mapping[str, str] = {},
    statuses: Mapping[str, str] = {},
) -> None:
    """Create wallets that hold so much."""
    for wallet, balance in wallets.items():
        new = {"uuid": wallet, "currency": currencies.get(wallet)}
        assert (await client.post("/api/v1/wallets", json=new)).status == 201
        if balance:
            assert (await deposit(client, wallet, balance)).status == 200
    for wallet, status in statuses.items():
        assert (await client.patch(path(wallet), json={"status": status})).status == 200


async def apply(
    client: TestClient, wallet: str, operation_type: str, amount: int | None, operation: UUID | None = None, **more: Any
) -> ClientResponse:
    """Ask for an operation; without a name it gets one of its own."""
    body = {"operation_uuid": str(operation or uuid4()), "operation_type": operation_type, "amount": amount, **more}
    return await client.post(path(wallet, "/operation"), json=body)


async def put(
    client: TestClient, wallet: str, operation_type: str, amount: int | None, operation: UUID, **more: Any
) -> ClientResponse:
    """Ask for an operation by its own path."""
    body = {"operation_type": operation_type, "amount": amount, **more}
    return await client.put(path(wallet, f"/operations/{operation}"), json=body)


async def deposit(client: TestClient, wallet: str, amount: int, operation: UUID | None = None) -> ClientResponse:
    return await apply(client, wallet, "DEPOSIT", amount, operation)


async def withdraw(client: TestClient, wallet: str, amount: int, operation: UUID | None = None) -> ClientResponse:
    return await apply(client, wallet, "WITHDRAW", amount, operation)


async def transfer(
    client: TestClient, wallet: str, payee: str, amount: int, operation: UUID | None = None
) -> ClientResponse:
    return await apply(client, wallet, "TRANSFER", amount, operation, counterparty_uuid=payee)


async def hold(client: TestClient, wallet: str, amount: int, name: UUID, **more: Any) -> ClientResponse:
    return await apply(client, wallet, "HOLD", amount, name, **more)


async def release(client: TestClient, wallet: str, name: UUID, operation: UUID | None = None) -> ClientResponse:
    return await apply(client, wallet, "RELEASE", None, operation, hold_uuid=str(name))


async def capture(
    client: TestClient, wallet: str, amount: int, name: UUID, operation: UUID | None = None
) -> ClientResponse:
    return await apply(client, wallet, "WITHDRAW", amount, operation, hold_uuid=str(name))


async def balance(client: TestClient, wallet: str) -> int:
    answer = await client.get(path(wallet))
    assert answer.status == 200
    return (await answer.json())["balance"]


async def held(client: TestClient, wallet: str, **query: str) -> int:
    """Return what is held, and see that the rest is available."""
    told = await (await client.get(path(wallet, "/balance"), params=query)).json()
    assert told["available"] == told["balance"] - told["held"] >= 0
    return told["held"]


async def is_due(client: TestClient, wallet: str, held_then: int = 0) -> None:
    """Wait until no more than this is held."""
    while await held(client, wallet) > held_then:
        await asyncio.sleep(0.01)


async def hold_for_a_moment(client: TestClient, *holds: Mapping[str, Any], seconds: float = 0.2) -> datetime:
    """Make holds in one atomic request, and return when they are due: after so long, or as soon as is possible here."""
    for patience in (1, 10, 100):
        until = datetime.now(UTC) + timedelta(seconds=patience * seconds)
        named = [{"operation_type": "HOLD", "expires_at": until.isoformat(), **hold} for hold in holds]
        answer = await client.post("/api/v1/operations", json={"operations": named, "atomic": True})
        if all(result["applied"] for result in (await answer.json())["results"]):
            return until
    raise AssertionError("no hold was made before it was due")


async def history(client: TestClient, wallet: str) -> list[dict[str, Any]]:
    """Return all operations of a wallet, oldest first."""
    operations: list[dict[str, Any]] = []
    query: dict[str, int] = {"limit": 1000}
    while True:
        page = await (await client.get(path(wallet, "/operations"), params=query)).json()
        operations += page["operations"]
        if page["next"] is None:
            return operations[::-1]
        query["before"] = page["next"]


async def problem(answer: ClientResponse, status: int, code: str) -> dict[str, Any]:
    """Assert that an answer is this problem, with every member that the contract asks for, and return it."""
    body = await answer.json(content_type=None)
    assert answer.status == status, body
    assert body.get("code") == code, body
    assert answer.content_type == "application/problem+json"
    assert body["type"] == "about:blank"
    assert body["title"]
    assert body["status"] == status
    assert body["detail"]
    return body
