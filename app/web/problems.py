"""Every answer that is not a success, as problem+json (RFC 9457)."""

import logging
import re
from http import HTTPStatus

import asyncpg
import msgspec
from aiohttp import web

from app.calls.refusals import (
    DATABASE_REFUSED,
    LOCKED,
    NO_ANSWER,
    REFUSALS,
    REFUSED,
    Overloaded,
    Refusal,
    code_of,
    message_of,
)
from app.web.response import WholeResponse

RETRY = {"Retry-After": "1"}
"""The headers of an answer after which a client may ask again: in a second."""

LAST_ANSWERS = (408, 501, 505)
"""Statuses that end a connection: where the next request would begin is unknown."""

_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    417: "expectation_failed",
}

_log = logging.getLogger("wallet")


class Problem(Exception):
    """An answer that is not a success. `members` are RFC 9457 extension members; those that are None are left out."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        headers: dict[str, str] | None = None,
        members: dict[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers
        self.members = members or {}

    def response(self) -> web.Response:
        """Return the problem as an application/problem+json response."""
        body: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        body.update((name, value) for name, value in self.members.items() if value is not None)
        response = WholeResponse(
            body=msgspec.json.encode(body),
            status=self.status,
            headers=self.headers,
            content_type="application/problem+json",
        )
        if self.status in LAST_ANSWERS:
            response.force_close()
        return response


def refusal(sqlstate: str, message: str, *, conflicts: bool = False, **members: object) -> Problem:
    """Return the problem for what a function in db/, or the database itself, refused.

    `conflicts`: what was to be put exists, and differs: 409.
    """
    status, code = REFUSALS.get(sqlstate, DATABASE_REFUSED)
    if conflicts and sqlstate in ("WA409", "WA419"):
        status = 409
    if sqlstate == "WA400":
        members["errors"] = [{"loc": ["body"], "msg": message, "type": "value_error"}]
    return Problem(status, code, message, headers=RETRY if status == 503 else None, members=members)


def invalid(location: list[str | int], message: str, kind: str = "value_error") -> Problem:
    """Return the problem for input that fails validation: where, what, and pydantic's word for what kind."""
    detail = f"{'.'.join(map(str, location))}: {message}"
    errors = [{"loc": location, "msg": message, "type": kind}]
    return Problem(400, "invalid_request", detail, members={"errors": errors})


def invalid_input(source: str, error: msgspec.DecodeError) -> Problem:
    """Return the problem for what msgspec could not decode from the body, the query or the path (`source`)."""
    if not isinstance(error, msgspec.ValidationError):
        return invalid([source], f"not valid JSON: {error}", "json_invalid")
    message, _, path = str(error).partition(" - at `$")
    location: list[str | int] = [source]
    location += [int(index) if index else name for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path)]
    kind = "value_error"
    if field := re.fullmatch(r"Object missing required field `(\w+)`", message):
        location, message, kind = [*location, field[1]], "Field required", "missing"
    elif field := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        location, message, kind = [*location, field[1]], "Unknown field", "extra_forbidden"
    return invalid(location, message, kind)


def overloaded(detail: str) -> Problem:
    """Return the 429 for a request that there is no room for now."""
    return Problem(429, "overloaded", detail, headers=RETRY)


def unavailable(detail: str) -> Problem:
    """Return the 503 `unavailable`: what was asked for may or may not have been done."""
    return Problem(503, "unavailable", detail, headers=RETRY)


def answer_to(error: Exception) -> web.Response:
    """Return the answer to whatever a handler raised; a redirection stays what it is."""
    match error:
        case Problem():
            if error.status >= 500 and error.status not in (501, 505):
                _log.warning(error.detail, extra={"code": error.code})
            return error.response()
        case web.HTTPException() if error.status < 400:
            return web.Response(status=error.status, headers={"Location": error.headers["Location"]})
        case web.HTTPException():
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            code = _HTTP_CODES.get(error.status, "http_error")
            return Problem(error.status, code, error.reason, headers=headers).response()
        case Refusal():
            return refusal(str(error.sqlstate), str(error)).response()
        case Overloaded():
            return overloaded(str(error)).response()
        case asyncpg.PostgresError():
            sqlstate = str(error.sqlstate)
            extra = {"sqlstate": sqlstate, "code": code_of(sqlstate)}
            _log.warning("the database refused a request: SQLSTATE %s: %s", sqlstate, message_of(error), extra=extra)
            return refusal(sqlstate, LOCKED if sqlstate == "55P03" else REFUSED).response()
        case _ if isinstance(error, NO_ANSWER):
            _log.warning("no answer from the database: %s", type(error).__name__, extra={"code": "unavailable"})
            return unavailable("The database did not answer in time").response()
        case _:
            _log.error("unexpected error", exc_info=error, extra={"code": "internal_error"})
            return Problem(500, "internal_error", "Internal error").response()
