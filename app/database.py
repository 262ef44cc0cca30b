"""The calls to the functions in db/: one Python function for one SQL function, one statement each."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar
from uuid import UUID, uuid4

import asyncpg
from aiohttp import web

from app.messages import NewOperation, Operation, Wallet
from app.problems import REFUSALS
from app.settings import Settings, StartupError

FUNCTIONS = (
    "wallet.create_wallet(text)",
    "wallet.get_wallet(text)",
    "wallet.apply_operation(text, uuid, text, bigint)",
    "wallet.apply_operations(text[], uuid[], text[], bigint[])",
    "wallet.get_operation(text, uuid)",
    "wallet.list_operations(text, bigint, int)",
)
"""What the service calls."""

CONNECT_TIMEOUT = 5.0
"""Seconds until an attempt to connect is given up."""

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
POOL: web.AppKey[Pool] = web.AppKey("pool", asyncpg.Pool)
SETTINGS = web.AppKey("settings", Settings)


T = TypeVar("T")

_log = logging.getLogger("wallet")


class Connection(asyncpg.Connection):
    """A connection that carries no session state, so that nothing needs a reset when it goes back to the pool."""

    def get_reset_query(self) -> str:
        """Return no reset query: it would cost a round trip a request."""
        return ""


async def pool(app: web.Application) -> AsyncIterator[None]:
    """Keep a pool of connections while the app runs; they are made when they are needed."""
    settings = app[SETTINGS]
    app[POOL] = await asyncpg.create_pool(
        settings.database_url,
        min_size=0,
        max_size=settings.pool_size,
        timeout=CONNECT_TIMEOUT,
        connection_class=Connection,
        server_settings={"application_name": "wallet"},
    )
    yield
    await app[POOL].close()


async def check(url: str) -> None:
    """See that a database can serve this service. Raises StartupError: unreachable, not migrated, not allowed."""
    try:
        connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT)
    except TimeoutError:
        raise StartupError(f"cannot reach the database: no answer within {CONNECT_TIMEOUT:g} seconds") from None
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartupError(f"cannot reach the database: {' '.join(str(error).split())}") from None
    try:
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


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Make a call that may safely be made twice, again and again until the database gives a definite answer.

    A refusal is definite; whatever else goes wrong is a database that is away, restarting or out of something. Bounded by
    the caller's deadline. Raises PostgresError for a refusal.
    """
    delay = 0.02
    while True:
        try:
            return await attempt()
        except asyncpg.PostgresError as error:
            if error.sqlstate in REFUSALS:
                raise
            _log.warning("no answer from the database: SQLSTATE %s", error.sqlstate)
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            _log.warning("no answer from the database: %s", type(error).__name__)
        await asyncio.sleep(delay * random.uniform(0.5, 1.5))
        delay = min(delay * 2, 0.5)


async def create_wallet(pool: Pool, wallet_uuid: str | None) -> Wallet:
    """Create a wallet; None for a random name. Raises PostgresError: WA400, WA419."""
    name = wallet_uuid or str(uuid4())
    query = "select id, uuid, balance from wallet.create_wallet($1)"
    try:
        return _wallet(await patiently(lambda: pool.fetchrow(query, name)))
    except asyncpg.PostgresError as error:
        if error.sqlstate == "WA419" and wallet_uuid is None:  # the name is ours: an earlier attempt had come through
            return await get_wallet(pool, name)
        raise


async def get_wallet(pool: Pool, wallet_uuid: str) -> Wallet:
    """Return a wallet. Raises PostgresError: WA400, WA404."""
    query = "select id, uuid, balance from wallet.get_wallet($1)"
    return _wallet(await patiently(lambda: pool.fetchrow(query, wallet_uuid)))


async def apply_operation(pool: Pool, wallet_uuid: str, operation: NewOperation) -> None:
    """Apply an operation; once this returns it is committed. Raises PostgresError: WA400, WA402, WA404, WA409, WA416."""
    await pool.fetchval(
        "select seq from wallet.apply_operation($1, $2, $3, $4)",
        wallet_uuid,
        operation.operation_uuid,
        operation.operation_type,
        operation.amount,
    )


async def get_operation(pool: Pool, wallet_uuid: str, operation_uuid: UUID) -> Operation:
    """Return an operation of a wallet. Raises PostgresError: WA400, WA404, WA414."""
    query = "select * from wallet.get_operation($1, $2)"
    row = await patiently(lambda: pool.fetchrow(query, wallet_uuid, operation_uuid))
    assert row is not None
    return _operation(row)


async def list_operations(pool: Pool, wallet_uuid: str, before: int | None, limit: int) -> list[Operation]:
    """Return a wallet's operations with a seq below `before`, newest first. Raises PostgresError: WA400, WA404."""
    query = "select * from wallet.list_operations($1, $2, $3)"
    rows = await patiently(lambda: pool.fetch(query, wallet_uuid, before, limit))
    return [_operation(row) for row in rows]


def _wallet(row: asyncpg.Record | None) -> Wallet:
    assert row is not None
    return Wallet(row["id"], row["uuid"], row["balance"])


def _operation(row: asyncpg.Record) -> Operation:
    return Operation(**{name: row[name] for name in Operation.__struct_fields__})
