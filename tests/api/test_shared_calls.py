"""Requests share a call, not a fate: what goes wrong for one of them is answered to that one."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.calls.dispatch import SIDING, TROUBLE
from app.calls.lane import Siding
from app.calls.line import UNTRIED, Line, Outcome, Request, refused
from app.calls.parties import Parties
from app.calls.trouble import Trouble
from app.settings import Settings
from app.web.application import make_app
from tests.api.door import balance, create, deposit, history, path, problem, put, transfer, withdraw
from tests.api.test_lanes import applied, in_one_call, locked, through, until, waiting_call
from tests.conftest import url_of
from tests.proxy import Point, Proxy

A = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
B = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
OTHERS = [f"other{number}" for number in range(20)]

REFUSING = """
create function public.refuse() returns trigger language plpgsql as
  $$ begin raise exception 'nothing for %', new.wallet_uuid; end $$;
"""
TRIGGER = (
    REFUSING
    + """
create trigger refuse before insert on wallet.operation
  for each row when (new.wallet_uuid = 'w') execute function public.refuse()"""
)
DEFERRED = (
    REFUSING
    + """
create constraint trigger refuse after insert on wallet.operation deferrable initially deferred
  for each row when (new.wallet_uuid = 'w') execute function public.refuse()"""
)
CONSTRAINT = "alter table wallet.operation add constraint small check (wallet_uuid <> 'w' or amount < 100) not valid"


def now() -> float:
    """Return the time on the loop's clock."""
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def patience() -> None:
    """Calls wait for locked wallets as long as they do in service, and no longer, but in tests that use `patient`."""


@pytest.fixture(autouse=True)
def _right_books(superuser: psycopg.Connection) -> Iterator[None]:
    yield
    assert superuser.execute("select * from wallet.verify()").fetchall() == []


@pytest.fixture
async def client(database_url: str, aiohttp_client: AiohttpClient) -> TestClient:
    """A client of an app with one lane. Wallet `w` holds 100."""
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1)))
    await create(client, {"w": 100, "pilot": 0, **dict.fromkeys(OTHERS, 0)})
    return client


async def bulk(client: TestClient, *items: tuple[str, str, int, UUID]) -> ClientResponse:
    """Ask for operations in one bulk request: wallet, type, amount, operation_uuid."""
    names = ("wallet_uuid", "operation_type", "amount", "operation_uuid")
    operations = [dict(zip(names, (*item[:3], str(item[3])), strict=True)) for item in items]
    return await client.post("/api/v1/operations", json={"operations": operations})


async def results(answer: ClientResponse) -> list[dict[str, Any]]:
    assert answer.status == 200
    return (await answer.json())["results"]


class Crowd:
    """Clients that ask again and again, the answers by status and code, and the time that the slowest 1 % took."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.answers: Counter[tuple[int, str | None]] = Counter()
        self.seconds: list[float] = []

    async def one(self, wallet: str, door: str) -> None:
        began = time.monotonic()
        if door == "lane":
            answer = await deposit(self.client, wallet, 1)
            code = None if answer.status == 200 else (await answer.json())["code"]
            self.answers[answer.status, code] += 1
        else:
            for result in await results(await bulk(self.client, (wallet, "DEPOSIT", 1, uuid4()))):
                self.answers[200, result.get("code")] += 1
        self.seconds.append(time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def asking(self, wallets: list[str], door: str, clients: int) -> AsyncIterator[None]:
        over = False

        async def ask(number: int) -> None:
            while not over:
                await self.one(wallets[number % len(wallets)], door)
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(ask(number)) for number in range(clients)]
        yield
        over = True
        await asyncio.gather(*tasks)

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]


# A locked wallet


@pytest.mark.alone
async def test_a_locked_wallet_holds_up_nobody_else_whoever_asks_for_it(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    doors = ("lane", "bulk")
    the_locked, others = [Crowd(client) for _ in doors], [Crowd(client) for _ in doors]
    async with contextlib.AsyncExitStack() as stack:
        for crowd, door in zip(others, doors, strict=True):
            await stack.enter_async_context(crowd.asking(OTHERS, door, 20))
        await asyncio.sleep(1)
        quiet = [crowd.answers.total() for crowd in others]
        with locked(superuser, "w"):
            for crowd, door in zip(the_locked, doors, strict=True):
                await stack.enter_async_context(crowd.asking(["w"], door, 10))
            await asyncio.sleep(4)
            assert [crowd.answers for crowd in the_locked] == [Counter(), Counter()]

    for crowd, before in zip(others, quiet, strict=True):
        assert set(crowd.answers) == {(200, None)}
        assert crowd.answers.total() > 2 * before  # whatever the machine: a quarter of the quiet rate at least
        assert crowd.p99 < 0.5
    assert [set(crowd.answers) for crowd in the_locked] == [{(200, None)}] * 2
    assert await balance(client, "w") == 100 + sum(crowd.answers.total() for crowd in the_locked)


async def test_a_request_for_a_wallet_that_stays_locked_is_told_that_it_was_not_applied(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=1)))
    await create(client, {"w": 100, "v": 0})

    with locked(superuser, "w"):
        began = time.monotonic()
        *single, many = await asyncio.gather(
            deposit(client, "w", 1),
            withdraw(client, "w", 1000),
            deposit(client, "w", 1, A),
            bulk(client, ("v", "DEPOSIT", 1, uuid4()), ("w", "DEPOSIT", 2, B), ("nobody", "DEPOSIT", 1, uuid4())),
        )
        assert time.monotonic() - began < 1.5
    for answer in single:
        told = await problem(answer, 503, "wallet_locked")
        assert told["detail"] == "Wallet is locked by another transaction: not applied"
        assert int(answer.headers["Retry-After"]) > 0
    assert [(result["applied"], result.get("code")) for result in await results(many)] == [
        (True, None),
        (False, "wallet_locked"),
        (False, "wallet_not_found"),
    ]

    assert await balance(client, "w") == 100
    assert (await deposit(client, "w", 1, A)).status == 200
    [result] = await results(await bulk(client, ("w", "DEPOSIT", 2, B)))
    assert result["applied"]
    assert await balance(client, "w") == 103


async def test_a_repeat_is_recognised_although_its_wallet_is_locked(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    assert (await deposit(client, "w", 5, A)).status == 200
    with locked(superuser, "w"):
        for _ in range(2):  # on its lane, and apart
            assert (await problem(await deposit(client, "w", 5, A), 400, "duplicate_operation"))["same_request"]
            [result] = await results(await bulk(client, ("w", "DEPOSIT", 5, A)))
            assert result["code"] == "duplicate_operation"
    assert await balance(client, "w") == 105


async def test_a_wallet_that_was_locked_is_back_on_its_lane_once_it_is_free(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    trouble = client.app[TROUBLE]
    with locked(superuser, "w"):
        asked = [asyncio.create_task(deposit(client, "w", 1)) for _ in range(300)]
        await until(lambda: trouble.wallets == {"w"})
        await asyncio.sleep(0.5)
    began = time.monotonic()
    assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
    assert time.monotonic() - began < 2
    assert trouble.wallets == set()
    assert await balance(client, "w") == 400


async def test_many_locked_wallets_and_one_that_is_not_known_to_be_free_do_not_wait_for_each_other(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    with contextlib.ExitStack() as stack:
        for wallet in OTHERS[1:]:
            stack.enter_context(locked(superuser, wallet))
        with locked(superuser, "w"):
            asked = [asyncio.create_task(deposit(client, wallet, 1)) for wallet in ["w", *OTHERS[1:]]]
            await until(lambda: len(client.app[TROUBLE].wallets) == 20)
        async with asyncio.timeout(2):
            assert (await asked[0]).status == 200
    assert {answer.status for answer in await asyncio.gather(*asked)} == {200}


async def test_an_operation_in_flight_elsewhere_holds_up_only_its_own_request(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    with psycopg.connect(url_of(superuser, "postgres")) as somebody:
        somebody.execute("select wallet.apply_operation('w', %s, 'DEPOSIT', 7)", [A])
        asked = asyncio.create_task(deposit(client, OTHERS[0], 7, A))
        await waiting_call(superuser)
        began = time.monotonic()
        answers = await asyncio.gather(*(deposit(client, wallet, 1) for wallet in OTHERS[1:]))
        assert time.monotonic() - began < 1
        assert {answer.status for answer in answers} == {200}
        assert not asked.done()
    assert "operation" not in await problem(await asked, 400, "duplicate_operation")
    assert await balance(client, OTHERS[0]) == 0


async def test_a_full_siding_refuses_only_those_for_locked_wallets(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, lane_queue=5)))
    await create(client, {"w": 0, "v": 0})
    with locked(superuser, "w"):
        asked = [asyncio.create_task(deposit(client, "w", 1))]
        await until(lambda: client.app[TROUBLE].wallets)
        asked += [asyncio.create_task(deposit(client, "w", 1)) for _ in range(20)]
        await asyncio.wait(asked, timeout=1)
        full = [task for task in asked if task.done()]
        assert len(full) >= 10
        for task in full:
            await problem(await task, 503, "wallet_locked")
        assert (await deposit(client, "v", 1)).status == 200
    kept = [answer for answer in await asyncio.gather(*asked) if answer.status == 200]
    assert await balance(client, "w") == len(kept)


@pytest.mark.alone
async def test_a_locked_payee_holds_up_no_payer_s_other_money(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    others = Crowd(client)
    with locked(superuser, "w"):
        to_the_locked = [asyncio.create_task(transfer(client, payer, "w", 1)) for payer in OTHERS]
        from_it = asyncio.create_task(transfer(client, "w", OTHERS[0], 1))
        await asyncio.sleep(0.3)
        async with others.asking(OTHERS, "lane", 20):
            await asyncio.sleep(1)  # the payers get what they need meanwhile
        assert client.app[TROUBLE].wallets == {"w"}
        assert not any(task.done() for task in (*to_the_locked, from_it))
    assert set(others.answers) == {(200, None)}
    assert others.p99 < 0.5
    for answer in await asyncio.gather(*to_the_locked, from_it):
        assert answer.status == 200 or await problem(answer, 400, "insufficient_funds")
    await until(lambda: client.app[TROUBLE].wallets == set())


def noted(trouble: Trouble, *outcomes: tuple[str, str | None]) -> set[str]:
    """Note how requests fared, `payer` or `payer payee` and a SQLSTATE each, and return the wallets in trouble."""
    requests = [Request(names.split()[0], uuid4(), "", 1, *names.split()[1:]) for names, _ in outcomes]
    applied = Outcome(None, None, True, 1, 0, 1, None)
    trouble.note(requests, [refused(sqlstate) if sqlstate else applied for _, sqlstate in outcomes])
    return trouble.wallets


def test_a_failed_transfer_puts_the_one_under_suspicion_that_nothing_speaks_for() -> None:
    assert noted(Trouble(), ("a", "55P03"), ("b", None)) == {"a"}
    assert noted(Trouble(), ("a b", "55P03")) == {"a", "b"}
    assert noted(Trouble(), ("a b", "P0001"), ("a", None)) == {"b"}
    assert noted(Trouble(), ("a b", "55P03"), ("c a", "WA402")) == {"b"}
    assert noted(Trouble(), ("a b", "55P03"), ("a c", "55P03"), ("d b", "55P03")) == {"a", "b"}
    trouble = Trouble()
    assert noted(trouble, ("b", "55P03")) == {"b"}
    assert noted(trouble, ("a b", "55P03"), ("b c", "55P03")) == {"b"}
    assert noted(trouble, ("a b", None)) == set()


def test_a_refusal_of_ours_shows_that_a_wallet_is_not_locked_and_nothing_of_what_the_database_refuses_it() -> None:
    trouble = Trouble()
    assert noted(trouble, ("a", "55P03"), ("b", "P0001")) == {"a", "b"}
    assert noted(trouble, ("a", "WA402"), ("b", "WA402")) == {"b"}
    assert noted(trouble, ("b", "WA410"), ("b c", "P0001"), ("c", None)) == {"b"}
    assert noted(trouble, ("b", None)) == set()
    assert noted(trouble, ("b", "55P03"), ("b", "WA402")) == set()


def test_what_a_lost_call_applied_speaks_for_nobody() -> None:
    trouble = Trouble()
    assert noted(trouble, ("a", "P0001")) == {"a"}
    trouble.note([Request("a", uuid4(), "", 1)], [Outcome(None, None, None, 1, 0, 1, None)])
    assert trouble.wallets == {"a"}
    assert noted(trouble, ("a", None)) == set()


def test_a_locked_wallet_does_not_stand_in_for_one_to_which_the_database_refuses_something() -> None:
    trouble = Trouble()
    assert noted(trouble, ("a", "55P03")) == {"a"}
    assert noted(trouble, ("a b", "P0001")) == {"a", "b"}
    assert noted(trouble, ("a", None)) == {"b"}
    assert trouble.outcome_of(Request("b", uuid4(), "", 1)).sqlstate == "P0001"


@pytest.mark.parametrize("sqlstate", ["WA400", "WA404", "WA409"])
def test_what_is_refused_before_a_lock_is_looked_at_speaks_for_nobody(sqlstate: str) -> None:
    trouble = Trouble()
    assert noted(trouble, ("a", "55P03")) == {"a"}
    assert noted(trouble, ("a", sqlstate)) == {"a"}
    assert noted(trouble, ("a", sqlstate), ("a b", "55P03")) == {"a"}
    assert noted(Trouble(), ("a", sqlstate), ("a b", "55P03")) == {"a", "b"}


async def test_the_siding_begins_by_turns_with_what_is_in_trouble_and_tries_alone_what_may_be_refused() -> None:
    trouble = Trouble()
    noted(trouble, ("refused", "P0001"), ("locked", "55P03"))
    siding = Siding(100, 10, trouble, Parties(1))

    def wait(wallet: str, *, atomic: bool = False) -> None:
        siding._queue([Request(wallet, uuid4(), "DEPOSIT", 1)], now() + 10, 0, atomic=atomic)

    async def taken() -> list[str]:
        await asyncio.sleep(0.005)  # so that the loop's clock goes on
        return [waiting.requests[0].wallet_uuid for waiting in siding._take()]

    for wallet in ("refused", "a", "locked", "b", "locked", "refused", "c"):
        wait(wallet, atomic=wallet == "a")
    order = [["refused"], ["a"], ["locked", "b", "c"], ["refused"], ["locked"], []]
    assert [await taken() for _ in range(6)] == order
    siding.close()


async def test_what_needs_the_wallets_in_trouble_that_were_tried_longest_ago_comes_first() -> None:
    trouble = Trouble()
    noted(trouble, *((wallet, "55P03") for wallet in "abc"))
    siding = Siding(100, 10, trouble, Parties(1))

    async def taken(*waiting: str) -> list[str]:
        """Queue atomic requests for these wallets, and return the order in which they are taken, one at a time."""
        for wallets in waiting:
            requests = [Request(wallet, uuid4(), "DEPOSIT", 1) for wallet in wallets]
            siding._queue(requests, now() + 10, 0, atomic=True)
        order = []
        for _ in waiting:
            await asyncio.sleep(0.005)  # so that the loop's clock goes on
            [one] = siding._take()
            order.append("".join(request.wallet_uuid for request in one.requests))
        return order

    assert await taken("a", "a", "ab", "c", "a", "b") == ["a", "ab", "c", "b", "a", "a"]
    assert await taken("a", "a", "b", "c", "ab") == ["ab", "c", "b", "a", "a"]
    siding.close()


async def test_a_wallet_that_many_wait_for_keeps_no_other_from_showing_that_it_is_free(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1)))
    await create(client, {"w": 0, "v": 100})
    with locked(superuser, "w"):
        asked = [asyncio.create_task(transfer(client, "v", "w", 1))]
        await until(lambda: client.app[TROUBLE].wallets == {"v", "w"})
        asked += [asyncio.create_task(deposit(client, "w", 1)) for _ in range(60)]
        await until(lambda: len(client.app[SIDING]._waiting) >= 60)
        [result] = await results(await atomic(client, ("v", 1)))
        assert result["applied"]
        assert not any(task.done() for task in asked)
    assert {answer.status for answer in await asyncio.gather(*asked)} == {200}


async def test_an_atomic_request_with_a_locked_wallet_waits_as_a_whole(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    items = [("v0", 5), ("w", 5), ("v1", 5)]
    await create(client, {"v0": 0, "v1": 0})
    with locked(superuser, "w"):
        asked = [asyncio.create_task(atomic(client, *items)) for _ in range(3)]
        await until(lambda: client.app[TROUBLE].wallets)
        asked.append(asyncio.create_task(atomic(client, *items)))
        await asyncio.gather(*(deposit(client, wallet, 1) for wallet in ("v0", "v1", *OTHERS)))
        assert [await balance(client, wallet) for wallet in ("v0", "v1")] == [1, 1]
        assert not any(task.done() for task in asked)
    for answer in await asyncio.gather(*asked):
        assert [result["applied"] for result in await results(answer)] == [True] * 3
    assert [await balance(client, wallet) for wallet in ("v0", "w", "v1")] == [21, 120, 21]


async def test_an_atomic_request_whose_wallet_stays_locked_is_told_that_it_was_not_applied(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=1)))
    await create(client, {"w": 100, "v": 0})
    with locked(superuser, "w"):
        for _ in range(2):  # on the lane at first, and apart
            told = await results(await atomic(client, ("v", 5), ("w", 5), ("nobody", 5)))
            codes = [result["code"] for result in told]
            assert codes == ["not_applied", "wallet_locked", "wallet_not_found"]
    assert await balance(client, "v") == 0


async def test_an_atomic_request_that_was_never_tried_is_not_applied(client: TestClient) -> None:
    siding = client.app[SIDING]
    outcomes = await siding.apply_atomic([Request("w", A, "DEPOSIT", 1)] * 2, now(), None)
    assert [outcome.sqlstate for outcome in outcomes] == ["55P03", "55P03"]
    noted(client.app[TROUBLE], ("w", "P0001"))
    outcomes = await siding.apply_atomic([Request(one, A, "DEPOSIT", 1) for one in "vw"], now(), None)
    assert [outcome.sqlstate for outcome in outcomes] == ["P0001", "P0001"]


async def test_a_large_atomic_request_that_was_never_tried_is_told_in_no_time(client: TestClient) -> None:
    siding = client.app[SIDING]
    requests = [Request(f"w{number}", uuid4(), "DEPOSIT", 1) for number in range(10_000)]
    began = time.monotonic()
    outcomes = await siding.apply_atomic(requests, now(), None)
    assert time.monotonic() - began < 1
    assert {outcome.sqlstate for outcome in outcomes} == {"55P03"}


async def atomic(client: TestClient, *items: tuple[str, int]) -> ClientResponse:
    """Ask for deposits, all or none."""
    operations = [
        {"wallet_uuid": wallet, "operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": amount}
        for wallet, amount in items
    ]
    return await client.post("/api/v1/operations", json={"operations": operations, "atomic": True})


@pytest.mark.parametrize("script", [TRIGGER, DEFERRED], ids=["trigger", "deferred"])
async def test_what_the_database_refuses_to_an_atomic_request_is_refused_to_all_of_it(
    script: str, client: TestClient, superuser: psycopg.Connection
) -> None:
    superuser.execute(script.encode())
    told = await results(await atomic(client, (OTHERS[0], 1), ("w", 1), (OTHERS[1], 1)))
    innocent = "not_applied" if script == TRIGGER else "database_refused"
    assert [result["code"] for result in told] == [innocent, "database_refused", innocent]
    assert [await balance(client, wallet) for wallet in (OTHERS[0], "w", OTHERS[1])] == [0, 100, 0]
    assert client.app[TROUBLE].wallets <= {"w"}


# What the database refuses


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("script", "amount", "message"),
    [
        (TRIGGER, 1, "nothing for w"),
        (DEFERRED, 1, "nothing for w"),
        (CONSTRAINT, 100, 'new row for relation "operation" violates check constraint "small"'),
    ],
    ids=["trigger", "deferred", "constraint"],
)
@pytest.mark.parametrize("door", ["lane", "alone", "bulk"])
async def test_what_the_database_refuses_to_one_is_answered_to_that_one(
    door: str,
    script: str,
    amount: int,
    message: str,
    client: TestClient,
    superuser: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    superuser.execute(script.encode())
    began = time.monotonic()
    if door == "bulk":
        items = [(wallet, "DEPOSIT", 1, uuid4()) for wallet in OTHERS]
        answer = await bulk(client, *items[:7], ("w", "DEPOSIT", amount, A), *items[7:])
        refused = [result for result in await results(answer) if not result["applied"]]
        assert [(result["operation_uuid"], result["code"]) for result in refused] == [(str(A), "database_refused")]
        assert refused[0]["detail"] == "Refused by the database: not applied"
    else:
        culprit = deposit(client, "w", amount, A)
        if door == "lane":
            *answers, refusal = await in_one_call(
                client, superuser, *(deposit(client, wallet, 1) for wallet in OTHERS), culprit
            )
            assert {answer.status for answer in answers} == {200}
        else:
            refusal = await culprit
        told = await problem(refusal, 503, "database_refused")
        assert told["detail"] == "Refused by the database: not applied"
        assert int(refusal.headers["Retry-After"]) > 0
    assert time.monotonic() - began < 1
    assert any(
        message in record.getMessage() and record.sqlstate for record in caplog.records if hasattr(record, "sqlstate")
    )

    if door != "alone":
        assert [await balance(client, wallet) for wallet in OTHERS] == [1] * 20
    assert await balance(client, "w") == 100
    assert applied(await history(client, "w"), A) == []


class CountingLine(Line):
    """A line that counts its calls."""

    calls = 0

    async def _call(self, *how: Any) -> list[Outcome]:
        self.calls += 1
        return await super()._call(*how)


async def test_what_the_database_refuses_to_a_wallet_costs_a_call_no_more_for_being_many(
    client: TestClient, database_url: str, superuser: psycopg.Connection
) -> None:
    superuser.execute(DEFERRED)
    calls = {}
    for culprits in (1, 20):
        line = CountingLine(Settings(database_url=database_url))
        requests = [Request("w", uuid4(), "DEPOSIT", 1) for _ in range(culprits)]
        requests += [Request(OTHERS[0], uuid4(), "TRANSFER", 1, "w")]
        requests += [Request(wallet, uuid4(), "DEPOSIT", 1) for wallet in OTHERS[1:]]
        requests[1::2], requests[::2] = requests[: len(requests) // 2], requests[len(requests) // 2 :]
        outcomes = await line.apply(requests, now() + 5)
        await line.close()
        calls[culprits] = line.calls
        told = Counter(
            (request.wallets() == ("w",), outcome.sqlstate)
            for request, outcome in zip(requests, outcomes, strict=True)
            if request.operation_type == "DEPOSIT"
        )
        assert told.pop((False, None)) == 19
        assert told.pop((True, "P0001")) == 1
        assert told == ({(True, "55P03"): culprits - 1} if culprits > 1 else {})
    assert calls[20] <= calls[1] + 4
    assert await balance(client, "w") == 100


async def test_what_is_left_out_for_a_refused_wallet_is_not_overtaken(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    """The transfer waits for its payer, to which the database refuses something; the withdrawal for the transfer."""
    superuser.execute(DEFERRED.replace("new.wallet_uuid = 'w'", "new.wallet_uuid = 'w' and new.amount = 7").encode())
    asked = [("w", "DEPOSIT", 7, uuid4()), ("w", "TRANSFER", 60, uuid4()), (OTHERS[0], "WITHDRAW", 50, uuid4())]
    operations = [
        {"wallet_uuid": wallet, "operation_uuid": str(operation), "operation_type": kind, "amount": amount}
        | ({"counterparty_uuid": OTHERS[0]} if kind == "TRANSFER" else {})
        for wallet, kind, amount, operation in asked
    ]
    told = await results(await client.post("/api/v1/operations", json={"operations": operations}))
    assert [result.get("code") for result in told] == ["database_refused", None, None]
    assert [await balance(client, wallet) for wallet in ("w", OTHERS[0])] == [40, 10]


def test_what_was_left_out_of_a_call_puts_no_wallet_in_trouble() -> None:
    trouble = Trouble()
    requests = [
        Request("w", uuid4(), "DEPOSIT", 1),
        Request("w", uuid4(), "DEPOSIT", 7),
        Request("w", uuid4(), "TRANSFER", 1, "v"),
    ]
    trouble.note(requests, [Outcome(None, None, True, 1, 0, 1, None), refused("23514"), UNTRIED])
    assert trouble.wallets == set()


@pytest.mark.usefixtures("patient")
async def test_a_refusal_of_the_database_hides_no_duplicate_of_the_others(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    superuser.execute(TRIGGER)
    assert (await deposit(client, OTHERS[0], 1, A)).status == 200
    answers = await in_one_call(
        client,
        superuser,
        deposit(client, OTHERS[0], 1, A),
        deposit(client, "w", 1),
        deposit(client, OTHERS[1], 2, B),
        deposit(client, OTHERS[1], 2, B),
        withdraw(client, OTHERS[2], 1),
    )
    assert [answer.status for answer in answers][:2] == [400, 503]
    assert sorted(answer.status for answer in answers[2:4]) == [200, 400]
    for answer in answers:
        if answer.status == 400 and answer is not answers[4]:
            assert (await problem(answer, 400, "duplicate_operation"))["same_request"] is True
    await problem(answers[4], 400, "insufficient_funds")


@pytest.mark.parametrize("count", [1, 8])
async def test_a_value_that_cannot_be_sent_is_refused_to_its_own_request(
    count: int, client: TestClient, database_url: str
) -> None:
    line = Line(Settings(database_url=database_url))
    requests = [Request(wallet, uuid4(), "DEPOSIT", 1) for wallet in OTHERS[:count]]
    for spoilt in (
        Request("w\0w", uuid4(), "DEPOSIT", 1),
        Request("w", uuid4(), "DEP\0SIT", 1),
        Request("w", uuid4(), "DEPOSIT", 2**63),
        Request("w", uuid4(), "HOLD", 1, expires_at="tomorrow or so"),
    ):
        requests[-1] = spoilt
        outcomes = await line.apply(requests, now() + 5)
        *good, bad = [outcome.sqlstate for outcome in outcomes]
        assert good == [None] * (count - 1)
        assert bad is not None
        requests = [request._replace(operation_uuid=uuid4()) for request in requests]
    await line.close()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("moment", ["20241-11-25 10:00:00+00", "infinity", "0044-03-15 10:00:00+00 BC"])
async def test_a_time_that_python_does_not_know_is_passed_on(
    moment: str, client: TestClient, superuser: psycopg.Connection
) -> None:
    assert (await deposit(client, "w", 5, A)).status == 200
    superuser.execute("update wallet.operation set created_at = %s where wallet_uuid = 'w'", [moment])

    answers = await in_one_call(client, superuser, deposit(client, "w", 5, A), deposit(client, OTHERS[0], 1))

    assert (await problem(answers[0], 400, "duplicate_operation"))["same_request"] is True
    assert answers[1].status == 200
    assert (await deposit(client, OTHERS[1], 1)).status == 200
    found = await (await client.get(path("w", f"/operations/{A}"))).json()
    assert found == (await history(client, "w"))[-1]
    assert found["created_at"].startswith(moment[:8].strip())


NO_X = "alter table wallet.wallet add constraint no_x check (uuid <> 'x') not valid"


async def test_a_wallet_that_the_database_refuses_is_refused_at_once_and_what_it_is_stays_out_of_the_log(
    client: TestClient, superuser: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    superuser.execute(NO_X)
    asked = {"uuid": "x", "currency": "S3CRET"}
    async with asyncio.timeout(2):
        await problem(await client.post("/api/v1/wallets", json=asked), 503, "database_refused")
    assert "no_x" in caplog.text
    assert "S3CRET" not in caplog.text  # it stands in the DETAIL
    assert (await client.post("/api/v1/wallets", json={"uuid": "y"})).status == 201


async def test_what_the_database_refuses_after_a_lost_attempt_may_have_been_done_by_that(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser))))
    superuser.execute(NO_X)
    cut = proxy.cut_next(b"wallet.create_wallet", Point.AFTER_THE_CALL)
    await problem(await client.post("/api/v1/wallets", json={"uuid": "x"}), 503, "unavailable")
    assert cut.done()


async def test_what_was_applied_stays_so_although_the_database_would_refuse_it_now(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser))))
    await create(client, {"x": 100})
    superuser.execute("alter table wallet.operation add constraint cap check (balance_after <= 150) not valid")
    superuser.execute(NO_X)
    assert (await client.put(path("x"))).status == 200

    cut = proxy.cut_next(b"wallet.apply_operation", Point.BEFORE_THE_ANSWER)
    assert (await put(client, "x", "DEPOSIT", 50, A)).status == 201
    assert cut.done()
    assert (await put(client, "x", "DEPOSIT", 50, A)).status == 200
    await problem(await deposit(client, "x", 50, A), 400, "duplicate_operation")
    await problem(await deposit(client, "x", 1, B), 503, "database_refused")
    assert await balance(client, "x") == 150


async def test_changes_that_wait_for_a_locked_wallet_leave_connections_to_others(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    settings = Settings(database_url=database_url, pool_size=2, request_deadline=4)
    client = await aiohttp_client(make_app(settings))
    await create(client, {"w": 0, "v": 0})
    with locked(superuser, "w"):
        waiting = [asyncio.create_task(client.patch(path("w"), json={"status": "FROZEN"})) for _ in range(2)]
        await asyncio.sleep(0.3)
        async with asyncio.timeout(2.5):
            for _ in range(3):
                assert (await client.get(path("v"))).status == 200
                assert (await client.get("/readyz")).status == 200
            assert (await client.patch(path("v"), json={"status": "FROZEN"})).status == 200
            assert (await client.put(path("new"))).status == 201
        assert not any(task.done() for task in waiting)
        for task in waiting:
            await problem(await task, 503, "wallet_locked")
    assert (await client.patch(path("w"), json={"status": "FROZEN"})).status == 200


# In contention, a call goes in parts


@pytest.fixture
def contention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parties, "in_contention", lambda _: True)


@pytest.mark.usefixtures("contention")
@pytest.mark.parametrize("apart", [False, True], ids=["bulk", "siding"])
async def test_a_wallet_that_is_unlocked_between_two_parts_keeps_the_order_of_a_request(
    apart: bool, client: TestClient, superuser: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    superuser.execute("select from wallet.create_wallet('x')")
    operations = [("x", kind, 1, uuid4()) for kind in ["DEPOSIT"] * 128 + ["WITHDRAW"] * 128]
    make_the_call = Line._call
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(superuser, "x"))

        async def call(line: Line, *arguments: Any) -> list[Outcome]:
            outcomes = await make_the_call(line, *arguments)
            if line._thorough or not apart:
                lock.close()
            return outcomes

        monkeypatch.setattr(Line, "_call", call)
        told = await results(await bulk(client, *operations))
    assert [result["applied"] for result in told] == [True] * 256


@pytest.mark.usefixtures("contention")
async def test_a_call_in_parts_waits_once_for_a_locked_wallet(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    with locked(superuser, "w"), locked(superuser, OTHERS[0]):
        asked = [
            asyncio.create_task(bulk(client, *((wallet, "DEPOSIT", 1, uuid4()) for _ in range(1280))))
            for wallet in ("w", OTHERS[0])
        ]
        await asyncio.sleep(0.2)
        async with asyncio.timeout(3):
            told = await results(await bulk(client, (OTHERS[1], "DEPOSIT", 1, uuid4())))
        assert told[0]["applied"] is True
    for answer in asked:
        assert {result["applied"] for result in await results(await answer)} == {True}


async def test_a_half_that_was_in_no_lost_call_takes_a_repeat_for_one(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser))))
    await create(client, {"w": 0, "v": 0})
    assert (await deposit(client, "v", 5, A)).status == 200
    superuser.execute(DEFERRED.encode())
    sizes: list[int] = []
    make_the_call = Line._call

    async def call(line: Line, requests: Any, *arguments: Any) -> list[Outcome]:
        sizes.append(len(requests))
        if len(sizes) == 2:
            proxy.cut_next(b"wallet.apply_operation", Point.BEFORE_THE_CALL)
        return await make_the_call(line, requests, *arguments)

    monkeypatch.setattr(Line, "_call", call)
    operations = [("w", 1, uuid4()), ("v", 1, uuid4()), ("v", 5, A), ("v", 1, uuid4())]
    told = await results(
        await bulk(client, *((wallet, "DEPOSIT", amount, name) for wallet, amount, name in operations))
    )
    assert sizes[:3] == [4, 2, 2]
    assert [(result["applied"], result.get("same_request")) for result in told[1:]] == [
        (True, None),
        (False, True),
        (True, None),
    ]
