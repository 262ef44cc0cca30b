"""The contract over REST, the old service's part of it first."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.settings import Settings
from app.web.application import make_app
from tests.api.door import (
    MAX,
    apply,
    balance,
    create,
    deposit,
    history,
    path,
    problem,
    put,
    transfer,
    withdraw,
)
from tests.conftest import url_of

A, B = (UUID(f"{letter * 8}-0000-4000-8000-00000000000{letter}") for letter in "ab")

# What a client written for the old service relies on


async def test_a_wallet_has_an_id_a_uuid_and_a_balance(client: TestClient) -> None:
    await create(client, {"1111111111": 1500})

    answer = await client.get("/api/v1/wallets/1111111111")

    assert answer.status == 200
    assert answer.content_type == "application/json"
    assert await answer.json() == {"id": 1, "uuid": "1111111111", "balance": 1500}


@pytest.mark.parametrize(("operation_type", "balance_after"), [("DEPOSIT", 1600), ("WITHDRAW", 1400)])
async def test_an_operation_is_answered_with_its_uuid(
    client: TestClient, operation_type: str, balance_after: int
) -> None:
    await create(client, {"1111111111": 1500})

    body = {"operation_type": operation_type, "amount": 100, "operation_uuid": str(A)}
    answer = await client.post("/api/v1/wallets/1111111111/operation", json=body)

    assert answer.status == 200
    assert answer.content_type == "application/json"
    assert await answer.json() == str(A)
    assert await balance(client, "1111111111") == balance_after


@pytest.mark.parametrize(
    "spelling",
    [str(A).upper(), A.hex, A.hex.upper()],
    ids=["upper_case", "without_hyphens", "upper_case_without_hyphens"],
)
async def test_an_operation_uuid_is_answered_in_canonical_form(client: TestClient, spelling: str) -> None:
    await create(client, {"w": 0})

    body = {"operation_uuid": spelling, "operation_type": "DEPOSIT", "amount": 5}
    answer = await client.post("/api/v1/wallets/w/operation", json=body)

    assert answer.status == 200
    assert await answer.json() == str(A)
    assert [operation["operation_uuid"] for operation in await history(client, "w")] == [str(A)]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        'Application/JSON;charset="UTF-8"',
        "application/problem+json",
    ],
)
async def test_a_body_is_taken_for_json_in_utf_8(client: TestClient, content_type: str) -> None:
    await create(client, {"w": 0})

    answer = await client.post(
        "/api/v1/wallets/w/operation",
        data=f'\r\n{{"amount": 5, "operation_type": "DEPOSIT", "operation_uuid": "{A}"}}\t'.encode(),
        headers={"Content-Type": content_type},
    )

    assert answer.status == 200
    assert await balance(client, "w") == 5


async def test_a_field_that_stands_twice_counts_once(client: TestClient) -> None:
    await create(client, {"w": 0})

    body = f'{{"amount": 5, "operation_type": "DEPOSIT", "operation_uuid": "{A}", "amount": 6}}'
    answer = await client.post(
        "/api/v1/wallets/w/operation", data=body.encode(), headers={"Content-Type": "application/json"}
    )

    assert answer.status == 200
    assert [operation["amount"] for operation in await history(client, "w")] == [6]


async def test_a_wallet_that_does_not_exist_is_not_found(client: TestClient) -> None:
    for answer in (
        await client.get("/api/v1/wallets/nobody"),
        await deposit(client, "nobody", 5),
        await client.get("/api/v1/wallets/nobody/operations"),
        await client.get(f"/api/v1/wallets/nobody/operations/{A}"),
    ):
        assert (await problem(answer, 404, "wallet_not_found"))["detail"] == "Wallet not found"


async def test_a_withdrawal_never_overdraws(client: TestClient) -> None:
    await create(client, {"w": 100})

    refused = await withdraw(client, "w", 101)

    assert (await problem(refused, 400, "insufficient_funds"))["detail"] == "Not enough money"
    assert await balance(client, "w") == 100


async def test_an_operation_is_applied_once(client: TestClient) -> None:
    await create(client, {"w": 100})
    assert (await deposit(client, "w", 5, A)).status == 200

    again = await deposit(client, "w", 5, A)

    assert (await problem(again, 400, "duplicate_operation"))["detail"] == "Transaction already exists"
    assert await balance(client, "w") == 105


# A repeated operation


async def test_a_repeat_of_the_same_request_learns_that_its_money_moved(client: TestClient) -> None:
    await create(client, {"w": 100})
    await withdraw(client, "w", 100, A)
    await deposit(client, "w", 7)

    told = await problem(await withdraw(client, "w", 100, A), 400, "duplicate_operation")

    assert told["same_request"] is True
    assert told["operation"] == (await history(client, "w"))[1]
    assert told["operation"]["balance_after"] == 0


@pytest.mark.parametrize(
    ("operation_type", "amount"), [("WITHDRAW", 11), ("DEPOSIT", 10)], ids=["other_amount", "other_type"]
)
async def test_another_request_under_a_used_uuid_learns_what_it_was(
    client: TestClient, operation_type: str, amount: int
) -> None:
    await create(client, {"w": 100})
    await withdraw(client, "w", 10, A)

    body = {"operation_uuid": str(A), "operation_type": operation_type, "amount": amount}
    told = await problem(await client.post(path("w", "/operation"), json=body), 400, "duplicate_operation")

    assert told["same_request"] is False
    assert told["operation"] == (await history(client, "w"))[1]


async def test_a_duplicate_of_another_wallet_s_operation_learns_nothing_of_it(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 100})
    await withdraw(client, "w", 10, A)

    told = await problem(await withdraw(client, "v", 10, A), 400, "duplicate_operation")

    assert "operation" not in told
    assert "same_request" not in told


async def test_a_refused_operation_may_be_tried_again(client: TestClient) -> None:
    await create(client, {"w": 0})
    await problem(await withdraw(client, "w", 10, A), 400, "insufficient_funds")
    await deposit(client, "w", 10)

    assert (await withdraw(client, "w", 10, A)).status == 200
    assert await balance(client, "w") == 0


AMOUNTS = {"10.0": 10, "1e1": 10, "1E+1": 10, "0.1e2": 10, "1000e-2": 10, "10." + "0" * 5000: 10}
AMOUNTS |= {"9007199254740991.0": 2**53 - 1, "9e15": 9 * 10**15, "9007199254740993": 2**53 + 1, str(MAX): MAX}


@pytest.mark.parametrize(("text", "amount"), AMOUNTS.items(), ids=[text[:30] for text in AMOUNTS])
async def test_an_amount_may_be_written_as_any_number_that_is_an_integer(
    client: TestClient, text: str, amount: int
) -> None:
    """JSON Schema (2020-12 core, section 4.2.3) knows no other integers, and what sends doubles sends 10.0."""
    await create(client, {"w": 0, "v": 0})
    body = f'{{"operation_uuid": "{A}", "operation_type": "DEPOSIT", "amount": {text}}}'
    in_bulk = body.replace(str(A), str(B)).replace("{", '{"wallet_uuid": "v", ')
    several = f'{{"operations": [{in_bulk}, {in_bulk.replace(text, "0.5").replace(str(B), str(A))}]}}'
    json = {"Content-Type": "application/json"}

    assert (await client.post("/api/v1/wallets/w/operation", data=body, headers=json)).status == 200
    told = await problem(await client.post("/api/v1/operations", data=several, headers=json), 400, "invalid_request")
    assert told["errors"][0]["loc"] == ["body", "operations", 1, "amount"]
    several = f'{{"operations": [{in_bulk}]}}'
    assert (await client.post("/api/v1/operations", data=several, headers=json)).status == 200

    assert [await balance(client, wallet) for wallet in ("w", "v")] == [amount, amount]


# New wallets


async def test_a_new_wallet_is_empty(client: TestClient) -> None:
    created = await client.post("/api/v1/wallets", json={"uuid": "mine"})

    assert created.status == 201
    assert created.headers["Location"] == "/api/v1/wallets/mine"
    assert await created.json() == {"id": 1, "uuid": "mine", "balance": 0}


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"uuid": null}'], ids=["no_body", "nothing", "empty", "null"])
async def test_a_wallet_without_a_chosen_name_gets_a_random_one(client: TestClient, body: bytes | None) -> None:
    names = set()
    for _ in range(2):
        created = await client.post("/api/v1/wallets", data=body, headers={"Content-Type": "application/json"})
        assert created.status == 201
        wallet = await created.json()
        assert created.headers["Location"] == f"/api/v1/wallets/{wallet['uuid']}"
        assert await (await client.get(created.headers["Location"])).json() == wallet
        names.add(UUID(wallet["uuid"]))
    assert {name.version for name in names} == {4}
    assert len(names) == 2


async def test_a_name_is_given_to_one_wallet_only(client: TestClient) -> None:
    await create(client, {"mine": 5})

    refused = await client.post("/api/v1/wallets", json={"uuid": "mine"})

    assert (await problem(refused, 400, "wallet_exists"))["detail"] == "Wallet already exists"
    assert await balance(client, "mine") == 5


async def test_a_name_may_have_64_characters(client: TestClient) -> None:
    await create(client, {"a-Z_9" + "w" * 59: 5})


async def test_put_creates_a_wallet_once(client: TestClient) -> None:
    first = await client.put("/api/v1/wallets/mine", json={"currency": "EUR"})
    created = await first.json()
    for time in ("created_at", "updated_at"):
        assert datetime.fromisoformat(created[time]).tzinfo is not None
    assert first.status == 201
    assert created == {
        "uuid": "mine",
        "id": 1,
        "currency": "EUR",
        "status": "OPEN",
        "balance": 0,
        "held": 0,
        "available": 0,
        "seq": 0,
        "created_at": created["created_at"],
        "updated_at": created["created_at"],
    }

    again = await client.put("/api/v1/wallets/mine", json={"currency": "EUR"})
    assert (again.status, await again.json()) == (200, created)
    for other in ({"currency": "USD"}, {}, None):
        refused = await client.put("/api/v1/wallets/mine", json=other) if other else await client.put(path("mine"))
        assert (await problem(refused, 409, "wallet_exists"))["detail"] == "Wallet already exists"


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"currency": null}'], ids=["no_body", "nothing", "empty", "null"])
async def test_put_without_a_currency_creates_a_wallet_without_one(client: TestClient, body: bytes | None) -> None:
    for status in (201, 200):
        answer = await client.put(path("mine"), data=body, headers={"Content-Type": "application/json"})
        assert (answer.status, (await answer.json())["currency"]) == (status, None)


async def test_a_new_wallet_may_have_a_currency(client: TestClient) -> None:
    created = await client.post("/api/v1/wallets", json={"uuid": "mine", "currency": "POINTS2026"})
    assert await created.json() == {"id": 1, "uuid": "mine", "balance": 0}
    assert (await balance_row(client, "mine"))["currency"] == "POINTS2026"


# Status


async def test_the_status_can_be_changed_and_the_same_again_changes_nothing(client: TestClient) -> None:
    await create(client, {"w": 0, "v": 5})
    for status in ("FROZEN", "FROZEN", "CLOSED", "OPEN", "CLOSED"):
        answer = await client.patch(path("w"), json={"status": status})
        assert (answer.status, (await answer.json())["status"]) == (200, status)
        assert await answer.json() == await balance_row(client, "w")
    await problem(await client.patch(path("nobody"), json={"status": "OPEN"}), 404, "wallet_not_found")
    told = await problem(await client.patch(path("v"), json={"status": "CLOSED"}), 400, "wallet_not_empty")
    assert told["detail"] == "Wallet is not empty"


# Balances, now and then


async def balance_row(client: TestClient, wallet: str, **query: str) -> dict[str, Any]:
    answer = await client.get(path(wallet, "/balance"), params=query)
    assert answer.status == 200
    return await answer.json()


async def test_the_balance_at_a_moment_is_that_of_the_last_operation_until_then(client: TestClient) -> None:
    await create(client, {"w": 100})
    await withdraw(client, "w", 30)
    first, second = await history(client, "w")

    now = await balance_row(client, "w")
    assert (now["balance"], now["seq"], now["updated_at"]) == (70, 2, second["created_at"])
    assert await balance_row(client, "w", at=second["created_at"]) == now
    assert await balance_row(client, "w", at="9999-12-31T23:59:59.999999-23:59") == now
    then = await balance_row(client, "w", at=first["created_at"])
    assert (then["balance"], then["available"], then["seq"]) == (100, 100, 1)
    assert then["updated_at"] == first["created_at"]
    before = await balance_row(client, "w", at="0001-01-01T00:00:00+01:00")
    assert (before["balance"], before["seq"], before["id"]) == (0, 0, now["id"])


async def test_a_statement_is_from_a_moment_to_another(client: TestClient) -> None:
    await create(client, {"w": 0})
    for amount in range(1, 8):
        await deposit(client, "w", amount)
    recorded = await history(client, "w")
    start, end = recorded[1]["created_at"], recorded[5]["created_at"]

    amounts: list[int] = []
    query: dict[str, str] = {"limit": "2", "from": start, "to": end}
    while True:
        page = await (await client.get(path("w", "/operations"), params=query)).json()
        amounts += [operation["amount"] for operation in page["operations"]]
        if page["next"] is None:
            break
        query["before"] = str(page["next"])
    assert amounts == [5, 4, 3, 2]
    assert len(page["operations"]) == 2  # the last page is full, and is the last

    for nothing in ({"from": end, "to": start}, {"from": end, "to": end}, {"from": "9999-01-01T00:00:00Z"}):
        empty = await client.get(path("w", "/operations"), params=nothing)
        assert await empty.json() == {"operations": [], "next": None}


async def test_wallets_are_listed_by_name_in_pages(client: TestClient) -> None:
    await create(client, {"b": 1, "A": 0, "a": 2, "_": 0, "10": 0})

    names: list[str] = []
    query = {"limit": "2"}
    while True:
        page = await (await client.get("/api/v1/wallets", params=query)).json()
        for wallet in page["wallets"]:
            assert wallet == await balance_row(client, wallet["uuid"])
        names += [wallet["uuid"] for wallet in page["wallets"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]

    assert names == ["10", "A", "_", "a", "b"]
    two = await (await client.get("/api/v1/wallets", params={"after": "Z", "limit": "3"})).json()
    assert [wallet["uuid"] for wallet in two["wallets"]] == ["_", "a", "b"]
    assert two["next"] is None


# Transfers


async def test_a_transfer_is_in_both_histories(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 5})

    answer = await apply(client, "w", "TRANSFER", 30, A, counterparty_uuid="v", metadata={"order": 4711})

    assert (answer.status, await answer.json()) == (200, str(A))
    paid, received = (await history(client, "w"))[-1], (await history(client, "v"))[-1]
    both = {"operation_uuid": str(A), "amount": 30, "held_after": 0, "created_at": paid["created_at"]}
    payer, payee = {"wallet_uuid": "w", "counterparty_uuid": "v"}, {"wallet_uuid": "v", "counterparty_uuid": "w"}
    both |= {"metadata": {"order": 4711}, "seq": 2}
    assert paid == both | payer | {"operation_type": "TRANSFER", "balance_after": 70}
    assert received == both | payee | {"operation_type": "RECEIVE", "balance_after": 35}
    for operation in (paid, received):
        found = await client.get(path(operation["wallet_uuid"], f"/operations/{A}"))
        assert await found.json() == operation


async def test_a_payee_cannot_repeat_what_it_received(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0})
    await transfer(client, "w", "v", 30, A)
    for told in (
        await problem(await deposit(client, "v", 30, A), 400, "duplicate_operation"),
        await problem(await put(client, "v", "DEPOSIT", 30, A), 409, "duplicate_operation"),
    ):
        assert "operation" not in told
        assert "same_request" not in told


# Metadata

METADATA = {
    '{"b": 1.50, "a": [1e3, 0.1, 12345678901234567890123]}': '{"a": [1000, 0.1, 12345678901234567890123], "b": 1.50}',
    '{"a": 1, "a": 2}': '{"a": 2}',
    r'{"\u00e9": "\ud83d\udcb0 \\u0000", "": null}': '{"": null, "é": "\N{MONEY BAG} \\\\u0000"}',
    '{"a": {"b": [true, false, null, {}]}}': '{"a": {"b": [true, false, null, {}]}}',
    '{"a": 0e5, "b": -1E-3}': '{"a": 0, "b": -0.001}',
}


@pytest.mark.parametrize(("metadata", "told"), METADATA.items())
async def test_metadata_comes_back_in_jsonb_s_form_wherever_the_operation_does(
    client: TestClient, metadata: str, told: str
) -> None:
    await create(client, {"w": 0})
    body = f'{{"operation_type": "DEPOSIT", "amount": 5.0, "metadata": {metadata}}}'
    json_type = {"Content-Type": "application/json"}
    for status in (201, 200):
        answer = await client.put(path("w", f"/operations/{A}"), data=body.encode(), headers=json_type)
        assert answer.status == status
        assert f'"metadata":{told}'.replace(" ", "") in (await answer.text()).replace(" ", "")
    answer = await client.get(path("w", f"/operations/{A}"))
    assert f'"metadata":{told}'.replace(" ", "") in (await answer.text()).replace(" ", "")
    page = await client.get(path("w", "/operations"))
    assert f'"metadata":{told}'.replace(" ", "") in (await page.text()).replace(" ", "")


async def test_metadata_arrives_whole_with_a_body_in_chunks(client: TestClient) -> None:
    """Such a body is kept in memory of the service's own, of which metadata is a part."""
    await create(client, {"w": 0})

    async def chunks(text: str) -> AsyncIterator[bytes]:
        for start in range(0, len(text), 20):
            yield text[start : start + 20].encode()
            await asyncio.sleep(0)

    for amount in ("5", "5.0", "5.5"):
        terms = f'"operation_type": "DEPOSIT", "amount": {amount}, "metadata": {{"a": "{amount}"}}'
        single = f'{{"operation_uuid": "{uuid4()}", {terms}}}'
        several = f'{{"operations": [{{"wallet_uuid": "w", "operation_uuid": "{uuid4()}", {terms}}}]}}'
        for url, body in ((path("w", "/operation"), single), ("/api/v1/operations", several)):
            answer = await client.post(url, data=chunks(body), headers={"Content-Type": "application/json"})
            assert answer.status == (400 if amount == "5.5" else 200)
    recorded = [operation["metadata"]["a"] for operation in await history(client, "w")]
    assert recorded == ["5", "5", "5.0", "5.0"]


@pytest.mark.parametrize("metadata", [None, {}], ids=["null", "empty"])
async def test_no_metadata_is_none(client: TestClient, metadata: Any) -> None:
    await create(client, {"w": 0})
    assert (await put(client, "w", "DEPOSIT", 5, A, metadata=metadata)).status == 201
    assert (await put(client, "w", "DEPOSIT", 5, A, counterparty_uuid=None)).status == 200
    assert "metadata" not in (await history(client, "w"))[0]


# PUT


async def test_put_applies_once_and_tells_what_is_recorded(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 0})
    terms: dict[str, Any] = {"counterparty_uuid": "v", "metadata": {"a": 1}}

    first = await put(client, "w", "TRANSFER", 30, A, **terms)
    await deposit(client, "w", 1)
    again = await put(client, "w", "TRANSFER", 30, A, **terms)

    recorded = (await history(client, "w"))[1]
    assert (first.status, await first.json()) == (201, recorded)
    assert (again.status, await again.json()) == (200, recorded)
    for other in (
        put(client, "w", "TRANSFER", 31, A, **terms),
        put(client, "w", "TRANSFER", 30, A, counterparty_uuid="v"),
        put(client, "w", "TRANSFER", 30, A, **terms | {"metadata": {"a": 2}}),
        put(client, "w", "WITHDRAW", 30, A, metadata={"a": 1}),
    ):
        told = await problem(await other, 409, "duplicate_operation")
        assert (told["operation"], told["same_request"]) == (recorded, False)
    assert await balance(client, "w") == 71


# What was done


async def test_operations_come_newest_first(client: TestClient) -> None:
    await create(client, {"w": 100})
    await withdraw(client, "w", 30, A)

    page = await (await client.get("/api/v1/wallets/w/operations")).json()

    assert page["next"] is None
    newest, first = page["operations"]
    assert datetime.fromisoformat(newest.pop("created_at")) >= datetime.fromisoformat(first["created_at"])
    assert newest == {
        "operation_uuid": str(A),
        "wallet_uuid": "w",
        "operation_type": "WITHDRAW",
        "amount": 30,
        "balance_after": 70,
        "held_after": 0,
        "seq": 2,
    }


async def test_a_new_wallet_has_no_operations(client: TestClient) -> None:
    await create(client, {"w": 0})

    answer = await client.get("/api/v1/wallets/w/operations")

    assert answer.status == 200
    assert await answer.json() == {"operations": [], "next": None}


@pytest.mark.parametrize("count", [6, 7, 8])
async def test_pages_follow_each_other_to_the_first_operation(client: TestClient, count: int) -> None:
    await create(client, {"w": 0})
    for amount in range(1, count + 1):
        await deposit(client, "w", amount)

    amounts: list[int] = []
    query = {"limit": 3}
    while True:
        page = await (await client.get("/api/v1/wallets/w/operations", params=query)).json()
        assert 1 <= len(page["operations"]) <= 3
        amounts += [operation["amount"] for operation in page["operations"]]
        if page["next"] is None:
            break
        await deposit(client, "w", 1000)  # what comes in meanwhile moves no page
        query["before"] = page["next"]

    assert amounts == list(range(count, 0, -1))


async def test_a_page_before_the_first_operation_is_empty(client: TestClient) -> None:
    await create(client, {"w": 5})

    answer = await client.get("/api/v1/wallets/w/operations", params={"before": 1})

    assert await answer.json() == {"operations": [], "next": None}


@pytest.mark.parametrize("spelling", [str(A), str(A).upper(), A.hex], ids=["canonical", "upper_case", "hex"])
async def test_an_operation_can_be_read_by_its_uuid(client: TestClient, spelling: str) -> None:
    await create(client, {"w": 100})
    await withdraw(client, "w", 30, A)

    answer = await client.get(f"/api/v1/wallets/w/operations/{spelling}")

    assert answer.status == 200
    assert await answer.json() == (await history(client, "w"))[1]


async def test_an_operation_is_found_on_its_own_wallet_only(client: TestClient) -> None:
    await create(client, {"w": 100, "v": 100})
    await withdraw(client, "w", 30, A)

    for answer in (
        await client.get(f"/api/v1/wallets/v/operations/{A}"),
        await client.get(f"/api/v1/wallets/w/operations/{uuid4()}"),
    ):
        assert (await problem(answer, 404, "operation_not_found"))["detail"] == "Operation not found"


# Health


@pytest.mark.parametrize("check", ["/healthz", "/readyz"])
async def test_a_service_on_a_migrated_database_is_well(client: TestClient, check: str) -> None:
    assert (await client.get(check)).status == 200


async def test_a_service_without_its_database_lives_but_is_not_ready(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(make_app(Settings(database_url="postgresql://nobody@/nowhere?host=/nonexistent")))

    assert (await client.get("/healthz")).status == 200
    answer = await client.get("/readyz")
    await problem(answer, 503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0


async def test_a_service_is_ready_on_a_database_that_is_as_new_as_it_needs(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    newer = "create or replace function wallet.contract_version() returns int language sql as 'select 99'"
    superuser.execute(newer)
    assert (await client.get("/readyz")).status == 200

    superuser.execute(newer.replace("99", "3"))
    await problem(await client.get("/readyz"), 503, "not_migrated")

    superuser.execute("drop function wallet.contract_version")
    await problem(await client.get("/readyz"), 503, "not_migrated")


async def test_a_service_is_not_ready_as_a_user_who_may_call_nothing(
    superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=url_of(superuser, "report"))))

    await problem(await client.get("/readyz"), 503, "not_migrated")


async def test_a_request_that_the_database_does_not_answer_in_time_may_be_asked_again(
    aiohttp_client: AiohttpClient,
) -> None:
    settings = Settings(database_url="postgresql://nobody@/nowhere?host=/nonexistent", request_deadline=0.2)
    client = await aiohttp_client(make_app(settings))

    for answer in (await client.get("/api/v1/wallets/w"), await deposit(client, "w", 5)):
        await problem(answer, 503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0


async def test_only_100_continue_can_be_expected(client: TestClient) -> None:
    met = await client.post("/api/v1/wallets", json={"uuid": "patient"}, headers={"Expect": "100-continue"})
    assert met.status == 201
    refused = await client.post("/api/v1/wallets", headers={"Expect": "miracles", "X-Request-ID": "wonder"})
    await problem(refused, 417, "expectation_failed")
    assert refused.headers["X-Request-ID"] == "wonder"
    counted = 'wallet_request_seconds_count{method="POST",route="/api/v1/wallets",status="417"}'
    assert counted in await (await client.get("/metrics")).text()


@pytest.mark.parametrize(
    "metadata", ['{"a": ' + "[" * depth + "]" * depth + "}" for depth in (940, 950, 1020)] + ['{"a": 0e3000}']
)
async def test_metadata_that_jsonb_can_hold_is_taken_and_shown_however_it_is_asked_for(
    client: TestClient, superuser: psycopg.Connection, metadata: str
) -> None:
    await create(client, {"w": 0})
    names = [str(uuid4()) for _ in range(4)]
    wallet, json = path("w"), {"Content-Type": "application/json"}
    said = f'"operation_type": "DEPOSIT", "amount": 5, "metadata": {metadata}'
    for status in (201, 200):
        answer = await client.put(f"{wallet}/operations/{names[0]}", data=f"{{{said}}}", headers=json)
        assert answer.status == status
    body = f'{{"operation_uuid": "{names[1]}", {said}}}'
    assert (await client.post(f"{wallet}/operation", data=body, headers=json)).status == 200
    await problem(await client.post(f"{wallet}/operation", data=body, headers=json), 400, "duplicate_operation")
    item = f'{{"wallet_uuid": "w", "operation_uuid": "{names[2]}", {said}}}'
    for applied in (True, False):
        answer = await client.post("/api/v1/operations", data=f'{{"operations": [{item}]}}', headers=json)
        assert [result["applied"] for result in (await answer.json())["results"]] == [applied]
    superuser.execute(
        "select wallet.apply_operation('w', %s, 'DEPOSIT', 5, p_metadata => %s::jsonb)", (names[3], metadata)
    )
    for name in names:
        assert (await client.get(f"{wallet}/operations/{name}")).status == 200
    assert (await client.get(f"{wallet}/operations")).status == 200
