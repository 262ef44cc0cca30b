"""app/web/openapi.yaml says what the service does: all of it, and nothing else."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, make_mocked_request
from jsonschema import Draft202012Validator
from pytest_aiohttp.plugin import AiohttpClient, AiohttpServer
from yarl import URL

from app.calls import refusals
from app.server.migrations import TESTDATA_HISTORY, dbmate
from app.settings import Settings
from app.web import body as bodies
from app.web import docs, keys, problems, request_log
from app.web.application import make_app, routes
from tests.api.door import create, deposit
from tests.api.test_keys import SCOPES, bearer, make_key
from tests.conftest import url_of

DOCUMENT: dict[str, Any] = json.loads(docs.description(wants_keys=True))
REQUEST_ID = DOCUMENT["components"]["parameters"]["RequestId"]["example"]
JSON = {"Content-Type": "application/json"}
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
WITHDRAWAL = {"operation_uuid": "aaaaaaaa-0000-4000-8000-00000000000a", "operation_type": "WITHDRAW", "amount": 1}


@pytest.fixture
def demonstration_wallets(superuser: psycopg.Connection) -> None:
    """1111111111 to 5555555555 hold 1500 each."""
    dbmate(url_of(superuser, "postgres"), "testdata", "--migrations-table", TESTDATA_HISTORY, "migrate")


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """Return what an object of the document is, or what it refers to."""
    while "$ref" in node:
        reference, node = node["$ref"], DOCUMENT
        for name in reference.removeprefix("#/").split("/"):
            node = node[name]
    return node


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Return path, method and description of every operation in the document, in its order."""
    for path, item in DOCUMENT["paths"].items():
        for method in item:
            parameters = item[method].get("parameters", [])
            yield path, method, item[method] | {"parameters": [resolved(parameter) for parameter in parameters]}


def codes_of(response: dict[str, Any]) -> set[str]:
    """Return the codes of problems that a response's description names."""
    codes = set(DOCUMENT["components"]["schemas"]["Problem"]["properties"]["code"]["enum"])
    return codes & set(re.findall(r"`(\w+)`", response["description"]))


# The document


def test_the_document_is_valid() -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator, validate  # one test needs it, and it is slow to load

    validate(DOCUMENT, cls=OpenAPIV31SpecValidator)


def test_every_operation_is_told_apart_and_explained() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for path, method, operation in operations():
        assert operation["summary"], (path, method)
        assert set(operation["tags"]) <= tags
        for parameter in operation["parameters"]:
            assert parameter["description"], (path, method, parameter["name"])


def test_the_document_has_only_what_every_tool_understands() -> None:
    """Swagger UI forgets the parameters of a path.

    Of openapi-generator's clients, all lose a schema that has more than a description beside its $ref; Java's takes one
    object for two of a oneOf; Go's has a constructor NewX for each X.
    """
    for path, item in DOCUMENT["paths"].items():
        assert item.keys() <= METHODS, path
    for node in nodes(DOCUMENT):
        assert "$ref" not in node or node.keys() <= {"$ref", "description"}, node
        assert all({"type": "null"} in node[kind] for kind in ("oneOf", "anyOf") if kind in node), node
    schemas = DOCUMENT["components"]["schemas"].keys()
    assert schemas & {f"New{name}" for name in schemas} == set()


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Return every object of a part of the document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(child)


def test_every_problem_is_a_problem_and_its_codes_are_named() -> None:
    problem = {"$ref": "#/components/schemas/Problem"}
    for path, method, operation in operations():
        for status, response in operation["responses"].items():
            for content_type, media in resolved(response).get("content", {}).items():
                assert (int(status) >= 400) is (content_type == "application/problem+json"), (path, method, status)
                assert (int(status) >= 400) is (media["schema"] == problem), (path, method, status)
                assert (int(status) >= 400) is (codes_of(resolved(response)) != set()), (path, method, status)


def test_every_number_shown_is_one_that_javascript_can_send_and_show() -> None:
    def numbers(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield value
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from numbers(child)

    shown = [
        media[kind] for media in nodes(DOCUMENT) for kind in ("example", "examples", "x-examples") if kind in media
    ]
    assert len(shown) > 30
    assert max(numbers(shown)) < 2**53


def test_nothing_in_the_document_is_left_over() -> None:
    used = set(re.findall(r'"\$ref":\s*"#/components/([^"]+)"', json.dumps(DOCUMENT)))
    used |= {f"securitySchemes/{name}" for node in nodes(DOCUMENT) for one in node.get("security", []) for name in one}
    assert used == {f"{kind}/{name}" for kind, components in DOCUMENT["components"].items() for name in components}


def test_every_route_is_described_and_every_description_has_its_route() -> None:
    """HEAD comes with every GET (RFC 9110, section 9.3.2); what lies below /docs/ are the parts of that page."""
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in make_app(Settings(database_url="postgres://nowhere/")).router.routes()
        if route.resource is not None and route.method != "HEAD" and not route.resource.canonical.startswith("/docs/")
    }
    assert routes == {(path, method) for path, method, _ in operations()}


def test_the_document_says_what_scopes_a_key_needs() -> None:
    described = {(path, method): operation.get("security", []) for path, method, operation in operations()}
    needed = {
        (route.path, route.method.lower()): [{"key": [scope]} for scope in scopes]
        for route, scopes in routes(wants_keys=True)
        if not route.path.startswith("/docs/")
    }
    assert described == needed
    for path, method, operation in operations():
        assert ({"401", "403"} <= operation["responses"].keys()) is bool(described[path, method]), (path, method)


def test_where_no_key_is_needed_the_document_says_so() -> None:
    optional: dict[str, Any] = json.loads(docs.description(wants_keys=False))
    for path, method, operation in operations():
        if security := operation.get("security"):
            assert optional["paths"][path][method].pop("security") == [{}, *security]
            optional["paths"][path][method]["security"] = security
    assert optional == DOCUMENT


def test_every_code_that_the_service_answers_with_is_listed() -> None:
    """Problems are made from the tables in calls/refusals.py and problems.py, or by Problem(status, code, …)."""
    sources = "".join(file.read_text() for file in Path(problems.__file__).parent.glob("*.py"))
    codes = {code for _, code in (*refusals.REFUSALS.values(), refusals.DATABASE_REFUSED)}
    codes |= set(re.findall(r'Problem\(\s*\d{3}, "(\w+)"', sources))
    codes |= set(re.findall(r'^    \d{3}: "(\w+)",$', sources, re.MULTILINE))
    codes |= set(re.findall(r'_HTTP_CODES\.get\([^)]*"(\w+)"\)', sources))
    assert codes == set(DOCUMENT["components"]["schemas"]["Problem"]["properties"]["code"]["enum"])


def test_the_limits_in_the_document_are_the_limits_of_the_service() -> None:
    told = DOCUMENT["components"]["responses"]["BodyTooLarge"]["description"]
    assert f"{bodies.BODY_LIMIT:,} bytes, of a bulk request {bodies.BULK_BODY_LIMIT:,}." in told


def test_every_request_may_have_an_id_and_every_answer_has_one() -> None:
    for path, method, operation in operations():
        assert "X-Request-ID" in {parameter["name"] for parameter in operation["parameters"]}, (path, method)
        for status, response in operation["responses"].items():
            header = resolved(response)["headers"]["X-Request-ID"]
            assert resolved(header)["required"], (path, method, status)


def test_a_request_id_is_what_the_document_says() -> None:
    described = DOCUMENT["components"]["headers"]["RequestId"]["schema"]["pattern"]
    assert described == f"^{request_log._GOOD_ID.pattern}$"
    assert re.fullmatch(described, REQUEST_ID)


# Its examples. A request and an answer of the same name belong together. A parameter without an example of that name
# has its first one if it must be given, else it is left out.


class Example(NamedTuple):
    """A request and the answer that it gets."""

    name: str
    path: str
    method: str
    url: URL
    body: Any
    status: int
    content_type: str
    answer: Any


def requests_of(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the bodies in an operation's examples, by name."""
    if "requestBody" not in operation:
        return {}
    shown = operation["requestBody"]["content"]["application/json"]["examples"]
    return {name: example["value"] for name, example in shown.items()}


def examples() -> Iterator[Example]:
    """Return the examples, in the document's order."""
    for path, method, operation in operations():
        bodies = requests_of(operation)
        for status, response in operation["responses"].items():
            for content_type, content in response.get("content", {}).items():
                for name, example in content.get("examples", {}).items():
                    if bodies and name not in bodies:
                        continue  # it takes more than one request
                    url = example_url(path, operation["parameters"], name)
                    body = bodies[name] if bodies else None
                    yield Example(name, path, method, url, body, int(status), content_type, example["value"])


def example_url(path: str, parameters: list[dict[str, Any]], name: str) -> URL:
    """Return the path and query of an example."""
    query = {}
    for parameter in parameters:
        if parameter["in"] == "header":
            continue
        values = {key: str(example["value"]) for key, example in examples_of(parameter).items()}
        if parameter["in"] == "path":
            value = values.get(name, next(iter(values.values())))
            path = path.replace(f"{{{parameter['name']}}}", quote(value, safe=""))
        elif name in values:
            query[parameter["name"]] = values[name]
    return URL(path, encoded=True).with_query(query)


def examples_of(parameter: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's examples. Of `examples` Swagger UI fills in the first, also where none must be given."""
    assert parameter["required"] or parameter["in"] == "header" or "examples" not in parameter
    examples: dict[str, Any] = parameter["examples" if parameter["required"] else "x-examples"]
    return examples


def masked(value: Any) -> Any:
    """Return an answer without what no two runs have in common: times, and names that are random UUIDs."""
    if isinstance(value, list):
        return [masked(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: "a time" if key.endswith("_at") else masked(item) for key, item in value.items()}
    if "balance" in value and re.fullmatch("[0-9a-f-]{36}", value["uuid"]):
        assert UUID(value["uuid"]).version == 4
        value["uuid"] = "a random UUID"
    return value


def test_every_example_of_a_request_has_its_answer() -> None:
    answered = {(example.method, example.path, example.name) for example in examples()}
    for path, method, operation in operations():
        for name in requests_of(operation):
            assert (method, path, name) in answered
        for parameter in operation["parameters"]:
            if parameter["in"] == "header":
                continue
            for name in list(examples_of(parameter))[parameter["required"] :]:
                assert (method, path, name) in answered


def test_every_problem_that_an_operation_has_to_itself_has_an_example() -> None:
    """The shared ones are below: they need more than a request."""
    for _, _, operation in operations():
        for status, response in operation["responses"].items():
            if status in ("400", "404", "409"):
                content = response["content"]["application/problem+json"]
                shown = {example["value"]["code"] for example in content["examples"].values()}
                assert shown == codes_of(response), operation["operationId"]


@pytest.mark.usefixtures("demonstration_wallets")
async def test_every_example_gets_its_answer(client: TestClient) -> None:
    sent = 0
    for example in examples():
        body = None if example.body is None else json.dumps(example.body)
        headers = {"X-Request-ID": REQUEST_ID} | ({} if body is None else {"Content-Type": "application/json"})
        answer = await client.request(example.method, example.url, data=body, headers=headers)
        told = await answer.json(content_type=None)
        assert (answer.status, answer.content_type) == (example.status, example.content_type), (example.name, told)
        assert masked(told) == masked(example.answer), example.name
        assert answer.headers["X-Request-ID"] == REQUEST_ID
        sent += 1
    assert sent > 25


async def test_a_balance_out_of_range_is_answered_as_shown(client: TestClient) -> None:
    """It takes an amount that JavaScript cannot send."""
    await create(client, {"full": 2**63 - 1})
    answer = await deposit(client, "full", 1)
    content = DOCUMENT["paths"]["/api/v1/wallets/{wallet_uuid}/operation"]["post"]["responses"]["400"]["content"]
    shown = content["application/problem+json"]["examples"]["balance_out_of_range"]["value"]
    assert (answer.status, await answer.json(content_type="application/problem+json")) == (shown["status"], shown)


def test_every_answer_shown_is_of_the_shape_described() -> None:
    for response in nodes(narrow()):
        for media in response.get("content", {}).values() if "headers" in response else ():
            shown = [example["value"] for example in media.get("examples", {}).values()]
            for value in [*shown, *([media["example"]] if "example" in media else [])]:
                checker(media["schema"], narrow()).validate(value)


def test_a_request_shown_is_of_the_shape_described_unless_its_answer_is_invalid_request() -> None:
    for example in examples():
        if example.body is None:
            continue
        body = DOCUMENT["paths"][example.path][example.method]["requestBody"]["content"]["application/json"]
        refused = example.status == 400 and example.answer["code"] == "invalid_request"
        assert checker(body["schema"]).is_valid(example.body) is not refused, example.name


def checker(schema: dict[str, Any], document: dict[str, Any] = DOCUMENT) -> Draft202012Validator:
    """Return a validator of one of the document's schemas, in which an answer may have only what is described."""
    return Draft202012Validator({**closed(schema), "components": closed(document["components"])})


def closed(node: Any) -> Any:
    """Return a part of the document in which no object has undescribed members. (Clients are told to ignore them.)"""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: closed(item) for name, item in node.items()}
    return node | {"additionalProperties": False} if node.get("type") == "object" and "properties" in node else node


OUTCOMES = [
    {
        "properties": {"applied": {"const": True}, "code": False, "detail": False},
        "required": ["balance_after", "held_after", "seq"],
    },
    {
        "properties": {"applied": {"const": False}, "balance_after": False, "held_after": False, "seq": False},
        "required": ["code", "detail"],
    },
]
"""The two kinds of a bulk request's results."""


def narrow() -> dict[str, Any]:
    """Return the document with what only its descriptions say, since generators do not understand it otherwise.

    A response's problems have the codes that its description names; a result is of one of two kinds.
    """
    document: dict[str, Any] = json.loads(docs.description(wants_keys=False))
    document["components"]["schemas"]["Result"]["oneOf"] = OUTCOMES
    responses = [*document["components"]["responses"].values()]
    for item in document["paths"].values():
        for operation in item.values():
            responses += [response for response in operation["responses"].values() if "$ref" not in response]
    for response in responses:
        for content_type, media in response.get("content", {}).items():
            if content_type == "application/problem+json":
                codes = {"properties": {"code": {"enum": sorted(codes_of(response))}}}
                media["schema"] = {"allOf": [media["schema"], codes]}
    return document


# The answers that many operations share, and what it takes to get them


async def is_as_shown(answer: ClientResponse, name: str, **but: object) -> None:
    """Assert that an answer is the one in components/responses, but for members that are given here."""
    await is_response(answer, DOCUMENT["components"]["responses"][name], **but)


async def is_response(answer: ClientResponse, response: dict[str, Any], **but: object) -> None:
    (media,) = response["content"].values()
    told = await answer.json(content_type="application/problem+json")
    assert told == media["example"] | but
    assert answer.status == told["status"]
    for header in response.get("headers", {}):
        assert header in answer.headers


def with_answer(status: str) -> list[tuple[str, str, Any]]:
    """Return method, path and a body of the operations that are described with this answer."""
    found = []
    for path, method, operation in operations():
        if status in operation["responses"]:
            url = path.replace("{wallet_uuid}", "w").replace("{operation_uuid}", WITHDRAWAL["operation_uuid"])
            found.append((method, url, next(iter(requests_of(operation).values()), None)))
    assert found
    return found


def each_with_answer(status: str) -> pytest.MarkDecorator:
    """Run a test for each operation that is described with this answer, with its method, path and a body."""
    found = with_answer(status)
    return pytest.mark.parametrize(("method", "path", "body"), found, ids=[f"{one[0]} {one[1]}" for one in found])


@each_with_answer("413")
async def test_a_body_that_is_too_large_is_answered_as_shown(
    client: TestClient, method: str, path: str, body: Any
) -> None:
    limit = bodies.BULK_BODY_LIMIT if path == "/api/v1/operations" else bodies.BODY_LIMIT
    spaces = b" " * (limit + 1 - len(json.dumps(body)))
    answer = await client.request(method, path, data=json.dumps(body).encode() + spaces, headers=JSON)
    # Python's word for 413 has changed with RFC 9110.
    await is_as_shown(answer, "BodyTooLarge", detail=f"A body may have {limit} bytes", title=HTTPStatus(413).phrase)


@each_with_answer("415")
async def test_a_body_of_another_type_is_answered_as_shown(
    client: TestClient, method: str, path: str, body: Any
) -> None:
    answer = await client.request(method, path, data=json.dumps(body), headers={"Content-Type": "text/plain"})
    await is_as_shown(answer, "UnsupportedMediaType")


@each_with_answer("408")
async def test_a_body_that_does_not_arrive_is_answered_as_shown(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Any
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT", 0.1)

    async def half_a_body() -> AsyncIterator[bytes]:
        yield json.dumps(body).encode()[:1]
        await asyncio.sleep(5)

    answer = await client.request(method, path, data=half_a_body(), headers=JSON)
    await is_as_shown(
        answer,
        "RequestTimeout",
        detail="The body was too slow: it may pause for 0.1 seconds, and needs 4096 bytes a second",
    )


@each_with_answer("401")
async def test_a_key_that_is_none_is_answered_as_shown(
    database_url: str, aiohttp_client: AiohttpClient, method: str, path: str, body: Any
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, access="keys")))
    answer = await client.request(method, path, json=body, headers={"Authorization": "Bearer nonsense"})
    await is_as_shown(answer, "Unauthorized")
    shown = resolved(DOCUMENT["components"]["responses"]["Unauthorized"]["headers"]["WWW-Authenticate"])["example"]
    assert answer.headers["WWW-Authenticate"] == shown


@each_with_answer("403")
async def test_a_key_that_lacks_a_scope_is_answered_as_shown(
    database_url: str,
    superuser: psycopg.Connection,
    aiohttp_client: AiohttpClient,
    method: str,
    path: str,
    body: Any,
) -> None:
    app = make_app(Settings(database_url=database_url, access="keys"))
    route = await app.router.resolve(make_mocked_request(method.upper(), path))
    assert route.route.resource is not None
    described = DOCUMENT["paths"][route.route.resource.canonical][method]["security"]
    scopes = [scope for one in described for scope in one["key"]]
    secret = make_key(superuser, "shop", *(scope for scope in SCOPES if scope not in scopes))
    client = await aiohttp_client(app)
    answer = await client.request(method, path, json=body, headers=bearer(secret))
    await is_as_shown(answer, "Forbidden", detail=f"The key lacks the scope {' or '.join(scopes)}")


@each_with_answer("429")
async def test_an_overload_is_answered_as_shown(
    database_url: str,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    body: Any,
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, lane_queue=0, bulk_queue=0)))
    if method != "get" and "/operation" in path:
        await is_as_shown(await client.request(method, path, json=body), "Overloaded")
    monkeypatch.setattr(keys, "ANYBODY", keys.ANYBODY._replace(name="greedy"))
    client = await aiohttp_client(make_app(Settings(database_url=database_url, key_requests=0)))
    detail = "This key has 0 requests in flight already"
    await is_as_shown(await client.request(method, path, json=body), "Overloaded", detail=detail)


async def test_a_database_that_is_away_is_answered_as_shown(aiohttp_client: AiohttpClient) -> None:
    nowhere = "postgres://nobody@/nothing?host=/nonexistent"
    client = await aiohttp_client(make_app(Settings(database_url=nowhere, request_deadline=0.2)))
    for method, path, body in with_answer("503"):
        if path != "/readyz":
            await is_as_shown(await client.request(method, path, json=body), "Unavailable")
    await is_response(await client.get("/readyz"), DOCUMENT["paths"]["/readyz"]["get"]["responses"]["503"])


async def test_what_the_introduction_says_of_routes(client: TestClient) -> None:
    problem = checker(DOCUMENT["components"]["schemas"]["Problem"])
    unknown = await client.get("/api/v1/wallet")
    told = await unknown.json(content_type="application/problem+json")
    problem.validate(told)
    assert (unknown.status, told["code"]) == (404, "not_found")
    other = await client.delete("/api/v1/wallets/1111111111")
    told = await other.json(content_type="application/problem+json")
    problem.validate(told)
    assert (other.status, told["code"], other.headers["Allow"]) == (405, "method_not_allowed", "GET,HEAD,PATCH,PUT")


# Whatever else one may send


@pytest.mark.usefixtures("demonstration_wallets")
async def test_no_request_gets_an_answer_that_is_not_described(
    database_url: str, aiohttp_server: AiohttpServer, tmp_path: Path
) -> None:
    """Schemathesis makes up requests from the document, good ones and bad ones, and compares each answer with it.

    Its check that good ones succeed is left out: a wallet that is unknown or empty is not their fault.
    """
    server = await aiohttp_server(make_app(Settings(database_url=database_url)))
    description = tmp_path / "openapi.json"
    description.write_text(json.dumps(closed(narrow())))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", str(description), "--url", str(server.make_url("/"))),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1", "--generation-deterministic"),
        *("--checks", ",".join(CHECKS), "--warnings", "off", "--no-color"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()


CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
]
