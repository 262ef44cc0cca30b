"""A batch of any requests, good and bad, is as they are one after another."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.cases import FUTURE, MAX, NIL, PAST, Request
from tests.db.door import apply, apply_all, call, create

WALLETS = {"a": 50, "b": 0, "c": 20, "euros": 9, "frozen": 9, "closed": 0}
CURRENCIES = {"euros": "EUR"}
STATUSES = {"frozen": "FROZEN", "closed": "CLOSED"}
UUIDS = [UUID(int=number) for number in range(1, 7)]
"""Of operations and of holds: few, so that they meet."""
ARGUMENTS: dict[str, list[Any]] = {
    "wallet": ["a", "a", "a", "b", "c", *WALLETS, "nobody", "bad name", ""],
    "operation": [*UUIDS, NIL],
    "type": ["DEPOSIT", "WITHDRAW", "TRANSFER", "HOLD", "RELEASE", "RECEIVE", "EXPIRE", "deposit"],
    "amount": [1, 2, 5, 10, 60, 0, -1, MAX, None],
    "counterparty": [None, "a", "b", *WALLETS, "nobody", "bad name"],
    "hold": [None, *UUIDS, NIL],
    "expires_at": [None, None, FUTURE, PAST],
    "metadata": [None, {}, {"a": 1}, [], "text"],
}
GOOD: dict[str, Sequence[str]] = {
    "DEPOSIT": ["amount"],
    "WITHDRAW": ["amount", "hold"],
    "TRANSFER": ["amount", "counterparty", "hold"],
    "HOLD": ["amount", "expires_at"],
    "RELEASE": ["hold"],
}
"""What a type takes beside a wallet and an operation_uuid."""


def request(chance: Random) -> Request:
    """Make a request up: every second one has an argument that is as likely bad as good."""
    kind = chance.choice([*GOOD])
    asked = Request(chance.choice("aaabc"), chance.choice(UUIDS), kind, None)
    asked = asked._replace(**{name: chance.choice(ARGUMENTS[name][:5]) for name in GOOD[kind]})
    if chance.random() < 0.5:
        name = chance.choice([*ARGUMENTS])
        asked = asked._replace(**{name: chance.choice(ARGUMENTS[name])})
    return asked


def one_by_one(connection: psycopg.Connection, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    told = []
    for each in requests:
        try:
            with connection.transaction():
                told.append((None, *without_moments(apply(connection, each))))
        except psycopg.Error as error:
            told.append(told_of(error.sqlstate, error.diag.message_primary))
    return told


def in_batches(connection: psycopg.Connection, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    rows = apply_all(connection, requests)
    return [told_of(row.sqlstate, row.message) if row.sqlstate else (None, *without_moments(row)) for row in rows]


def without_moments(row: Any) -> tuple[Any, ...]:
    """Return what a row says of an operation but for its time."""
    names = ("wallet_uuid", "operation_type", "operation_uuid", "seq", "amount", "balance_after", "held_after")
    return tuple(getattr(row, name) for name in (*names, "counterparty_uuid", "hold_uuid", "expires_at", "metadata"))


def books(connection: psycopg.Connection) -> list[Any]:
    """Return everything that is recorded but for its times; it is right."""
    assert call(connection, "verify") == []
    return [
        (
            call(connection, "get_wallet", wallet)[0]._replace(created_at=None, updated_at=None, id=None),
            [without_moments(row) for row in call(connection, "list_operations", wallet, None, 1000)],
            [row._replace(created_at=None) for row in call(connection, "list_holds", wallet, None, 1000)],
        )
        for wallet in WALLETS
    ]


def told_of(sqlstate: str | None, message: str | None) -> tuple[Any, ...]:
    """Return what a refusal says; what the database itself refuses, each door puts in words of its own."""
    return (sqlstate, message if str(sqlstate).startswith("WA") else None)


CAP = "alter table wallet.operation add constraint cap check (balance_after not in (15, 60) and amount <> 2) not valid"
"""What the database refuses: the batch is then applied in halves."""


@pytest.mark.parametrize("capped", [False, True], ids=["whole", "in_halves"])
@pytest.mark.parametrize("seed", range(5))
def test_a_batch_of_any_requests_is_as_they_are_one_after_another(
    seed: int, capped: bool, service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, WALLETS, CURRENCIES, STATUSES)
    if capped:
        superuser.execute(CAP)
    chance = Random(seed)
    seen = Counter[str | None]()
    for _ in range(30):
        requests = [request(chance) for _ in range(chance.choice([2, 3, 5, 20]))]
        found = []
        for way in (one_by_one, in_batches):
            with service.transaction(force_rollback=True):
                told = way(service, requests)
                found.append((told, books(service)))
        assert found[0] == found[1], requests
        seen.update(each[0] for each in told)
    assert {None, "WA400", "WA402", "WA409", "WA424"} <= set(seen)
    assert ("23514" in seen) is capped
