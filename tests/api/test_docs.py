"""The page at /docs: what it is made of, and that a person with a browser can use it."""

import asyncio
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient, AiohttpServer
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as conditions
from selenium.webdriver.support.wait import WebDriverWait
from yarl import URL

from app.server.migrations import TESTDATA_HISTORY, dbmate
from app.settings import Settings
from app.web import docs
from app.web.application import make_app
from tests.api.test_keys import knows, make_key
from tests.conftest import url_of

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


async def parts(client: TestClient) -> list[str]:
    """Return the paths of the styles and scripts that the page loads."""
    page = await (await client.get("/docs")).text()
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    return [f"/{link}" for link in links if link.endswith((".css", ".js"))]


async def test_the_description_is_json_that_can_be_kept(client: TestClient) -> None:
    answer = await client.get("/openapi.json")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert (await answer.json())["openapi"].startswith("3.1.")


async def test_the_page_is_html_under_a_strict_policy(client: TestClient) -> None:
    answer = await client.get("/docs")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    directives = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == "'self'"
    assert directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"


async def test_the_page_has_no_script_of_its_own_and_names_no_other_host(client: TestClient) -> None:
    page = await (await client.get("/docs")).text()
    assert all(not script.strip() for script in re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL))
    assert not re.search(r"\son\w+=|javascript:|//", page.removeprefix("<!doctype html>"))
    initializer = await (await client.get("/docs/initializer.js")).text()
    assert "//" not in initializer


async def test_the_parts_of_the_page_have_their_types_and_their_time(client: TestClient) -> None:
    assert len(await parts(client)) == 4
    for part in await parts(client):
        answer = await client.get(part)
        assert answer.status == 200, part
        kind = "text/css" if part.endswith(".css") else "text/javascript"
        assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        versioned = re.search(r"-\d+\.\d+\.\d+/", part)
        assert answer.headers["Cache-Control"] == ("public, max-age=31536000, immutable" if versioned else "no-cache")


async def test_who_has_it_already_is_told_so(client: TestClient) -> None:
    for path in ["/openapi.json", "/docs", *await parts(client)]:
        first = await client.get(path)
        for known in (first.headers["ETag"], f'"another", W/{first.headers["ETag"]}', "*"):
            again = await client.get(path, headers={"If-None-Match": known})
            assert (again.status, await again.read()) == (304, b""), path
            for header in ("ETag", "Cache-Control"):
                assert again.headers[header] == first.headers[header]
        assert (await client.get(path, headers={"If-None-Match": '"another"'})).status == 200


async def test_a_slash_behind_the_page_s_name_leads_to_it(client: TestClient) -> None:
    answer = await client.get("/docs/")
    assert (answer.status, answer.url.path) == (200, "/docs")


@pytest.mark.parametrize(
    "path",
    ["/docs/nothing.js", "/docs/index.html", "/docs/../docs.py", "/docs/%2e%2e/docs.py", "/docs/..%2fopenapi.yaml"],
)
async def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert (await client.get(URL(path, encoded=True))).status == 404


def test_swagger_ui_s_licence_lies_beside_it() -> None:
    (folder,) = docs.STATIC.glob("swagger-ui-*")
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert (folder / "NOTICE").exists()
    assert (folder / "swagger-ui-bundle.js.LICENSE.txt").exists()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A headless Chromium that knows nothing."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser here: chromium and chromedriver (Debian: chromium-driver) are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,2000",
        "host-resolver-rules=MAP evil.example 127.0.0.1",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


async def test_a_person_opens_the_page_and_tries_an_operation_out(
    superuser: psycopg.Connection, database_url: str, aiohttp_server: AiohttpServer, browser: webdriver.Chrome
) -> None:
    dbmate(url_of(superuser, "postgres"), "testdata", "--migrations-table", TESTDATA_HISTORY, "migrate")
    server = await aiohttp_server(make_app(Settings(database_url=database_url)))
    url = str(server.make_url("/docs"))
    await asyncio.to_thread(try_an_operation_out, browser, url)

    assert superuser.execute("select balance from wallet.balance where uuid = '1111111111'").fetchone() == (2000,)
    assert browser.get_log("browser") == []
    requested = urls_requested(browser)
    assert all(one.startswith(str(server.make_url("/"))) for one in requested), requested
    assert str(server.make_url("/api/v1/wallets/1111111111/operation")) in requested


@pytest.mark.parametrize("access", ["open", "keys"])
async def test_a_person_presents_a_key(
    superuser: psycopg.Connection,
    database_url: str,
    aiohttp_client: AiohttpClient,
    browser: webdriver.Chrome,
    access: str,
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, access=access)))
    secret = make_key(superuser, "a-person", "read", "metrics")
    await knows(client, secret)
    superuser.execute("select from wallet.create_wallet('1111111111')")

    def see() -> None:
        def seen(selector: str) -> WebElement:
            place = (By.CSS_SELECTOR, selector)
            return WebDriverWait(browser, 20).until(conditions.visibility_of_element_located(place))

        def status() -> str:
            seen(f"{wallet} button.execute").click()
            return seen(f"{wallet} .live-responses-table tbody .response-col_status").text.split()[0]

        wallet = "#operations-wallets-get_wallet"
        browser.get(str(client.make_url("/docs")))
        seen(f"{wallet} .opblock-summary-control").click()
        seen(f"{wallet} .try-out__btn").click()
        assert status() == ("401" if access == "keys" else "200")
        seen(f"{wallet} .btn-clear").click()
        seen("button.authorize").click()
        seen(".modal-ux input").send_keys(secret)
        seen(".modal-ux button.authorize").click()
        seen(".modal-ux .btn-done").click()
        assert status() == "200"

    await asyncio.to_thread(see)
    refused = [entry["message"] for entry in browser.get_log("browser") if "401 (Unauthorized)" not in entry["message"]]
    assert refused == []


def try_an_operation_out(browser: webdriver.Chrome, url: str) -> None:
    """Open the page, unfold the operation request, send its example as it stands and see the 200."""

    def seen(selector: str) -> WebElement:
        place = (By.CSS_SELECTOR, f"#operations-operations-apply_operation {selector}")
        return WebDriverWait(browser, 20).until(conditions.visibility_of_element_located(place))

    def press(selector: str) -> None:
        seen(selector).click()

    browser.get(url)
    press(".opblock-summary-control")
    press(".try-out__btn")
    press("button.execute")
    assert seen(".live-responses-table tbody .response-col_status").text.split()[0] == "200"
    shown = seen(".live-responses-table tbody .response-col_description").text
    assert "0b0e3c2e-5d2a-4f6b-8a51-6f1f0b7d9a01" in shown


SCHEMES = ("light", "dark")
"""What readers prefer."""


def prefer(browser: webdriver.Chrome, scheme: str) -> None:
    """Have the reader prefer a colour scheme, and wait until the page has heard of it: before its next frame."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    heard = "return document.documentElement.classList.contains('dark-mode') === (arguments[0] === 'dark')"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(heard, scheme))


def unfold(browser: webdriver.Chrome) -> None:
    """Unfold every operation, and press its "Try it out".

    A few at a time: of many at once the page makes one ever larger document, and after each time it draws all again.
    """
    wait = WebDriverWait(browser, 20)
    summaries = wait.until(conditions.presence_of_all_elements_located((By.CSS_SELECTOR, ".opblock-summary-control")))
    unfolded = 0
    for some in (summaries[start : start + 5] for start in range(0, len(summaries), 5)):
        browser.execute_script("arguments[0].forEach(summary => summary.click())", some)
        unfolded += len(some)
        wait.until(lambda _, wanted=unfolded: len(browser.find_elements(By.CSS_SELECTOR, ".try-out__btn")) == wanted)
    browser.execute_script("document.querySelectorAll('.try-out__btn').forEach(button => button.click())")
    wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "button.execute")) == len(summaries))


async def test_the_page_with_every_operation_unfolded(
    client: TestClient, browser: webdriver.Chrome, subtests: pytest.Subtests
) -> None:
    """To unfold it takes Chromium seconds, so what is to be seen there is one test."""

    def open_it() -> None:
        browser.get(str(client.make_url("/docs")))
        unfold(browser)

    await asyncio.to_thread(open_it)
    for what_is_seen in (
        every_parameter_has_its_name_and_type_and_none_is_filled_in_that_may_be_left_out,
        it_is_no_wider_than_a_telephone,
        it_is_as_dark_as_the_reader_wants_it,
    ):
        with subtests.test(what_is_seen.__name__):
            await asyncio.to_thread(what_is_seen, browser)


def every_parameter_has_its_name_and_type_and_none_is_filled_in_that_may_be_left_out(page: webdriver.Chrome) -> None:
    for scheme in SCHEMES:
        prefer(page, scheme)
        see_parameters(page)


def see_parameters(page: webdriver.Chrome) -> None:
    document = json.loads(docs.description(wants_keys=False))
    shown: list[dict[str, str]] = page.execute_script("""
        return [...document.querySelectorAll(".opblock")].flatMap(operation =>
          [...operation.querySelectorAll("table.parameters > tbody > tr")].map(row => ({
            operation: operation.id,
            name: row.querySelector(".parameter__name").firstChild.textContent,
            type: row.querySelector(".parameter__type").innerText,
            place: row.querySelector(".parameter__in").innerText,
            value: row.querySelector("input").value,
          })))""")

    described = 0
    for item in document["paths"].values():
        for operation in item.values():
            parameters = [row for row in shown if row["operation"].endswith(f"-{operation['operationId']}")]
            assert len(parameters) == len(operation["parameters"]), operation["operationId"]
            described += len(parameters)
    assert len(shown) == described > 15
    assert {row["type"] for row in shown} <= {"string", "string($date-time)", "integer", "integer($int64)"}
    assert all(row["name"] for row in shown)
    filled_in = {row["name"]: row["value"] for row in shown if row["place"] == "(query)"}
    assert filled_in == {"limit": "100"} | dict.fromkeys(("before", "after", "at", "from", "to"), "")


def it_is_no_wider_than_a_telephone(page: webdriver.Chrome) -> None:
    for scheme in SCHEMES:
        prefer(page, scheme)
        page.execute_script("document.querySelector('button.execute').click()")
        answer = (By.CSS_SELECTOR, ".live-responses-table tbody .response-col_status")
        WebDriverWait(page, 20).until(conditions.presence_of_element_located(answer))
        try:
            for width in (1280, 600, 390, 320):
                metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
                page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                assert page.execute_script("return document.documentElement.clientWidth") == width
                assert page.execute_script("return document.documentElement.scrollWidth") == width
        finally:
            page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRASTS = """
    const channel = value => value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4;
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const background = element => {
      if (element === null) return [255, 255, 255];
      const [r, g, b, opacity = 1] = parts(getComputedStyle(element).backgroundColor);
      return opacity > 0.5 ? [r, g, b] : background(element.parentElement);
    };
    return [...document.querySelectorAll("#swagger-ui *")]
      .filter(element => element.getClientRects().length
        && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim()))
      .map(element => {
        const [one, other] = [parts(getComputedStyle(element).color), background(element)].map(luminance);
        const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        return [element.textContent, contrast, element.closest("pre") ? null : other];
      });
"""
"""The texts of the page, each with its contrast (WCAG 2.2, relative luminance) and the luminance behind it.

Examples are dark for every reader: for them the luminance is null.
"""


def it_is_as_dark_as_the_reader_wants_it(page: webdriver.Chrome) -> None:
    """Also after he has changed his mind, either way."""
    for scheme in (*SCHEMES, *SCHEMES):
        prefer(page, scheme)
        page.execute_script("document.querySelectorAll('*').forEach(one => one.style.transition = 'none')")
        texts = page.execute_script(CONTRASTS)
        behind = statistics.median(luminance for _, _, luminance in texts if luminance is not None)
        assert (behind < 0.1) if scheme == "dark" else (behind > 0.7)
        if scheme == "dark":
            assert [text for text, contrast, _ in texts if contrast < 3] == []


def urls_requested(browser: webdriver.Chrome) -> list[str]:
    """Return every address that was asked for over the network, and not inside the browser (data:, chrome:)."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "chrome:"))]
