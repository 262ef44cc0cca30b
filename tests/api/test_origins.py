"""Web pages of others neither move money nor read: Sec-Fetch-Site, Origin, Host and Content-Type show who asks."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from app.settings import Settings, StartupError, from_environment
from app.web.application import make_app
from tests.api.door import create, problem
from tests.api.test_docs import browser
from tests.api.test_keys import SCOPES, keyed, knows, make_key

__all__ = ["browser", "keyed"]  # fixtures

ROUTES = [
    ("POST", "/api/v1/wallets"),
    ("POST", "/api/v1/wallets/w/operation"),
    ("POST", "/api/v1/operations"),
    ("GET", "/api/v1/wallets/w"),
    ("GET", "/api/v1/wallets/w/operations"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs/initializer.js"),
]
NAVIGATION = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
shared = pytest.mark.asyncio(loop_scope="module")


def deposit() -> dict[str, Any]:
    return {"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 5}


def own(client: TestClient, scheme: str = "http") -> str:
    return f"{scheme}://{client.host}:{client.port}"


# Sec-Fetch-Site and Origin


@shared
@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "nonsense", "none, same-origin"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_page_of_another_site_may_not_ask(shared_client: TestClient, method: str, path: str, site: str) -> None:
    answer = await shared_client.request(method, path, json=deposit(), headers={"Sec-Fetch-Site": site})
    await problem(answer, 403, "forbidden")


@shared
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://127.0.0.1.evil.example",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost",
        "null",
        "",
        "file://",
        "nonsense",
        "http://[::1",
        "chrome-extension://abcdef",
    ],
)
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_page_of_another_origin_may_not_ask(
    shared_client: TestClient, method: str, path: str, origin: str
) -> None:
    for site in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        answer = await shared_client.request(method, path, json=deposit(), headers={"Origin": origin} | site)
        await problem(answer, 403, "forbidden")


@pytest.mark.parametrize("site", ["same-origin", "none", None])
@pytest.mark.parametrize("scheme", ["http", "https", None])
async def test_the_service_s_own_page_may(client: TestClient, site: str | None, scheme: str | None) -> None:
    await create(client, {"w": 0})
    headers = {} if scheme is None else {"Origin": own(client, scheme)}
    headers |= {} if site is None else {"Sec-Fetch-Site": site}
    for method, path in ROUTES:
        body = deposit() if path.endswith("/operation") else {"operations": []} if path.endswith("s") else {}
        kept = {"json": {} if path == "/api/v1/wallets" else body} if method == "POST" else {}
        assert (await client.request(method, path, headers=headers, **kept)).status < 300, path


@pytest.mark.parametrize("name", ["wallet.example", "wallet.example:80", "WALLET.example"])
async def test_a_default_port_is_the_same_as_none(database_url: str, aiohttp_client: AiohttpClient, name: str) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, host="0.0.0.0", access="open")))
    headers = {"Host": name, "Origin": "http://wallet.example"}
    assert (await client.get("/healthz", headers=headers)).status == 200


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
async def test_whoever_follows_a_link_to_the_page_sees_it(client: TestClient, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert (await client.request(method, path, headers=NAVIGATION)).status == 200


@pytest.mark.parametrize(
    "different",
    [{"Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Dest": "script"}],
    ids=lambda headers: next(iter(headers.values())),
)
async def test_no_other_page_builds_it_in(client: TestClient, different: dict[str, str]) -> None:
    await problem(await client.get("/docs", headers=NAVIGATION | different), 403, "forbidden")


async def test_a_link_leads_to_the_page_only(client: TestClient) -> None:
    for method, path in ROUTES:
        await problem(await client.request(method, path, headers=NAVIGATION, json={}), 403, "forbidden")


# Host

OWN = [
    "127.0.0.1",
    "127.0.0.1:8000",
    "localhost",
    "LocalHost:1",
    "[::1]",
    "[::1]:8000",
    "[0:0::1]:80",
    "127.1.2.3",
    "localhost:",
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "evil.localhost",
    "0.0.0.0:8000",
    "10.0.0.1",
    "[::2]:8000",
    "[::ffff:10.0.0.1]",
    "::1",
    "localhost@evil.example",
    "evil.example@localhost",
    "localhost:x",
    "localhost/",
    "localhost evil",
    "",
]


@shared
@pytest.mark.parametrize("host", OWN)
async def test_a_name_of_this_machine_is_answered(shared_client: TestClient, host: str) -> None:
    assert (await shared_client.get("/healthz", headers={"Host": host})).status == 200


@shared
@pytest.mark.parametrize("host", FOREIGN)
async def test_a_name_that_a_stranger_has_pointed_here_is_not(shared_client: TestClient, host: str) -> None:
    for method, path in [*ROUTES, ("GET", "/docs")]:
        answer = await shared_client.request(method, path, json=deposit(), headers={"Host": host})
        await problem(answer, 421, "misdirected_request")


@pytest.mark.parametrize("listening", ["0.0.0.0", "::", "192.0.2.1"])
async def test_where_others_can_ask_any_name_is_answered(
    database_url: str, aiohttp_client: AiohttpClient, listening: str
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, host=listening, access="open")))
    for host in ("evil.example", "wallet.internal:8000", "[2001:db8::1]:8000", *OWN):
        assert (await client.get("/healthz", headers={"Host": host})).status == 200


@pytest.mark.parametrize("listening", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
async def test_a_setting_names_who_is_meant(database_url: str, aiohttp_client: AiohttpClient, listening: str) -> None:
    named = "wallet.example, wallet.internal:8443,[2001:DB8::1]"
    settings = Settings(database_url=database_url, host=listening, access="open", allowed_hosts=named)
    client = await aiohttp_client(make_app(settings))
    for host in ("wallet.example", "Wallet.Example:1", "wallet.internal:8443", "[2001:db8::1]:8000", *OWN):
        assert (await client.get("/healthz", headers={"Host": host})).status == 200
    for host in ("wallet.internal", "wallet.internal:8000", "a.wallet.example", "[2001:db8::2]", "evil.example"):
        await problem(await client.get("/healthz", headers={"Host": host}), 421, "misdirected_request")
    behind_a_proxy = {"Host": own(client).removeprefix("http://"), "Origin": "https://wallet.example"}
    assert (await client.get("/healthz", headers=behind_a_proxy)).status == 200
    evil = behind_a_proxy | {"Origin": "https://evil.example"}
    await problem(await client.get("/healthz", headers=evil), 403, "forbidden")


@pytest.mark.parametrize(
    "value", ["http://wallet.example", "wallet.example/", "a b", "wallet.example:x", "*.example/x"]
)
def test_a_name_that_is_none_is_no_setting(value: str) -> None:
    with pytest.raises(StartupError, match="ALLOWED_HOSTS"):
        from_environment({"ALLOWED_HOSTS": f"localhost, {value}"})


async def test_http_1_0_needs_no_host(client: TestClient) -> None:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.0 200 ")
    writer.close()


# The order of answers


async def test_the_route_comes_first_then_who_asks_then_what_is_asked(client: TestClient) -> None:
    foreign = {"Host": "evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
    await problem(await client.post("/nowhere", data=b"x", headers=foreign), 404, "not_found")
    await problem(await client.put("/healthz", data=b"x", headers=foreign), 405, "method_not_allowed")
    bad = "/api/v1/wallets/w w/operation?page=2"
    await problem(await client.post(bad, data=b"x", headers=foreign), 421, "misdirected_request")
    del foreign["Host"]
    await problem(await client.post(bad, data=b"x", headers=foreign), 403, "forbidden")
    await problem(await client.post(bad, data=b"x", headers={"Content-Type": "text/plain"}), 400, "invalid_request")


# A real browser


class Page(BaseHTTPRequestHandler):
    """An empty page of somebody else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>evil</title>")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def evil_page() -> Iterator[int]:
    """Serve the page, and yield its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


ATTACKS = """
const [wallet, key, done] = arguments;
const body = (n) => JSON.stringify({operation_uuid: `aaaaaaaa-0000-4000-8000-0000000000${n}`,
  operation_type: "WITHDRAW", amount: 1});
const url = wallet + "/api/v1/wallets/w/operation";
const bulk = (n) => JSON.stringify({operations: [{wallet_uuid: "w", ...JSON.parse(body(n))}]});
const post = (to, sent, more) => fetch(to, {method: "POST", mode: "no-cors", body: sent, ...more});
const keyed = {"Authorization": `Bearer ${key}`};
const typed = (text) => new TextEncoder().encode(text);
const attacks = [
  () => post(url, new Blob([body(10)])),
  () => post(url, typed(body(11))),
  () => post(url, typed(body(12)).buffer),
  () => post(url, body(13)),
  () => post(url, new Blob([body(14)], {type: "application/json"})),
  () => post(url, new Blob([body(15)]), {credentials: "include", keepalive: true}),
  () => navigator.sendBeacon(url, new Blob([body(16)])),
  () => navigator.sendBeacon(url, typed(body(17))),
  () => post(wallet + "/api/v1/operations", new Blob([bulk(18)])),
  () => fetch(url, {method: "POST", body: body(19), headers: {"Content-Type": "application/json"}}),
  () => fetch(url, {method: "POST", body: body(21), headers: {"Content-Type": "application/json", ...keyed}}),
  () => fetch(url, {method: "POST", body: body(22), headers: keyed}),
  () => post(url, body(23), {headers: {"Content-Type": "application/json", ...keyed}}),
  () => post(wallet + "/api/v1/wallets", undefined),
  () => new Promise((next) => {
    const form = document.createElement("form");
    const field = document.createElement("input");
    const text = body(20);
    [field.name, field.value] = [text.slice(0, -1) + ', "x": "', '"}'];
    [form.method, form.action, form.enctype, form.target] = ["POST", url, "text/plain", "frame"];
    const frame = document.createElement("iframe");
    frame.name = "frame";
    document.body.append(frame, form);
    form.append(field);
    form.submit();
    setTimeout(next, 500);
  }),
];
const reads = ["/api/v1/wallets/w", "/metrics", "/openapi.json", "/docs"];
(async () => {
  for (const attack of attacks) { try { await attack(); } catch (error) {} }
  let seen = [];
  for (const path of reads) {
    for (const headers of [{}, keyed]) {
      try { seen.push((await (await fetch(wallet + path, {headers})).text()).slice(0, 100)); } catch (error) {}
    }
  }
  await new Promise((next) => setTimeout(next, 500));
  done(seen);
})();
"""


@pytest.fixture
def books(superuser: psycopg.Connection) -> Any:
    """What there is: the numbers of wallets and of operations."""

    def look() -> tuple[int, int]:
        query = "select (select count(*) from wallet.wallet), (select count(*) from wallet.operation)"
        row = superuser.execute(query).fetchone()
        assert row is not None
        return row

    return look


@pytest.mark.parametrize("access", ["open", "keys"])
@pytest.mark.parametrize("origin", ["localhost", "127.0.0.1"])
async def test_no_page_moves_money_or_reads_whatever_it_tries(
    database_url: str,
    superuser: psycopg.Connection,
    aiohttp_client: AiohttpClient,
    browser: webdriver.Chrome,
    books: Any,
    origin: str,
    access: str,
) -> None:
    """One page is of another site, the other of the same site and another port. Both know a key."""
    client = await aiohttp_client(make_app(Settings(database_url=database_url, access=access)))
    secret = make_key(superuser, "known", *SCOPES)
    await knows(client, secret)
    superuser.execute("select from wallet.create_wallet('w')")
    superuser.execute("select from wallet.apply_operation('w', gen_random_uuid(), 'DEPOSIT', 100)")
    before = books()
    with evil_page() as port:
        await asyncio.to_thread(browser.get, f"http://{origin}:{port}/")
        seen = await asyncio.to_thread(browser.execute_async_script, ATTACKS, own(client), secret)
    assert seen == []
    assert books() == before
    headers = {"Authorization": f"Bearer {secret}", "Origin": own(client)}
    body = deposit() | {"operation_type": "WITHDRAW"}
    assert (await client.post("/api/v1/wallets/w/operation", json=body, headers=headers)).status == 200


@shared
async def test_no_page_of_another_origin_is_told_that_it_may_present_a_key(keyed: TestClient) -> None:
    """Fetch, section 3.3.2: what a browser asks before it sends an Authorization."""
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for method, path in ROUTES:
        answer = await keyed.options(path, headers={"Origin": "http://evil.example", **asks})
        assert answer.status == 405, (method, path)
        assert not [name for name in answer.headers if name.startswith("Access-Control-")]


async def test_a_name_that_leads_here_reads_and_moves_nothing(
    client: TestClient, browser: webdriver.Chrome, books: Any
) -> None:
    """In this browser evil.example is this machine: after DNS rebinding the page's origin is the service's."""
    await create(client, {"w": 100})
    before = books()
    evil = f"http://evil.example:{client.port}"
    await asyncio.to_thread(browser.get, f"{evil}/docs")
    assert json.loads(browser.find_element("tag name", "pre").text)["status"] == 421
    seen = await asyncio.to_thread(browser.execute_async_script, ATTACKS, evil, "wk_")
    assert len(seen) == 8
    assert all('"status":421' in text for text in seen)
    assert books() == before


async def test_a_link_on_another_page_leads_to_the_working_page(client: TestClient, browser: webdriver.Chrome) -> None:
    def follow() -> None:
        with evil_page() as port:
            browser.get(f"http://localhost:{port}/")
            browser.execute_script(
                "const a = document.createElement('a'); a.href = arguments[0]; a.id = 'a'; a.text = 'docs';"
                "document.body.append(a)",
                f"{own(client)}/docs/",
            )
            browser.find_element("id", "a").click()
            WebDriverWait(browser, 20).until(
                lambda page: page.find_elements("css selector", ".opblock-summary-control")
            )
            assert browser.current_url.split("#")[0] == f"{own(client)}/docs"

    await asyncio.to_thread(follow)
