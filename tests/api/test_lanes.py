"""The hot lane: whatever happens to the connection, each request has its own answer, each operation is applied once."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest
from aiohttp import ClientConnectorError, ClientError, ClientResponse, ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from pytest_aiohttp.plugin import AiohttpClient

from app.calls import line as lines
from app.calls.database import connect
from app.calls.dispatch import LANES
from app.calls.lane import Lane
from app.calls.line import Line, Outcome, Request
from app.calls.parties import Parties
from app.calls.trouble import Trouble
from app.server.embedded import Postgres, connection_url
from app.server.migrations import LOGIN
from app.settings import Settings
from app.web.application import make_app
from tests.api.door import MAX, apply, balance, create, deposit, history, hold, path, problem, put, withdraw
from tests.conftest import url_of
from tests.proxy import Http, Point, Proxy

A = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
B = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
CALL = b"wallet.apply_operation"
SEED = int(os.environ.get("WALLET_TEST_SEED", random.SystemRandom().randrange(2**32)))


@pytest.fixture(autouse=True)
def _right_books(superuser: psycopg.Connection) -> Iterator[None]:
    print(f"WALLET_TEST_SEED={SEED}")  # shown if the test fails
    yield
    assert superuser.execute("select * from wallet.verify()").fetchall() == []


def through(proxy: Proxy, superuser: psycopg.Connection) -> str:
    """Return the URI of this test's database for a service that reaches it through the proxy."""
    return connection_url(Path(str(proxy.address)).parent, LOGIN, superuser.info.dbname)


@pytest.fixture
async def lossy(proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient) -> TestClient:
    """A client of an app with one lane, which reaches PostgreSQL through the proxy. Wallet `w` holds 100."""
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser), lanes=1)))
    await create(client, {"w": 100, "pilot": 0})
    return client


@pytest.fixture
async def client(database_url: str, aiohttp_client: AiohttpClient) -> TestClient:
    """A client of an app with one lane. Wallet `w` holds 100."""
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1)))
    await create(client, {"w": 100, "pilot": 0})
    return client


@contextlib.contextmanager
def locked(superuser: psycopg.Connection, wallet: str) -> Iterator[None]:
    """Hold a wallet's row lock."""
    with psycopg.connect(url_of(superuser, "postgres")) as holder:
        assert holder.execute("select from wallet.wallet where uuid = %s for update", [wallet]).rowcount == 1
        yield


async def until(reached: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait for a state, and return what told of it."""
    async with asyncio.timeout(seconds):
        while not (told := reached()):
            await asyncio.sleep(0.005)
        return told


def lane_pids(superuser: psycopg.Connection, condition: str = "true") -> list[int]:
    query = (
        "select pid from pg_stat_activity where application_name = 'wallet lane'"
        f" and datname = current_database() and {condition}"
    )
    return [pid for (pid,) in superuser.execute(query.encode())]


def waiting_backends(superuser: psycopg.Connection) -> int:
    """Return the number of backends of this test's database that wait for a lock."""
    query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    [[count]] = superuser.execute(query).fetchall()
    return count


@contextlib.contextmanager
def frozen_backend(superuser: psycopg.Connection) -> Iterator[int]:
    """Stop the backend of the only lane that has one; it goes on afterwards. Yields its pid."""
    [pid] = lane_pids(superuser)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


async def waiting_call(superuser: psycopg.Connection) -> int:
    """Wait for a lane's call that waits for a lock, and return its backend's pid."""
    [pid] = await until(lambda: lane_pids(superuser, "wait_event_type = 'Lock'"))
    return pid


@contextlib.asynccontextmanager
async def busy_lane(client: TestClient, superuser: psycopg.Connection) -> AsyncIterator[None]:
    """Keep the lane busy with a call that waits for wallet `pilot`: what is asked meanwhile goes in the next call."""
    with locked(superuser, "pilot"):
        pilot = asyncio.create_task(deposit(client, "pilot", 1))
        await waiting_call(superuser)
        yield
    assert (await pilot).status == 200


async def queued(client: TestClient, count: int) -> None:
    """Wait until so many requests wait in the lanes."""
    await until(lambda: sum(len(lane._waiting) for lane in client.app[LANES]) == count)


async def in_one_call(
    client: TestClient, superuser: psycopg.Connection, *requests: Any, meanwhile: Callable[[], object] = lambda: None
) -> list[ClientResponse]:
    """Make requests that share a call, and return their answers."""
    async with busy_lane(client, superuser):
        asked = [asyncio.create_task(request) for request in requests]
        await queued(client, len(asked))
        meanwhile()
    return await asyncio.gather(*asked)


def applied(operations: Sequence[dict[str, Any]], operation: UUID) -> list[int]:
    """Return the amounts under which an operation stands in a history."""
    return [one["amount"] for one in operations if one["operation_uuid"] == str(operation)]


async def assert_success(answer: ClientResponse, operation: UUID) -> None:
    assert (answer.status, await answer.json()) == (200, str(operation))


# A lost connection


@pytest.mark.parametrize("server_too", [True, False], ids=["both_sides", "client_side"])
@pytest.mark.parametrize("point", Point)
async def test_a_lost_connection_costs_waiting_only(
    point: Point, server_too: bool, proxy: Proxy, lossy: TestClient
) -> None:
    cut = proxy.cut_next(CALL, point, server_too=server_too)

    answer = await deposit(lossy, "w", 5, A)

    assert cut.done()
    await assert_success(answer, A)
    assert applied(await history(lossy, "w"), A) == [5]
    assert await balance(lossy, "w") == 105


@pytest.mark.parametrize("point", Point)
async def test_connections_lost_again_and_again_cost_waiting_only(
    point: Point, proxy: Proxy, lossy: TestClient
) -> None:
    cuts = [proxy.cut_next(CALL, point, server_too=number % 2 == 0) for number in range(4)]

    await assert_success(await withdraw(lossy, "w", 100, A), A)

    assert all(cut.done() for cut in cuts)
    assert applied(await history(lossy, "w"), A) == [100]
    assert await balance(lossy, "w") == 0


@pytest.mark.parametrize("point", Point)
async def test_a_call_of_many_is_lost_and_each_gets_its_own_answer(
    point: Point, proxy: Proxy, lossy: TestClient, superuser: psycopg.Connection
) -> None:
    operations = [uuid4() for _ in range(30)]

    *answers, overdraft, nobody = await in_one_call(
        lossy,
        superuser,
        *(deposit(lossy, "w", amount, operation) for amount, operation in enumerate(operations, 1)),
        withdraw(lossy, "w", 10_000, B),
        deposit(lossy, "nobody", 1),
        meanwhile=lambda: proxy.cut_next(CALL, point),
    )

    for operation, answer in zip(operations, answers, strict=True):
        await assert_success(answer, operation)
    await problem(overdraft, 400, "insufficient_funds")
    await problem(nobody, 404, "wallet_not_found")
    recorded = await history(lossy, "w")
    assert [applied(recorded, operation) for operation in operations] == [[amount] for amount in range(1, 31)]
    assert await balance(lossy, "w") == 100 + 30 * 31 // 2
    await problem(await withdraw(lossy, "w", 10_000, B), 400, "insufficient_funds")


async def test_a_duplicate_sent_after_a_lost_answer_is_still_a_duplicate(proxy: Proxy, lossy: TestClient) -> None:
    cut = proxy.cut_next(CALL, Point.BEFORE_THE_ANSWER)
    await assert_success(await deposit(lossy, "w", 5, A), A)
    assert cut.done()

    told = await problem(await deposit(lossy, "w", 5, A), 400, "duplicate_operation")

    assert told["same_request"] is True
    assert await balance(lossy, "w") == 105


@pytest.mark.parametrize("point", Point)
async def test_an_operation_sent_twice_in_a_lost_call_succeeds_once(
    point: Point, proxy: Proxy, lossy: TestClient, superuser: psycopg.Connection
) -> None:
    answers = await in_one_call(
        lossy,
        superuser,
        deposit(lossy, "w", 5, A),
        deposit(lossy, "w", 5, A),
        meanwhile=lambda: proxy.cut_next(CALL, point),
    )

    first, second = sorted(answers, key=lambda answer: answer.status)
    await assert_success(first, A)
    assert (await problem(second, 400, "duplicate_operation"))["same_request"] is True
    assert await balance(lossy, "w") == 105


@pytest.mark.parametrize("point", Point)
async def test_a_duplicate_with_another_amount_in_a_lost_call_is_a_duplicate(
    point: Point, proxy: Proxy, lossy: TestClient, superuser: psycopg.Connection
) -> None:
    answers = await in_one_call(
        lossy,
        superuser,
        deposit(lossy, "w", 5, A),
        deposit(lossy, "w", 7, A),
        meanwhile=lambda: proxy.cut_next(CALL, point),
    )

    assert sorted(answer.status for answer in answers) == [200, 400]
    [moved] = [amount for amount, answer in zip((5, 7), answers, strict=True) if answer.status == 200]
    [refused] = [answer for answer in answers if answer.status == 400]
    told = await problem(refused, 400, "duplicate_operation")
    assert (told["same_request"], told["operation"]["amount"]) == (False, moved)
    assert await balance(lossy, "w") == 100 + moved


async def test_a_duplicate_of_another_wallet_s_operation_in_a_lost_call_is_a_duplicate(
    proxy: Proxy, lossy: TestClient, superuser: psycopg.Connection
) -> None:
    await assert_success(await deposit(lossy, "pilot", 5, A), A)
    cut = proxy.cut_next(CALL, Point.BEFORE_THE_ANSWER)

    told = await problem(await deposit(lossy, "w", 5, A), 400, "duplicate_operation")

    assert cut.done()
    assert "same_request" not in told
    assert await balance(lossy, "w") == 100


async def test_an_idle_connection_that_is_lost_hides_no_duplicate(
    client: TestClient, superuser: psycopg.Connection
) -> None:
    await assert_success(await deposit(client, "w", 5, A), A)
    [pid] = lane_pids(superuser)
    superuser.execute("select pg_terminate_backend(%s)", [pid])
    await until(lambda: not Path(f"/proc/{pid}").exists())

    told = await problem(await deposit(client, "w", 5, A), 400, "duplicate_operation")

    assert told["same_request"] is True
    assert await balance(client, "w") == 105


async def test_a_connection_that_cannot_be_had_at_first_hides_no_duplicate(
    client: TestClient, proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    await assert_success(await deposit(client, "w", 5, A), A)
    another = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser), lanes=1)))
    cuts = [proxy.cut_next(b"wallet lane", point) for point in (Point.BEFORE_THE_CALL, Point.IN_THE_ANSWER)]

    told = await problem(await deposit(another, "w", 5, A), 400, "duplicate_operation")

    assert all(cut.done() for cut in cuts)
    assert told["same_request"] is True
    assert await balance(client, "w") == 105


async def test_the_old_call_is_over_before_the_call_is_made_again(
    proxy: Proxy, lossy: TestClient, superuser: psycopg.Connection
) -> None:
    [old] = lane_pids(superuser)
    with locked(superuser, "w"):
        cut = proxy.cut_next(CALL, Point.AFTER_THE_CALL, server_too=False)
        asked = asyncio.create_task(withdraw(lossy, "w", 100, A))
        await cut
        new = await until(lambda: lane_pids(superuser, f"wait_event_type = 'Lock' and pid <> {old}"))
        assert lane_pids(superuser) == new

    await assert_success(await asked, A)
    assert old not in lane_pids(superuser)
    assert applied(await history(lossy, "w"), A) == [100]
    assert await balance(lossy, "w") == 0


async def test_a_client_whose_own_answer_was_lost_learns_that_its_money_moved(client: TestClient) -> None:
    proxy = Proxy((str(client.host), int(client.port or 0)), Http)
    await proxy.listen(("127.0.0.1", 0))
    assert isinstance(proxy.address, tuple)
    host, port = proxy.address
    url = f"http://{host}:{port}{path('w', '/operation')}"
    body = {"operation_uuid": str(A), "operation_type": "WITHDRAW", "amount": 100}
    async with ClientSession() as session:
        cut = proxy.cut_next(str(A).encode(), Point.BEFORE_THE_ANSWER)
        with pytest.raises(ClientError):
            await session.post(url, json=body)
        await cut

        told = await problem(await session.post(url, json=body), 400, "duplicate_operation")

    await proxy.close()
    assert told["same_request"] is True
    assert await balance(client, "w") == 0


# A call that PostgreSQL ends


@pytest.mark.parametrize("ending", ["pg_terminate_backend", "pg_cancel_backend"])
async def test_a_call_that_an_administrator_ends_is_made_again(
    ending: str, client: TestClient, superuser: psycopg.Connection
) -> None:
    with locked(superuser, "w"):
        asked = asyncio.create_task(deposit(client, "w", 5, A))
        for _ in range(3):
            pid = await waiting_call(superuser)
            assert superuser.execute(f"select {ending}(%s)".encode(), [pid]).fetchone() == (True,)
            await until(lambda ended=pid: ended not in lane_pids(superuser, "wait_event_type = 'Lock'"))

    await assert_success(await asked, A)
    assert applied(await history(client, "w"), A) == [5]
    assert await balance(client, "w") == 105


async def test_a_cancelled_call_hides_no_duplicate(client: TestClient, superuser: psycopg.Connection) -> None:
    await assert_success(await deposit(client, "w", 5, A), A)
    with locked(superuser, "w"):
        async with busy_lane(client, superuser):
            repeated = asyncio.create_task(deposit(client, "w", 5, A))
            fresh = asyncio.create_task(deposit(client, "w", 6, B))
            await queued(client, 2)
        pid = await waiting_call(superuser)
        superuser.execute("select pg_cancel_backend(%s)", [pid])
        await until(lambda: lane_pids(superuser, "wait_event_type is distinct from 'Lock'"))

    await assert_success(await fresh, B)
    assert (await problem(await repeated, 400, "duplicate_operation"))["same_request"] is True
    assert await balance(client, "w") == 111


# A restart of PostgreSQL


@pytest.fixture
async def own_postgres(home: Path) -> AsyncIterator[Postgres]:
    """A server of this test's own, migrated, with the demonstration wallets."""
    postgres = Postgres(home, "fsync=off")
    postgres.start()
    try:
        yield postgres
    finally:
        postgres.stop()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=["fast", "immediate", "kill_9"])
async def test_a_restart_of_postgresql_under_load_costs_waiting_only(
    how: signal.Signals, own_postgres: Postgres, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=own_postgres.url(LOGIN), request_deadline=30)))
    wallets = ["hot", "hot", "hot", "spread1", "spread2", "spread3"]
    await create(client, dict.fromkeys(wallets, 0))
    applied: dict[str, Counter[tuple[str, str, int]]] = defaultdict(Counter)
    answers: Counter[tuple[int, str | None]] = Counter()
    over = asyncio.Event()

    async def one_client(seed: int) -> None:
        choice = random.Random(f"{SEED} {seed}")
        while not over.is_set():
            wallet, operation = choice.choice(wallets), uuid4()
            operation_type, amount = choice.choice(["DEPOSIT", "WITHDRAW"]), choice.randrange(1, 100)
            answer = await apply(client, wallet, operation_type, amount, operation)
            code = None if answer.status == 200 else (await answer.json())["code"]
            answers[answer.status, code] += 1
            if answer.status == 200:
                applied[wallet][str(operation), operation_type, amount] += 1

    async def some_answers(count: int) -> None:
        enough = answers.total() + count
        await until(lambda: answers.total() >= enough, 40)

    clients = [asyncio.create_task(one_client(seed)) for seed in range(32)]
    for _ in range(2):
        await some_answers(300)
        assert own_postgres.process is not None
        own_postgres.process.send_signal(how)
        await asyncio.to_thread(own_postgres.process.wait)
        await asyncio.to_thread(own_postgres.start)
    await some_answers(300)
    over.set()
    await asyncio.gather(*clients)

    assert set(answers) <= {(200, None), (400, "insufficient_funds")}
    for wallet in set(wallets):
        recorded = await history(client, wallet)
        stands = Counter((one["operation_uuid"], one["operation_type"], one["amount"]) for one in recorded)
        assert stands == applied[wallet]
        assert [one["seq"] for one in recorded] == list(range(1, len(recorded) + 1))
    with psycopg.connect(own_postgres.url("postgres")) as connection:
        assert connection.execute("select * from wallet.verify()").fetchall() == []


# Deadline, queue, hang-up


async def test_a_request_past_its_deadline_may_be_asked_again(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=0.5)))
    await create(client, {"w": 100, "v": 0})

    with locked(superuser, "w"):
        behind = (deposit(client, "v", 1) for _ in range(20))
        for answer in await asyncio.gather(withdraw(client, "w", 100, A), *behind):
            await problem(answer, 503, "unavailable")
            assert int(answer.headers["Retry-After"]) > 0
    async with asyncio.timeout(1):
        while (await deposit(client, "v", 1, B)).status == 503:
            pass

    again = await withdraw(client, "w", 100, A)
    if again.status != 200:
        assert (await problem(again, 400, "duplicate_operation"))["same_request"] is True
    assert applied(await history(client, "w"), A) == [100]
    assert applied(await history(client, "v"), B) == [1]


@pytest.mark.parametrize("text", [CALL, b"wallet.get_wallet"], ids=["lane", "read"])
@pytest.mark.parametrize("point", [Point.BEFORE_THE_CALL, Point.AFTER_THE_CALL, Point.BEFORE_THE_ANSWER])
async def test_a_connection_that_goes_nowhere_leaves_time_for_a_second_attempt(
    point: Point, text: bytes, proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    settings = Settings(database_url=through(proxy, superuser), lanes=1, request_deadline=2)
    behind = await aiohttp_client(make_app(settings))
    await create(behind, {"w": 100})
    cut = proxy.cut_next(text, point, client_too=False, server_too=False)

    if text == CALL:
        await assert_success(await withdraw(behind, "w", 100, A), A)
    assert await balance(behind, "w") == (0 if text == CALL else 100)
    assert cut.done()


async def test_an_answer_that_never_comes_holds_nobody_longer_than_the_deadline(
    client: TestClient, proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    settings = Settings(database_url=through(proxy, superuser), lanes=1, request_deadline=0.5)
    behind = await aiohttp_client(make_app(settings))
    cuts = [proxy.cut_next(CALL, Point.BEFORE_THE_ANSWER, client_too=False, server_too=False) for _ in range(2)]

    await problem(await withdraw(behind, "w", 100, A), 503, "unavailable")

    assert all(cut.done() for cut in cuts)
    async with asyncio.timeout(1):
        while (await deposit(behind, "pilot", 1)).status == 503:
            pass
    assert (await problem(await withdraw(behind, "w", 100, A), 400, "duplicate_operation"))["same_request"] is True
    assert await balance(client, "w") == 0


async def test_a_request_that_gave_up_while_it_waited_is_not_sent(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    settings = Settings(database_url=database_url, lanes=1, lane_batch=1, request_deadline=0.5)
    client = await aiohttp_client(make_app(settings))
    await create(client, {"w": 100, "v": 0})

    with locked(superuser, "w"):
        ahead = [asyncio.create_task(deposit(client, "w", 1))]
        await waiting_call(superuser)
        ahead += [asyncio.create_task(deposit(client, "w", 1))]
        await queued(client, 1)
        await problem(await deposit(client, "v", 1, A), 503, "unavailable")
        for answer in await asyncio.gather(*ahead):
            await problem(answer, 503, "unavailable")

    async with asyncio.timeout(1):
        while (await deposit(client, "v", 2)).status == 503:
            pass
    assert applied(await history(client, "v"), A) == []


async def test_a_request_has_its_deadline_even_if_its_lane_is_dead(
    database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=0.3)))
    await create(client, {"w": 100})
    for task in asyncio.all_tasks():
        if task.get_coro().__qualname__ == "Lane.run":
            task.cancel()

    async with asyncio.timeout(5):
        await problem(await deposit(client, "w", 1), 503, "unavailable")


async def test_a_request_has_its_own_deadline_if_that_of_an_older_one_passes_during_its_call(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=1)))
    await create(client, {"w": 100})
    assert (await deposit(client, "w", 1)).status == 200

    await asyncio.sleep(0.5)
    with locked(superuser, "w"):
        async with asyncio.timeout(5):
            await problem(await deposit(client, "w", 1), 503, "unavailable")


async def test_one_request_too_many_is_told_at_once(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, lane_queue=5)))
    await create(client, {"w": 100})

    with locked(superuser, "w"):
        accepted = [asyncio.create_task(deposit(client, "w", 1))]
        await waiting_call(superuser)
        accepted += [asyncio.create_task(deposit(client, "w", 1)) for _ in range(5)]
        await queued(client, 5)

        async with asyncio.timeout(5):  # half of the deadline
            refused = await asyncio.gather(*(deposit(client, "w", 1000) for _ in range(10)))
        assert not any(task.done() for task in accepted)

    for answer in refused:
        await problem(answer, 429, "overloaded")
        assert int(answer.headers["Retry-After"]) > 0
    assert [(await task).status for task in accepted] == [200] * 6
    assert await balance(client, "w") == 106
    assert (await deposit(client, "w", 1)).status == 200


class Server(TestServer):
    """A server that lets the handler of a client that hung up go on, as the service does and aiohttp's tests do not."""

    async def _make_runner(self, **arguments: Any) -> Any:
        return await super()._make_runner(**{**arguments, "handler_cancellation": False})


async def test_a_client_that_hangs_up_changes_nothing_for_the_others(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(Server(make_app(Settings(database_url=database_url, lanes=1))))
    await create(client, {"w": 100})

    with locked(superuser, "w"):
        called = asyncio.create_task(deposit(client, "w", 1, A))
        await waiting_call(superuser)
        waiting = asyncio.create_task(deposit(client, "w", 2, B))
        others = [asyncio.create_task(deposit(client, "w", 3)) for _ in range(5)]
        await queued(client, 6)
        for gone in (called, waiting):
            gone.cancel()
        await asyncio.wait({called, waiting})
        [pid] = lane_pids(superuser, "wait_event_type = 'Lock'")

    assert [(await other).status for other in others] == [200] * 5
    assert lane_pids(superuser) == [pid]
    recorded = await history(client, "w")
    assert (applied(recorded, A), applied(recorded, B)) == ([1], [2])
    assert await balance(client, "w") == 118


# The right answer to each


async def test_each_of_hundreds_of_requests_gets_its_own_answer(client: TestClient) -> None:
    await create(client, {"full": MAX, "v": 0})
    used = {uuid4(): amount for amount in range(1, 51)}
    await asyncio.gather(*(deposit(client, "v", amount, operation) for operation, amount in used.items()))

    async def succeeds(wallet: str, operation_type: str, amount: int) -> None:
        operation = uuid4()
        await assert_success(await apply(client, wallet, operation_type, amount, operation), operation)

    async def is_refused(wallet: str, operation_type: str, amount: int, status: int, code: str) -> None:
        await problem(await apply(client, wallet, operation_type, amount), status, code)

    async def is_a_duplicate(wallet: str, operation: UUID, amount: int) -> None:
        told = await problem(await deposit(client, wallet, amount, operation), 400, "duplicate_operation")
        if wallet == "v":
            recorded = told["operation"]
            assert (recorded["operation_uuid"], recorded["amount"]) == (str(operation), used[operation])
            assert told["same_request"] is (amount == used[operation])
        else:
            assert "operation" not in told

    asked = [succeeds(wallet, "DEPOSIT", amount) for wallet in ("w", "v") for amount in range(1, 151)]
    asked += [succeeds("w", "WITHDRAW", 1) for _ in range(100)]
    asked += [is_refused("w", "WITHDRAW", MAX, 400, "insufficient_funds") for _ in range(60)]
    asked += [is_refused("full", "DEPOSIT", 1, 400, "balance_out_of_range") for _ in range(60)]
    asked += [is_refused("nobody", "DEPOSIT", 1, 404, "wallet_not_found") for _ in range(60)]
    asked += [is_refused("w", "DEPOSIT", 0, 400, "invalid_request") for _ in range(20)]
    for operation, amount in used.items():
        asked += [
            is_a_duplicate(*which) for which in (("v", operation, amount), ("v", operation, 99), ("w", operation, 1))
        ]
    random.Random(SEED).shuffle(asked)
    await asyncio.gather(*asked)

    assert await balance(client, "w") == 100 + 150 * 151 // 2 - 100
    assert await balance(client, "v") == 50 * 51 // 2 + 150 * 151 // 2
    assert await balance(client, "full") == MAX


@contextlib.asynccontextmanager
async def running_lane(settings: Settings, *lines: Line) -> AsyncIterator[Lane]:
    lane = Lane("0", settings.lane_batch, settings.lane_queue, settings.request_deadline, Trouble(), Parties(1))
    tasks = [asyncio.create_task(lane.run(line)) for line in lines]
    try:
        yield lane
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for line in lines:
            await line.close()


@pytest.mark.parametrize(
    ("batch", "lines", "arrivals", "most"), [(1, 1, 3_000, 1), (7, 1, 20_000, 1), (512, 1, 20_000, 1), (7, 2, 5_000, 5)]
)
async def test_no_request_hangs_whenever_it_arrives(
    batch: int, lines: int, arrivals: int, most: int, client: TestClient, database_url: str
) -> None:
    """Each client asks for one operation, or for a few, `most` of them."""
    choice = random.Random(f"{SEED} {batch} {lines}")
    wallets = ("w", "v", "u", "nobody")
    await create(client, {"v": 0, "u": 0})
    asked: list[tuple[list[Request], asyncio.Future[list[Outcome]]]] = []
    settings = Settings(database_url=database_url, lane_batch=batch, lane_queue=10**6)

    async with running_lane(settings, *(Line(settings) for _ in range(lines))) as lane:
        for _ in range(arrivals):
            requests = [
                Request(
                    choice.choice(wallets), uuid4(), choice.choice(("DEPOSIT", "WITHDRAW")), choice.randrange(1, 100)
                )
                for _ in range(choice.randint(1, most))
            ]
            if asked and choice.random() < 0.1:  # the same again
                requests = choice.choice(asked[-50:])[0]
            asked.append((requests, lane.apply(requests)))
            if choice.random() < 0.01:  # somebody gives up
                choice.choice(asked[-20:])[1].cancel()
            gap = choice.random()
            if gap < 0.1:  # until an answer comes: the lane has just drained its queue, or is about to
                awaited = choice.choice(asked[-3:])[1]
                await asyncio.wait({awaited}, timeout=5)
                assert awaited.done(), "a request hangs until another comes"
                gap = choice.random()
            for _ in range(choice.randrange(6) if gap < 0.6 else 0):
                await asyncio.sleep(0)
        answered = {future for _, future in asked}
        _, hanging = await asyncio.wait(answered, timeout=5)
        assert not hanging, f"{len(hanging)} of {arrivals} requests hang"

    told: dict[UUID, list[str | None]] = defaultdict(list)
    recorded: dict[str, dict[int, tuple[UUID, str, int, int]]] = defaultdict(dict)
    decided: list[tuple[Request, Outcome]] = []
    for requests, future in asked:
        if future.cancelled():
            for request in requests:
                told[request.operation_uuid].append("gave up")
        else:
            decided += zip(requests, future.result(), strict=True)
    for request, outcome in decided:
        told[request.operation_uuid].append(outcome.sqlstate)
        assert (outcome.sqlstate == "WA404") is (request.wallet_uuid == "nobody")
        assert outcome.sqlstate in (None, "WA404", "WA402", "WA409")
        if outcome.sqlstate is None:
            assert outcome.seq not in recorded[request.wallet_uuid]
            recorded[request.wallet_uuid][outcome.seq] = (*request[1:4], outcome.balance_after)
        elif outcome.sqlstate == "WA409":
            assert outcome.is_repeat()
    assert all(outcomes.count(None) <= 1 for outcomes in told.values())

    for wallet in wallets[:-1]:
        before = 0
        for seq, stands in enumerate(await history(client, wallet), 1):
            assert stands["seq"] == seq
            signed = stands["amount"] if stands["operation_type"] == "DEPOSIT" else -stands["amount"]
            assert stands["balance_after"] == before + signed
            before = stands["balance_after"]
            operation = UUID(stands["operation_uuid"])
            row = (operation, stands["operation_type"], stands["amount"], stands["balance_after"])
            assert recorded[wallet].pop(seq, row) == row
            if operation in told:  # else it is the money that the wallet held at first
                assert None in told[operation] or "gave up" in told[operation]
        assert recorded[wallet] == {}


@pytest.mark.parametrize("door", ["lane", "bulk"])
async def test_what_is_refused_after_a_503_is_not_applied_later(
    door: str, database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    settings = Settings(database_url=database_url, lanes=1, request_deadline=1)
    one, other = [await aiohttp_client(make_app(settings)) for _ in range(2)]  # as two workers, or two machines
    await create(one, {"a": 0, "w": 0, "pilot": 0})

    with locked(superuser, "a"):  # the call waits for it, and hasn't looked at `w` yet
        if door == "lane":
            _, answer = await in_one_call(one, superuser, deposit(one, "a", 1), withdraw(one, "w", 100, A))
            status = answer.status
        else:
            items = [
                {"wallet_uuid": "a", "operation_uuid": str(B), "operation_type": "DEPOSIT", "amount": 1},
                {"wallet_uuid": "w", "operation_uuid": str(A), "operation_type": "WITHDRAW", "amount": 100},
            ]
            status = (await one.post("/api/v1/operations", json={"operations": items})).status
        assert status == 503
        await problem(await withdraw(other, "w", 100, A), 400, "insufficient_funds")
        assert (await deposit(other, "w", 100)).status == 200
    await until(lambda: not lane_pids(superuser, "state = 'active'"))

    assert applied(await history(other, "w"), A) == []


async def test_a_frozen_backend_that_goes_on_after_the_503_applies_nothing(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the database is frozen, but for the test's own connections: nor can the lane end the backend."""

    async def cannot(_line: Line) -> None:
        pass

    monkeypatch.setattr(Line, "_end_abandoned", cannot)
    monkeypatch.setattr(lines, "FIRST_ATTEMPT", 1)
    settings = Settings(database_url=database_url, lanes=1, request_deadline=1)
    one = await aiohttp_client(make_app(settings))
    await create(one, {"w": 0})
    await problem(await withdraw(one, "w", 1), 400, "insufficient_funds")  # now the lane has its backend

    with frozen_backend(superuser) as frozen:
        other = await aiohttp_client(make_app(settings))
        assert (await withdraw(one, "w", 100, A)).status == 503
        await problem(await withdraw(other, "w", 100, A), 400, "insufficient_funds")
        assert (await deposit(other, "w", 100)).status == 200
    await until(lambda: frozen not in lane_pids(superuser))

    assert await balance(other, "w") == 100


async def test_a_call_that_was_given_up_does_not_hold_its_locks_for_long(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(database_url=database_url, lanes=1, request_deadline=1)
    one, other = [await aiohttp_client(make_app(settings)) for _ in range(2)]
    await create(one, {"a": 0, "w": 0, "pilot": 0})

    with locked(superuser, "w"):
        answers = await in_one_call(one, superuser, deposit(one, "a", 1), deposit(one, "w", 1))
        assert [answer.status for answer in answers] == [503, 503]
        given_up = [record for record in caplog.records if "made again: TimeoutError" in record.getMessage()]
        assert {hasattr(record, "sqlstate") for record in given_up} == {False}  # the database said nothing
        async with asyncio.timeout(1.5):
            while (await deposit(other, "a", 1, A)).status == 503:
                pass
    assert applied(await history(other, "a"), A) == [1]


@pytest.mark.parametrize("name", ['"', "\\", ",", "}", "a b", "\n", "\N{WHITE CHESS QUEEN}", ""])
async def test_a_name_that_no_wallet_can_have_spoils_nothing_for_the_others(
    name: str, client: TestClient, database_url: str
) -> None:
    line = Line(Settings(database_url=database_url))
    requests = [Request(one, uuid4(), "DEPOSIT", 1) for one in ("w", name, "w")]
    outcomes = await line.apply(requests, asyncio.get_running_loop().time() + 5)

    await line.close()
    assert [(outcome.sqlstate, outcome.balance_after) for outcome in outcomes] == [
        (None, 101),
        ("WA400", None),
        (None, 102),
    ]


@pytest.mark.parametrize("count", [1, 5])
async def test_a_clock_that_is_set_ahead_delays_a_call_and_refuses_none(
    count: int, client: TestClient, database_url: str
) -> None:
    line = Line(Settings(database_url=database_url))
    last = asyncio.get_running_loop().time() + 5
    await line.apply([Request("w", uuid4(), "DEPOSIT", 1)], last)

    line._clock -= timedelta(hours=1)  # as if the database's had been set after it was read
    outcomes = await line.apply([Request("w", uuid4(), "DEPOSIT", 1) for _ in range(count)], last)

    await line.close()
    assert [outcome.sqlstate for outcome in outcomes] == [None] * count
    assert await balance(client, "w") == 101 + count


async def test_the_clock_is_read_again_after_a_while(
    client: TestClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(Settings(database_url=database_url))

    async def apply_one() -> Any:
        await line.apply([Request("w", uuid4(), "DEPOSIT", 1)], asyncio.get_running_loop().time() + 5)
        return line._clock

    monkeypatch.setattr(lines, "CLOCK_AGE", 3600)
    first = await apply_one()
    assert await apply_one() == first
    monkeypatch.setattr(lines, "CLOCK_AGE", 0)
    assert await apply_one() > first
    await line.close()


async def test_the_server_ends_a_statement_that_takes_longer_than_the_deadline(database_url: str) -> None:
    connection = await connect(database_url, 0.2)
    with pytest.raises(asyncpg.QueryCanceledError):
        await connection.execute("select pg_sleep(5)")
    await connection.close()


@pytest.mark.parametrize(("first_attempt", "told"), [(1, 503), (lines.FIRST_ATTEMPT, 200)])
async def test_a_backend_that_cannot_be_ended_is_not_waited_for_for_ever(
    first_attempt: float,
    told: int,
    database_url: str,
    superuser: psycopg.Connection,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "FIRST_ATTEMPT", first_attempt)
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=1)))
    await create(client, {"w": 0})
    await deposit(client, "w", 1)

    with frozen_backend(superuser) as frozen:
        assert (await deposit(client, "w", 1)).status == told
        assert (await deposit(client, "w", 1, A)).status == 200
    await until(lambda: frozen not in lane_pids(superuser))
    assert await balance(client, "w") == (2 if told == 503 else 3)


SLOW = """
create function public.rest() returns trigger language plpgsql as
  $$ begin perform pg_sleep(0.02); return null; end $$;
create trigger rest after insert on wallet.operation for each statement execute function public.rest();
"""


@pytest.mark.alone
async def test_a_lane_is_back_at_once_after_an_outage_longer_than_the_deadline_whatever_still_arrives(
    client: TestClient, database_url: str, superuser: psycopg.Connection
) -> None:
    """Those who wait are of every age: the oldest must not spoil the call for the others, one after another."""
    superuser.execute(SLOW.encode())
    over = asyncio.Event()

    async def arrivals(wallet: str, batch: int) -> list[tuple[float, list[Outcome] | BaseException]]:
        settings = Settings(database_url=database_url, request_deadline=1, lane_batch=batch)
        asked: list[tuple[float, asyncio.Future[list[Outcome]]]] = []
        async with running_lane(settings, Line(settings)) as lane:
            while not over.is_set():
                asked.append((time.monotonic(), lane.apply([Request(wallet, uuid4(), "DEPOSIT", 1)])))
                await asyncio.sleep(0.01)
            done = await asyncio.gather(*(future for _, future in asked), return_exceptions=True)
        return list(zip((came for came, _ in asked), done, strict=True))

    await create(client, {"v": 0})
    with locked(superuser, "w"), locked(superuser, "v"):
        arriving = [asyncio.create_task(arrivals(wallet, batch)) for wallet, batch in (("w", 8), ("v", 512))]
        await asyncio.sleep(2)
    back = time.monotonic()
    await asyncio.sleep(1.5)
    over.set()
    for found in await asyncio.gather(*arriving):
        late = [came - back for came, outcome in found if isinstance(outcome, TimeoutError)]
        assert late
        assert max(late) < 0.5
        assert {type(outcomes) for _, outcomes in found} == {list, TimeoutError}


async def test_what_shares_a_call_with_an_overdue_request_goes_on(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, request_deadline=2)))
    await create(client, {"a": 0, "w": 0, "pilot": 0})
    with locked(superuser, "a"):
        async with busy_lane(client, superuser):
            first = asyncio.create_task(deposit(client, "a", 1))
            await asyncio.sleep(1)  # the first is older by half of its deadline
            second = asyncio.create_task(deposit(client, "w", 1))
            await queued(client, 2)
        assert (await first).status == 503
        assert (await second).status == 200


REFUSED = """
create function public.refuse() returns trigger language plpgsql as $$ begin raise exception 'nothing'; end $$;
create constraint trigger refuse after insert on wallet.operation deferrable initially deferred
  for each row when (new.wallet_uuid = 'refused') execute function public.refuse();
"""


async def test_what_a_call_in_parts_had_applied_when_it_was_given_up_is_recognised(
    client: TestClient, database_url: str, superuser: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at its commit, a call is made in parts; its time is over between two of them, with none under way."""
    await create(client, {"v": 0, "refused": 0})
    superuser.execute(REFUSED.encode())
    line = Line(Settings(database_url=database_url))
    requests = [Request(wallet, uuid4(), "DEPOSIT", 5) for wallet in ("w", "v", "refused")]
    now = asyncio.get_running_loop().time
    prepare, prepared = line._prepare, itertools.count(1)

    async def hang_before_the_last_part() -> datetime:
        if next(prepared) == 5:  # after all three, w, v and refused, and v
            await asyncio.sleep(10)
        return await prepare()

    with monkeypatch.context() as changed:
        changed.setattr(line, "_prepare", hang_before_the_last_part)
        changed.setattr(line, "_ready", lambda: None)
        with pytest.raises(TimeoutError):
            await line.apply(requests, now() + 1)
    assert [await balance(client, one) for one in ("w", "v", "refused")] == [105, 5, 0]
    outcomes = await line.apply(requests, now() + 5, again=True)

    await line.close()
    assert [outcome.sqlstate for outcome in outcomes] == [None, None, "P0001"]
    assert [await balance(client, one) for one in ("w", "v", "refused")] == [105, 5, 0]


@pytest.mark.parametrize("point", Point)
async def test_a_put_that_the_service_sends_twice_is_applied_now(point: Point, proxy: Proxy, lossy: TestClient) -> None:
    cut = proxy.cut_next(CALL, point)

    answer = await put(lossy, "w", "WITHDRAW", 5, A, metadata={"a": 1})

    assert cut.done()
    assert (answer.status, await answer.json()) == (201, (await history(lossy, "w"))[-1])
    assert (await put(lossy, "w", "WITHDRAW", 5, A, metadata={"a": 1})).status == 200
    assert await balance(lossy, "w") == 95


@pytest.mark.parametrize("amount", [100, 101], ids=["all", "none"])
@pytest.mark.parametrize("point", Point)
async def test_an_atomic_call_that_is_lost_is_applied_as_a_whole_or_not_at_all(
    point: Point, amount: int, proxy: Proxy, lossy: TestClient
) -> None:
    await create(lossy, {"v": 0})
    moves = [("w", "TRANSFER", amount, "v"), ("v", "WITHDRAW", amount, None)]
    operations = [
        {"wallet_uuid": w, "operation_uuid": str(uuid4()), "operation_type": t, "amount": a, "counterparty_uuid": c}
        for w, t, a, c in moves
    ]
    assert (await deposit(lossy, "v", 1, A)).status == 200
    cut = proxy.cut_next(CALL, point)

    answer = await lossy.post("/api/v1/operations", json={"operations": operations, "atomic": True})

    assert cut.done()
    results = (await answer.json())["results"]
    assert [result["applied"] for result in results] == [amount == 100] * 2
    if amount == 101:
        assert {result["code"] for result in results} == {"insufficient_funds"}
    assert [await balance(lossy, one) for one in ("w", "v")] == ([0, 1] if amount == 100 else [100, 1])


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "each"])
@pytest.mark.parametrize("point", Point)
async def test_a_hold_and_its_capture_in_a_lost_call_succeed_once(
    point: Point, atomic: bool, proxy: Proxy, lossy: TestClient
) -> None:
    until = "2099-01-01T00:00:00Z"
    operations = [
        {"wallet_uuid": "w", "operation_uuid": str(A), "operation_type": "HOLD", "amount": 60, "expires_at": until},
        {"wallet_uuid": "w", "operation_uuid": str(B), "operation_type": "WITHDRAW", "amount": 50, "hold_uuid": str(A)},
        {"wallet_uuid": "w", "operation_uuid": str(uuid4()), "operation_type": "RELEASE", "hold_uuid": str(A)},
    ][: 2 if atomic else 3]
    cut = proxy.cut_next(CALL, point)

    answer = await lossy.post("/api/v1/operations", json={"operations": operations, "atomic": atomic})

    assert cut.done()
    held, captured, *released = (await answer.json())["results"]
    assert (held["applied"], held["held_after"], captured["applied"], captured["held_after"]) == (True, 60, True, 0)
    assert [result["code"] for result in released] == ["hold_closed"] * (not atomic)
    assert await balance(lossy, "w") == 50


@pytest.mark.parametrize("point", Point)
async def test_a_capture_whose_call_is_lost_succeeds_once(point: Point, proxy: Proxy, lossy: TestClient) -> None:
    assert (await hold(lossy, "w", 60, A)).status == 200
    cut = proxy.cut_next(CALL, point)

    answers = [await put(lossy, "w", "WITHDRAW", 50, B, hold_uuid=str(A)) for _ in range(2)]

    assert cut.done()
    assert [answer.status for answer in answers] == [201, 200]
    assert await answers[0].json() == await answers[1].json()
    assert await balance(lossy, "w") == 50


@pytest.mark.parametrize("point", Point)
async def test_a_lost_atomic_call_with_a_duplicate_applies_nothing(
    point: Point, proxy: Proxy, lossy: TestClient
) -> None:
    assert (await deposit(lossy, "w", 5, A)).status == 200
    operations = [
        {"wallet_uuid": "w", "operation_uuid": str(one), "operation_type": "DEPOSIT", "amount": 5} for one in (A, B)
    ]
    cut = proxy.cut_next(CALL, point)

    answer = await lossy.post("/api/v1/operations", json={"operations": operations, "atomic": True})

    assert cut.done()
    results = (await answer.json())["results"]
    assert [result["code"] for result in results] == ["duplicate_operation", "not_applied"]
    assert await balance(lossy, "w") == 105


# What goes together


async def test_an_atomic_request_shares_its_call_with_nobody(client: TestClient, database_url: str) -> None:
    settings = Settings(database_url=database_url)
    line = WatchedLine(settings)
    sizes = [(1, False), (2, False), (3, True), (4, True), (5, False), (6, False)]
    async with running_lane(settings, line) as lane:
        await until(lambda: line._connection is not None and line._clock is not None)
        futures = [
            lane.apply([Request("w", uuid4(), "DEPOSIT", 1) for _ in range(size)], atomic=atomic)
            for size, atomic in sizes
        ]
        await asyncio.gather(*futures)
    assert line.calls == [3, 3, 4, 11]


class WatchedLine(Line):
    """A line that notes what it is asked for."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.calls: list[int] = []

    async def apply(self, requests: Sequence[Request], last: float, **how: Any) -> list[Outcome]:
        self.calls.append(len(requests))
        return await super().apply(requests, last, **how)


async def test_an_idle_lane_sends_at_once(client: TestClient, database_url: str) -> None:
    settings = Settings(database_url=database_url)
    line = WatchedLine(settings)
    async with running_lane(settings, line) as lane:
        await until(lambda: line._connection is not None and line._clock is not None)
        for count in range(1, 6):
            future = lane.apply([Request("w", uuid4(), "DEPOSIT", 1)])
            for _ in range(3):  # turns of the event loop
                await asyncio.sleep(0)
            assert line.calls == [1] * count
            assert [outcome.sqlstate for outcome in await future] == [None]


async def test_an_answer_comes_after_the_commit(
    client: TestClient, database_url: str, superuser: psycopg.Connection
) -> None:
    query = "select count(*) from wallet.operation where operation_uuid = any(%s)"
    settings = Settings(database_url=database_url)
    async with running_lane(settings, Line(settings)) as lane:
        for count in (1, 5) * 10:
            requests = [Request("w", uuid4(), "DEPOSIT", 1) for _ in range(count)]
            futures = [lane.apply([request]) for request in requests]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            answered = [
                request.operation_uuid for request, future in zip(requests, futures, strict=True) if future.done()
            ]
            assert superuser.execute(query, [answered]).fetchone() == (len(answered),)
            await asyncio.wait(futures)


async def test_what_waits_goes_in_one_call(client: TestClient, superuser: psycopg.Connection) -> None:
    await create(client, {"v": 0})
    operations = {wallet: [uuid4() for _ in range(25)] for wallet in ("w", "v")}

    await in_one_call(
        client, superuser, *(deposit(client, wallet, 1, one) for wallet, some in operations.items() for one in some)
    )

    query = "select created_at, count(*) from wallet.operation where operation_uuid = any(%s) group by created_at"
    assert [count for _, count in superuser.execute(query, [[*operations["w"], *operations["v"]]])] == [50]


async def test_a_call_takes_so_many_at_most_and_none_waits_twice(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, lane_batch=20)))
    await create(client, {"w": 100, "pilot": 0})

    answers = await in_one_call(client, superuser, *(deposit(client, "w", 1000) for _ in range(50)))

    assert [answer.status for answer in answers] == [200] * 50
    query = "select count(*) from wallet.operation where amount = 1000 group by created_at order by created_at"
    assert [count for (count,) in superuser.execute(query)] == [20, 20, 10]


# The end


async def test_a_service_that_stops_answers_what_it_accepted(superuser: psycopg.Connection, database_url: str) -> None:
    runner = web.AppRunner(make_app(Settings(database_url=database_url, lanes=1)), shutdown_timeout=20)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async with ClientSession(url) as session:

        async def ask(amount: int) -> tuple[int, str]:
            body = {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": amount}
            async with session.post("/api/v1/wallets/w/operation", json=body) as answer:
                return answer.status, await answer.text()

        async with session.post("/api/v1/wallets", json={"uuid": "w"}) as created:
            assert created.status == 201
        with locked(superuser, "w"):
            asked = [asyncio.create_task(ask(1))]
            await waiting_call(superuser)
            asked += [asyncio.create_task(ask(2)) for _ in range(20)]
            await until(lambda: len(runner.app[LANES][0]._waiting) == 20)
            stopping = asyncio.create_task(runner.cleanup())
            await until(lambda: not runner.sites)
            async with ClientSession() as late:
                with pytest.raises(ClientConnectorError):
                    await late.get(f"{url}/healthz")
            assert not stopping.done()

        assert [status for status, _ in await asyncio.gather(*asked)] == [200] * 21
        began = time.monotonic()
        await stopping
        assert time.monotonic() - began < 5
    assert superuser.execute("select balance, seq from wallet.balance").fetchall() == [(41, 21)]
    await until(lambda: lane_pids(superuser) == [])
