"""Rows as the functions in db/ return them, and as clients see them."""

from uuid import UUID

import msgspec


class Wallet(msgspec.Struct, frozen=True):
    """A wallet as clients see it. `balance` is in minor units."""

    id: int
    uuid: str
    balance: int


class Operation(msgspec.Struct, frozen=True):
    """An applied operation as clients see it. `amount` and `balance_after` are in minor units."""

    operation_uuid: UUID
    wallet_uuid: str
    operation_type: str
    amount: int
    balance_after: int
    seq: int
    created_at: str
