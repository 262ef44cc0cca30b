"""/metrics: what the numbers say after requests that are known.

The counters are of the process, which runs many tests: what is looked at is how much they have grown.
"""

import asyncio
import sys
import threading
import time
from types import SimpleNamespace
from urllib.request import urlopen
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pytest_aiohttp.plugin import AiohttpClient

from app import metrics as app_metrics
from app.settings import CHECKOUT, Settings
from app.web.application import make_app
from tests.api.door import MAX, capture, create, deposit, hold, path, release, withdraw
from tests.api.test_bad_input import send_raw
from tests.api.test_lanes import (
    busy_lane,
    in_one_call,
    locked,
    queued,
    through,
    until,
    waiting_backends,
    waiting_call,
)
from tests.api.test_process import Service, Start, answers, kill, start, wait_until
from tests.conftest import url_of
from tests.proxy import Point, Proxy

__all__ = ["start"]  # a fixture

METRICS_ASKED = {"method": "GET", "route": "/metrics", "status": "200"}
CALL = b"wallet.apply_operation"


class Metrics:
    """The samples of one answer, by name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Return the value of a series; 0 if it is not there, as it is before the first event."""
        return self.samples.get((name, frozenset(labels.items())), 0)

    def labels(self, name: str) -> set[frozenset[tuple[str, str]]]:
        return {labels for sample, labels in self.samples if sample == name}

    def since(self, before: "Metrics", name: str) -> dict[tuple[str, ...], float]:
        """Return the series of a name that have grown, by the values of their labels in the labels' order."""
        grown = {
            tuple(value for _, value in sorted(labels)): self.value(name, **dict(labels))
            - before.value(name, **dict(labels))
            for labels in self.labels(name)
        }
        return {labels: growth for labels, growth in grown.items() if growth}


async def metrics(client: TestClient) -> Metrics:
    answer = await client.get("/metrics")
    assert answer.status == 200
    assert answer.content_type == "text/plain"
    return Metrics(await answer.text())


@pytest.fixture(autouse=True)
def collected_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at what is, not at what was up to a second ago."""
    monkeypatch.setattr(app_metrics, "MAX_AGE", 0)


@pytest.fixture
async def client(database_url: str, aiohttp_client: AiohttpClient) -> TestClient:
    """A client of an app with one lane. Wallet `w` holds 100."""
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lanes=1, lane_batch=4)))
    await create(client, {"w": 100, "pilot": 0})
    return client


async def bulk(client: TestClient, *operations: tuple[str, str, int, UUID]) -> None:
    names = ("wallet_uuid", "operation_type", "amount", "operation_uuid")
    listed = [dict(zip(names, (*rest, str(operation)), strict=True)) for *rest, operation in operations]
    assert (await client.post("/api/v1/operations", json={"operations": listed})).status == 200


# Requests


async def test_requests_are_counted_by_method_route_and_status(client: TestClient) -> None:
    before = await metrics(client)

    await client.get("/api/v1/wallets/w")
    await client.get("/api/v1/wallets/w")
    await client.head("/api/v1/wallets/w")
    await client.get("/api/v1/wallets/nobody")
    await client.post("/api/v1/wallets", json={"uuid": "zebra"})
    await deposit(client, "zebra", 1)
    await withdraw(client, "zebra", 2)
    await client.delete("/api/v1/wallets/zebra")

    after = await metrics(client)
    assert after.since(before, "wallet_request_seconds_count") == {
        ("GET", "/api/v1/wallets/{wallet_uuid}", "200"): 2,
        ("HEAD", "/api/v1/wallets/{wallet_uuid}", "200"): 1,
        ("GET", "/api/v1/wallets/{wallet_uuid}", "404"): 1,
        ("POST", "/api/v1/wallets", "201"): 1,
        ("POST", "/api/v1/wallets/{wallet_uuid}/operation", "200"): 1,
        ("POST", "/api/v1/wallets/{wallet_uuid}/operation", "400"): 1,
        ("DELETE", "none", "405"): 1,
        ("GET", "/metrics", "200"): 1,  # the first of the two, which counted itself when it was answered
    }


async def test_what_strangers_send_makes_no_labels(client: TestClient) -> None:
    before = await metrics(client)

    for stranger in ("/zebra/1", "/zebra/2", "/api/v1/wallets/zebra/3/4", "/%7Aebra"):
        assert (await client.get(stranger)).status == 404
    assert (await client.get(path("zebra"))).status == 404
    for method in ("PROPFIND", "MKCOL", "UNLINK"):
        assert (await client.request(method, "/zebra")).status == 404

    after = await metrics(client)
    grown = after.since(before, "wallet_request_seconds_count")
    assert grown.pop(("GET", "/metrics", "200")) == 1
    assert grown == {
        ("GET", "none", "404"): 4,
        ("GET", "/api/v1/wallets/{wallet_uuid}", "404"): 1,
        ("other", "none", "404"): 3,
    }
    assert "zebra" not in after.text


async def test_the_histogram_holds_how_long_requests_took(client: TestClient, superuser: psycopg.Connection) -> None:
    before = await metrics(client)
    began = time.perf_counter()
    with locked(superuser, "w"):
        asked = asyncio.create_task(deposit(client, "w", 1))
        await waiting_call(superuser)
        waiting_since = time.perf_counter()
        await until(lambda: time.perf_counter() > waiting_since + 0.03)
    assert (await asked).status == 200
    at_most = time.perf_counter() - began

    after = await metrics(client)
    labels = {"method": "POST", "route": "/api/v1/wallets/{wallet_uuid}/operation", "status": "200"}

    def growth(series: str, **more: str) -> float:
        name = f"wallet_request_seconds_{series}"
        return after.value(name, **labels, **more) - before.value(name, **labels, **more)

    assert 0.03 <= growth("sum") <= at_most
    assert [growth("bucket", le=le) for le in ("0.025", "10.0", "+Inf")] == [0, 1, 1]


async def test_what_is_no_http_and_who_is_led_elsewhere_is_counted(client: TestClient) -> None:
    before = await metrics(client)

    for _ in range(3):
        await send_raw(client, b"nonsense\r\n\r\n")
    await client.get("/api/v1/wallets/w/", allow_redirects=False)

    grown = (await metrics(client)).since(before, "wallet_request_seconds_count")
    assert grown == {("other", "none", "400"): 3, ("GET", "none", "308"): 1, ("GET", "/metrics", "200"): 1}


async def test_the_numbers_are_collected_once_a_second(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_metrics, "MAX_AGE", 1)
    monkeypatch.setattr(app_metrics, "_collected", (b"", -1))
    told = []
    for now in (0, 0.75, 1):
        monkeypatch.setattr(app_metrics, "time", SimpleNamespace(monotonic=lambda now=now: now))
        told.append(await metrics(client))
    assert told[1].text == told[0].text
    first, _, last = (each.value("wallet_request_seconds_count", **METRICS_ASKED) for each in told)
    assert last == first + 2  # both were counted when they had been answered


async def test_what_alerts_look_at_is_there_before_it_happens(client: TestClient) -> None:
    """In an app of its own process: here other tests have made series already."""
    script = "\n".join(
        [
            "from prometheus_client import generate_latest",
            "from app.web.application import make_app",
            "from app.settings import Settings",
            "make_app(Settings(database_url='postgresql:///x'))",
            "print(generate_latest().decode())",
        ]
    )
    command = [sys.executable, "-c", script]
    ran = await asyncio.create_subprocess_exec(*command, cwd=CHECKOUT, stdout=asyncio.subprocess.PIPE)
    output, _ = await ran.communicate()
    told = Metrics(output.decode())

    def zero(name: str, **labels: str) -> bool:
        return told.samples.get((name, frozenset(labels.items()))) == 0

    for route in client.app.router.routes():
        path, method = route.resource.canonical, route.method
        if path.startswith("/api/"):
            for status in ("429", "500", "503"):
                assert zero("wallet_request_seconds_count", method=method, route=path, status=status), (method, path)
    decided = ("applied", "insufficient_funds", "duplicate_operation", "wallet_not_found", "invalid_request")
    for operation_type in ("DEPOSIT", "WITHDRAW", "TRANSFER", "HOLD", "RELEASE"):
        for outcome in (*decided, "hold_closed", "hold_not_found"):
            assert zero("wallet_operations_total", type=operation_type, outcome=outcome)
    assert zero("wallet_resends_total")
    assert zero("wallet_log_lines_dropped_total")
    assert len(output) < 200_000


# Operations


async def test_operations_are_counted_by_type_and_outcome(client: TestClient) -> None:
    operation, name = uuid4(), uuid4()
    await create(client, {"full": MAX})
    before = await metrics(client)

    await deposit(client, "w", 5, operation)
    await deposit(client, "w", 5, operation)
    await withdraw(client, "w", 5)
    await withdraw(client, "w", 1000)
    await deposit(client, "full", 1)
    await withdraw(client, "nobody", 1)
    await hold(client, "full", 1, operation)
    await hold(client, "full", 1, name)
    await capture(client, "full", 1, name)
    await release(client, "full", name)
    await release(client, "full", operation)

    assert (await metrics(client)).since(before, "wallet_operations_total") == {
        ("applied", "DEPOSIT"): 1,
        ("applied", "WITHDRAW"): 2,
        ("applied", "HOLD"): 1,
        ("balance_out_of_range", "DEPOSIT"): 1,
        ("duplicate_operation", "DEPOSIT"): 1,
        ("duplicate_operation", "HOLD"): 1,
        ("hold_closed", "RELEASE"): 1,
        ("hold_not_found", "RELEASE"): 1,
        ("insufficient_funds", "WITHDRAW"): 1,
        ("wallet_not_found", "WITHDRAW"): 1,
    }


async def test_operations_of_a_bulk_request_are_counted_each(client: TestClient) -> None:
    operation = uuid4()
    before = await metrics(client)

    await bulk(
        client,
        ("w", "DEPOSIT", 5, operation),
        ("w", "DEPOSIT", 5, operation),
        ("w", "DEPOSIT", 5, uuid4()),
        ("w", "WITHDRAW", 1000, uuid4()),
        ("nobody", "DEPOSIT", 1, uuid4()),
    )

    after = await metrics(client)
    assert after.since(before, "wallet_operations_total") == {
        ("applied", "DEPOSIT"): 2,
        ("duplicate_operation", "DEPOSIT"): 1,
        ("insufficient_funds", "WITHDRAW"): 1,
        ("wallet_not_found", "DEPOSIT"): 1,
    }
    assert after.since(before, "wallet_batch_size_sum") == {(): 5}


async def test_a_call_made_again_is_a_resend_and_its_operation_applied_once(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=through(proxy, superuser), lanes=1)))
    await create(client, {"w": 100})
    before = await metrics(client)
    cuts = [proxy.cut_next(CALL, Point.BEFORE_THE_ANSWER) for _ in range(2)]

    assert (await deposit(client, "w", 5)).status == 200

    assert all(cut.done() for cut in cuts)
    after = await metrics(client)
    assert after.since(before, "wallet_resends_total") == {(): 2}
    assert after.since(before, "wallet_operations_total") == {("applied", "DEPOSIT"): 1}


# Lanes and pool


async def test_the_operations_of_a_call_are_its_batch_size(client: TestClient, superuser: psycopg.Connection) -> None:
    before = await metrics(client)

    await in_one_call(client, superuser, *(deposit(client, "w", 1) for _ in range(3)))

    after = await metrics(client)
    assert after.since(before, "wallet_batch_size_count") == {(): 2}  # the one that kept the lane busy, and the three
    assert after.since(before, "wallet_batch_size_sum") == {(): 4}
    buckets = {le: growth for (le,), growth in after.since(before, "wallet_batch_size_bucket").items()}
    assert (buckets["1.0"], buckets["2.0"], buckets["4.0"]) == (1, 1, 2)


async def test_what_a_call_leaves_behind_is_waiting(client: TestClient, superuser: psycopg.Connection) -> None:
    """Four go in a call: of ten that have come meanwhile, six wait while the first four are under way."""
    with locked(superuser, "w"):
        async with busy_lane(client, superuser):
            asked = [asyncio.create_task(deposit(client, "w", 1)) for _ in range(10)]
            await queued(client, 10)
        await queued(client, 6)
        assert (await metrics(client)).value("wallet_lane_waiting", lane="0") == 6
    assert {(await answer).status for answer in asked} == {200}
    assert (await metrics(client)).value("wallet_lane_waiting", lane="0") == 0


async def test_calls_are_in_flight_until_they_are_answered(client: TestClient, superuser: psycopg.Connection) -> None:
    async with busy_lane(client, superuser):
        assert (await metrics(client)).value("wallet_calls_in_flight") == 1
        more = asyncio.create_task(bulk(client, ("pilot", "DEPOSIT", 1, uuid4())))
        await until(lambda: waiting_backends(superuser) == 2)
        assert (await metrics(client)).value("wallet_calls_in_flight") == 2
    await more
    assert (await metrics(client)).value("wallet_calls_in_flight") == 0


async def test_connections_are_in_use_while_they_are_lent(client: TestClient, superuser: psycopg.Connection) -> None:
    assert (await metrics(client)).value("wallet_pool_in_use") == 0
    with psycopg.connect(url_of(superuser, "postgres")) as other:
        other.execute("lock table wallet.wallet in access exclusive mode")
        asked = [asyncio.create_task(client.get("/api/v1/wallets/w")) for _ in range(3)]
        await until(lambda: waiting_backends(superuser) == 3)
        assert (await metrics(client)).value("wallet_pool_in_use") == 3
    assert {(await answer).status for answer in asked} == {200}
    assert (await metrics(client)).value("wallet_pool_in_use") == 0


async def test_the_build_is_named(client: TestClient) -> None:
    told = await metrics(client)
    [labels] = told.labels("wallet_build_info")
    assert dict(labels).keys() == {"python", "aiohttp", "asyncpg"}
    assert told.value("wallet_build_info", **dict(labels)) == 1


async def test_every_series_is_explained(client: TestClient) -> None:
    text = (await metrics(client)).text
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name


# Several workers


def scrape(service: Service) -> Metrics:
    """Ask one of the workers, whichever answers: every question has a connection of its own.

    What it tells is up to a second old.
    """
    with urlopen(f"http://127.0.0.1:{service.port}/metrics", timeout=30) as answer:
        return Metrics(answer.read().decode())


def applied(service: Service) -> float:
    return scrape(service).value("wallet_operations_total", type="DEPOSIT", outcome="applied")


def test_every_worker_tells_of_all_workers_and_of_those_that_are_gone(start: Start) -> None:
    service = start(WORKERS="2")
    for _ in range(40):
        service.deposit("1111111111", 5)

    wait_until(lambda: {applied(service) for _ in range(20)} == {40})
    told = scrape(service)
    assert told.value("wallet_batch_size_count") == 40
    route = "/api/v1/wallets/{wallet_uuid}/operation"
    assert told.value("wallet_request_seconds_count", method="POST", route=route, status="200") == 40
    assert [told.value("wallet_build_info", **dict(labels)) for labels in told.labels("wallet_build_info")] == [1]
    assert (told.value("wallet_calls_in_flight"), told.value("wallet_pool_in_use")) == (0, 0)

    killed = service.workers()
    assert len(killed) == 2
    with service.superuser() as holder:
        holder.execute("select from wallet.wallet where uuid = '1111111111' for update")
        client = threading.Thread(target=lambda: answers_at_all(service))
        client.start()
        wait_until(lambda: scrape(service).value("wallet_calls_in_flight") == 1)
        for worker in killed:
            kill(worker)
        client.join(30)
        wait_until(lambda: len(service.workers() - killed) == 2 and answers(service))
        wait_until(lambda: {scrape(service).value("wallet_calls_in_flight") for _ in range(20)} == {0})
    service.deposit("2222222222", 5)
    wait_until(lambda: {applied(service) for _ in range(20)} == {41})


def answers_at_all(service: Service) -> bool:
    try:
        service.deposit("1111111111", 5)
    except OSError:
        return False
    return True
