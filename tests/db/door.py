"""The functions of schema wallet as a login of the service calls them."""

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import namedtuple_row

from tests.cases import Request


def create(connection: psycopg.Connection, wallets: dict[str, int]) -> None:
    """Create wallets that hold so much."""
    for wallet, balance in wallets.items():
        connection.execute("select wallet.create_wallet(%s)", [wallet])
        if balance:
            apply(connection, Request(wallet, uuid4(), "DEPOSIT", balance, None))


def apply(connection: psycopg.Connection, request: Request) -> Any:
    """Apply one operation and return its row. Raises what the function raises."""
    return call(connection, "apply_operation", *request[:4])[0]


def apply_all(connection: psycopg.Connection, requests: Iterable[Request]) -> list[Any]:
    """Apply operations as one batch and return a row for each."""
    requests = list(requests)
    return call(
        connection,
        "apply_operations",
        [request.wallet for request in requests],
        [request.operation for request in requests],
        [request.type for request in requests],
        [request.amount for request in requests],
    )


SIGNATURES = {
    "create_wallet": "text",
    "get_wallet": "text",
    "apply_operation": "text, uuid, text, bigint",
    "apply_operations": "text[], uuid[], text[], bigint[]",
    "get_operation": "text, uuid",
    "list_operations": "text, bigint, int",
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
