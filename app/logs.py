"""Logs on standard error: JSON lines for machines, short ones on a terminal. No bodies, no amounts, no credentials."""

import asyncio
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec
from aiohttp.web import RequestPayloadError

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being handled."""
FIELDS = ("sqlstate", "code")
"""What a record may carry beside its message."""
FLUSH_INTERVAL = 0.1
"""Seconds that an access line may wait to be written with others."""

log = logging.getLogger("wallet")


def configure(level: str) -> None:
    """Send everything from this level on to standard error, one line a record."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TerminalFormatter() if sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(is_not_bad_body)


def is_not_bad_body(record: logging.LogRecord) -> bool:
    """Tell whether a record is worth a line: a body that does not decode as its headers say has had its 400.

    aiohttp reads on after that answer, meets the same error again and logs it with its traceback.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], RequestPayloadError))


class JsonFormatter(logging.Formatter):
    """A record as a JSON object on one line, a traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        line.update((name, record.__dict__[name]) for name in FIELDS if name in record.__dict__)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TerminalFormatter(logging.Formatter):
    """A record as a short line, a traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")


class AccessLine(msgspec.Struct, gc=False):
    """A request that was answered, as a line of the log.

    `ms` is the time it took in milliseconds, `peer` the address of the client, or of the proxy, that is connected.
    """

    time: datetime
    request_id: str
    method: str
    path: str
    status: int
    ms: float
    peer: str
    level: str = "info"
    logger: str = "access"


class AccessLog:
    """One line a request, written with others ten times a second: a write a line would cost more than the line."""

    def __init__(self) -> None:
        self.enabled = log.isEnabledFor(logging.INFO)
        self._encode = terminal_lines if sys.stderr.isatty() else msgspec.json.Encoder().encode_lines
        self._lines: list[AccessLine] = []

    def add(self, line: AccessLine) -> None:
        """Add the line of a request that was answered."""
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_INTERVAL, self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        """Write the lines that wait."""
        if self._lines:
            lines, self._lines = self._lines, []
            sys.stderr.buffer.write(self._encode(lines))
            sys.stderr.buffer.flush()


def terminal_lines(lines: list[AccessLine]) -> bytes:
    """Return lines for a terminal."""
    return "".join(
        f"{line.time.astimezone():%H:%M:%S} {line.method} {line.path} {line.status} {line.ms} ms {line.request_id}\n"
        for line in lines
    ).encode()
