"""What no client should send: each gets a clear problem, and no money moves."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient
from yarl import URL

from app.web import body as bodies
from tests.api.door import MAX, create, deposit, path, problem

A = "aaaaaaaa-0000-4000-8000-00000000000a"
B = "bbbbbbbb-0000-4000-8000-00000000000b"
GOOD = {"operation_uuid": A, "operation_type": "DEPOSIT", "amount": 5}
JSON = {"Content-Type": "application/json"}
WALLETS = "/api/v1/wallets"
OPERATION = "/api/v1/wallets/w/operation"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shared_client: TestClient) -> TestClient:
    """A client of the app that all these tests share. Wallet w holds 100."""
    await create(shared_client, {"w": 100})
    return shared_client


@pytest.fixture(autouse=True)
def nothing_moves(client: TestClient, shared_superuser: psycopg.Connection) -> Iterator[None]:
    """After the test every wallet and every operation is as it was before."""

    def books() -> list[Any]:
        tables = ("wallet", "operation")
        return [shared_superuser.execute(f"select * from wallet.{table}").fetchall() for table in tables]

    before = books()
    yield
    assert books() == before


def operation_with(field: str, value: str) -> bytes:
    """Return the body of a good operation but for one field, whose value is JSON text."""
    fields = {name: json.dumps(good) for name, good in GOOD.items()} | {field: value}
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}").encode()


async def refuse(client: TestClient, body: bytes, url: str = OPERATION) -> list[dict[str, Any]]:
    """Send a body and return the errors of the 400 that it meets: what is wrong, and where."""
    told = await problem(await client.post(url, data=body, headers=JSON), 400, "invalid_request")
    assert told["errors"]
    for error in told["errors"]:
        assert error.keys() == {"loc", "msg", "type"}
        assert error["loc"][0] == "body"
        assert error["msg"]
        assert error["type"]
    return told["errors"]


async def send_raw(client: TestClient, request: bytes) -> tuple[int, dict[str, str], Any]:
    """Send bytes as they are and return status, headers (names in lower case) and decoded body of the answer."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(5):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:-1])}
            body = await reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body) if headers["content-type"].endswith("json") else body
    finally:
        writer.close()


# The whole body

NOT_JSON = {
    "white_space": b" \n",
    "single_quotes": b"{'amount': 5}",
    "truncated": operation_with("amount", "5")[:-1],
    "truncated_string": b'{"operation_uuid": "aaaaaaaa-0000-4000',
    "two_values": b"{}{}",
    "trailing_comma": b'{"uuid": null,}',
    "byte_order_mark": b"\xef\xbb\xbf" + operation_with("amount", "5"),
    "byte_order_mark_of_a_wallet": b"\xef\xbb\xbf{}",
    "utf_16": operation_with("amount", "5").decode().encode("utf-16"),
    "bad_utf_8": operation_with("operation_uuid", '"?"').replace(b"?", b"\xff"),
    "bad_utf_8_in_a_name": b'{"\xc3\x28": 1}',
    "lone_surrogate": operation_with("operation_type", r'"\ud800"'),
    "lone_surrogate_in_a_wallet": rb'{"uuid": "\ud800"}',
    "lone_surrogate_in_a_name": rb'{"\ud800": 1}',
    "nan": operation_with("amount", "NaN"),
    "infinity": operation_with("amount", "-Infinity"),
    "leading_zero": operation_with("amount", "05"),
    "plus_sign": operation_with("amount", "+5"),
}


@pytest.mark.parametrize("url", [OPERATION, WALLETS], ids=["operation", "wallet"])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_body_that_is_not_json(client: TestClient, body: bytes, url: str) -> None:
    await refuse(client, body, url)


async def test_an_operation_without_a_body(client: TestClient) -> None:
    await refuse(client, b"")


@pytest.mark.parametrize("url", [OPERATION, WALLETS], ids=["operation", "wallet"])
@pytest.mark.parametrize("body", [b"null", b"[]", b'"DEPOSIT"', b"5", b"true"], ids=bytes.decode)
async def test_a_body_that_is_not_an_object(client: TestClient, body: bytes, url: str) -> None:
    await refuse(client, body, url)


DEEP = {
    "arrays": b"[" * 30_000 + b"]" * 30_000,
    "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "in_a_field": operation_with("amount", "[" * 30_000 + "]" * 30_000),
    "in_an_unknown_field": operation_with("note", "[" * 30_000 + "]" * 30_000),
    "never_closed": b"[" * 60_000,
}


@pytest.mark.parametrize("url", [OPERATION, WALLETS], ids=["operation", "wallet"])
@pytest.mark.parametrize("body", DEEP.values(), ids=DEEP)
async def test_a_body_that_is_nested_as_deeply_as_fits(client: TestClient, body: bytes, url: str) -> None:
    await refuse(client, body, url)


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, operation_with("amount", "[" * 100_000 + "]" * 100_000)],
    ids=["alone", "in_a_field"],
)
async def test_a_body_that_is_nested_100_000_deep(client: TestClient, body: bytes) -> None:
    await problem(await client.post(OPERATION, data=body, headers=JSON), 413, "body_too_large")


@pytest.mark.parametrize("url", [OPERATION, WALLETS], ids=["operation", "wallet"])
async def test_a_body_of_2_mb(client: TestClient, url: str) -> None:
    body = operation_with("note", json.dumps("x" * 2_000_000))
    await problem(await client.post(url, data=body, headers=JSON), 413, "body_too_large")


async def test_a_body_in_chunks_that_grows_too_large(client: TestClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield operation_with("amount", "5")
        for _ in range(20):
            yield b" " * 10_000

    await problem(await client.post(OPERATION, data=chunks(), headers=JSON), 413, "body_too_large")


@pytest.mark.parametrize("length", [64 * 1024 + 1, 2_000_000, 2**63 - 1])
async def test_a_body_that_is_announced_too_large_is_not_waited_for(client: TestClient, length: int) -> None:
    head = f"POST {OPERATION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {length}\r\n\r\n"
    status, headers, body = await send_raw(client, head.encode())
    assert (status, headers["content-type"], body["code"]) == (413, "application/problem+json", "body_too_large")


async def test_a_body_that_does_not_arrive(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT", 0.2)
    body = operation_with("amount", "5")
    head = f"POST {OPERATION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    status, headers, answer = await send_raw(client, head.encode() + body[:-1])
    assert (status, headers["content-type"], answer["code"]) == (408, "application/problem+json", "request_timeout")


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "text/plain;charset=UTF-8",
        "text/plain, application/json",
        "application/octet-stream",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/json; charset=nonsense",
        "nonsense",
        "",
    ],
)
@pytest.mark.parametrize("url", [OPERATION, WALLETS], ids=["operation", "wallet"])
async def test_a_body_of_another_type(client: TestClient, content_type: str | None, url: str) -> None:
    body = operation_with("amount", "5") if url == OPERATION else b"{}"
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await client.post(url, data=body, headers=headers, skip_auto_headers=["Content-Type"])
    await problem(answer, 415, "unsupported_media_type")


# Fields


@pytest.mark.parametrize("field", ["operation_uuid", "operation_type"])
async def test_an_operation_without_a_field(client: TestClient, field: str) -> None:
    body = {name: value for name, value in GOOD.items() if name != field}
    (error,) = await refuse(client, json.dumps(body).encode())
    assert (error["loc"], error["type"]) == (["body", field], "missing")


@pytest.mark.parametrize("field", ["operation_uuid", "operation_type"])
async def test_a_field_that_is_null(client: TestClient, field: str) -> None:
    (error,) = await refuse(client, operation_with(field, "null"))
    assert error["loc"] == ["body", field]


@pytest.mark.parametrize("field", ["note", "Amount", "wallet_uuid", "", "a b", "\N{MONEY BAG}"])
async def test_a_field_that_nobody_knows(client: TestClient, field: str) -> None:
    (error,) = await refuse(client, operation_with(field, "1"))
    assert (error["loc"], error["type"]) == (["body", field], "extra_forbidden")


async def test_a_wallet_s_field_that_nobody_knows(client: TestClient) -> None:
    (error,) = await refuse(client, b'{"balance": 1000000}', WALLETS)
    assert (error["loc"], error["type"]) == (["body", "balance"], "extra_forbidden")


TIMES = {
    "without_an_offset": '"2030-01-01T00:00:00"',
    "a_date": '"2030-01-01"',
    "a_space": '"2030-01-01 00:00:00Z"',
    "seven_decimals": '"2030-01-01T00:00:00.1234567Z"',
    "no_such_day": '"2030-02-30T00:00:00Z"',
    "hour_24": '"2030-01-01T24:00:00Z"',
    "a_leap_second": '"2030-12-31T23:59:60Z"',
    "an_offset_without_a_colon": '"2030-01-01T00:00:00+0300"',
    "year_0": '"0000-01-01T00:00:00Z"',
    "year_0_in_utc": '"0001-01-01T00:00:00+00:01"',
    "year_10000_in_utc": '"9999-12-31T23:59:59-00:01"',
    "other_digits": '"203\\u0660-01-01T00:00:00Z"',
    "infinity": '"infinity"',
    "empty": '""',
    "a_number": "1893456000",
    "true": "true",
    "array": "[]",
}


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
async def test_an_expiry_that_is_no_time(client: TestClient, time: str) -> None:
    body = operation_with("expires_at", time).replace(b"DEPOSIT", b"HOLD")
    (error,) = await refuse(client, body)
    assert error["loc"] == ["body", "expires_at"]
    assert error["msg"].startswith("must be ")


@pytest.mark.parametrize("name", ['"a"', '""', "1", "[]", '"aaaaaaaa-0000-4000-8000-00000000000"'])
async def test_a_hold_uuid_that_is_no_uuid(client: TestClient, name: str) -> None:
    (error,) = await refuse(client, operation_with("hold_uuid", name).replace(b"DEPOSIT", b"WITHDRAW"))
    assert error["loc"] == ["body", "hold_uuid"]


AMOUNTS = {
    "zero": "0",
    "minus_zero": "-0",
    "minus_one": "-1",
    "true": "true",
    "string": '"5"',
    "fraction": "1.5",
    "a_little_more_than_an_integer": "10.00000000000000000001",
    "zero_as_a_fraction": "0.0",
    "minus_one_as_a_fraction": "-1.0",
    "2^53_as_a_fraction": "9007199254740992.0",
    "2^53_with_an_exponent": "9007199254740992e0",
    "2^63-1_as_a_fraction": "9223372036854775807.0",
    "ten_to_the_18th": "1e18",
    "small_exponent": "1e-1",
    "infinite": "1e400",
    "exponent_of_10_digits": "1e9999999999",
    "exponent_of_20_digits": "1e99999999999999999999",
    "negative_exponent_of_20_digits": "1e-99999999999999999999",
    "2^63": str(2**63),
    "-2^63": str(-(2**63)),
    "2^64": str(2**64),
    "2^64+5": str(2**64 + 5),
    "2^63_as_a_fraction": "9223372036854775808.0",
    "5000_digits": "5" * 5000,
    "-5000_digits": "-" + "5" * 5000,
    "array": "[5]",
    "object": '{"value": 5}',
}


@pytest.mark.parametrize("operation_type", ["DEPOSIT", "WITHDRAW"])
@pytest.mark.parametrize("amount", AMOUNTS.values(), ids=AMOUNTS)
async def test_an_amount_that_is_no_positive_64_bit_integer(
    client: TestClient, amount: str, operation_type: str
) -> None:
    body = operation_with("amount", amount).replace(b"DEPOSIT", operation_type.encode())
    (error,) = await refuse(client, body)
    assert error["loc"] == ["body", "amount"]


@pytest.mark.parametrize("amount", [MAX, MAX - 99])
async def test_a_deposit_past_the_largest_balance(client: TestClient, amount: int) -> None:
    told = await problem(await deposit(client, "w", amount), 400, "balance_out_of_range")
    assert told["detail"] == "Balance out of range"


NO_UUIDS = {
    "empty": '""',
    "braces": json.dumps("{" + A + "}"),
    "urn": json.dumps(f"urn:uuid:{A}"),
    "one_digit_short": json.dumps(A[:-1]),
    "one_digit_long": json.dumps(A + "a"),
    "hyphens_elsewhere": '"aaaaaaaa0000-4000-8000-00000000-000a"',
    "one_hyphen": '"aaaaaaaa-000040008000-00000000000a"',
    "not_hexadecimal": json.dumps(A.replace("a", "g")),
    "white_space": json.dumps(A + " "),
    "newline": json.dumps(A + "\n"),
    "arabic_digits": json.dumps(A.replace("0", "\N{ARABIC-INDIC DIGIT ZERO}")),
    "nul": json.dumps(A + "\0"),
    "number": "170",
    "array": json.dumps([A]),
}


@pytest.mark.parametrize("operation_uuid", NO_UUIDS.values(), ids=NO_UUIDS)
async def test_an_operation_uuid_that_is_none(client: TestClient, operation_uuid: str) -> None:
    (error,) = await refuse(client, operation_with("operation_uuid", operation_uuid))
    assert error["loc"] == ["body", "operation_uuid"]


@pytest.mark.parametrize("nil", ["00000000-0000-0000-0000-000000000000", "0" * 32], ids=["hyphens", "none"])
async def test_the_nil_uuid_names_no_operation(client: TestClient, nil: str) -> None:
    await refuse(client, operation_with("operation_uuid", json.dumps(nil)))


@pytest.mark.parametrize(
    "operation_type",
    ['"deposit"', '"Withdraw"', '"RECEIVE"', '""', '" DEPOSIT"', r'"DEPOSIT\u0000"', "1", "true", '["DEPOSIT"]'],
    ids=["lower_case", "capitalized", "another", "empty", "white_space", "nul", "number", "true", "array"],
)
async def test_an_operation_type_that_is_none(client: TestClient, operation_type: str) -> None:
    (error,) = await refuse(client, operation_with("operation_type", operation_type))
    assert error["loc"] == ["body", "operation_type"]


@pytest.mark.parametrize("payee", ['"a b"', '""', "1", '["v"]', json.dumps("w" * 65)])
async def test_a_payee_that_no_wallet_can_be(client: TestClient, payee: str) -> None:
    body = operation_with("counterparty_uuid", payee).replace(b"DEPOSIT", b"TRANSFER")
    (error,) = await refuse(client, body)
    assert error["loc"] == ["body", "counterparty_uuid"]


@pytest.mark.parametrize("payee", ["null", '"w"', '"nobody"'])
async def test_a_transfer_without_another_wallet(client: TestClient, payee: str) -> None:
    body = operation_with("counterparty_uuid", payee).replace(b"DEPOSIT", b"TRANSFER")
    if payee == '"nobody"':
        await problem(await client.post(OPERATION, data=body, headers=JSON), 404, "wallet_not_found")
    else:
        await refuse(client, body)


NO_METADATA = {
    "array": b"[]",
    "text": b'"text"',
    "number": b"1",
    "true": b"true",
    "nul": rb'{"a": "\u0000"}',
    "nul_in_a_name": rb'{"\\\u0000": 1}',
    "high_surrogate": rb'{"a": "\ud800b"}',
    "low_surrogate": rb'{"a": "\ude00"}',
    "bad_utf_8": b'{"a": "\xff"}',
    "too_long": b'{"a": "' + b"x" * 2040 + b'"}',
    "too_long_written_short": b'{"a": 1e2041}',
    "huge_exponent": b'{"a": 1e131072}',
    "tiny_exponent": b'{"a": 1e-16384}',
    "exponent_of_20_digits": b'{"a": 1e99999999999999999999}',
    "deep_and_too_long": b'{"a": ' + b"[" * 1022 + b"]" * 1022 + b"}",
    "much_too_deep": b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "zero_with_many_places": b'{"a": 0e-3000}',
    "5000_digits": b'{"a": ' + b"9" * 5000 + b"}",
}
LONG_METADATA = (
    "too_long",
    "too_long_written_short",
    "huge_exponent",
    "tiny_exponent",
    "exponent_of_20_digits",
    "5000_digits",
    "deep_and_too_long",
    "zero_with_many_places",
)


@pytest.mark.parametrize("metadata", NO_METADATA.values(), ids=NO_METADATA)
async def test_metadata_that_jsonb_cannot_hold_is_refused_to_its_own_request(
    client: TestClient, metadata: bytes
) -> None:
    (error,) = await refuse(
        client,
        b'{"operation_uuid": "%s", "operation_type": "DEPOSIT", "amount": 5, "metadata": %s}' % (A.encode(), metadata),
    )
    is_long = metadata in [NO_METADATA[name] for name in LONG_METADATA]
    assert (error["msg"] == "metadata must have at most 2048 octets as text") is is_long
    item = b'{"wallet_uuid": "%s", "operation_uuid": "%s", "operation_type": "WITHDRAW", "amount": %d, "metadata": %s}'
    body = b'{"operations": [%s, %s]}' % (item % (b"w", A.encode(), 1, metadata), item % (b"w", B.encode(), 101, b"{}"))
    answer = await client.post("/api/v1/operations", data=body, headers=JSON)
    if answer.status == 400:  # it is no JSON object at all
        names = ("array", "text", "number", "true", "high_surrogate", "low_surrogate", "much_too_deep")
        assert metadata in [NO_METADATA[name] for name in names]
        return
    codes = [result["code"] for result in (await answer.json())["results"]]
    assert codes == ["invalid_request", "insufficient_funds"]


@pytest.mark.parametrize(
    "currency", ['"eur"', '"EU"', '"EUR "', '"EURO-EURO"', '"ABCDEFGHIJKLM"', '""', "1", '"EUR\\n"']
)
async def test_a_currency_that_no_wallet_can_have(client: TestClient, currency: str) -> None:
    (error,) = await refuse(client, f'{{"currency": {currency}}}'.encode(), WALLETS)
    assert error["loc"] == ["body", "currency"]
    answer = await client.put(f"{WALLETS}/new", data=f'{{"currency": {currency}}}', headers=JSON)
    await problem(answer, 400, "invalid_request")


@pytest.mark.parametrize(
    "body", [{}, {"status": "open"}, {"status": None}, {"status": "OPEN", "balance": 1}, [], "OPEN"]
)
async def test_a_status_that_there_is_not(client: TestClient, body: Any) -> None:
    await problem(await client.patch(f"{WALLETS}/w", json=body), 400, "invalid_request")


TIMES = [
    "",
    "now",
    "2026-01-01",
    "2026-01-01T00:00:00",
    "2026-01-01 00:00:00Z",
    "2026-01-01T00:00Z",
    "2026-01-01T00:00:00 03:00",
    "2026-01-01T00:00:00+0300",
    "2026-01-01T00:00:00+24:00",
    "2026-01-01T00:00:00.Z",
    "2026-01-01T00:00:00.1234567Z",
    "2026-02-29T00:00:00Z",
    "2026-01-01T24:00:00Z",
    "2026-01-01T23:59:60Z",
    "0000-01-01T00:00:00Z",
    "10000-01-01T00:00:00Z",
    "-0001-01-01T00:00:00Z",
    "\N{ARABIC-INDIC DIGIT TWO}026-01-01T00:00:00Z",
    "infinity",
    "1767225600",
    "null",
]


@pytest.mark.parametrize(("parameter", "below"), [("at", "balance"), ("from", "operations"), ("to", "operations")])
@pytest.mark.parametrize("value", TIMES, ids=ascii)
async def test_a_time_that_is_none(client: TestClient, value: str, parameter: str, below: str) -> None:
    answer = await client.get(f"{WALLETS}/w/{below}", params={parameter: value})
    told = await problem(answer, 400, "invalid_request")
    assert told["errors"][0]["loc"] == ["query", parameter]


@pytest.mark.parametrize("after", ["", "a b", "w" * 65, "\0", "\N{MONEY BAG}"], ids=ascii)
async def test_a_page_of_wallets_after_a_name_that_none_can_have(client: TestClient, after: str) -> None:
    told = await problem(await client.get(WALLETS, params={"after": after}), 400, "invalid_request")
    assert told["errors"][0]["loc"] == ["query", "after"]


# Names

NO_NAMES = {
    "nul": "w\0",
    "slash": "w/operation",
    "dots": "w.w",
    "space": "w w",
    "newline": "w\n",
    "emoji": "\N{MONEY BAG}",
    "arabic_digits": "\N{ARABIC-INDIC DIGIT ONE}",
    "quote": "w'; drop schema wallet cascade; --",
    "65_characters": "w" * 65,
    "5000_characters": "w" * 5000,
    "percent": "%77",
}


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
async def test_a_path_with_a_name_that_no_wallet_can_have(client: TestClient, name: str) -> None:
    for answer in (
        await client.get(path(name)),
        await deposit(client, name, 5),
        await client.get(path(name, "/operations")),
        await client.get(path(name, f"/operations/{A}")),
    ):
        told = await problem(answer, 400, "invalid_request")
        assert told["errors"][0]["loc"] == ["path", "wallet_uuid"]


@pytest.mark.parametrize("name", ["%ff", "w%FF", "%c3%28", "%ed%a0%80", "%", "%zz"])
async def test_a_path_with_broken_percent_encoding(client: TestClient, name: str) -> None:
    for url, method in ((f"{WALLETS}/{name}", "GET"), (f"{WALLETS}/{name}/operation", "POST")):
        answer = await client.request(method, URL(url, encoded=True), json=GOOD)
        await problem(answer, 400, "invalid_request")


async def test_a_path_with_a_name_of_10_000_characters(client: TestClient) -> None:
    await problem(await client.get(path("w" * 10_000)), 400, "invalid_request")
    await problem(await deposit(client, "w" * 10_000, 5), 400, "invalid_request")


@pytest.mark.parametrize("name", [*NO_NAMES.values(), ""], ids=[*NO_NAMES, "empty"])
async def test_a_new_wallet_with_a_name_that_none_can_have(client: TestClient, name: str) -> None:
    (error,) = await refuse(client, json.dumps({"uuid": name}).encode(), WALLETS)
    assert error["loc"] == ["body", "uuid"]


@pytest.mark.parametrize("name", ["1", "true", "[]", "{}", "1.5"])
async def test_a_new_wallet_with_a_name_that_is_no_text(client: TestClient, name: str) -> None:
    (error,) = await refuse(client, f'{{"uuid": {name}}}'.encode(), WALLETS)
    assert error["loc"] == ["body", "uuid"]


@pytest.mark.parametrize("operation", ["1", "nil", A + "a", "urn:uuid:" + A, "%00", "%ff", "\N{MONEY BAG}"])
async def test_a_path_with_an_operation_uuid_that_is_none(client: TestClient, operation: str) -> None:
    answer = await client.get(URL(f"{WALLETS}/w/operations/{operation}", encoded=operation.startswith("%")))
    told = await problem(answer, 400, "invalid_request")
    assert told["errors"][0]["loc"] == ["path", "operation_uuid"]


# Pages


OUT_OF_RANGE = [
    "0",
    "-1",
    str(2**63),
    "5" * 1000,
    "abc",
    "1.5",
    "1.0",
    "1e2",
    "",
    " 5",
    "+5",
    "1_0",
    "\N{ARABIC-INDIC DIGIT FIVE}",
    "true",
    "null",
    "\0",
]


@pytest.mark.parametrize(
    ("route", "parameter"), [("operations", "limit"), ("operations", "before"), ("holds", "limit"), ("holds", "after")]
)
@pytest.mark.parametrize("value", OUT_OF_RANGE, ids=ascii)
async def test_a_page_out_of_range(client: TestClient, value: str, route: str, parameter: str) -> None:
    answer = await client.get(f"{WALLETS}/w/{route}", params={parameter: value})
    told = await problem(answer, 400, "invalid_request")
    assert told["errors"][0]["loc"] == ["query", parameter]


async def test_a_page_of_more_than_1000(client: TestClient) -> None:
    await problem(await client.get(f"{WALLETS}/w/operations", params={"limit": 1001}), 400, "invalid_request")


async def test_a_query_in_broken_percent_encoding(client: TestClient) -> None:
    url = URL(f"{WALLETS}/w/operations?limit=%ff", encoded=True)
    await problem(await client.get(url), 400, "invalid_request")


ONE_OPERATION = f"{WALLETS}/w/operations/{A}"


@pytest.mark.parametrize(
    "query", ["page=2", "page", "Limit=5", "limit=5&page=2", "limit%00=5", "%FF=1", "%ff", "w%5B%5D=1"]
)
@pytest.mark.parametrize("url", [f"{WALLETS}/w", f"{WALLETS}/w/operations", f"{WALLETS}/w/holds", ONE_OPERATION])
async def test_a_parameter_that_nobody_knows(client: TestClient, url: str, query: str) -> None:
    told = await problem(await client.get(URL(f"{url}?{query}", encoded=True)), 400, "invalid_request")
    assert told["errors"][0]["loc"][0] == "query"


@pytest.mark.parametrize("url", [WALLETS, OPERATION, "/api/v1/operations"])
async def test_a_parameter_where_there_is_none(client: TestClient, url: str) -> None:
    body: dict[str, Any] = GOOD if url == OPERATION else {"operations": [GOOD | {"wallet_uuid": "w"}]}
    answer = await client.post(url, json={} if url == WALLETS else body, params={"limit": "5"})
    told = await problem(answer, 400, "invalid_request")
    assert [(error["loc"], error["type"]) for error in told["errors"]] == [(["query", "limit"], "extra_forbidden")]


@pytest.mark.parametrize(
    "query", ["limit=5&limit=5", "before=9&limit=1&before=8", "limit=5&%6cimit=6", "limit=&limit="]
)
async def test_a_parameter_that_stands_there_twice(client: TestClient, query: str) -> None:
    answer = await client.get(URL(f"{WALLETS}/w/operations?{query}", encoded=True))
    told = await problem(answer, 400, "invalid_request")
    assert told["errors"][0]["loc"] in (["query", "limit"], ["query", "before"])


async def test_outside_of_the_api_a_parameter_is_nobody_s_business(client: TestClient) -> None:
    assert (await client.get("/healthz?probe=1&probe=2")).status == 200


# Methods and paths


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        (WALLETS, {"GET", "HEAD", "POST"}),
        (f"{WALLETS}/w", {"GET", "HEAD", "PUT", "PATCH"}),
        (f"{WALLETS}/w/balance", {"GET", "HEAD"}),
        (OPERATION, {"POST"}),
        (f"{WALLETS}/w/operations", {"GET", "HEAD"}),
        (f"{WALLETS}/w/operations/{A}", {"GET", "HEAD", "PUT"}),
    ],
    ids=["wallets", "wallet", "balance", "operation", "operations", "one_operation"],
)
async def test_a_method_that_is_not_allowed(client: TestClient, url: str, allowed: set[str]) -> None:
    for method in {"POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - allowed:
        answer = await client.request(method, url, json=GOOD)
        await problem(answer, 405, "method_not_allowed")
        assert set(answer.headers["Allow"].split(",")) == allowed


@pytest.mark.parametrize(
    "url",
    [
        "/",
        "/api",
        "/api/v1",
        "/api/v1/",
        "/api/v2/wallets",
        "/api/v1/wallets//",
        "/api/v2/wallets/",
        "/API/V1/WALLETS",
        "/api/v1/wallets/w/operation//",
        "/api/v1/wallets//operation",
        "/api/v1/wallets/w/operations//",
        "/%00",
        "/%ff",
        "//",
        "/api/v1/wallets/{w}/operation",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_path_that_leads_nowhere(client: TestClient, method: str, url: str) -> None:
    await problem(await client.request(method, URL(url, encoded=True), json=GOOD), 404, "not_found")


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "url",
    [
        "/api/v1/wallets/",
        "/api/v1/wallets/w/",
        "/api/v1/wallets/%77%c3%a4/",
        "/api/v1/wallets/w/operation/",
        "/api/v1/wallets/w/operations/?limit=5&before=%39",
        "/api/v1/operations/",
        "/healthz/",
        "/openapi.json/?",
    ],
)
async def test_a_slash_at_the_end_of_a_route_leads_to_it(client: TestClient, method: str, url: str) -> None:
    answer = await client.request(method, URL(url, encoded=True), json=GOOD, allow_redirects=False)
    path, _, query = url.partition("?")
    assert (answer.status, answer.headers["Location"]) == (308, path.removesuffix("/") + (query and f"?{query}"))


@pytest.mark.parametrize("target", ["//api/v1/wallets/w/", "//evil.example/healthz/", "/\\evil.example/", "///docs/"])
async def test_nobody_is_led_to_another_host(client: TestClient, target: str) -> None:
    status, headers, told = await send_raw(client, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (status, told["code"]) == (404, "not_found")
    assert "location" not in headers


async def test_a_request_that_is_led_from_a_slash_to_its_route_is_the_same_request(client: TestClient) -> None:
    await problem(await client.post(f"{OPERATION}/", json=GOOD | {"amount": 0}), 400, "invalid_request")
    assert (await (await client.get(f"{WALLETS}/w/")).json())["balance"] == 100


# What is not even HTTP

NOT_HTTP = {
    "method_that_nobody_knows": b"NONSENSE / HTTP/1.1\r\nHost: w\r\n\r\n",
    "path_in_raw_utf_8": "GET /api/v1/wallets/\N{MONEY BAG} HTTP/1.1\r\nHost: w\r\n\r\n".encode(),
    "path_in_raw_bytes": b"GET /api/v1/wallets/\xff\x00 HTTP/1.1\r\nHost: w\r\n\r\n",
    "header_of_100_000_bytes": b"GET / HTTP/1.1\r\nHost: w\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "content_length_of_30_digits": b"POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 1" + b"0" * 29 + b"\r\n\r\n",
    "content_length_below_zero": b"POST / HTTP/1.1\r\nHost: w\r\nContent-Length: -1\r\n\r\n",
    "two_lengths": b"POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no_http_at_all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", NOT_HTTP.values(), ids=NOT_HTTP)
async def test_a_request_that_is_not_http(client: TestClient, request_bytes: bytes) -> None:
    status, headers, body = await send_raw(client, request_bytes)
    assert (status, headers["content-type"].split(";")[0]) == (400, "application/problem+json")
    assert body["code"] == "invalid_request"
