"""Parties: one party's flood is its own affair."""

import asyncio
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.calls.database import POOL, UNTIL
from app.calls.dispatch import BULK
from app.calls.lane import SHORT, Lane
from app.calls.line import Line, Outcome, Request
from app.calls.parties import PARTY, PORTION, ByTurns, Parties, Places, check_share
from app.calls.refusals import Overloaded
from app.calls.trouble import Trouble
from app.server.supervisor import spare_the_collector
from app.settings import Settings
from app.web import handlers, keys
from app.web.application import make_app
from app.web.keys import CALLER, Key
from app.web.messages import decode_part
from app.web.turns import Turns
from tests.api.door import balance, create, path, problem
from tests.api.test_lanes import busy_lane, locked, queued, through, until, waiting_backends, waiting_call
from tests.conftest import url_of
from tests.proxy import Point, Proxy

BULK_PATH = "/api/v1/operations"
DEPOSIT = Request("w", uuid4(), "DEPOSIT", 1)
MIB = 1024 * 1024
TICK = 0.002
"""Seconds by which uvloop's clock, in milliseconds, and a timer on it may be early."""


@pytest.fixture(autouse=True)
def _parties_by_header(monkeypatch: pytest.MonkeyPatch) -> None:
    async def admit(request: web.Request, _scopes: Sequence[str]) -> Key:
        request[CALLER] = key = keys.ANYBODY._replace(name=request.headers.get("X-Party", ""))
        PARTY.set(key.name)
        return key

    monkeypatch.setattr(keys, "admit_anybody", admit)


@pytest.fixture
def right_books(superuser: psycopg.Connection) -> Iterator[None]:
    yield
    assert superuser.execute("select * from wallet.verify()").fetchall() == []


async def deposit(client: TestClient, who: str, wallet: str, amount: int = 1) -> ClientResponse:
    body = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": amount}
    return await client.post(path(wallet, "/operation"), json=body, headers={"X-Party": who})


async def bulk(client: TestClient, who: str, wallet: str, operations: int = 1, padding: int = 0) -> ClientResponse:
    one = {"wallet_uuid": wallet, "operation_type": "DEPOSIT", "amount": 1}
    body = json.dumps({"operations": [{**one, "operation_uuid": str(uuid4())} for _ in range(operations)]})
    headers = {"X-Party": who, "Content-Type": "application/json"}
    return await client.post(BULK_PATH, data=body + " " * padding, headers=headers)


async def are_answered(*asked: Any, status: int = 200) -> None:
    assert [answer.status for answer in await asyncio.gather(*asked)] == [status] * len(asked)


# Turns


def order(turns: ByTurns[tuple[str, int]]) -> list[str]:
    taken = []
    while (one := turns.take(cost=lambda item: item[1])) is not None:
        taken.append(one[0])
    return taken


def test_what_one_party_asks_for_goes_in_its_order() -> None:
    turns: ByTurns[tuple[str, int]] = ByTurns()
    for number in range(50):
        turns.add("a", (str(number), number % 7))
    assert order(turns) == [str(number) for number in range(50)]


def test_parties_go_by_turns_whoever_came_first() -> None:
    turns: ByTurns[tuple[str, int]] = ByTurns()
    for who in ("flood",) * 100 + ("a", "b") * 2:
        turns.add(who, (who, 1))
    assert order(turns) == ["flood", "a", "b"] * 2 + ["flood"] * 98


def test_turns_are_counted_in_operations() -> None:
    turns: ByTurns[tuple[str, int]] = ByTurns()
    for who, size, times in (("large", 100, 3), ("small", 10, 30)):
        for _ in range(times):
            turns.add(who, (who, size))
    taken = order(turns)
    assert taken[:2] == ["large", "small"]
    assert [taken[: at + 1].count("small") for at, who in enumerate(taken) if who == "large"] == [0, 10, 20]


def test_who_was_away_has_no_credit_for_it() -> None:
    turns: ByTurns[tuple[str, int]] = ByTurns()
    for _ in range(100):
        turns.add("busy", ("busy", 1))
    for _ in range(50):
        turns.take()
    for _ in range(20):
        turns.add("late", ("late", 1))
    assert order(turns)[:20].count("late") == 10


def test_whoever_does_not_fit_lets_others_pass_and_is_the_next() -> None:
    turns: ByTurns[tuple[str, int]] = ByTurns()
    turns.add("large", ("large", 100))
    for _ in range(3):
        turns.add("small", ("small", 1))
    taken = [turns.take(lambda item: item[1] < 50) for _ in range(2)]
    assert taken == [("small", 1)] * 2
    assert order(turns) == ["large", "small"]


def test_nothing_is_taken_where_nothing_waits_or_fits() -> None:
    turns: ByTurns[int] = ByTurns()
    assert turns.take() is None
    turns.add("a", 1)
    assert turns.take(lambda _: False) is None
    assert (len(turns), turns.take(), len(turns)) == (1, 1, 0)


async def test_places_are_lent_by_turns_and_none_is_lost() -> None:
    places, had = Places(2), list[str]()

    async def ask(who: str) -> None:
        PARTY.set(who)
        async with places.place():
            had.append(who)
            await asyncio.sleep(0)

    async with places.place(), places.place():
        asking = [asyncio.create_task(ask(who)) for who in ("flood",) * 20 + ("quiet",) * 2]
        await until(lambda: places.waiting() == 22)
        asking.pop(0).cancel()
    asking[0].cancel()  # it has just been given a place
    await asyncio.wait(asking)
    assert had[:4].count("quiet") == 2
    assert len(had) == 20
    async with places.place(), places.place():
        assert places.waiting() == 0


async def test_while_in_contention_a_party_has_its_share_of_the_places_only_and_all_of_them_afterwards() -> None:
    most, had = [2], list[str]()
    places, done = Places(8, lambda: most[0]), asyncio.Event()

    async def ask(who: str, done: asyncio.Event = done) -> None:
        PARTY.set(who)
        async with places.place():
            had.append(who)
            await done.wait()

    asking = [asyncio.create_task(ask("flood")) for _ in range(20)]
    await until(lambda: places.waiting() == 18)
    asking += [asyncio.create_task(ask("quiet")) for _ in range(2)]
    await asyncio.sleep(0)
    assert had == ["flood"] * 2 + ["quiet"] * 2
    most[0] = 8
    asking += [asyncio.create_task(ask("third"))]
    await asyncio.sleep(0)
    asking.pop(2).cancel()  # it waits
    asking.pop(0).cancel()
    await until(lambda: places.waiting() == 13)
    assert (len(had), had[4:]) == (9, ["third", *["flood"] * 4])
    done.set()
    await asyncio.wait(asking)
    assert len(had) == 22
    assert places.waiting() == 0


async def test_a_step_is_answered_at_once_and_the_next_one_leaves_as_much_time() -> None:
    turns = Turns(Parties(1))
    began = time.perf_counter()
    first = asyncio.create_task(turns.take(lambda: time.sleep(0.1)))
    second = asyncio.create_task(turns.take(time.perf_counter))
    await asyncio.sleep(0)
    assert first.done()
    assert await second >= began + 0.2 - TICK
    assert turns.places.waiting() == 0


async def test_a_deadline_that_has_passed_is_its_own_affair() -> None:
    lane = Lane("passed", 8, 8, 5, Trouble(), Parties(1))
    UNTIL.set(asyncio.get_running_loop().time() - 1)
    late = lane.apply([DEPOSIT])
    UNTIL.set(None)
    other = lane.apply([DEPOSIT])
    with pytest.raises(TimeoutError):
        await late
    assert not other.done()
    lane.close()


@pytest.mark.parametrize("in_contention", [False, True])
async def test_short_steps_follow_each_other_at_once_without_contention(in_contention: bool) -> None:
    """By medians: a busy machine may stop a process for longer than all of its steps take."""
    parties = Parties(1)
    parties.in_contention = lambda: in_contention  # type: ignore[method-assign]
    turns, begun, ended = Turns(parties), list[float](), list[float]()

    def step() -> None:
        begun.append(time.perf_counter())
        time.sleep(0.001)
        ended.append(time.perf_counter())

    for _ in range(100):
        await turns.take(step)
    steps = statistics.median(end - begin for begin, end in zip(begun, ended, strict=True))
    pauses = statistics.median(begin - end for begin, end in zip(begun[1:], ended, strict=False))
    assert (pauses > steps / 2) == in_contention


async def test_a_step_that_fails_leaves_its_place_to_the_next_one() -> None:
    turns = Turns(Parties(1))
    with pytest.raises(ZeroDivisionError):
        await turns.take(lambda: 1 / 0)
    async with asyncio.timeout(10):
        assert await turns.take(lambda: "next") == "next"


def test_a_party_has_as_much_as_it_leaves_and_without_parties_all_may_be_had() -> None:
    def had(who: str, taken: int) -> int:
        PARTY.set(who)
        own = 0
        try:
            while True:
                check_share(32, taken + own, own, "Full")
                own += 1
        except Overloaded:
            return own

    assert had("", 0) == 32
    assert (had("flood", 0), had("quiet", 16), had("third", 24)) == (16, 8, 4)
    assert had("last", 31) == 1  # the smallest settings are for somebody, too
    PARTY.set("")


async def test_parties_are_in_contention_for_a_moment_after_another_has_asked() -> None:
    parties = Parties(1000)
    for who, contention in (("a", False), ("a", False), ("b", True), ("b", True), ("a", True)):
        await parties.enter(who)
        assert parties.in_contention() is contention


async def test_in_contention_requests_come_in_by_turns_a_few_at_a_time() -> None:
    parties, came = Parties(1000), list[str]()

    async def ask(who: str) -> None:
        await parties.enter(who)
        came.append(who)

    await asyncio.gather(ask("quiet"), ask("flood"))
    flood = [asyncio.create_task(ask("flood")) for _ in range(100)]
    await asyncio.sleep(0)
    await asyncio.gather(*(ask("quiet") for _ in range(3)))
    assert came[2:].count("flood") <= 2 * PORTION
    await asyncio.gather(*flood)


# What a flood leaves to others


async def test_a_lane_that_one_party_floods_takes_what_another_asks_for_at_once(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, right_books: None
) -> None:
    settings = Settings(database_url=database_url, lanes=1, lane_batch=128)
    client = await aiohttp_client(make_app(settings))
    await create(client, {"pilot": 0, "flooded": 0, "quiet": 0})

    async with busy_lane(client, superuser):
        flood = [asyncio.create_task(deposit(client, "flood", "flooded")) for _ in range(90)]
        await queued(client, 90)
        quiet = asyncio.create_task(deposit(client, "quiet", "quiet"))
        await queued(client, 91)
    await are_answered(quiet, *flood)

    query = (
        "select count(*) filter (where wallet_uuid = 'quiet'), count(*) from wallet.operation"
        " where wallet_uuid <> 'pilot' group by created_at order by created_at limit 1"
    )
    assert superuser.execute(query).fetchone() == (1, 4)


async def test_the_smallest_calls_are_not_divided(
    database_url: str, aiohttp_client: AiohttpClient, right_books: None
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lane_batch=1, request_deadline=2)))
    await create(client, {"w": 0})
    await are_answered(*(deposit(client, who, "w") for who in ("a", "b") * 5))
    assert await balance(client, "w") == 10


async def test_reads_of_one_party_wait_for_those_of_another_by_turns_only(
    database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, pool_size=1)))
    await create(client, {"w": 0})
    answered: list[str] = []

    async def read(who: str) -> None:
        assert (await client.get(path("w"), headers={"X-Party": who})).status == 200
        answered.append(who)

    places = client.app[POOL]._places
    async with places.place():
        reading = [asyncio.create_task(read("flood")) for _ in range(50)]
        await until(lambda: places.waiting() == 50)
        reading.append(asyncio.create_task(read("quiet")))
        await until(lambda: places.waiting() == 51)
    await asyncio.gather(*reading)
    assert answered.index("quiet") < 10


async def test_reads_of_one_party_leave_connections_and_cores_to_others(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, pool_size=8)))
    await create(client, {"w": 0})

    async def read(who: str) -> None:
        assert (await client.get(path("w"), headers={"X-Party": who})).status == 200

    await asyncio.gather(read("flood"), read("quiet"))
    with psycopg.connect(url_of(superuser, "postgres")) as holder:
        holder.execute("lock table wallet.operation in access exclusive mode")
        reading = [asyncio.create_task(read("flood")) for _ in range(20)]
        await until(lambda: client.app[POOL]._places.waiting() == 18)
        await until(lambda: waiting_backends(superuser) == 2)
        reading.append(asyncio.create_task(read("quiet")))
        await until(lambda: waiting_backends(superuser) == 3)
    await asyncio.gather(*reading)


def test_the_collector_stops_nobody_for_long_however_much_a_flood_has_in_flight() -> None:
    looked_at = list[int]()

    def note(phase: str, collection: dict[str, int]) -> None:
        if phase == "start" and collection["generation"] == 1:
            looked_at.append(len(gc.get_objects(0)) + len(gc.get_objects(1)))

    before = gc.get_threshold()
    spare_the_collector()
    gc.callbacks.append(note)
    try:
        in_flight = [[number] for number in range(500_000)]
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
        gc.unfreeze()
    assert len(in_flight) > 15 * max(looked_at)


async def test_a_line_for_bulk_requests_is_left_to_others(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, right_books: None
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url)))
    await create(client, {"flooded": 0, "other": 0, "quiet": 0})
    await are_answered(bulk(client, "quiet", "quiet"))

    with locked(superuser, "flooded"):
        flood = [asyncio.create_task(bulk(client, "flood", "flooded", SHORT + 1))]
        await until(lambda: waiting_backends(superuser) == 1)
        flood += [asyncio.create_task(bulk(client, "flood", "other")) for _ in range(5)]
        await until(lambda: len(client.app[BULK]._waiting) == 5)
        async with asyncio.timeout(5):  # half of the deadline
            await are_answered(bulk(client, "quiet", "quiet"), bulk(client, "quiet", "quiet"))
        assert waiting_backends(superuser) == 1
    await are_answered(*flood)
    assert await balance(client, "quiet") == 3


async def test_long_work_for_one_party_is_done_in_steps_between_which_another_has_its_turn(
    database_url: str, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch, right_books: None
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url)))
    await create(client, {"flooded": 0, "quiet": 0})
    await are_answered(*(bulk(client, who, who) for who in ("quiet", "flooded")))
    places = client.app[handlers.TURNS].places
    async with places.place():
        flood = [asyncio.create_task(bulk(client, "flood", "flooded", 5_000)) for _ in range(3)]
        await until(lambda: places.waiting() == 3)
        quiet = asyncio.create_task(bulk(client, "quiet", "quiet"))
        await until(lambda: places.waiting() == 4)
        steps = list[int]()
        monkeypatch.setattr(handlers, "decode_part", lambda part: steps.append(len(part)) or decode_part(part))
    await are_answered(quiet)
    assert sum(steps) < 10_000
    await are_answered(*flood)
    assert sum(steps) == 15_000
    assert max(steps) <= 500
    assert await balance(client, "flooded") == 15_001


# Bounds


async def test_a_key_that_asks_for_too_much_at_once_is_told_so_and_nobody_else(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, right_books: None
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, key_requests=3)))
    await create(client, {"w": 0, "v": 0})

    with locked(superuser, "w"):
        flood = [asyncio.create_task(deposit(client, "flood", "w"))]
        await waiting_call(superuser)  # else the others might go with it
        flood += [asyncio.create_task(deposit(client, "flood", "w")) for _ in range(2)]
        await queued(client, 2)
        for answer in (await deposit(client, "flood", "v"), await client.get(path("v"), headers={"X-Party": "flood"})):
            told = await problem(answer, 429, "overloaded")
            assert told["detail"] == "This key has 3 requests in flight already"
            assert int(answer.headers["Retry-After"]) > 0
        for who in ("quiet", "", "third"):
            await are_answered(client.get(path("v"), headers={"X-Party": who}))
    await are_answered(*flood)
    await are_answered(*(deposit(client, "flood", "v") for _ in range(3)))
    assert await balance(client, "v") == 3


async def test_bulk_requests_of_one_key_leave_room_for_those_of_another(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, right_books: None
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, bulk_queue=4)))
    await create(client, {"w": 0, "v": 0})
    await are_answered(bulk(client, "quiet", "v"))

    with locked(superuser, "w"):
        async with asyncio.timeout(10):
            flood = [asyncio.create_task(bulk(client, "flood", "w", SHORT + 1))]
            await until(lambda: waiting_backends(superuser) == 1)
            flood += [asyncio.create_task(bulk(client, "flood", "w")) for _ in range(2)]
            await until(lambda: len(client.app[BULK]._waiting) == 2)
            told = await problem(await bulk(client, "flood", "w"), 429, "overloaded")
            assert told["detail"] == "Too many requests are waiting: this key has its share"
            await are_answered(bulk(client, "quiet", "v"))
    await are_answered(*flood)


async def test_large_bodies_of_one_key_leave_room_for_those_of_another(
    database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, body_memory=6)))
    places = client.app[handlers.TURNS].places
    async with asyncio.timeout(10), places.place():
        waiting = [asyncio.create_task(bulk(client, "flood", "w", 0, 2 * MIB))]
        await until(lambda: places.waiting() == 1)
        told = await problem(await bulk(client, "flood", "w", 0, 2 * MIB), 429, "overloaded")
        assert told["detail"] == "Too many large bodies are being received: this key has its share"
        waiting.append(asyncio.create_task(bulk(client, "quiet", "w", 0, MIB)))
        await until(lambda: places.waiting() == 2)
    await are_answered(*waiting)
    await are_answered(bulk(client, "flood", "w", 0, 2 * MIB))


# Large requests in contention


@pytest.mark.parametrize("lost", [0, 8])
@pytest.mark.parametrize("point", Point)
async def test_a_large_request_that_is_applied_in_parts_has_the_same_outcomes(
    point: Point,
    lost: int,
    proxy: Proxy,
    superuser: psycopg.Connection,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    right_books: None,
) -> None:
    """The connection is cut during the call of a part: of the first, or of the last, which repeats an operation."""
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser))))
    await create(client, {"w": 0})
    names = [str(uuid4()) for _ in range(1_100)]
    earlier = await client.post(path("w", "/operation"), json=asked(names[600]))
    assert earlier.status == 200
    await are_answered(client.get(path("w"), headers={"X-Party": "quiet"}))
    sizes: list[int] = []
    cuts: list[asyncio.Future[None]] = []

    async def call(line: Line, requests: Sequence[Request], *rest: Any) -> list[Outcome]:
        if len(sizes) == lost:
            cuts.append(proxy.cut_next(b"wallet.apply_operation", point))
        sizes.append(len(requests))
        return await whole_call(line, requests, *rest)

    whole_call = Line._call
    monkeypatch.setattr(Line, "_call", call)
    operations = [{**asked(name), "wallet_uuid": "w"} for name in (*names, names[0])]
    answer = await client.post(BULK_PATH, json={"operations": operations}, headers={"X-Party": "flood"})

    assert [cut.done() for cut in cuts] == [True]
    assert sorted({*sizes}) == [77, 128]
    results = (await answer.json())["results"]
    refused = [number for number, result in enumerate(results) if not result["applied"]]
    assert refused == [600, 1_100]
    assert all(results[number]["same_request"] for number in refused)
    assert await balance(client, "w") == 1_100
    query = "select count(distinct created_at) from wallet.operation"
    assert superuser.execute(query).fetchone() == (1 + 9,)


def asked(name: str) -> dict[str, Any]:
    return {"operation_uuid": name, "operation_type": "DEPOSIT", "amount": 1}
