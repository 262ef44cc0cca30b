"""The table of cases over REST: one by one, in bulk, and all or nothing."""

from collections import Counter
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient

from tests.api.door import apply, balance, create, held, hold_for_a_moment, is_due, path, problem, put
from tests.cases import CASES, MESSAGES, PROBLEMS, Case, Request

CODES = {"WA425": "not_applied"} | {sqlstate: code for sqlstate, (_, code) in PROBLEMS.items()}
pytestmark = pytest.mark.asyncio(loop_scope="module")
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "_") for case in CASES])


@pytest.fixture
def service(shared_service: psycopg.Connection, emptied: None) -> psycopg.Connection:
    return shared_service


@pytest.fixture
def client(shared_client: TestClient, emptied: None) -> TestClient:
    return shared_client


def terms_of(request: Request) -> dict[str, Any]:
    """Return what a request's body has beside its names, its type and its amount."""
    more = {
        "counterparty_uuid": request.counterparty,
        "hold_uuid": request.hold and str(request.hold),
        "expires_at": request.expires_at and request.expires_at.isoformat(),
        "metadata": request.metadata,
    }
    return {name: value for name, value in more.items() if value is not None}


def item_of(request: Request) -> dict[str, Any]:
    """Return a request as an operation of a bulk request."""
    names = {"wallet_uuid": request.wallet, "operation_uuid": str(request.operation)}
    return names | {"operation_type": request.type, "amount": request.amount} | terms_of(request)


async def is_refused(answer: ClientResponse, outcome: str, status: int | None = None) -> dict[str, Any]:
    told = await problem(answer, status or PROBLEMS[outcome][0], PROBLEMS[outcome][1])
    assert told["detail"] == MESSAGES.get(outcome, told["detail"])
    return told


async def set_up(client: TestClient, case: Case) -> dict[UUID, tuple[Request, Any]]:
    """Make what a case begins with; return its holds and how they are recorded, by name."""
    await create(client, case.wallets, case.currencies)
    for request in case.holds:
        answer = await put(client, request.wallet, "HOLD", request.amount, request.operation, **terms_of(request))
        assert answer.status == 201
    until = await hold_for_a_moment(client, *map(item_of, case.due)) if case.due else None
    holds = [*case.holds, *(request._replace(expires_at=until) for request in case.due)]
    made = {request.operation: (request, await read(client, request)) for request in holds}
    for wallet in {request.wallet for request in case.due}:
        await is_due(client, wallet, held_before(case)[wallet])
    for wallet, status in case.statuses.items():
        assert (await client.patch(path(wallet), json={"status": status})).status == 200
    return made


def held_before(case: Case) -> Counter[str]:
    held = Counter[str]()
    for request in case.holds:
        held[request.wallet] += request.amount or 0
    return held


async def balances(client: TestClient, case: Case) -> dict[str, int]:
    return {wallet: await balance(client, wallet) for wallet in case.wallets}


async def holdings(client: TestClient, wallets: Iterable[str]) -> dict[str, int]:
    """Return what is held, where that is not 0."""
    return {wallet: amount for wallet in wallets if (amount := await held(client, wallet))}


@each_case
async def test_one_by_one(case: Case, client: TestClient, service: psycopg.Connection) -> None:
    await set_up(client, case)

    for request in case.requests:
        answer = await apply(
            client, request.wallet, request.type, request.amount, request.operation, **terms_of(request)
        )
        if request.outcome is None:
            assert (answer.status, await answer.json()) == (200, str(request.operation))
        else:
            await is_refused(answer, request.outcome)

    assert await balances(client, case) == case.balances
    assert await holdings(client, case.wallets) == case.held
    assert service.execute("select * from wallet.verify()").fetchall() == []


@each_case
async def test_put_one_by_one(case: Case, client: TestClient, service: psycopg.Connection) -> None:
    applied = await set_up(client, case)

    for request in case.requests:
        answer = await put(client, request.wallet, request.type, request.amount, request.operation, **terms_of(request))
        first, recorded = applied.get(request.operation, (request, None))
        if request.outcome is None:
            assert answer.status == 201
            applied[request.operation] = request, await answer.json()
            assert await read(client, request) == applied[request.operation][1]
        elif request.outcome == "WA409" and request._replace(outcome=None) == first:
            assert (answer.status, await answer.json()) == (200, recorded)
        elif request.outcome == "WA409":
            told = await is_refused(answer, "WA409", 409)
            is_own = request.wallet == first.wallet
            assert (told.get("operation"), told.get("same_request")) == ((recorded, False) if is_own else (None, None))
        else:
            await is_refused(answer, request.outcome)

    assert await balances(client, case) == case.balances
    assert await holdings(client, case.wallets) == case.held
    assert service.execute("select * from wallet.verify()").fetchall() == []


async def read(client: TestClient, request: Request) -> Any:
    return await (await client.get(path(request.wallet, f"/operations/{request.operation}"))).json()


@each_case
async def test_all_in_one_request(case: Case, client: TestClient, service: psycopg.Connection) -> None:
    await set_up(client, case)

    answer = await client.post("/api/v1/operations", json={"operations": list(map(item_of, case.requests))})

    if answer.status == 400:  # what can be seen without the database refuses the whole request
        assert (await is_refused(answer, "WA400"))["errors"][0]["loc"][:2] == ["body", "operations"]
        assert "WA400" in {request.outcome for request in case.requests}
        assert await balances(client, case) == case.wallets
        assert await holdings(client, case.wallets) == held_before(case)
        return
    assert answer.status == 200
    for request, result in zip(case.requests, (await answer.json())["results"], strict=True):
        assert result["operation_uuid"] == str(request.operation)
        assert result["applied"] is (request.outcome is None)
        if request.outcome is not None:
            assert result["code"] == PROBLEMS[request.outcome][1]
            assert result["detail"] == MESSAGES.get(request.outcome, result["detail"])
    assert await balances(client, case) == case.balances
    assert await holdings(client, case.wallets) == case.held
    assert service.execute("select * from wallet.verify()").fetchall() == []


@each_case
async def test_all_or_nothing(case: Case, client: TestClient, service: psycopg.Connection) -> None:
    await set_up(client, case)
    wanted = {"operations": list(map(item_of, case.requests)), "atomic": True}

    answer = await client.post("/api/v1/operations", json=wanted)

    if answer.status == 400:
        await is_refused(answer, "WA400")
        assert await balances(client, case) == case.wallets
        assert await holdings(client, case.wallets) == held_before(case)
        return
    refused = any(request.outcome is not None for request in case.requests)
    for request, result in zip(case.requests, (await answer.json())["results"], strict=True):
        if not refused:
            assert result["applied"]
            continue
        outcome = request.outcome or "WA425"
        assert (result["applied"], result["code"]) == (False, CODES[outcome])
        assert result["detail"] == MESSAGES.get(outcome, result["detail"])
    assert await balances(client, case) == (case.wallets if refused else case.balances)
    assert await holdings(client, case.wallets) == (held_before(case) if refused else case.held)
    assert service.execute("select * from wallet.verify()").fetchall() == []
    if not refused:
        again = await (await client.post("/api/v1/operations", json=wanted)).json()
        assert [result["same_request"] for result in again["results"]] == [True] * len(case.requests)
