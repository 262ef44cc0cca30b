"""What goes over the wire is what aiohttp's own response would be."""

import asyncio
import re

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from app.web.response import WholeResponse

REQUESTS = {
    "GET": "GET / HTTP/1.1\r\n",
    "POST": "POST / HTTP/1.1\r\nContent-Length: 2\r\n",
    "HEAD": "HEAD / HTTP/1.1\r\n",
    "to be closed": "GET / HTTP/1.1\r\nConnection: close\r\n",
    "HTTP/1.0": "GET / HTTP/1.0\r\n",
    "HTTP/1.0 to be kept": "GET / HTTP/1.0\r\nConnection: keep-alive\r\n",
}
RESPONSES = {
    "JSON": {"body": b'{"a": 1}', "content_type": "application/json"},
    "refused": {"body": b"{}", "status": 404, "content_type": "application/problem+json"},
    "with headers": {"body": b"{}", "status": 201, "headers": {"Content-Type": "text/plain", "Location": "/here"}},
    "an empty body": {"body": b"", "content_type": "application/json"},
    "no body": {"status": 308, "headers": {"Location": "/here"}},
    "must have no body": {"body": b"x", "status": 304, "content_type": "text/plain"},
    "bytes of another kind": {"body": bytearray(b"{}"), "content_type": "application/json"},
}


async def exchange(kind: type[web.Response], request: str, told: dict, *, close: bool = False) -> bytes:
    """Return what a server answers on one connection: if it stays, to the request twice and to a last one."""

    async def handle(_request: web.Request) -> web.Response:
        response = kind(**told)
        if close:
            response.force_close()
        return response

    app = web.Application()
    app.router.add_route("*", "/", handle)
    async with TestServer(app) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        body = b"{}" if "Content-Length" in request else b""
        asked = request.encode() + b"Host: a\r\n\r\n" + body
        stays = "close" not in request and ("1.1" in request or "keep-alive" in request)
        writer.write(asked * 2 + b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" if stays else asked)
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
    return re.sub(rb"Date: [^\r]+", b"Date: -", answer)


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("told", RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
async def test_is_aiohttps(request_: str, told: dict, close: bool) -> None:
    own, plain = [await exchange(kind, request_, told, close=close) for kind in (WholeResponse, web.Response)]
    assert own == plain
    assert own.count(b"Date: -") == own.count(b"HTTP/1.") >= 1
