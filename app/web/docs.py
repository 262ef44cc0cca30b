"""The service's description of itself: /openapi.json, and /docs, which is Swagger UI from static/ and no network."""

import functools
import hashlib
from pathlib import Path

import msgspec
import yaml
from aiohttp import web
from aiohttp.typedefs import Handler

DESCRIPTION = Path(__file__).with_name("openapi.yaml")
STATIC = Path(__file__).with_name("static")

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
REVALIDATE = "no-cache"
"""For what changes under its name: a client may keep it, and asks each time whether it is still right (ETag)."""
IMMUTABLE = "public, max-age=31536000, immutable"
"""For what has its version in its name."""

_TYPES = {".css": "text/css", ".js": "text/javascript"}


def routes(*, wants_keys: bool) -> list[web.RouteDef]:
    """Return the routes of the description and of the page that shows it."""
    page = (STATIC / "index.html").read_bytes()
    return [
        web.get("/openapi.json", _serve(description(wants_keys=wants_keys), "application/json", REVALIDATE)),
        web.get("/docs", _serve(page, "text/html", REVALIDATE, {"Content-Security-Policy": CONTENT_SECURITY_POLICY})),
        web.get("/docs/", _redirect_to_docs),
        *(
            web.get(
                f"/docs/{file.relative_to(STATIC).as_posix()}",
                _serve(file.read_bytes(), _TYPES[file.suffix], REVALIDATE if file.parent == STATIC else IMMUTABLE),
            )
            for file in sorted(STATIC.rglob("*"))
            if file.suffix in _TYPES
        ),
    ]


@functools.cache
def description(*, wants_keys: bool) -> bytes:
    """Return openapi.yaml as JSON. Where no key is needed, each request may also be made without one."""
    document = yaml.load(DESCRIPTION.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not wants_keys:
        for item in document["paths"].values():
            for operation in item.values():
                if "security" in operation:
                    operation["security"] = [{}, *operation["security"]]
    return msgspec.json.encode(document)


def _serve(body: bytes, content_type: str, cache_control: str, headers: dict[str, str] | None = None) -> Handler:
    """Return a handler that serves bytes from memory, or a 304 (RFC 9110, section 13.1.2) to whoever has them."""
    etag = hashlib.sha256(body).hexdigest()[:32]
    charset = "utf-8" if content_type.startswith("text/") else None  # JSON has no charset: RFC 8259, section 11
    fixed = {"Cache-Control": cache_control, "X-Content-Type-Options": "nosniff", **(headers or {})}

    async def handler(request: web.Request) -> web.Response:
        if any(known.value in (etag, "*") for known in request.if_none_match or ()):
            answer = web.Response(status=304, headers=fixed)
        else:
            answer = web.Response(body=body, headers=fixed, content_type=content_type, charset=charset)
        answer.etag = etag
        return answer

    return handler


async def _redirect_to_docs(_request: web.Request) -> web.StreamResponse:
    """GET /docs/: the page's links are relative to /docs."""
    raise web.HTTPPermanentRedirect("../docs")
