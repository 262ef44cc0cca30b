"""Sessions of PostgreSQL, on the server that takes writes. A commit that did not wait for its standby is no success."""

import asyncio
import logging
import os
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from app.calls.refusals import NO_SUCCESS, NotReplicated
from app.settings import HOST

CONNECT_TIMEOUT = 5.0
"""Seconds for an attempt to connect, and for an orderly close."""
HOST_TIMEOUT = 1.0
"""Seconds for an attempt to connect to one of several hosts: a later one may find another host that takes writes."""
HEAD_START = 0.1
"""Seconds that one of several hosts has to answer before the next one is asked, too (RFC 8305, section 5)."""

_log = logging.getLogger("wallet")


class Session(asyncpg.Connection):
    """A connection that raises NotReplicated if a commit was answered before its synchronous standby had it.

    If a commit's wait for its standby is cancelled, or ends with the session, PostgreSQL sends a WARNING and then
    answers as after any commit. The WARNING's text is in the server's language, and its SQLSTATE is that of any RAISE
    WARNING: it is recognised by the function that sends it (src/backend/replication/syncrep.c). fetch, fetchrow and
    execute look for it, and raise from then on (fetchval does not): close the session.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.replicated = True
        self.one_of_several = False
        self.add_log_listener(_note)

    async def fetch(self, *arguments: Any, **more: Any) -> Any:
        """Make a call and return its rows."""
        return self._seen(await super().fetch(*arguments, **more))

    async def fetchrow(self, *arguments: Any, **more: Any) -> Any:
        """Make a call and return its first row."""
        return self._seen(await super().fetchrow(*arguments, **more))

    async def execute(self, *arguments: Any, **more: Any) -> Any:
        """Run statements, such as the commit of a transaction."""
        return self._seen(await super().execute(*arguments, **more))

    def is_demoted(self) -> bool:
        """Tell whether its server was chosen for taking writes and has said since (14 or later) that it takes none."""
        settings = self.get_settings()
        told = (getattr(settings, name, "off") for name in ("default_transaction_read_only", "in_hot_standby"))
        return self.one_of_several and "on" in told

    def _seen(self, answer: Any) -> Any:
        if not self.replicated:
            raise NotReplicated("the commit's wait for its synchronous standby was ended")
        return answer


def _note(session: Any, warning: asyncpg.PostgresLogMessage) -> None:
    """Note that a commit did not wait, or log the WARNING. asyncpg calls this before it passes on the answer."""
    if warning.server_source_function == "SyncRepWaitForLSN":
        session.replicated = False
    elif warning.severity_en == "WARNING":
        extra = {"sqlstate": warning.sqlstate}
        _log.warning("the database says: SQLSTATE %s: %s", warning.sqlstate, warning.message, extra=extra)


async def open_session(url: str, **options: Any) -> Any:
    """Connect to PostgreSQL; where a URL names several hosts, to the one that takes writes."""
    hosts = several_hosts(url)
    if not hosts:
        return await asyncpg.connect(url, timeout=CONNECT_TIMEOUT, connection_class=Session, **options)
    session = await _first_to_take_writes(url, hosts, options)
    session.one_of_several = True
    return session


async def _first_to_take_writes(url: str, hosts: list[tuple[str, int]], options: dict[str, Any]) -> Any:
    """Connect to the first of several hosts that takes writes, and wait for none that says nothing.

    Raises what the last of them raised: TargetServerAttributeNotMatched only if none raised anything else.
    """
    attempts: set[asyncio.Task[Any]] = set()
    unasked = list(hosts)
    refused: Exception | None = None
    try:
        while unasked or attempts:
            if unasked:
                host, port = unasked.pop(0)
                where: dict[str, Any] = {
                    "host": host,
                    "port": port,
                    "target_session_attrs": SessionAttribute.read_write,
                }
                connecting = asyncpg.connect(url, timeout=HOST_TIMEOUT, connection_class=Session, **where, **options)
                attempts.add(asyncio.ensure_future(connecting))
            head_start = HEAD_START if unasked else None
            done, _ = await asyncio.wait(attempts, timeout=head_start, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                attempts.discard(attempt)
                try:
                    return attempt.result()
                except NO_SUCCESS as error:
                    if refused is None or not isinstance(error, asyncpg.TargetServerAttributeNotMatched):
                        refused = error
    finally:
        for attempt in attempts:
            if not attempt.cancel() and attempt.exception() is None:
                attempt.result().terminate()
    assert refused is not None
    raise refused


def several_hosts(url: str) -> list[tuple[str, int]]:
    """Return the hosts and ports of a URL, or of PGHOST, if there are several and no target_session_attrs."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    if "target_session_attrs" in query or "PGTARGETSESSIONATTRS" in os.environ:
        return []
    default = os.environ.get("PGPORT", "")
    if "host" in query or not (named := parts.netloc.rpartition("@")[2]):
        hosts = query.get("host", [os.environ.get("PGHOST", "")])[-1].split(",")
        ports = query.get("port", [default])[-1].split(",")
        ports *= len(hosts) if len(ports) == 1 else 1
    else:
        parts_of = [HOST.fullmatch(host) for host in named.split(",")]
        hosts = [unquote(each[1].strip("[]")) for each in parts_of if each]
        ports = [each[2] or default for each in parts_of if each]
    return [(host, int(port or 5432)) for host, port in zip(hosts, ports, strict=True)] if len(hosts) > 1 else []
