"""Logs on standard error: JSON lines for machines, short ones on a terminal. No bodies, no amounts, no credentials."""

import asyncio
import fcntl
import logging
import os
import select
import signal
import stat
import threading
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec
from aiohttp.web import RequestPayloadError
from msgspec import UNSET, UnsetType

from app.calls.parties import PARTY
from app.metrics import LINES_DROPPED

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being handled."""
PEER: ContextVar[str | None] = ContextVar("peer", default=None)
"""The address of the client whose request is being handled."""
FIELDS = ("sqlstate", "code")
"""What a record may carry beside its message."""
FLUSH_INTERVAL = 0.1
"""Seconds that an access line may wait to be written with others."""
WAITING_LIMIT = 4 * 1024 * 1024
"""Bytes of lines that may wait for whoever reads standard error; lines that come then are dropped."""
LAST_LINES = 1.0
"""Seconds that the last lines have to be written when a process ends."""

log = logging.getLogger("wallet")


def configure(level: str) -> None:
    """Send everything from this level on to standard error, one line a record. Each process calls it for itself."""
    global _standard_error
    turn, unblocked = _standard_error.turn, _standard_error.unblocked
    if turn is None:
        turn, unblocked = os.memfd_create("turn"), _open_unblocked(2)
    _standard_error = StandardError(2, turn, unblocked)
    logging.basicConfig(level=level, handlers=[Handler()], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(is_not_bad_body)


def is_not_bad_body(record: logging.LogRecord) -> bool:
    """Tell whether a record is about anything but a malformed body, which was answered with a 400 already.

    aiohttp reads on after that answer, meets the same error again and logs it with its traceback.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], RequestPayloadError))


def finish() -> None:
    """Wait a little for the last lines to be written."""
    _standard_error.finish()


class StandardError:
    """Standard error, as a file that never makes a process wait: a reader that stalls loses lines, which are counted.

    It is reopened where that is possible, as a file of its own that does not block: what it takes at once is written
    at once. A thread writes the rest, or everything if it can't be reopened. The thread ends when nothing is left: the
    supervisor forks, and should have no threads. Processes that share the file take turns, by a lock on `turn`: what a
    pipe does not hold at once would be mixed with others' lines.
    """

    def __init__(self, descriptor: int, turn: int | None, unblocked: int | None) -> None:
        self._descriptor = descriptor
        self.unblocked = unblocked
        self.turn = turn
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def write(self, lines: bytes, number: int = 1) -> None:
        """Have a number of lines written, or drop them if too much waits already."""
        with self._lock:
            if self._thread is None and not self._waiting and not self._dropped:
                lines = self._write_at_once(lines)
                if not lines:
                    return
            if self._size and self._size + len(lines) > WAITING_LIMIT:
                self._drop(number)
                return
            self._waiting.append(lines)
            self._size += len(lines)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="standard error", daemon=True)
            # The thread must not take signals: the main thread waits for them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._thread.start()
            except RuntimeError:  # no more threads are to be had: the next line tries again
                self._thread = None
                self._lock_turn(fcntl.LOCK_UN)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def finish(self) -> None:
        """Wait up to LAST_LINES seconds until all is written."""
        thread = self._thread
        if thread is not None:
            thread.join(LAST_LINES)

    def _drop(self, number: int) -> None:
        self._dropped += number
        LINES_DROPPED.inc(number)

    def _write_at_once(self, lines: bytes) -> bytes:
        """Write what can be written without waiting, and return the rest."""
        if self.unblocked is None:
            return lines
        try:
            self._lock_turn(fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = lines[os.write(self.unblocked, lines) :]
            if lines:
                return lines  # still in turn: the thread goes on where this one stopped
        except OSError:  # it is full, or another process writes
            pass
        self._lock_turn(fcntl.LOCK_UN)
        return lines

    def _lock_turn(self, operation: int) -> None:
        """Take the turn or end it; the kernel ends it with the process."""
        if self.turn is not None:
            fcntl.lockf(self.turn, operation)

    def _run(self) -> None:
        size = 0
        while True:
            with self._lock:
                self._size -= size
                lines = b"".join(self._waiting)
                size, dropped = len(lines), self._dropped
                self._waiting.clear()
                self._dropped = 0
                if not lines and not dropped:
                    self._thread = None
                    return
            left = self._write(lines + _told(dropped))
            if left:
                with self._lock:
                    self._size -= size
                    self._dropped += dropped
                    self._drop(left.count(b"\n") - bool(dropped))
                    self._thread = None
                    return

    def _write(self, lines: bytes) -> bytes:
        """Write lines, however long it takes, and return those that cannot be: the reader is gone, or the disk full."""
        self._lock_turn(fcntl.LOCK_EX)
        while lines:
            try:
                lines = lines[os.write(self._descriptor, lines) :]
            except BlockingIOError:  # somebody else made the file non-blocking
                writable = select.poll()
                writable.register(self._descriptor, select.POLLOUT)
                writable.poll()
            except OSError:
                break
        self._lock_turn(fcntl.LOCK_UN)
        return lines


_standard_error = StandardError(2, None, None)


def _open_unblocked(descriptor: int) -> int | None:
    """Return a descriptor whose writes never block; None: there is none (a socket).

    Writes to a regular file never block, and its writers must share one offset: it is returned as it is. Anything else
    is reopened, so that O_NONBLOCK is not set for others too.
    """
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None


def _told(dropped: int) -> bytes:
    """Return the line that tells of lines that were dropped before it, if any were."""
    if not dropped:
        return b""
    text = "%d log lines were dropped: standard error was not read"
    record = logging.LogRecord(log.name, logging.WARNING, __file__, 0, text, (dropped,), None)
    return f"{_formatter().format(record)}\n".encode()


def _formatter() -> logging.Formatter:
    return TerminalFormatter() if os.isatty(2) else JsonFormatter()


def tell(message: str) -> None:
    """Write a message as a record, whatever the level."""
    record = logging.LogRecord(log.name, logging.INFO, __file__, 0, message, None, None)
    _standard_error.write(f"{_formatter().format(record)}\n".encode())


def share_a_pipe(one: int, other: int) -> bool:
    """Tell whether two open files are one pipe or one socket."""
    try:
        found = os.fstat(one)
        return os.path.samestat(found, os.fstat(other)) and stat.S_IFMT(found.st_mode) in (stat.S_IFIFO, stat.S_IFSOCK)
    except OSError:  # closed
        return False


class Handler(logging.Handler):
    """What writes the records of Python's logging."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written."""
        try:
            _standard_error.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:
            self.handleError(record)


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
        about = (("request_id", REQUEST_ID.get()), ("peer", PEER.get()), ("key", PARTY.get() or None))
        line.update((name, value) for name, value in about if value is not None)
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

    `ms` is the time it took in milliseconds, `peer` the client's address (app/web/peers.py), `key` the name of its key.
    """

    time: datetime
    request_id: str
    method: str
    path: str
    status: int
    ms: float
    peer: str
    key: str | UnsetType = UNSET
    level: str = "info"
    logger: str = "access"


class AccessLog:
    """One line a request, written with others ten times a second: a write a line would cost more than the line."""

    def __init__(self) -> None:
        self.enabled = log.isEnabledFor(logging.INFO)
        self._encode = terminal_lines if os.isatty(2) else msgspec.json.Encoder().encode_lines
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
            _standard_error.write(self._encode(lines), len(lines))


def terminal_lines(lines: list[AccessLine]) -> bytes:
    """Return lines for a terminal."""
    return "".join(
        f"{line.time.astimezone():%H:%M:%S} {line.method} {line.path} {line.status} {line.ms} ms {line.request_id}\n"
        for line in lines
    ).encode()
