"""Who may do what. A key has scopes and reaches the wallets whose names begin with its prefix; SQL knows its digest.

Each worker holds the keys that are valid, by digest, so that an unknown one costs no query and leaves nothing behind.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import asyncpg
from aiohttp import hdrs, web

from app.calls.database import FIRST_ATTEMPT, SETTINGS, UNTIL, connect, deadline_of, live_keys, pauses
from app.calls.line import Request
from app.calls.parties import PARTY
from app.settings import Settings
from app.web.problems import Problem

INTERVAL = 1.0
"""Seconds between two readings of the keys."""
TRUST = 5.0
"""Seconds for which a reading holds, from its start: a revoked key works at most this long."""
TIMEOUT = TRUST / 2
"""Seconds that a reading may take."""
SECRET_LIMIT = 128
"""Characters of a secret, at most: a longer one is not looked up."""

OPEN = ()
"""The scopes of a route that needs no key."""
SCOPES = {"DEPOSIT": "deposit", "WITHDRAW": "withdraw", "TRANSFER": "transfer", "HOLD": "hold", "RELEASE": "hold"}
"""The scope that each type of operation needs."""
OPERATE = tuple(dict.fromkeys(SCOPES.values()))
"""The scopes of which one is needed to ask for operations at all."""

_log = logging.getLogger("wallet")


class Key(NamedTuple):
    """A caller: what it is called, what it may do, how its wallets' names begin, until when (by time.monotonic())."""

    name: str
    scopes: frozenset[str]
    prefix: str
    until: float
    digest: bytes = b""


ANYBODY = Key("", frozenset(("read", "create", *OPERATE, "admin", "metrics")), "", math.inf)
"""Every caller, where no key is needed."""
CALLER = web.RequestKey("caller", Key)


class Keys:
    """The keys that are valid, as of the last reading."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._keys: dict[bytes, Key] = {}
        self._lately: dict[str, Key] = {}
        """Which key a header presented since the last reading: SHA-256 would be a twentieth of a request's cost."""
        self._trusted_until = -math.inf
        self._fresh = asyncio.Event()

    async def admit(self, request: web.Request, scopes: Sequence[str]) -> Key:
        """Take a request with a key that has one of these scopes, if it needs any, and reaches the wallet in its path.

        Returns the key. Raises Problem: 401, 403; and TimeoutError if the keys cannot be read.
        """
        if not scopes:
            request[CALLER] = ANYBODY
            return ANYBODY
        given = request.headers.getall(hdrs.AUTHORIZATION, ())
        key = self._lately.get(given[0]) if len(given) == 1 else None
        if key is None or (now := time.monotonic()) >= self._trusted_until or now >= key.until:
            key = await self._identify(given)
        PARTY.set(key.name)
        if key.scopes.isdisjoint(scopes):
            raise out_of_scope(*scopes)
        if key.prefix and not request.match_info.get("wallet_uuid", key.prefix).startswith(key.prefix):
            raise out_of_reach(key)
        request[CALLER] = key
        return key

    async def _identify(self, given: Sequence[str]) -> Key:
        """Return the key that these headers present. Raises Problem: 401; and TimeoutError as find does."""
        secret = presented(given)
        if secret is None:
            raise unauthorized("This needs a key: Authorization: Bearer wk_...")
        key = None
        if secret.startswith("wk_") and len(secret) <= SECRET_LIMIT and secret.isascii():
            key = await self.find(hashlib.sha256(secret.encode()).digest())
        if key is None:
            raise unknown()
        if given[0] == f"Bearer {secret}":  # as nearly all write it: there is one such header a key
            self._lately[given[0]] = key
        return key

    async def find(self, digest: bytes) -> Key | None:
        """Return the key with a digest. Waits for a reading up to the request's deadline, then raises TimeoutError.

        By time.monotonic(): the loop's clock stops while the process is stopped.
        """
        while (now := time.monotonic()) >= self._trusted_until:
            UNTIL.set(until := deadline_of(self._deadline))
            self._fresh.clear()
            async with asyncio.timeout_at(until):
                await self._fresh.wait()
        key = self._keys.get(digest)
        return key if key is not None and now < key.until else None

    async def poll(self, settings: Settings) -> None:
        """Read the keys every INTERVAL seconds, until cancelled."""
        timeout = min(TIMEOUT, FIRST_ATTEMPT * settings.request_deadline)
        connection: Any = None
        pause = pauses()
        told = False
        try:
            while True:
                try:
                    async with asyncio.timeout(timeout):
                        if connection is None or connection.is_closed() or connection.is_demoted():
                            assert settings.database_url is not None
                            if connection is not None:
                                connection.terminate()
                            connection = await connect(settings.database_url, timeout, "wallet keys")
                        await self._read(connection)
                    pause, told = pauses(), False
                    await asyncio.sleep(INTERVAL)
                except Exception as error:
                    if not told:
                        extra = {"sqlstate": error.sqlstate} if isinstance(error, asyncpg.PostgresError) else {}
                        _log.warning("the keys cannot be read: %s", type(error).__name__, extra=extra)
                    told = True
                    if connection is not None:
                        connection.terminate()
                    await asyncio.sleep(next(pause))
        finally:
            if connection is not None:
                connection.terminate()

    async def _read(self, connection: Any) -> None:
        began = time.monotonic()
        self._keys = {
            row["digest"]: Key(
                row["name"],
                frozenset(row["scopes"]),
                row["wallet_prefix"] or "",
                math.inf if row["seconds"] is None else began + row["seconds"],
                row["digest"],
            )
            for row in await live_keys(connection)
        }
        self._lately.clear()
        self._trusted_until = began + TRUST
        self._fresh.set()


KEYS = web.AppKey("keys", Keys)


async def keep(app: web.Application) -> AsyncIterator[None]:
    """Read the keys while the app runs."""
    reading = asyncio.create_task(app[KEYS].poll(app[SETTINGS]))
    yield
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


async def admit_anybody(request: web.Request, scopes: Sequence[str]) -> Key:
    """Take every request, whatever it needs."""
    request[CALLER] = ANYBODY
    return ANYBODY


async def check_again(request: web.Request) -> None:
    """Check the caller's key again, after a body that took its time: it may be revoked or expired by now.

    Raises Problem: 401; and TimeoutError if the keys cannot be read.
    """
    caller = request[CALLER]
    if caller.digest and await request.app[KEYS].find(caller.digest) is None:
        raise unknown()


def presented(given: Sequence[str]) -> str | None:
    """Return the secret that Authorization headers present (RFC 6750, section 2.1); None: none, or several."""
    if len(given) != 1:
        return None
    scheme, _, secret = given[0].partition(" ")
    return secret.strip(" ") if scheme.lower() == "bearer" else None


def permit_wallet(request: web.Request, name: str | None) -> None:
    """Raise Problem (403) if the caller may not create a wallet of this name; None: of a random one."""
    if not (name or "").startswith(request[CALLER].prefix):
        raise out_of_reach(request[CALLER])


def permit_operation(request: web.Request, operation_type: str) -> None:
    """Raise Problem (403) if the caller may not ask for operations of a type."""
    if (scope := SCOPES[operation_type]) not in request[CALLER].scopes:
        raise out_of_scope(scope)


def permit_operations(request: web.Request, operations: Sequence[Request]) -> None:
    """Raise Problem (403) if the caller may not ask for one of these operations. A payee may be any wallet."""
    caller = request[CALLER]
    if caller is ANYBODY:
        return
    for number, operation in enumerate(operations):
        if (scope := SCOPES[operation.operation_type]) not in caller.scopes:
            raise out_of_scope(scope, place=f"operation {number}: ")
        if not operation.wallet_uuid.startswith(caller.prefix):
            raise out_of_reach(caller, place=f"operation {number}: ")


def unknown() -> Problem:
    """Return the 401 for a key that is unknown, expired or revoked."""
    return unauthorized("The key is unknown, expired or revoked", error="invalid_token")


def unauthorized(detail: str, **parameters: str) -> Problem:
    """Return the 401 with its challenge (RFC 6750, section 3)."""
    told = ", ".join(f'{name}="{value}"' for name, value in {"realm": "wallet", **parameters}.items())
    return Problem(401, "unauthorized", detail, headers={hdrs.WWW_AUTHENTICATE: f"Bearer {told}"})


def out_of_scope(*scopes: str, place: str = "") -> Problem:
    """Return the 403 for a key that has none of these scopes."""
    return Problem(403, "forbidden", f"{place}The key lacks the scope {' or '.join(scopes)}")


def out_of_reach(key: Key, place: str = "") -> Problem:
    """Return the 403 for a wallet that a key doesn't reach."""
    return Problem(403, "forbidden", f"{place}The key reaches only wallets whose names begin with {key.prefix}")
