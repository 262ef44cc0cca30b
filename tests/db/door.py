"""The functions of schema wallet as a login of the service calls them."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb

from tests.cases import Request, deposit


def create(
    connection: psycopg.Connection,
    wallets: dict[str, int],
    currencies: dict[str, str] | None = None,
    statuses: dict[str, str] | None = None,
    holds: Iterable[Request] = (),
    due: Sequence[Request] = (),
) -> None:
    """Create wallets with these balances. `due`: holds that are past their expires_at when this is done."""
    for wallet, balance in wallets.items():
        call(connection, "create_wallet", wallet, (currencies or {}).get(wallet))
        if balance:
            apply(connection, deposit(wallet, uuid4(), balance))
    for request in holds:
        apply(connection, request)
    let_expire(connection, due)
    for wallet, status in (statuses or {}).items():
        call(connection, "set_status", wallet, status)


def let_expire(
    connection: psycopg.Connection, holds: Sequence[Request], apart: timedelta = timedelta(0)
) -> list[datetime]:
    """Hold, wait until all is due by the database's clock, and return when each was: the last first, `apart`."""
    for patience in (50, 500, 5000):
        [now] = connection.execute("select clock_timestamp()").fetchone() or ()
        until = now + timedelta(milliseconds=patience)
        moments = [until + number * apart for number in reversed(range(len(holds)))]
        asked = [request._replace(expires_at=moment) for request, moment in zip(holds, moments, strict=True)]
        if all(row.sqlstate is None for row in apply_all(connection, asked, atomic=True)):
            break
    if holds:
        connection.execute("select pg_sleep(extract(epoch from %s - clock_timestamp()))", [moments[0]])
    return moments


def apply(connection: psycopg.Connection, request: Request) -> Any:
    """Apply one operation and return its row. Raises what the function raises."""
    *arguments, metadata = request.arguments
    return call(connection, "apply_operation", *arguments, None if metadata is None else Jsonb(metadata))[0]


def apply_all(connection: psycopg.Connection, requests: Iterable[Request], atomic: bool = False) -> list[Any]:
    """Apply operations as one batch and return a row for each."""
    requests = list(requests)
    *arrays, metadata = zip(*[request.arguments for request in requests], strict=True) if requests else [()] * 8
    arrays.append([None if one is None else Jsonb(one) for one in metadata])
    optional = [None if all(one is None for one in array) else list(array) for array in arrays[4:]]
    return call(connection, "apply_operations", *map(list, arrays[:4]), *optional, atomic)


def operation(row: Any) -> tuple[Any, ...]:
    """Return what a row of apply_operations says of the operation: a row of wallet.operation, or nulls."""
    return tuple(row[4:])


SIGNATURES = {
    "create_wallet": "text, text, timestamptz",
    "get_wallet": "text, timestamptz",
    "apply_operation": "text, uuid, text, bigint, text, uuid, timestamptz, jsonb, timestamptz",
    "apply_operations": (
        "text[], uuid[], text[], bigint[], text[], uuid[], timestamptz[], jsonb[], boolean, timestamptz"
    ),
    "get_operation": "text, uuid",
    "list_operations": "text, bigint, int, timestamptz, timestamptz",
    "list_wallets": "text, int, text",
    "list_holds": "text, bigint, int",
    "expire_holds": "text, int",
    "set_status": "text, text, timestamptz",
    "create_key": "text, text[], text, timestamptz",
    "revoke_key": "text",
    "list_keys": "",
    "live_keys": "",
    "verify": "",
    "raise_too_late": "",
    "contract_version": "",
}
"""The public functions: name and argument types."""


def call(connection: psycopg.Connection, function: str, *arguments: object) -> list[Any]:
    """Call a function of schema wallet and return its rows."""
    types = SIGNATURES[function].split(", ")
    values = ", ".join(f"%s::{kind}" for _, kind in zip(arguments, types, strict=False))
    with connection.cursor(row_factory=namedtuple_row) as cursor:
        return cursor.execute(f"select * from wallet.{function}({values})", arguments).fetchall()


def outcome(connection: psycopg.Connection, request: Request) -> str | None:
    """Apply one operation and return None, or the SQLSTATE with which it was refused."""
    try:
        apply(connection, request)
    except psycopg.Error as error:
        return error.sqlstate
    return None


def balances(connection: psycopg.Connection, wallets: Sequence[str] | dict[str, int]) -> dict[str, int]:
    return {wallet: call(connection, "get_wallet", wallet)[0].balance for wallet in wallets}


def held(connection: psycopg.Connection, wallets: Iterable[str]) -> dict[str, int]:
    """Return what is held, where that is not 0."""
    states = [call(connection, "get_wallet", wallet)[0] for wallet in wallets]
    assert all(state.available == state.balance - state.held >= 0 for state in states)
    return {state.uuid: state.held for state in states if state.held}
