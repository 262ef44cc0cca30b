"""Connections and their pool, what errors mean, and the calls to db/ that apply no operations."""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, TypeGuard
from uuid import UUID, uuid4

import asyncpg
from aiohttp import web

from app.calls.parties import PARTIES, Parties, Places
from app.calls.records import Balance, Hold, Operation, Wallet, as_json, balance_of, hold_of, operation_of
from app.calls.refusals import NO_ANSWER, NO_SUCCESS, Refusal, message_of
from app.calls.session import CONNECT_TIMEOUT, open_session
from app.metrics import POOL_IN_USE
from app.settings import Settings

CONTRACT = 5
"""The least wallet.contract_version() that this service works with."""

OPERATION = as_json(Operation)
"""The SQL expression of a row of wallet.operation as JSON."""
_BALANCE = as_json(Balance)
_HOLD = as_json(Hold)

REPLICATED = """
select pg_logical_emit_message(true, 'wallet', ''::text) where current_setting('synchronous_standby_names') <> ''
"""
"""A statement whose commit waits until the synchronous standby, if there is one, has all that was visible before.

A commit waits only if it wrote WAL and has a transaction id (src/backend/access/transam/xact.c).
"""
FIRST_ATTEMPT = 0.5
"""The part of the time for a first attempt (the pool: of the deadline; a line: of what is left of it).

So a connection that goes nowhere leaves time for a second attempt.
"""
LEAD = 0.05
"""The part of a deadline that is left when a call is given up: room for clock skew."""
IDLE = 10.0
"""Seconds after which a connection that nobody needs is closed."""
POOL_LOCK_TIMEOUT = 0.2
"""Seconds that a change waits for a locked wallet before it gives its connection to others, and tries again."""
READ_DIVISOR = 4
"""In contention, one party may have the pool's size divided by this: each read keeps a core busy."""

UNTIL: ContextVar[float | None] = ContextVar("until", default=None)
"""The deadline, on the loop's clock, of the request that is being handled, if it had to wait for the keys.

Else its deadline is counted from its first call on.
"""

_log = logging.getLogger("wallet")


_HARMLESS = ("40001", "40P01", "55P03", "57014")
"""SQLSTATEs after which the session can be used again: the statement gave way to another one, or was too late."""
_PASSING = ("25", "40", "53", "55P03", "57", "58")
"""Beginnings of the SQLSTATEs of errors that may pass: the same call may succeed later."""
_DELIBERATE = ("23", "P0")
"""Classes of errors of constraints, and of what triggers raise (manual, appendix A)."""
_LOST = ("08", "XX")
"""Classes of SQLSTATEs that don't say whether the statement took effect."""


async def connect(url: str, deadline: float, name: str = "wallet", *, lock_timeout: float = 0) -> Any:
    """Connect to PostgreSQL; where the URL names several hosts, to the one that takes writes.

    The server itself ends a statement after `deadline` seconds, so that it holds no lock and no connection for ever if
    its caller is gone, and ends a wait for a lock after `lock_timeout` seconds (0: never). Whatever the role or the
    database have set, a commit is on disk before it is answered, WARNINGs are sent (see Session), and the
    isolation level is read committed.
    `name` is what pg_stat_activity calls the session.
    """
    connection = await open_session(url, server_settings={"application_name": name})
    _keep_alive(connection, deadline)
    try:  # with SET: poolers refuse these as startup parameters
        await connection.execute(
            f"set statement_timeout = {round(deadline * 1000)};"
            f"set lock_timeout = {round(lock_timeout * 1000)};"
            "set default_transaction_isolation = 'read committed';"
            "set client_min_messages = warning;"
            "select set_config('synchronous_commit', 'on', false)"
            " where current_setting('synchronous_commit') <> 'remote_apply'"
        )
    except BaseException:
        connection.terminate()
        raise
    return connection


def abandon(connection: Any) -> None:
    """Close a connection in the background, and have its server cancel what may still run on it.

    A commit that waits for a standby has no statement_timeout, and does not notice that its client is gone.
    """
    closing = asyncio.create_task(close(connection))
    _closing.add(closing)
    closing.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()
"""What `abandon` has begun: the event loop itself keeps no task alive (asyncio.create_task)."""


async def close(connection: Any) -> None:
    """Close a connection. asyncpg cancels what runs on it, and waits for that; CONNECT_TIMEOUT at most."""
    with contextlib.suppress(*NO_SUCCESS):
        await connection.close(timeout=CONNECT_TIMEOUT)


def _keep_alive(connection: Any, deadline: float) -> None:
    """Have the kernel notice a peer that is gone without a word, such as behind a NAT that forgot (Linux, tcp(7)).

    asyncpg has no option for it.
    """
    peer = connection._transport.get_extra_info("socket")  # noqa: SLF001
    if peer is not None and peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("IDLE", 15), ("INTVL", 5), ("CNT", 3)):
            if number := getattr(socket, f"TCP_KEEP{option}", None):
                peer.setsockopt(socket.IPPROTO_TCP, number, value)
        if number := getattr(socket, "TCP_USER_TIMEOUT", None):
            peer.setsockopt(socket.IPPROTO_TCP, number, round(FIRST_ATTEMPT * deadline * 1000))


def deadline_of(seconds: float) -> float:
    """Return the request's deadline on the loop's clock: UNTIL, or `seconds` from now."""
    return UNTIL.get() or asyncio.get_running_loop().time() + seconds


def session_survives(error: BaseException) -> bool:
    """Tell whether the session is good after an error: the statement was refused, gave way, or was too late."""
    return isinstance(error, Refusal) or (_is_answer(error) and error.sqlstate in _HARMLESS)


def is_deliberate(error: BaseException) -> bool:
    """Tell whether a constraint or a trigger refused the statement: no new session changes that."""
    return _is_answer(error) and str(error.sqlstate).startswith(_DELIBERATE)


def nothing_changed(error: BaseException) -> bool:
    """Tell whether an error shows that a statement had no effect: the database rolled it back, or it was never sent."""
    return isinstance(error, asyncpg.DataError) or _is_answer(error)


def is_passing(error: BaseException) -> bool:
    """Tell whether the same call may succeed later: the database is away, full, busy, or read-only for a while."""
    return not nothing_changed(error) or (_is_answer(error) and str(error.sqlstate).startswith(_PASSING))


def _is_answer(error: BaseException) -> TypeGuard[asyncpg.PostgresError]:
    return (
        isinstance(error, asyncpg.PostgresError)
        and error.severity_en == "ERROR"
        and not str(error.sqlstate).startswith(_LOST)
    )


def pauses() -> Iterator[float]:
    """Yield the seconds between attempts: 20 ms at first, doubled each time up to 250 ms, give or take a half."""
    seconds = 0.02
    while True:
        yield seconds * random.uniform(0.5, 1.5)
        seconds = min(seconds * 2, 0.25)


class Pool:
    """Connections for reads, new wallets and statuses, lent by turns to parties, to each in the order of asking.

    asyncpg's own pool lets newcomers overtake those who wait, and holds a caller who gives up until the server has
    answered. Here a connection is closed unless its session is known to be good.
    """

    def __init__(self, url: str, size: int, deadline: float, parties: Parties) -> None:
        self._url = url
        self.deadline = deadline
        self._places = Places(size, lambda: max(size // READ_DIVISOR, 1) if parties.in_contention() else size)
        self._changes = Places(max(size // 2, 1))
        self._lock_timeout = min(POOL_LOCK_TIMEOUT, deadline / 4)
        self._idle: list[tuple[Any, float]] = []

    @contextlib.asynccontextmanager
    async def connection(self, *, change: bool = False) -> AsyncIterator[Any]:
        """Lend a connection; no more than half of them for changes, which may wait for locked wallets."""
        async with self._changes.place() if change else contextlib.nullcontext(), self._places.place():
            connection = self._take() or await connect(self._url, self.deadline, lock_timeout=self._lock_timeout)
            POOL_IN_USE.inc()
            good = True
            try:
                yield connection
            except BaseException as error:
                good = session_survives(error)
                raise
            finally:
                POOL_IN_USE.dec()
                if not connection.is_closed():
                    if good and not connection.is_demoted():
                        self._idle.append((connection, asyncio.get_running_loop().time()))
                    else:
                        abandon(connection)

    def _forget_idle(self) -> None:
        while self._idle:
            self._idle.pop()[0].terminate()

    def _take(self) -> Any:
        """Return the connection that was used last, if there is an open one."""
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None

    async def close_idle(self) -> None:
        """Close connections that have been idle for IDLE seconds, until cancelled."""
        while True:
            await asyncio.sleep(IDLE / 2)
            long_ago = asyncio.get_running_loop().time() - IDLE
            while self._idle and self._idle[0][1] < long_ago:
                self._idle.pop(0)[0].terminate()

    async def fetch(self, query: str, *arguments: object, change: bool = False) -> list[asyncpg.Record]:
        """Repeat a call until the database gives a definite answer. It must be safe to make it twice.

        A refusal is definite, and so is an error that a new session meets too and that time doesn't mend. Raises
        Refusal, asyncpg.PostgresError for such an error or (55P03) if a change met a lock until the deadline, and
        TimeoutError at the deadline of a request, or for such an error after an attempt that was lost.
        """
        until = deadline_of(self.deadline)
        async with asyncio.timeout_at(until):
            return await self._fetch(query, *arguments, change=change, until=until)

    async def _fetch(self, query: str, *arguments: object, change: bool, until: float) -> list[asyncpg.Record]:
        pause, seconds = pauses(), 0.0
        lost, before = False, None
        locked: asyncpg.PostgresError | None = None
        last = until - LEAD * self.deadline - self._lock_timeout
        limit: float | None = FIRST_ATTEMPT * self.deadline
        while True:
            sent = False
            try:
                async with contextlib.AsyncExitStack() as stack:
                    async with asyncio.timeout_at(last if locked else None):
                        if seconds:
                            await asyncio.sleep(seconds)
                        connection = await stack.enter_async_context(self.connection(change=change))
                    sent = True
                    async with asyncio.timeout(limit):
                        rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
                        return rows
            except Refusal as error:
                error.after_a_lost_attempt = lost
                raise
            except asyncpg.LockNotAvailableError as error:  # tried again and again while a wallet stays locked
                locked = error if change and not lost else None
            except asyncpg.PostgresError as error:
                extra = {"sqlstate": error.sqlstate}
                told = message_of(error)
                _log.warning("no answer from the database: SQLSTATE %s: %s", error.sqlstate, told, extra=extra)
                if error.sqlstate == before and not is_passing(error):
                    if lost:  # an earlier attempt may have taken effect
                        raise TimeoutError from None
                    raise
                before = error.sqlstate
                lost = lost or not nothing_changed(error)
                limit, locked = None, None
            except NO_ANSWER as error:
                if locked and not sent and asyncio.get_running_loop().time() >= last:  # too late for another attempt
                    raise locked from None
                _log.warning("no answer from the database: %s", type(error).__name__)
                lost = lost or sent
                self._forget_idle()  # what they are connected to may be gone, too
                limit, locked = None, None if lost else locked
            seconds = next(pause)

    def close(self) -> None:
        """Close the connections that are not lent."""
        self._forget_idle()


POOL = web.AppKey("pool", Pool)
SETTINGS = web.AppKey("settings", Settings)


async def pool(app: web.Application) -> AsyncIterator[None]:
    """Keep a pool of connections while the app runs; they are made when they are needed."""
    settings = app[SETTINGS]
    assert settings.database_url is not None
    app[POOL] = Pool(settings.database_url, settings.pool_size, settings.request_deadline, app[PARTIES])
    closing = asyncio.create_task(app[POOL].close_idle())
    yield
    closing.cancel()
    app[POOL].close()


async def is_writable(connection: Any) -> bool:
    """Tell whether this session may write: it is no standby's, and not read-only by a setting."""
    read_only: str = await connection.fetchval("show transaction_read_only")
    return read_only == "off"


async def is_migrated(connection: Any) -> bool:
    """Tell whether the functions are there, may be called, and are not older than what the service needs."""
    query = "select wallet.contract_version() where pg_has_role('wallet_app', 'usage')"
    try:
        version: int | None = await connection.fetchval(query)
    except (
        asyncpg.InsufficientPrivilegeError,
        asyncpg.InvalidSchemaNameError,
        asyncpg.UndefinedFunctionError,
        asyncpg.UndefinedObjectError,
    ):
        return False
    return version is not None and version >= CONTRACT


async def readiness(pool: Pool) -> tuple[bool, bool]:
    """Return whether the database can be written, and whether it is migrated.

    A session keeps the default_transaction_read_only that it began with: where it may not write, a new one is asked.
    """
    for _ in range(2):
        async with pool.connection() as connection:
            writable, migrated = await is_writable(connection), await is_migrated(connection)
            if writable:
                break
            connection.terminate()
    return writable, migrated


async def create_wallet(pool: Pool, wallet_uuid: str | None, currency: str | None) -> Balance:
    """Create a wallet; None for a random name. Raises Refusal: WA400, WA419.

    Raises TimeoutError where the wallet exists and an earlier attempt of this call was lost: that may have created it.
    """
    name = wallet_uuid or str(uuid4())
    async with asyncio.timeout_at(deadline_of(pool.deadline)):
        try:
            return await _create_wallet(pool, name, currency)
        except Refusal as error:
            if error.sqlstate != "WA419" or not error.after_a_lost_attempt:
                raise
            if wallet_uuid is None:  # an earlier attempt created it, on the standby as well: nobody else has this name
                return await get_balance(pool, name)
            raise TimeoutError from None


async def put_wallet(pool: Pool, wallet_uuid: str, currency: str | None) -> tuple[Balance, bool]:
    """Return a wallet, and whether it was created now. Raises Refusal: WA400; WA419 if it has another currency."""
    async with asyncio.timeout_at(deadline_of(pool.deadline)):
        try:
            return await _create_wallet(pool, wallet_uuid, currency), True
        except Refusal as error:
            if error.sqlstate != "WA419":
                raise
            existing = await get_balance(pool, wallet_uuid)
            if existing.currency != currency:
                raise
            return existing, False


async def _create_wallet(pool: Pool, name: str, currency: str | None) -> Balance:
    query = f"select {_BALANCE} from wallet.create_wallet($1, $2, $3)"
    return _balance(await _change(pool, query, name, currency, await _last_moment(pool)))


async def set_status(pool: Pool, wallet_uuid: str, status: str) -> Balance:
    """Give a wallet a status. Raises Refusal: WA400, WA404, WA417."""
    query = f"select {_BALANCE} from wallet.set_status($1, $2, $3)"
    async with asyncio.timeout_at(deadline_of(pool.deadline)):
        return _balance(await _change(pool, query, wallet_uuid, status, await _last_moment(pool)))


async def _change(pool: Pool, query: str, *arguments: object) -> list[asyncpg.Record]:
    """Make a call that changes something. Before a refusal is passed on, wait for the standby.

    The refusal may depend on another call's commit that the standby does not have yet, and a refused call commits
    nothing itself. So commit a message: that waits until the standby has everything before it.
    """
    try:
        return await pool.fetch(query, *arguments, change=True)
    except Refusal as error:
        if error.sqlstate != "WA400":
            await pool.fetch(REPLICATED, change=True)
        raise


async def _last_moment(pool: Pool) -> datetime:
    """Return when a request that begins now is too late to change anything, by the database's clock."""
    last = deadline_of(pool.deadline) - LEAD * pool.deadline
    clock: datetime = (await pool.fetch("select clock_timestamp()"))[0][0]
    return clock + timedelta(seconds=last - asyncio.get_running_loop().time())  # the clock was read before this


async def get_wallet(pool: Pool, wallet_uuid: str) -> Wallet:
    """Return a wallet. Raises Refusal: WA400, WA404."""
    rows = await pool.fetch("select id, uuid, balance from wallet.get_wallet($1)", wallet_uuid)
    return Wallet(*rows[0].values())


async def get_balance(pool: Pool, wallet_uuid: str, at: datetime | None = None) -> Balance:
    """Return the row of wallet.balance, now or as of a moment. Raises Refusal: WA400, WA404."""
    return _balance(await pool.fetch(f"select {_BALANCE} from wallet.get_wallet($1, $2)", wallet_uuid, at))


async def list_wallets(pool: Pool, after: str | None, limit: int, prefix: str | None) -> tuple[list[Balance], bool]:
    """Return, by name, the wallets that begin with a prefix and come after a name, and whether there are more."""
    query = f"select {_BALANCE} from wallet.list_wallets($1, $2, $3)"
    async with asyncio.timeout_at(deadline_of(pool.deadline)):
        wallets = [balance_of(row[0]) for row in await pool.fetch(query, after, limit, prefix)]
        return wallets, len(wallets) == limit and bool(await pool.fetch(query, wallets[-1].uuid, 1, prefix))


async def get_operation(pool: Pool, wallet_uuid: str, operation_uuid: UUID) -> Operation:
    """Return an operation of a wallet. Raises Refusal: WA400, WA404, WA414."""
    query = f"select {OPERATION} from wallet.get_operation($1, $2)"
    rows = await pool.fetch(query, wallet_uuid, operation_uuid)
    return operation_of(rows[0][0])


async def list_operations(
    pool: Pool, wallet_uuid: str, before: int | None, limit: int, start: datetime | None, end: datetime | None
) -> tuple[list[Operation], bool]:
    """Return a wallet's operations with a seq below `before`, newest first, and whether there are more.

    `start` is included, `end` is not. Raises Refusal: WA400, WA404.
    """
    query = f"select {OPERATION} from wallet.list_operations($1, $2, $3, $4, $5)"
    async with asyncio.timeout_at(deadline_of(pool.deadline)):
        rows = await pool.fetch(query, wallet_uuid, before, limit, start, end)
        operations = [operation_of(row[0]) for row in rows]
        more = len(operations) == limit and operations[-1].seq > 1
        if more and start is not None:
            more = bool(await pool.fetch(query, wallet_uuid, operations[-1].seq, 1, start, end))
        return operations, more


async def list_holds(pool: Pool, wallet_uuid: str, after: int | None, limit: int) -> tuple[list[Hold], bool]:
    """Return a wallet's open holds with a seq above `after`, oldest first, and whether there are more.

    Raises Refusal: WA400, WA404.
    """
    query = f"select {_HOLD} from wallet.list_holds($1, $2, $3)"
    async with asyncio.timeout_at(deadline_of(pool.deadline)):
        holds = [hold_of(row[0]) for row in await pool.fetch(query, wallet_uuid, after, limit)]
        return holds, len(holds) == limit and bool(await pool.fetch(query, wallet_uuid, holds[-1].seq, 1))


async def live_keys(connection: Any) -> list[asyncpg.Record]:
    """Return the valid keys: name, digest, scopes, wallet_prefix, and the seconds until it expires, or None."""
    query = """
      select name, digest, scopes, wallet_prefix,
        extract(epoch from expires_at - clock_timestamp())::double precision as seconds
      from wallet.live_keys()
    """
    rows: list[asyncpg.Record] = await connection.fetch(query)
    return rows


def _balance(rows: list[asyncpg.Record]) -> Balance:
    return balance_of(rows[0][0])
