"""The calls to the functions in db/: one Python function for one SQL function, one statement each."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from aiohttp import web

from app.messages import Operation, Wallet
from app.metrics import POOL_IN_USE
from app.problems import NO_ANSWER, Refusal
from app.settings import Settings, StartupError

FUNCTIONS = (
    "wallet.create_wallet(text)",
    "wallet.get_wallet(text)",
    "wallet.apply_operation(text, uuid, text, bigint)",
    "wallet.apply_operations(text[], uuid[], text[], bigint[])",
    "wallet.raise_too_late()",
    "wallet.get_operation(text, uuid)",
    "wallet.list_operations(text, bigint, int)",
)
"""What the service calls."""

CONNECT_TIMEOUT = 5.0
"""Seconds until an attempt to connect is given up."""

_log = logging.getLogger("wallet")


async def connect(url: str, deadline: float, name: str = "wallet") -> Any:
    """Connect to PostgreSQL.

    The server ends a statement after `deadline` seconds by itself, so that none whose caller is gone holds a lock or a
    connection for ever. `name` is what pg_stat_activity calls the session.
    """
    connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT, server_settings={"application_name": name})
    try:  # by a statement: a pooler refuses a session that begins with this setting
        await connection.execute(f"set statement_timeout = {round(deadline * 1000)}")
    except BaseException:
        connection.terminate()
        raise
    return connection


def session_survives(error: BaseException) -> bool:
    """Tell whether an error was the answer to a statement, so that the session goes on and nothing was changed."""
    return isinstance(error, asyncpg.PostgresError) and error.severity_en == "ERROR"


def pauses() -> Iterator[float]:
    """Yield the seconds between attempts: 20 ms at first, twice as many each time up to 250, give or take a half."""
    seconds = 0.02
    while True:
        yield seconds * random.uniform(0.5, 1.5)
        seconds = min(seconds * 2, 0.25)


class Pool:
    """Connections for reads and for creating wallets, lent in the order in which they are asked for.

    asyncpg's own pool lets newcomers overtake those who wait, and holds a caller who gives up until the server has
    answered. Here a connection is dropped unless its session is known to go on.
    """

    def __init__(self, url: str, size: int, deadline: float) -> None:
        self._url = url
        self.deadline = deadline
        self._places = asyncio.Semaphore(size)
        self._idle: list[Any] = []

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """Lend a connection."""
        async with self._places:
            while self._idle and self._idle[-1].is_closed():
                self._idle.pop()
            connection = self._idle.pop() if self._idle else await connect(self._url, self.deadline)
            POOL_IN_USE.inc()
            try:
                yield connection
            except BaseException as error:
                if not session_survives(error):
                    connection.terminate()
                raise
            finally:
                POOL_IN_USE.dec()
                if not connection.is_closed():
                    self._idle.append(connection)

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Make a call that may safely be made twice, again and again until the database gives a definite answer.

        A refusal is definite; whatever else goes wrong is a database that is away, restarting or out of something.
        Raises Refusal, and TimeoutError after the deadline of a request.
        """
        async with asyncio.timeout(self.deadline):
            return await self._fetch(query, *arguments)

    async def _fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        pause = pauses()
        while True:
            try:
                async with self.connection() as connection:
                    rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
                    return rows
            except Refusal:
                raise
            except asyncpg.PostgresError as error:
                extra = {"sqlstate": error.sqlstate}
                _log.warning("no answer from the database: SQLSTATE %s", error.sqlstate, extra=extra)
            except NO_ANSWER as error:
                _log.warning("no answer from the database: %s", type(error).__name__)
            await asyncio.sleep(next(pause))

    def close(self) -> None:
        """Close the connections that are not lent."""
        while self._idle:
            self._idle.pop().terminate()


POOL = web.AppKey("pool", Pool)
SETTINGS = web.AppKey("settings", Settings)


async def pool(app: web.Application) -> AsyncIterator[None]:
    """Keep a pool of connections while the app runs; they are made when they are needed."""
    settings = app[SETTINGS]
    assert settings.database_url is not None
    app[POOL] = Pool(settings.database_url, settings.pool_size, settings.request_deadline)
    yield
    app[POOL].close()


async def check(settings: Settings) -> None:
    """See that a database can serve this service. Raises StartupError: unreachable, not migrated, not allowed."""
    from app import preconditions

    try:
        connection = await asyncpg.connect(settings.database_url, timeout=CONNECT_TIMEOUT)
    except TimeoutError:
        raise StartupError(f"cannot reach the database: no answer within {CONNECT_TIMEOUT:g} seconds") from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartupError(f"cannot reach the database: {' '.join(str(error).split())}") from None
    except ValueError:  # its text may hold a piece of the password
        raise StartupError(
            "cannot reach the database: DATABASE_URL is no URI; are special characters in its password percent-encoded?"
        ) from None
    try:
        await preconditions.see(connection, settings)
        if not await is_migrated(connection):
            raise StartupError(
                "the database is not migrated, or its user is no member of wallet_app: "
                "run dbmate --env-file dbmate.env migrate"
            )
    finally:
        await connection.close()


async def is_migrated(connection: Any) -> bool:
    """Tell whether every function that the service calls is there and may be called."""
    ready: bool = await connection.fetchval(
        "select bool_and(coalesce(has_function_privilege(to_regprocedure(name), 'execute'), false))"
        " and bool_and(has_schema_privilege(to_regnamespace('wallet')::oid, 'usage')) from unnest($1::text[]) as name",
        FUNCTIONS,
    )
    return bool(ready)


async def create_wallet(pool: Pool, wallet_uuid: str | None) -> Wallet:
    """Create a wallet; None for a random name. Raises Refusal: WA400, WA419."""
    name = wallet_uuid or str(uuid4())
    async with asyncio.timeout(pool.deadline):
        try:
            return _wallet(await pool.fetch("select id, uuid, balance from wallet.create_wallet($1)", name))
        except Refusal as error:
            if error.sqlstate == "WA419" and wallet_uuid is None:  # the name is ours: an earlier attempt came through
                return await get_wallet(pool, name)
            raise


async def get_wallet(pool: Pool, wallet_uuid: str) -> Wallet:
    """Return a wallet. Raises Refusal: WA400, WA404."""
    return _wallet(await pool.fetch("select id, uuid, balance from wallet.get_wallet($1)", wallet_uuid))


async def get_operation(pool: Pool, wallet_uuid: str, operation_uuid: UUID) -> Operation:
    """Return an operation of a wallet. Raises Refusal: WA400, WA404, WA414."""
    rows = await pool.fetch("select * from wallet.get_operation($1, $2)", wallet_uuid, operation_uuid)
    return _operation(rows[0])


async def list_operations(pool: Pool, wallet_uuid: str, before: int | None, limit: int) -> list[Operation]:
    """Return a wallet's operations with a seq below `before`, newest first. Raises Refusal: WA400, WA404."""
    rows = await pool.fetch("select * from wallet.list_operations($1, $2, $3)", wallet_uuid, before, limit)
    return [_operation(row) for row in rows]


def _wallet(rows: list[asyncpg.Record]) -> Wallet:
    return Wallet(*rows[0].values())


def _operation(row: asyncpg.Record) -> Operation:
    return Operation(**{name: row[name] for name in Operation.__struct_fields__})
