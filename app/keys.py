"""Keys from the command line: `python -m app key create`, `list` and `revoke`.

A secret goes to standard output, alone on its line, and nowhere else; what is said beside it goes to standard error.
"""

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec

from app.settings import Settings, StartupError

COLUMNS = ("name", "scopes", "wallet_prefix", "created_at", "expires_at", "revoked_at")
"""What is shown of a key."""
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
NOT_MIGRATED = ("3F000", "42883")
"""SQLSTATEs: there is no schema wallet, or no such function in it."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Exits with 2 if it is wrong, with 0 after help."""
    parser = argparse.ArgumentParser(prog="python -m app key", description="Keys let clients in where ACCESS is keys.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print its secret, which is never shown again")
    create.add_argument("name", metavar="NAME", help="1 to 64 characters of A-Z, a-z, 0-9, _ and -; never used twice")
    create.add_argument(
        "--scopes",
        required=True,
        type=lambda text: text.split(","),
        help="one or more, separated by commas, of read, create, deposit, withdraw, transfer, hold, admin, metrics",
    )
    create.add_argument("--prefix", help="reach only wallets whose names begin so")
    create.add_argument("--expires", type=duration, metavar="TIME", help="from now: 30m, 12h, 90d; without it: never")
    commands.add_parser("list", help="list all keys, revoked and expired ones too")
    revoke = commands.add_parser("revoke", help="refuse a key for good, after at most 5 seconds")
    revoke.add_argument("name", metavar="NAME")
    return parser.parse_args(arguments)


def duration(text: str) -> timedelta:
    """Return what 30m, 12h or 90d says. Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"not a whole number of minutes, hours or days like 30m, 12h or 90d: {text!r}")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def run(asked: argparse.Namespace, settings: Settings) -> None:
    """Do what was asked for on the service's database. Raises StartupError, one line, if that failed.

    On the embedded database as the superuser: the service's login there manages no keys.
    """
    from app.server.embedded import connection_url
    from app.server.supervisor import embedded_socket

    if settings.database_url is not None:
        asyncio.run(_run(asked, settings))
        return
    with embedded_socket(settings) as socket_dir:
        url = connection_url(socket_dir, "postgres", "wallet")
        asyncio.run(_run(asked, msgspec.structs.replace(settings, database_url=url)))


async def _run(asked: argparse.Namespace, settings: Settings) -> None:
    from app.calls.database import REPLICATED, close
    from app.calls.refusals import NO_ANSWER
    from app.server.preconditions import reach

    connection = await reach(settings)
    try:
        async with asyncio.timeout(settings.request_deadline):
            try:
                await _do(connection, asked)
            except asyncpg.PostgresError:  # the refusal may rest on a commit that is not on the standby yet
                await connection.fetch(REPLICATED)
                raise
    except asyncpg.PostgresError as error:
        raise StartupError(_reason(error)) from None
    except NO_ANSWER:
        raise StartupError("no answer from the database: `key list` shows what was done") from None
    finally:
        await close(connection)


async def _do(connection: Any, asked: argparse.Namespace) -> None:
    match asked.command:
        case "create":
            await _create(connection, asked)
        case "list":
            keys = await connection.fetch("select * from wallet.list_keys()")
            print(_table([COLUMNS, *([_shown(key[column]) for column in COLUMNS] for key in keys)]))
        case "revoke":
            key = await connection.fetchrow("select * from wallet.revoke_key($1)", asked.name)
            print(f"{key['name']} is revoked since {_shown(key['revoked_at'])}", file=sys.stderr)


async def _create(connection: Any, asked: argparse.Namespace) -> None:
    """Make a key; one whose secret could not be printed is not made."""
    async with connection.transaction():
        secret = await connection.fetchval(
            "select wallet.create_key($1, $2, $3, clock_timestamp() + $4::interval)",
            *(asked.name, asked.scopes, asked.prefix, asked.expires),
        )
        try:
            print(secret, flush=True)
        except OSError as error:
            sys.stdout = None  # else exit would flush it again
            raise StartupError(f"cannot print the secret: {error.strerror}; no key was made") from None
    print(f"That is the secret of {asked.name}: keep it, it is not shown again", file=sys.stderr)


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        case list():
            return ",".join(value)
    return str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _reason(error: asyncpg.PostgresError) -> str:
    said = " ".join(str(error).split())
    if error.sqlstate == "42501":
        return f"{said}: the login in DATABASE_URL must be a member of wallet_admin"
    if error.sqlstate in NOT_MIGRATED:
        return f"{said}: run dbmate --env-file dbmate.env migrate"
    return said
