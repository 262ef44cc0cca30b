"""Where requests need keys: what each key may do, and how soon that changes."""

import asyncio
import gc
import hashlib
import itertools
import json
import random
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
import pytest
import pytest_asyncio
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from app.server.migrations import LOGIN
from app.settings import Settings
from app.web import application, keys
from app.web.application import make_app
from tests.api.door import problem
from tests.api.test_lanes import locked, through, until
from tests.conftest import url_of
from tests.proxy import Proxy

SCOPES = ["read", "create", "deposit", "withdraw", "transfer", "hold", "admin", "metrics"]
UNKNOWN = "wk_" + "x" * 43
HOLD = "aaaaaaaa-0000-4000-8000-00000000000a"
shared = pytest.mark.asyncio(loop_scope="module")


def make_key(
    superuser: psycopg.Connection, name: str, *scopes: str, prefix: str | None = None, expires: str | None = None
) -> str:
    """Make a key and return its secret; `expires` is an interval from now on."""
    made = superuser.execute(
        "select wallet.create_key(%s, %s, %s, clock_timestamp() + %s::interval)", (name, list(scopes), prefix, expires)
    ).fetchone()
    assert made is not None
    return str(made[0])


def bearer(secret: str | None) -> dict[str, str]:
    """Return the header that presents a secret."""
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}


async def knows(client: TestClient, secret: str) -> None:
    """Wait until the service knows a key."""
    async with asyncio.timeout(10):
        while (await client.get("/metrics", headers=bearer(secret))).status == 401:
            await asyncio.sleep(0.02)


def books(superuser: psycopg.Connection) -> Any:
    """Return what there is: all wallets and operations."""
    return superuser.execute("select uuid, status, seq from wallet.balance order by uuid").fetchall()


# Every route and every scope


class Wish(NamedTuple):
    """A request, the scope that it needs, and the status of its answer to whoever has it. `path` is that of a route."""

    method: str
    path: str
    scope: str
    status: int
    body: Any = None


def kinds() -> Iterator[tuple[str, dict[str, Any], int]]:
    """Return each kind of operation: its scope, its body, and the status of its answer."""
    yield "deposit", {"operation_type": "DEPOSIT", "amount": 1}, 200
    yield "withdraw", {"operation_type": "WITHDRAW", "amount": 1}, 200
    yield "transfer", {"operation_type": "TRANSFER", "amount": 1, "counterparty_uuid": "c"}, 200
    yield "hold", {"operation_type": "HOLD", "amount": 1}, 200
    yield "hold", {"operation_type": "RELEASE", "hold_uuid": HOLD}, 404
    yield "withdraw", {"operation_type": "WITHDRAW", "amount": 1, "hold_uuid": HOLD}, 404
    yield "transfer", {"operation_type": "TRANSFER", "amount": 1, "counterparty_uuid": "c", "hold_uuid": HOLD}, 404


def wishes() -> Iterator[Wish]:
    """Return a wish for every route, and for every kind of operation."""
    wallet = "/api/v1/wallets/{wallet_uuid}"
    yield Wish("GET", "/api/v1/wallets", "read", 200)
    yield Wish("GET", wallet, "read", 200)
    yield Wish("HEAD", wallet, "read", 200)
    yield Wish("GET", f"{wallet}/balance", "read", 200)
    yield Wish("GET", f"{wallet}/operations", "read", 200)
    yield Wish("GET", f"{wallet}/operations/{{operation_uuid}}", "read", 404)
    yield Wish("GET", f"{wallet}/holds", "read", 200)
    yield Wish("POST", "/api/v1/wallets", "create", 400, {})
    yield Wish("PUT", wallet, "create", 200, {})
    yield Wish("PATCH", wallet, "admin", 200, {"status": "OPEN"})
    yield Wish("GET", "/metrics", "metrics", 200)
    for scope, body, status in kinds():
        yield Wish("POST", f"{wallet}/operation", scope, status, body)
        yield Wish("PUT", f"{wallet}/operations/{{operation_uuid}}", scope, 201 if status == 200 else status, body)
        for atomic in (False, True):
            yield Wish("POST", "/api/v1/operations", scope, 200, {"operations": [body, body], "atomic": atomic})


WISHES = list(wishes())
OPERATE = {"deposit", "withdraw", "transfer", "hold"}


async def ask(client: TestClient, wish: Wish, secret: str | None, wallet: str = "a") -> ClientResponse:
    """Make a request for a wallet, with operation_uuids of its own."""
    url = wish.path.format(wallet_uuid=wallet, operation_uuid=uuid4())
    body = wish.body
    match wish.method, wish.path.rpartition("/")[2]:
        case "POST", "operation":
            body = {"operation_uuid": str(uuid4()), **body}
        case "POST", "operations":
            each = [{"wallet_uuid": wallet, "operation_uuid": str(uuid4()), **one} for one in body["operations"]]
            body = body | {"operations": each}
        case "POST", "wallets":
            body = {"uuid": wallet}
    return await client.request(wish.method, url, json=body, headers=bearer(secret))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(shared_superuser: psycopg.Connection) -> AsyncIterator[TestClient]:
    """A client of an app that wants keys. The wallets a, b and c hold 1000 each."""
    operation = "select from wallet.apply_operation(%s, gen_random_uuid(), 'DEPOSIT', 1000)"
    for wallet in ("a", "b", "c"):
        shared_superuser.execute("select from wallet.create_wallet(%s)", (wallet,))
        shared_superuser.execute(operation, (wallet,))
    settings = Settings(database_url=url_of(shared_superuser, LOGIN), access="keys")
    async with TestClient(TestServer(make_app(settings))) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secrets(shared_superuser: psycopg.Connection, keyed: TestClient) -> dict[str, str]:
    """The secrets of keys, by scope, of keys with all scopes, and of such ones as are good for nothing."""
    made = {scope: make_key(shared_superuser, scope, scope) for scope in SCOPES}
    made["all"] = make_key(shared_superuser, "all", *SCOPES)
    made["b"] = make_key(shared_superuser, "b", *SCOPES, prefix="b")
    made["payer"] = make_key(shared_superuser, "payer", "deposit", "transfer", prefix="b")
    made["expired"] = make_key(shared_superuser, "expired", *SCOPES, expires="-1 s")
    made["revoked"] = make_key(shared_superuser, "revoked", *SCOPES)
    shared_superuser.execute("select from wallet.revoke_key('revoked')")
    made["unknown"] = UNKNOWN
    made["last"] = make_key(shared_superuser, "last", "metrics")
    await knows(keyed, made["last"])
    return made


def name_of(wish: Wish) -> str:
    kind = wish.body.get("operations", [wish.body])[0].get("operation_type", "") if wish.body else ""
    return f"{wish.method} {wish.path} {kind}"


REACHING = [wish for wish in WISHES if "{wallet_uuid}" in wish.path or wish.method == "POST"]
each_wish = pytest.mark.parametrize("wish", WISHES, ids=map(name_of, WISHES))


@shared
@each_wish
async def test_a_key_does_what_its_scope_says_and_nothing_else(
    keyed: TestClient, secrets: dict[str, str], shared_superuser: psycopg.Connection, wish: Wish
) -> None:
    assert (await ask(keyed, wish, secrets["all"])).status == wish.status
    assert (await ask(keyed, wish, secrets[wish.scope])).status == wish.status
    before = books(shared_superuser)
    for scope in SCOPES:
        if scope != wish.scope:
            answer = await ask(keyed, wish, secrets[scope])
            assert answer.status == 403, scope
            if wish.method != "HEAD":
                assert wish.scope in (await problem(answer, 403, "forbidden"))["detail"]
    assert books(shared_superuser) == before


@shared
@each_wish
async def test_without_a_valid_key_nothing_is_done_and_nothing_is_told(
    keyed: TestClient, secrets: dict[str, str], shared_superuser: psycopg.Connection, wish: Wish
) -> None:
    before = books(shared_superuser)
    for secret, challenge in (
        (None, 'Bearer realm="wallet"'),
        (secrets["unknown"], 'Bearer realm="wallet", error="invalid_token"'),
        (secrets["expired"], 'Bearer realm="wallet", error="invalid_token"'),
        (secrets["revoked"], 'Bearer realm="wallet", error="invalid_token"'),
    ):
        answer = await ask(keyed, wish, secret)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == challenge
        if wish.method != "HEAD":
            await problem(answer, 401, "unauthorized")
    assert books(shared_superuser) == before


@shared
@pytest.mark.parametrize("wish", REACHING, ids=map(name_of, REACHING))
async def test_a_key_reaches_only_wallets_whose_names_begin_with_its_prefix(
    keyed: TestClient, secrets: dict[str, str], shared_superuser: psycopg.Connection, wish: Wish
) -> None:
    """Whether they exist or not: the answer is the same."""
    before = books(shared_superuser)
    for wallet in ("a", "nobody", "B", "ab"):
        answer = await ask(keyed, wish, secrets["b"], wallet)
        assert answer.status == 403
        if wish.method != "HEAD":
            assert "begin with b" in (await problem(answer, 403, "forbidden"))["detail"]
    assert books(shared_superuser) == before
    assert (await ask(keyed, wish, secrets["b"], "b")).status == wish.status


@shared
async def test_what_needs_no_key_takes_any(keyed: TestClient) -> None:
    scripts = [
        r.path for r, scopes in application.routes(wants_keys=True) if r.path.startswith("/docs/") and not scopes
    ]
    assert len(scripts) > 3
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", *scripts):
        for headers in ({}, bearer(UNKNOWN), {"Authorization": "nonsense"}):
            assert (await keyed.get(path, headers=headers)).status == 200, path


def test_every_route_has_been_asked() -> None:
    asked = {(wish.method, wish.path) for wish in WISHES if wish.method != "HEAD"}
    assert asked == {(r.method, r.path) for r, scopes in application.routes(wants_keys=True) if scopes}


# Requests that name several wallets


def operation(wallet: str, kind: str = "DEPOSIT", **more: Any) -> dict[str, Any]:
    return {"wallet_uuid": wallet, "operation_uuid": str(uuid4()), "operation_type": kind, "amount": 1, **more}


@shared
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("place", [0, 7, 99])
@pytest.mark.parametrize(
    ("forbidden", "told"),
    [
        (operation("b", "WITHDRAW"), "withdraw"),
        (operation("b", "HOLD"), "hold"),
        (operation("a"), "begin with b"),
        (operation("nobody"), "begin with b"),
    ],
    ids=["a scope", "another scope", "a wallet", "a wallet that there is not"],
)
async def test_one_operation_that_is_forbidden_refuses_the_whole_request(
    keyed: TestClient,
    secrets: dict[str, str],
    shared_superuser: psycopg.Connection,
    atomic: bool,
    place: int,
    forbidden: dict[str, Any],
    told: str,
) -> None:
    many = [operation("b") for _ in range(100)]
    many[place] = forbidden
    before = books(shared_superuser)
    asked = {"operations": many, "atomic": atomic}
    answer = await keyed.post("/api/v1/operations", json=asked, headers=bearer(secrets["payer"]))
    detail = (await problem(answer, 403, "forbidden"))["detail"]
    assert detail.startswith(f"operation {place}: ")
    assert told in detail
    assert books(shared_superuser) == before


@shared
async def test_a_payee_may_be_any_wallet(keyed: TestClient, secrets: dict[str, str]) -> None:
    pay = {"operation_type": "TRANSFER", "amount": 1, "counterparty_uuid": "a"}
    headers = bearer(secrets["b"])
    assert (await keyed.put(f"/api/v1/wallets/b/operations/{uuid4()}", json=pay, headers=headers)).status == 201
    bulk = {"operations": [operation("b", "TRANSFER", counterparty_uuid="a")], "atomic": True}
    [result] = (await (await keyed.post("/api/v1/operations", json=bulk, headers=headers)).json())["results"]
    assert result["applied"]


@shared
async def test_an_empty_request_needs_a_key_that_may_operate(keyed: TestClient, secrets: dict[str, str]) -> None:
    for scope in SCOPES:
        answer = await keyed.post("/api/v1/operations", json={"operations": []}, headers=bearer(secrets[scope]))
        assert answer.status == (200 if scope in OPERATE else 403)


# New wallets, lists, answers


@shared
async def test_under_a_prefix_a_new_wallet_has_a_name_with_it(keyed: TestClient, secrets: dict[str, str]) -> None:
    for body, status in (({}, 403), ({"uuid": None}, 403), ({"uuid": "a-new"}, 403), ({"uuid": "b-new"}, 201)):
        assert (await keyed.post("/api/v1/wallets", json=body, headers=bearer(secrets["b"]))).status == status
    assert (await keyed.post("/api/v1/wallets", headers=bearer(secrets["b"]))).status == 403
    assert (await keyed.put("/api/v1/wallets/a-new", headers=bearer(secrets["b"]))).status == 403
    assert (await keyed.put("/api/v1/wallets/b-newer", headers=bearer(secrets["b"]))).status == 201


@shared
async def test_a_list_shows_what_the_prefix_reaches(
    keyed: TestClient, secrets: dict[str, str], shared_superuser: psycopg.Connection
) -> None:
    for name in ("list_1", "list_2", "list_3", "listX", "lisu", "LIST_"):
        shared_superuser.execute("select from wallet.create_wallet(%s)", (name,))
    secret = make_key(shared_superuser, "lister", "read", "metrics", prefix="list_")
    await knows(keyed, secret)

    async def page(**query: str) -> tuple[list[str], str | None]:
        answer = await keyed.get("/api/v1/wallets", params=query, headers=bearer(secret))
        told = await answer.json()
        return [wallet["uuid"] for wallet in told["wallets"]], told["next"]

    assert await page() == (["list_1", "list_2", "list_3"], None)
    assert await page(limit="2") == (["list_1", "list_2"], "list_2")
    assert await page(limit="2", after="list_2") == (["list_3"], None)
    assert await page(limit="3") == (["list_1", "list_2", "list_3"], None)
    assert await page(after="a") == (["list_1", "list_2", "list_3"], None)
    assert await page(after="z") == ([], None)


@shared
async def test_whoever_may_change_a_wallet_sees_what_the_answer_says_of_it(
    keyed: TestClient, secrets: dict[str, str]
) -> None:
    headers, url = bearer(secrets["deposit"]), f"/api/v1/wallets/a/operations/{uuid4()}"
    terms = {"operation_type": "DEPOSIT", "amount": 1}
    applied = await (await keyed.put(url, json=terms, headers=headers)).json()
    assert await (await keyed.put(url, json=terms, headers=headers)).json() == applied
    other = await problem(await keyed.put(url, json=terms | {"amount": 2}, headers=headers), 409, "duplicate_operation")
    assert other["operation"] == applied
    assert (await keyed.get(url, headers=headers)).status == 403


# The header


@shared
@pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER {}", "bEaReR   {}", "Bearer {} "])
async def test_the_scheme_is_written_in_any_case(keyed: TestClient, secrets: dict[str, str], header: str) -> None:
    headers = {"Authorization": header.format(secrets["all"])}
    assert (await keyed.get("/api/v1/wallets/a", headers=headers)).status == 200


@shared
@pytest.mark.parametrize(
    ("header", "presented"),
    [
        ("", False),
        ("{}", False),
        ("Basic {}", False),
        ("Token {}", False),
        ("Bearer", True),
        ("Bearer ", True),
        ("Bearer\t{}", False),
        ("Bearer:{}", False),
        ("Bearer {},", True),
        ("Bearer {0} {0}", True),
        ('Bearer "{}"', True),
        ("Bearer {}=", True),
        ("Bearer xx_{}", True),
        ("Bearer wk_", True),
        ("Bearer wk_\xfc", True),
        ("Bearer wk_" + "x" * 5_000, True),
    ],
)
async def test_anything_else_is_no_key(
    keyed: TestClient, secrets: dict[str, str], header: str, presented: bool
) -> None:
    answer = await keyed.get("/api/v1/wallets/a", headers={"Authorization": header.format(secrets["all"])})
    await problem(answer, 401, "unauthorized")
    assert ("invalid_token" in answer.headers["WWW-Authenticate"]) is presented


@shared
async def test_a_key_is_presented_once(keyed: TestClient, secrets: dict[str, str]) -> None:
    twice = [("Authorization", f"Bearer {secrets[name]}") for name in ("all", "all")]
    answer = await keyed.get("/api/v1/wallets/a", headers=twice)
    await problem(answer, 401, "unauthorized")
    url = URL(f"/api/v1/wallets/a?access_token={secrets['all']}")
    await problem(await keyed.get(url), 401, "unauthorized")


# The order of answers


@shared
async def test_the_route_comes_first_then_the_key_then_the_form_then_what_the_body_asks(
    keyed: TestClient, secrets: dict[str, str]
) -> None:
    bad, wallet = "/api/v1/wallets/a%20b/operation?x=1", "/api/v1/wallets/a/operation"
    text = {"Content-Type": "text/plain", "Content-Encoding": "gzip"}
    json = {"Content-Type": "application/json"}

    async def post(path: str, data: bytes | None, secret: str | None, headers: dict[str, str]) -> ClientResponse:
        return await keyed.post(URL(path, encoded=True), data=data, headers=headers | bearer(secret))

    await problem(await post("/nowhere", b"x", None, text), 404, "not_found")
    await problem(await keyed.delete("/api/v1/wallets/a"), 405, "method_not_allowed")
    slash = await keyed.get("/api/v1/wallets/a/", allow_redirects=False)
    assert slash.status == 308
    await problem(await post(bad, b"x", None, text | {"Sec-Fetch-Site": "cross-site"}), 403, "forbidden")
    await problem(await post(bad, b"x", None, text), 401, "unauthorized")
    await problem(await post(bad, b"x", secrets["read"], text), 403, "forbidden")
    await problem(await post(bad, b"x", secrets["b"], text), 403, "forbidden")
    await problem(await post(bad, b"x", secrets["deposit"], json), 400, "invalid_request")
    await problem(await post(wallet, b"x", secrets["deposit"], text), 415, "unsupported_media_type")
    await problem(await post(wallet, b"x", secrets["deposit"], json), 400, "invalid_request")
    await problem(await post(wallet, b" " * 70_000, secrets["deposit"], json), 413, "body_too_large")
    invalid = b'{"operation_uuid": "%s", "operation_type": "WITHDRAW", "amount": 0}' % HOLD.encode()
    await problem(await post(wallet, invalid, secrets["deposit"], json), 400, "invalid_request")
    nobody = wallet.replace("/a/", "/nobody/")
    withdrawal = invalid.replace(b": 0", b": 1")
    await problem(await post(nobody, withdrawal, secrets["deposit"], json), 403, "forbidden")
    await problem(await post(nobody, withdrawal, secrets["withdraw"], json), 404, "wallet_not_found")


# What becomes of a key


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the keys be read ten times as often, and be trusted for a fifth of the time."""
    assert (keys.INTERVAL, keys.TRUST) == (1, 5)
    monkeypatch.setattr(keys, "INTERVAL", 0.1)
    monkeypatch.setattr(keys, "TRUST", 1)


async def make_client(url: str, aiohttp_client: AiohttpClient, **settings: Any) -> TestClient:
    return await aiohttp_client(make_app(Settings(database_url=url, access="keys", **settings)))


@pytest.mark.usefixtures("soon")
async def test_two_keys_serve_while_one_takes_the_other_s_place(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await make_client(database_url, aiohttp_client)
    old = make_key(superuser, "shop-1", "metrics")
    await knows(client, old)
    new = make_key(superuser, "shop-2", "metrics")
    await knows(client, new)
    assert (await client.get("/metrics", headers=bearer(old))).status == 200
    superuser.execute("select from wallet.revoke_key('shop-1')")
    async with asyncio.timeout(1):
        while (await client.get("/metrics", headers=bearer(old))).status == 200:
            await asyncio.sleep(0.01)
    assert (await client.get("/metrics", headers=bearer(old))).status == 401
    assert (await client.get("/metrics", headers=bearer(new))).status == 200


async def test_a_key_expires_by_the_database_s_clock_also_while_the_database_is_away(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await make_client(through(proxy, superuser), aiohttp_client)
    secret = make_key(superuser, "guest", "metrics", expires="2.5 s")
    await knows(client, secret)
    await proxy.close()
    loop = asyncio.get_running_loop()
    left = "select extract(epoch from expires_at - clock_timestamp())::float from wallet.key"
    expiry = superuser.execute(left).fetchone()[0] + loop.time()
    asked = loop.time()
    while (await client.get("/metrics", headers=bearer(secret))).status == 200:
        assert asked < expiry + 0.2
        await asyncio.sleep(0.02)
        asked = loop.time()
    assert loop.time() > expiry - 0.5
    await problem(await client.get("/metrics", headers=bearer(secret)), 401, "unauthorized")


# While the database is away


@pytest.mark.usefixtures("soon")
async def test_a_revoked_key_is_not_trusted_any_longer_because_the_database_is_away(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await make_client(through(proxy, superuser), aiohttp_client, request_deadline=1)
    secret = make_key(superuser, "shop", "metrics", "deposit")
    await knows(client, secret)
    where = str(proxy.address)
    await proxy.close()
    superuser.execute("select from wallet.revoke_key('shop')")
    loop = asyncio.get_running_loop()
    away = asked = loop.time()
    while (await client.get("/metrics", headers=bearer(secret))).status == 200:
        assert asked < away + 1
        asked = loop.time()
    assert loop.time() > away + 0.5  # what is known goes on for a while
    for known in (secret, UNKNOWN):
        asked = loop.time()
        await problem(await client.get("/metrics", headers=bearer(known)), 503, "unavailable")
        assert 0.9 < loop.time() - asked < 1.6
    for refused in ({}, bearer("nonsense"), {"Authorization": "Basic x"}):
        asked = loop.time()
        await problem(await client.get("/metrics", headers=refused), 401, "unauthorized")
        assert loop.time() - asked < 0.5
    await proxy.listen(where)
    await until(lambda: superuser.execute(SESSIONS).fetchone() == (1,))
    await problem(await client.get("/metrics", headers=bearer(secret)), 401, "unauthorized")


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("route", ["/api/v1/wallets/w/operation", "/api/v1/operations"])
async def test_a_key_that_is_revoked_while_a_body_comes_in_moves_no_money(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, route: str
) -> None:
    client = await make_client(database_url, aiohttp_client)
    superuser.execute("select from wallet.create_wallet('w')")
    secret = make_key(superuser, "slow", "deposit", "metrics")
    await knows(client, secret)
    one = {"operation_uuid": HOLD, "operation_type": "DEPOSIT", "amount": 1}
    body = json.dumps({"operations": [{"wallet_uuid": "w", **one}]} if route.endswith("s") else one).encode()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:10]
        superuser.execute("select from wallet.revoke_key('slow')")
        async with asyncio.timeout(10):
            while (await client.get("/metrics", headers=bearer(secret))).status == 200:
                await asyncio.sleep(0.01)
        yield body[10:]

    answer = await client.post(route, data=slowly(), headers={"Content-Type": "application/json", **bearer(secret)})

    await problem(answer, 401, "unauthorized")
    assert books(superuser) == [("w", "OPEN", 0)]


SESSIONS = (
    "select count(*) from pg_stat_activity where application_name = 'wallet keys' and datname = current_database()"
)


@pytest.mark.usefixtures("soon")
async def test_an_outage_of_70_percent_of_the_deadline_costs_no_request(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    client = await make_client(through(proxy, superuser), aiohttp_client, request_deadline=10)
    secret = make_key(superuser, "shop", *SCOPES)
    await knows(client, secret)
    headers = bearer(secret)
    assert (await client.put("/api/v1/wallets/w", headers=headers)).status == 201
    where = str(proxy.address)
    await proxy.close()
    loop = asyncio.get_running_loop()
    back = loop.time() + 0.7 * 10
    terms = {"operation_type": "DEPOSIT", "amount": 1}
    bulk = [{"operations": [operation("w")], "atomic": atomic} for atomic in (False, True)]
    asked = [asyncio.create_task(client.post("/api/v1/operations", json=body, headers=headers)) for body in bulk]
    while loop.time() < back:
        url = f"/api/v1/wallets/w/operations/{uuid4()}"
        asked.append(asyncio.create_task(client.put(url, json=terms, headers=headers)))
        asked.append(asyncio.create_task(client.get("/api/v1/wallets/w", headers=headers)))
        await asyncio.sleep(0.1)
    await proxy.listen(where)
    statuses = [answer.status for answer in await asyncio.gather(*asked)]
    assert set(statuses) == {200, 201}
    assert superuser.execute("select balance from wallet.balance").fetchone() == (statuses.count(201) + len(bulk),)


async def test_a_service_starts_without_its_database_and_its_first_requests_wait_for_the_keys(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    where, url = str(proxy.address), through(proxy, superuser)
    await proxy.close()
    secret = make_key(superuser, "shop", "read")
    client = await make_client(url, aiohttp_client)
    waiting = asyncio.create_task(client.get("/api/v1/wallets", headers=bearer(secret)))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await proxy.listen(where)
    assert (await waiting).status == 200


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
async def test_a_request_that_has_waited_for_the_keys_is_not_applied_after_its_deadline(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, bulk: bool
) -> None:
    """The wallet is locked until then: counted from the end of its wait it would have time enough."""
    where, url = str(proxy.address), through(proxy, superuser)
    await proxy.close()
    superuser.execute("select from wallet.create_wallet('w')")
    secret = make_key(superuser, "shop", *SCOPES)
    client = await make_client(url, aiohttp_client, request_deadline=2)
    loop = asyncio.get_running_loop()
    asked = loop.time()
    if bulk:
        request = client.post("/api/v1/operations", json={"operations": [operation("w")]}, headers=bearer(secret))
    else:
        body = {"operation_type": "DEPOSIT", "amount": 1}
        request = client.put(f"/api/v1/wallets/w/operations/{uuid4()}", json=body, headers=bearer(secret))
    asking = asyncio.create_task(request)
    await asyncio.sleep(1.2)
    with locked(superuser, "w"):
        await proxy.listen(where)
        await problem(await asking, 503, "unavailable")
        assert 1.8 < loop.time() - asked < 2.8
    await asyncio.sleep(1.5)
    assert superuser.execute("select balance from wallet.balance").fetchone() == (0,)


async def test_a_body_that_comes_slowly_after_a_wait_for_the_keys_is_not_too_late(
    proxy: Proxy, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    where, url = str(proxy.address), through(proxy, superuser)
    await proxy.close()
    superuser.execute("select from wallet.create_wallet('w')")
    secret = make_key(superuser, "shop", *SCOPES)
    client = await make_client(url, aiohttp_client, request_deadline=1)
    body = json.dumps({"operations": [operation("w")]}).encode()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:10]
        await asyncio.sleep(0.3)
        await proxy.listen(where)
        await asyncio.sleep(1.2)
        yield body[10:]

    headers = bearer(secret) | {"Content-Type": "application/json"}
    assert (await client.post("/api/v1/operations", data=slowly(), headers=headers)).status == 200


# Unknown keys


async def test_unknown_keys_cost_no_query_and_no_memory(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "INTERVAL", 3600)
    monkeypatch.setattr(keys, "TRUST", 3600)
    known = make_key(superuser, "shop", "metrics")
    client = await make_client(database_url, aiohttp_client)
    await knows(client, known)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    numbers = itertools.count()

    async def guess(times: int) -> None:
        for _ in range(times):
            secret = f"wk_{next(numbers):043}"
            head = f"GET /api/v1/wallets/w HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\n\r\n"
            writer.write(head.encode())
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ")
            await reader.readexactly(int(answer.lower().partition(b"content-length:")[2].split()[0]))

    def sessions() -> Any:
        query = "select pid, state_change from pg_stat_activity where datname = current_database() and pid <> %s"
        return superuser.execute(query, (superuser.info.backend_pid,)).fetchall()

    await guess(500)
    before = sessions()
    assert before
    tracemalloc.start()
    try:
        await guess(100)
        gc.collect()
        memory = tracemalloc.get_traced_memory()[0]
        await guess(2000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - memory < 20_000  # 10 bytes each
    finally:
        tracemalloc.stop()
    assert sessions() == before
    writer.close()


async def test_a_million_unknown_keys_leave_nothing_and_take_no_longer_than_the_first(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up as the digest of each request's key is."""
    monkeypatch.setattr(keys, "INTERVAL", 3600)
    monkeypatch.setattr(keys, "TRUST", 3600)
    secret = make_key(superuser, "shop", "metrics")
    client = await make_client(database_url, aiohttp_client)
    await knows(client, secret)
    find = client.app[keys.KEYS].find

    async def guess(times: int) -> float:
        began = time.process_time()
        for digest in (random.randbytes(32) for _ in range(times)):
            assert await find(digest) is None
        return time.process_time() - began

    await guess(1000)
    gc.collect()
    before = sys.getallocatedblocks()
    parts = [await guess(100_000) for _ in range(10)]
    gc.collect()
    assert sys.getallocatedblocks() - before < 1000
    assert sum(parts[5:]) < 2 * sum(parts[:5])
    assert await find(hashlib.sha256(secret.encode()).digest()) is not None


async def test_what_a_good_key_s_header_was_is_forgotten_at_the_next_reading(
    database_url: str, superuser: psycopg.Connection, aiohttp_client: AiohttpClient
) -> None:
    """However many ways there are to write it."""
    secret = make_key(superuser, "shop", "metrics")
    client = await make_client(database_url, aiohttp_client)
    await knows(client, secret)
    for header in (f"Bearer {secret}", f"bearer {secret}", f"Bearer  {secret}", f"BEARER {secret}"):
        answer = await client.get("/metrics", headers={"Authorization": header})
        assert answer.status == 200
    lately = client.app[keys.KEYS]._lately
    assert lately.keys() <= {f"Bearer {secret}"}
    async with asyncio.timeout(10):
        while lately:
            await asyncio.sleep(0.1)
