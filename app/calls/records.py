"""Rows as the functions in db/ return them, and as clients see them."""

from typing import Any
from uuid import UUID

import msgspec
from msgspec import Raw


class Wallet(msgspec.Struct, frozen=True):
    """A wallet in the short form of the service that this one replaced. `balance` is in minor units."""

    id: int
    uuid: str
    balance: int


class Balance(msgspec.Struct, frozen=True):
    """A row of the view wallet.balance. Money is in minor units, times are RFC 3339 in UTC."""

    uuid: str
    id: int
    currency: str | None
    status: str
    balance: int
    held: int
    available: int
    seq: int
    created_at: str
    updated_at: str


class Operation(msgspec.Struct, frozen=True, omit_defaults=True):
    """An applied operation as clients see it. Money is in minor units, times are RFC 3339 in UTC."""

    operation_uuid: UUID
    wallet_uuid: str
    operation_type: str
    amount: int
    balance_after: int
    held_after: int
    seq: int
    created_at: str
    counterparty_uuid: str | None = None
    hold_uuid: UUID | None = None
    expires_at: str | None = None
    metadata: dict[str, Any] | None = None


class Hold(msgspec.Struct, frozen=True):
    """An open hold as clients see it. Money is in minor units, times are RFC 3339 in UTC."""

    hold_uuid: UUID
    seq: int
    amount: int
    expires_at: str | None
    created_at: str


def as_json(shape: type[msgspec.Struct]) -> str:
    """Return the SQL expression of a row as a JSON object with the members of a shape.

    Times are text in it: asyncpg knows no year past 9999, and the service only passes them on.
    """
    time = "(to_json({} at time zone 'UTC') #>> '{{}}') || 'Z'"
    members = (f"'{name}', {time.format(name) if name.endswith('_at') else name}" for name in shape.__struct_fields__)
    return f"json_build_object({', '.join(members)})"


def _number(text: str) -> Raw:
    """Keep a number of metadata as it is written."""
    return Raw(text.encode())


balance_of = msgspec.json.Decoder(Balance).decode
hold_of = msgspec.json.Decoder(Hold).decode
operation_of = msgspec.json.Decoder(Operation, float_hook=_number).decode
