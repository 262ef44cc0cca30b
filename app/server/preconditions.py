"""What the service needs of a PostgreSQL before it starts: the functions, writes that last, sessions of its own."""

import asyncio
from typing import Any

import asyncpg

from app.calls.database import connect, is_migrated, is_writable
from app.calls.dispatch import BULK_LINES, SIDING_LINES
from app.calls.session import open_session
from app.settings import Settings, StartupError

ATTEMPTS = 3
"""How often a pooler is looked for: one look may miss it, where it has few backends and lends the same one again."""
TIMEOUT = 5.0
"""Seconds that the database has for all checks together."""


def sessions(settings: Settings) -> int:
    """Return how many sessions the service may have at once."""
    return settings.workers * (settings.pool_size + settings.lanes + _beside(settings))


def _beside(settings: Settings) -> int:
    """Return how many sessions a worker has beside those of POOL_SIZE and LANES: one of them reads the keys."""
    return BULK_LINES + SIDING_LINES + (settings.access == "keys")


async def check(settings: Settings) -> None:
    """Check that a database can serve this service and these settings. Raises StartupError, one line."""
    connection = await reach(settings)
    try:
        async with asyncio.timeout(TIMEOUT):
            await _check(connection, settings)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = " ".join(str(error).split()) or f"no answer within {TIMEOUT:g} seconds"
        raise StartupError(f"cannot use the database: {reason}") from None
    finally:
        connection.terminate()


async def reach(settings: Settings) -> Any:
    """Connect to the database. Raises StartupError, one line."""
    assert settings.database_url is not None
    try:
        return await connect(settings.database_url, settings.request_deadline)
    except TimeoutError:
        raise StartupError("cannot reach the database: it did not answer in time") from None
    except asyncpg.TargetServerAttributeNotMatched:
        raise StartupError("none of the hosts in DATABASE_URL takes writes") from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartupError(f"cannot reach the database: {' '.join(str(error).split())}") from None
    except ValueError:  # its text may hold a piece of the password
        raise StartupError(
            "cannot reach the database: DATABASE_URL is no URI; are special characters in its password percent-encoded?"
        ) from None


async def _check(connection: Any, settings: Settings) -> None:
    await check_own_sessions(connection, settings)
    if not await is_writable(connection):
        raise StartupError("the database is read-only: a standby, or default_transaction_read_only is on")
    if not settings.allow_fsync_off and await connection.fetchval("show fsync") == "off":
        raise StartupError("the database has fsync = off: a crash of its machine would lose answered operations")
    await check_session_limits(connection, settings)
    if not await is_migrated(connection):
        raise StartupError(
            "the database is not migrated, or its user is no member of wallet_app: "
            "run dbmate --env-file dbmate.env migrate"
        )


async def check_own_sessions(connection: Any, settings: Settings) -> None:
    """Check that no pooler lends a session to another client between two transactions. Raises StartupError.

    Without a pooler, each of two connected clients keeps its own backend. Behind one in transaction mode both may get
    the same backend, or the first may change backends while the second is in a transaction: prepared statements then
    clash (42P05) or are missing (26000). One in statement mode ends a session that begins a transaction.
    """
    try:
        assert settings.database_url is not None
        other = await open_session(settings.database_url, statement_cache_size=0)
        try:
            for _ in range(ATTEMPTS):
                backend = await _backend(connection)
                async with other.transaction():
                    if await _backend(other) == backend or await _backend(connection) != backend:
                        raise _pooled()
        finally:
            other.terminate()
    except asyncpg.PostgresError as error:
        if error.sqlstate in ("42P05", "26000"):
            raise _pooled() from None
        raise


async def _backend(connection: Any) -> int:
    async with connection.transaction():
        backend: int = await connection.fetchval("select pg_backend_pid()")
        return backend


def _pooled() -> StartupError:
    return StartupError(
        "the database is behind a pooler in transaction mode, where sessions are not kept apart: "
        "use its session mode (PgBouncer: pool_mode = session) or connect to PostgreSQL itself"
    )


async def check_session_limits(connection: Any, settings: Settings) -> None:
    """Check that the server may have as many sessions as these settings want. Raises StartupError with the numbers."""
    limits = await connection.fetchrow(
        """
        select current_setting('max_connections')::int as all_sessions,
          case when rolsuper then 0
            else current_setting('superuser_reserved_connections')::int
              + coalesce(current_setting('reserved_connections', true)::int, 0) -- from PostgreSQL 16 on
          end as reserved,
          rolconnlimit, datconnlimit
        from pg_catalog.pg_roles, pg_catalog.pg_database
        where rolname = current_user and datname = current_database()
        """
    )
    room, why = (
        limits["all_sessions"] - limits["reserved"],
        f"max_connections {limits['all_sessions']}, reserved {limits['reserved']}",
    )
    for limit, whose in ((limits["rolconnlimit"], "role"), (limits["datconnlimit"], "database")):
        if 0 <= limit < room:
            room, why = limit, f"the connection limit of the {whose}"
    if (wanted := sessions(settings)) > room:
        raise StartupError(
            f"the settings want {wanted} sessions, WORKERS {settings.workers} x (POOL_SIZE {settings.pool_size} "
            f"+ LANES {settings.lanes} + {_beside(settings)}), and the database has room for {room} ({why})"
        )
