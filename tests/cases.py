"""The rules as a table: what happens to whom, in what order, with what outcome. Every door is held to it."""

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

MAX = 2**63 - 1
NIL = UUID(int=0)
A, B, C, D, X, Y = (UUID(f"{letter * 8}-0000-4000-8000-000000000000") for letter in "abcdef")
PAST, FUTURE = (datetime(year, 1, 1, tzinfo=UTC) for year in (2000, 2100))

MESSAGES = {
    "WA402": "Not enough money",
    "WA403": "Wallet is frozen",
    "WA404": "Wallet not found",
    "WA405": "Wallet is closed",
    "WA409": "Transaction already exists",
    "WA410": "Hold is closed",
    "WA414": "Operation not found",
    "WA416": "Balance out of range",
    "WA417": "Wallet is not empty",
    "WA419": "Wallet already exists",
    "WA420": "Key already exists",
    "WA421": "Key not found",
    "WA422": "Currencies differ",
    "WA424": "Hold not found",
    "WA425": "Another operation of the request was refused",
}
"""What goes with each SQLSTATE. WA400 is not here: it says what is wrong with the argument."""
NIL_MESSAGE = "operation_uuid must not be the nil UUID"

PROBLEMS = {
    "WA400": (400, "invalid_request"),
    "WA402": (400, "insufficient_funds"),
    "WA403": (400, "wallet_frozen"),
    "WA404": (404, "wallet_not_found"),
    "WA405": (400, "wallet_closed"),
    "WA409": (400, "duplicate_operation"),
    "WA410": (400, "hold_closed"),
    "WA414": (404, "operation_not_found"),
    "WA416": (400, "balance_out_of_range"),
    "WA417": (400, "wallet_not_empty"),
    "WA419": (400, "wallet_exists"),
    "WA422": (400, "currency_mismatch"),
    "WA424": (404, "hold_not_found"),
}
"""The status and the code with which REST answers each SQLSTATE."""


class Request(NamedTuple):
    """One operation that somebody asks for. `outcome`: None if it is applied, else the SQLSTATE."""

    wallet: str
    operation: UUID
    type: str
    amount: int | None
    outcome: str | None = None
    counterparty: str | None = None
    hold: UUID | None = None
    expires_at: datetime | None = None
    metadata: Any = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the functions take, in their order."""
        return (
            self.wallet,
            self.operation,
            self.type,
            self.amount,
            self.counterparty,
            self.hold,
            self.expires_at,
            self.metadata,
        )


class Case(NamedTuple):
    """Wallets with their balances at first, requests one after another, and the balances then.

    `holds`, `due`: HOLDs that are applied before the first request; those in `due` are past their expires_at by then.
    `currencies` and `statuses`: of wallets that have another than null and OPEN, from before the first request.
    `held`: what the requests leave held, where that is not 0.
    Sent as one atomic batch, requests that are refused with others leave `wallets` as they were, and what is None here
    is WA425 there.
    """

    name: str
    wallets: dict[str, int]
    requests: list[Request]
    balances: dict[str, int]
    currencies: dict[str, str] = {}  # noqa: RUF012
    statuses: dict[str, str] = {}  # noqa: RUF012
    holds: list[Request] = []  # noqa: RUF012
    due: list[Request] = []  # noqa: RUF012
    held: dict[str, int] = {}  # noqa: RUF012


def deposit(wallet: str, operation: UUID, amount: int, outcome: str | None = None, **more: Any) -> Request:
    return Request(wallet, operation, "DEPOSIT", amount, outcome, **more)


def withdraw(wallet: str, operation: UUID, amount: int, outcome: str | None = None, **more: Any) -> Request:
    return Request(wallet, operation, "WITHDRAW", amount, outcome, **more)


def transfer(
    wallet: str, payee: str | None, operation: UUID, amount: int, outcome: str | None = None, **more: Any
) -> Request:
    return Request(wallet, operation, "TRANSFER", amount, outcome, payee, **more)


def hold(wallet: str, operation: UUID, amount: int | None, outcome: str | None = None, **more: Any) -> Request:
    return Request(wallet, operation, "HOLD", amount, outcome, **more)


def release(wallet: str, operation: UUID, held: UUID | None, outcome: str | None = None, **more: Any) -> Request:
    return Request(wallet, operation, "RELEASE", None, outcome, hold=held, **more)


CASES = [
    Case("a deposit adds", {"w": 100}, [deposit("w", A, 50)], {"w": 150}),
    Case("a withdrawal takes off", {"w": 100}, [withdraw("w", A, 30)], {"w": 70}),
    Case("a withdrawal may take everything", {"w": 100}, [withdraw("w", A, 100)], {"w": 0}),
    Case("a withdrawal never overdraws", {"w": 100}, [withdraw("w", A, 101, "WA402")], {"w": 100}),
    Case("an empty wallet has nothing to give", {"w": 0}, [withdraw("w", A, 1, "WA402")], {"w": 0}),
    Case("the largest withdrawal is refused", {"w": 100}, [withdraw("w", A, MAX, "WA402")], {"w": 100}),
    Case("the smallest amount counts", {"w": 0}, [deposit("w", A, 1), withdraw("w", B, 1)], {"w": 0}),
    Case(
        "a refusal does not stop what follows",
        {"w": 100},
        [withdraw("w", A, 60), withdraw("w", B, 60, "WA402"), withdraw("w", C, 40)],
        {"w": 0},
    ),
    Case(
        "the third succeeds only because the first did",
        {"w": 0, "v": 5},
        [deposit("w", A, 70), withdraw("v", B, 5), withdraw("w", C, 70)],
        {"w": 0, "v": 0},
    ),
    Case(
        "wallets do not share their money",
        {"w": 100, "v": 10},
        [withdraw("v", A, 11, "WA402"), deposit("v", B, 1), withdraw("w", C, 1), withdraw("v", D, 11)],
        {"w": 99, "v": 0},
    ),
    Case(
        "names that differ in case are two wallets",
        {"wallet_A-1": 1, "wallet_a-1": 2},
        [withdraw("wallet_A-1", A, 2, "WA402"), withdraw("wallet_a-1", B, 2)],
        {"wallet_A-1": 1, "wallet_a-1": 0},
    ),
    # The same operation_uuid again
    Case("a repeat changes nothing", {"w": 0}, [deposit("w", A, 50), deposit("w", A, 50, "WA409")], {"w": 50}),
    Case(
        "a repeat after another operation changes nothing",
        {"w": 100},
        [withdraw("w", A, 10), withdraw("w", B, 10), withdraw("w", A, 10, "WA409")],
        {"w": 80},
    ),
    Case(
        "a repeat with another amount is a duplicate",
        {"w": 100},
        [withdraw("w", A, 10), withdraw("w", A, 20, "WA409")],
        {"w": 90},
    ),
    Case(
        "a repeat of another type is a duplicate",
        {"w": 100},
        [withdraw("w", A, 10), deposit("w", A, 10, "WA409")],
        {"w": 90},
    ),
    Case(
        "a repeat that names another wallet is a duplicate",
        {"w": 100, "v": 100},
        [withdraw("w", A, 10), withdraw("v", A, 10, "WA409"), deposit("v", A, 5, "WA409")],
        {"w": 90, "v": 100},
    ),
    Case(
        "a repeated withdrawal that emptied the wallet exists",
        {"w": 100},
        [withdraw("w", A, 100), withdraw("w", A, 100, "WA409"), withdraw("w", B, 100, "WA402")],
        {"w": 0},
    ),
    Case(
        "a duplicate on a wallet without the money exists",
        {"w": 100, "v": 0},
        [withdraw("w", A, 100), withdraw("v", A, 100, "WA409"), withdraw("v", B, 100, "WA402")],
        {"w": 0, "v": 0},
    ),
    Case(
        "a refused operation may be tried again and succeed",
        {"w": 0},
        [withdraw("w", A, 10, "WA402"), deposit("w", B, 10), withdraw("w", A, 10), withdraw("w", A, 10, "WA409")],
        {"w": 0},
    ),
    Case(
        "an operation refused on one wallet may succeed on another",
        {"w": 0, "v": 10},
        [withdraw("w", A, 10, "WA402"), withdraw("v", A, 10), deposit("w", A, 10, "WA409")],
        {"w": 0, "v": 0},
    ),
    Case(
        "an operation refused for its amount may succeed with another",
        {"w": 0},
        [deposit("w", A, 0, "WA400"), deposit("w", A, 1)],
        {"w": 1},
    ),
    # The balance's range
    Case("a balance may reach the largest", {"w": MAX - 1}, [deposit("w", A, 1)], {"w": MAX}),
    Case("a balance never passes the largest", {"w": MAX}, [deposit("w", A, 1, "WA416")], {"w": MAX}),
    Case("the largest amount moves in and out", {"w": 0}, [deposit("w", A, MAX), withdraw("w", B, MAX)], {"w": 0}),
    Case(
        "the largest amount passes the largest balance",
        {"w": 1},
        [deposit("w", A, MAX, "WA416"), withdraw("w", B, 1), deposit("w", A, MAX)],
        {"w": MAX},
    ),
    Case(
        "a repeated deposit that would pass the largest exists",
        {"w": 0, "v": MAX},
        [deposit("w", A, MAX), deposit("w", A, MAX, "WA409"), deposit("v", A, MAX, "WA409")],
        {"w": MAX, "v": MAX},
    ),
    # What no wallet can accept
    Case("a missing wallet is not found", {"w": 5}, [deposit("nobody", A, 5, "WA404"), deposit("w", A, 5)], {"w": 10}),
    Case(
        "a missing wallet goes before a duplicate",
        {"w": 0},
        [deposit("w", A, 5), deposit("nobody", A, 5, "WA404")],
        {"w": 5},
    ),
    Case("a name with a space is refused", {"w": 0}, [deposit("a b", A, 5, "WA400")], {"w": 0}),
    Case("a name of 65 characters is refused", {"w": 0}, [deposit("w" * 65, A, 5, "WA400")], {"w": 0}),
    Case("a name of 64 characters is good", {"w" * 64: 0}, [deposit("w" * 64, A, 5)], {"w" * 64: 5}),
    Case("a name outside of ASCII is refused", {"w": 0}, [deposit("wället", A, 5, "WA400")], {"w": 0}),
    Case("an emoji is no name", {"w": 0}, [deposit("\N{MONEY BAG}", A, 5, "WA400")], {"w": 0}),
    Case("a name that ends in a newline is refused", {"w": 0}, [deposit("w\n", A, 5, "WA400")], {"w": 0}),
    Case(
        "a bad name goes before a duplicate",
        {"w": 0},
        [deposit("w", A, 5), deposit("a b", A, 5, "WA400")],
        {"w": 5},
    ),
    Case("the nil UUID names no operation", {"w": 0}, [deposit("w", NIL, 5, "WA400")], {"w": 0}),
    Case("an amount of 0 is refused", {"w": 5}, [deposit("w", A, 0, "WA400"), withdraw("w", B, 0, "WA400")], {"w": 5}),
    Case(
        "a negative amount is refused",
        {"w": 5},
        [deposit("w", A, -1, "WA400"), withdraw("w", B, -1, "WA400"), withdraw("w", C, -MAX - 1, "WA400")],
        {"w": 5},
    ),
    Case("an unknown type is refused", {"w": 5}, [Request("w", A, "LOAN", 5, "WA400")], {"w": 5}),
    Case("an empty type is refused", {"w": 5}, [Request("w", A, "", 5, "WA400")], {"w": 5}),
    Case(
        "a type in lower case is refused",
        {"w": 5},
        [Request("w", A, "deposit", 5, "WA400"), Request("w", B, "Withdraw", 5, "WA400")],
        {"w": 5},
    ),
    Case(
        "a bad argument goes before a missing wallet",
        {"w": 0},
        [
            deposit("nobody", A, 0, "WA400"),
            deposit("nobody", NIL, 5, "WA400"),
            Request("nobody", A, "deposit", 5, "WA400"),
        ],
        {"w": 0},
    ),
    Case(
        "a bad argument goes before a duplicate",
        {"w": 5},
        [deposit("w", A, 5), deposit("w", A, 0, "WA400"), Request("w", A, "deposit", 5, "WA400")],
        {"w": 10},
    ),
    Case(
        "a bad argument goes before the lack of money",
        {"w": 0},
        [withdraw("w", NIL, 5, "WA400"), withdraw("w", A, 5, "WA402")],
        {"w": 0},
    ),
    # Transfers
    Case("a transfer moves money", {"w": 100, "v": 5}, [transfer("w", "v", A, 30)], {"w": 70, "v": 35}),
    Case("a transfer may take everything", {"w": 100, "v": 0}, [transfer("w", "v", A, 100)], {"w": 0, "v": 100}),
    Case("a transfer never overdraws", {"w": 100, "v": 0}, [transfer("w", "v", A, 101, "WA402")], {"w": 100, "v": 0}),
    Case(
        "money goes around a ring",
        {"w": 10, "v": 0, "u": 0},
        [transfer("w", "v", A, 10), transfer("v", "u", B, 10), transfer("u", "w", C, 10)],
        {"w": 10, "v": 0, "u": 0},
    ),
    Case(
        "what was received can be spent and what was sent cannot",
        {"w": 10, "v": 0},
        [withdraw("v", A, 10, "WA402"), transfer("w", "v", B, 10), withdraw("w", C, 1, "WA402"), withdraw("v", D, 10)],
        {"w": 0, "v": 0},
    ),
    Case(
        "a payee's balance never passes the largest",
        {"w": 1, "v": MAX},
        [transfer("w", "v", A, 1, "WA416"), transfer("v", "w", B, MAX - 1), transfer("w", "v", A, 1)],
        {"w": MAX - 1, "v": 2},
    ),
    Case(
        "the lack of money goes before the payee's range",
        {"w": 1, "v": MAX},
        [transfer("w", "v", A, 2, "WA402")],
        {"w": 1, "v": MAX},
    ),
    Case(
        "a transfer to a missing wallet is not found",
        {"w": 5},
        [transfer("w", "nobody", A, 5, "WA404"), transfer("nobody", "w", B, 5, "WA404")],
        {"w": 5},
    ),
    Case(
        "a missing payee goes before a duplicate and the lack of money",
        {"w": 0},
        [deposit("w", A, 5), transfer("w", "nobody", A, 50, "WA404")],
        {"w": 5},
    ),
    Case(
        "a wallet is never its own counterparty",
        {"w": 5},
        [transfer("w", "w", A, 5, "WA400"), transfer("nobody", "nobody", A, 5, "WA400")],
        {"w": 5},
    ),
    Case(
        "a transfer names its payee",
        {"w": 5},
        [transfer("w", None, A, 5, "WA400"), transfer("nobody", None, B, 5, "WA400")],
        {"w": 5},
    ),
    Case(
        "a payee has a good name",
        {"w": 5},
        [transfer("w", "a b", A, 5, "WA400"), transfer("nobody", "w\n", B, 5, "WA400")],
        {"w": 5},
    ),
    Case(
        "only a transfer has a payee",
        {"w": 5, "v": 0},
        [deposit("w", A, 5, "WA400", counterparty="v"), withdraw("w", B, 5, "WA400", counterparty="nobody")],
        {"w": 5, "v": 0},
    ),
    Case(
        "a repeated transfer changes nothing",
        {"w": 10, "v": 0},
        [transfer("w", "v", A, 10), transfer("w", "v", A, 10, "WA409")],
        {"w": 0, "v": 10},
    ),
    Case(
        "an operation_uuid is one operation whichever wallets it names",
        {"w": 10, "v": 10, "u": 10},
        [
            transfer("w", "v", A, 1),
            transfer("v", "w", A, 1, "WA409"),
            deposit("v", A, 1, "WA409"),
            transfer("w", "u", A, 1, "WA409"),
            deposit("u", B, 1),
            transfer("v", "w", B, 1, "WA409"),
        ],
        {"w": 9, "v": 11, "u": 11},
    ),
    Case(
        "nobody asks for a RECEIVE", {"w": 5, "v": 5}, [Request("w", A, "RECEIVE", 5, "WA400", "v")], {"w": 5, "v": 5}
    ),
    # Currencies
    Case(
        "a transfer stays within a currency",
        {"w": 9, "v": 9, "u": 9, "t": 9},
        [
            transfer("w", "v", A, 1),
            transfer("w", "u", B, 1, "WA422"),
            transfer("w", "t", C, 1, "WA422"),
            transfer("t", "w", D, 1, "WA422"),
        ],
        {"w": 8, "v": 10, "u": 9, "t": 9},
        currencies={"w": "EUR", "v": "EUR", "u": "USD"},
    ),
    Case(
        "a wrong currency goes before the lack of money and after a duplicate",
        {"w": 1, "v": 0},
        [transfer("w", "v", A, 2, "WA422"), deposit("v", A, 1), transfer("w", "v", A, 2, "WA409")],
        {"w": 1, "v": 1},
        currencies={"w": "EUR"},
    ),
    # Status
    Case(
        "from a frozen wallet nothing leaves",
        {"w": 5, "v": 5},
        [
            withdraw("w", A, 1, "WA403"),
            transfer("w", "v", B, 1, "WA403"),
            deposit("w", C, 1),
            transfer("v", "w", D, 1),
        ],
        {"w": 7, "v": 4},
        statuses={"w": "FROZEN"},
    ),
    Case(
        "with a closed wallet nothing is done",
        {"w": 0, "v": 5},
        [
            deposit("w", A, 1, "WA405"),
            withdraw("w", A, 1, "WA405"),
            transfer("w", "v", A, 1, "WA405"),
            transfer("v", "w", A, 1, "WA405"),
        ],
        {"w": 0, "v": 5},
        statuses={"w": "CLOSED"},
    ),
    Case(
        "of several reasons the first in the table is told",
        {"w": 0, "v": 0, "u": 0, "t": 0},
        [
            transfer("w", "v", A, 1, "WA405"),
            transfer("w", "u", A, 1, "WA403"),
            transfer("t", "v", A, 1, "WA405"),
            deposit("t", A, 1),
            transfer("w", "v", A, 1, "WA409"),
            transfer("w", "nobody", A, 1, "WA404"),
            transfer("w", "v", A, 0, "WA400"),
        ],
        {"w": 0, "v": 0, "u": 0, "t": 1},
        currencies={"u": "EUR", "v": "EUR"},
        statuses={"w": "FROZEN", "v": "CLOSED"},
    ),
    # Metadata
    Case(
        "metadata stands with every type",
        {"w": 5, "v": 0},
        [
            deposit("w", A, 1, metadata={"a": 1}),
            withdraw("w", B, 1, metadata={}),
            transfer("w", "v", C, 1, metadata={"a": {"b": [None, "\N{MONEY BAG}", 1.5]}}),
        ],
        {"w": 4, "v": 1},
    ),
    Case("metadata of 2048 octets is good", {"w": 0}, [deposit("w", A, 1, metadata={"a": "x" * 2039})], {"w": 1}),
    Case(
        "metadata of 2049 octets is refused",
        {"w": 0},
        [deposit("w", A, 1, "WA400", metadata={"a": "x" * 2040})],
        {"w": 0},
    ),
    Case(
        "metadata counts octets",
        {"w": 0},
        [deposit("w", A, 1, "WA400", metadata={"a": "\N{MONEY BAG}" * 510})],
        {"w": 0},
    ),
    Case(
        "metadata is an object",
        {"w": 0},
        [deposit("w", A, 1, "WA400", metadata=["a"]), deposit("nobody", B, 1, "WA400", metadata="a")],
        {"w": 0},
    ),
    # Holds
    Case(
        "what is held is not available",
        {"w": 100, "v": 0},
        [
            hold("w", X, 60),
            withdraw("w", A, 41, "WA402"),
            transfer("w", "v", B, 41, "WA402"),
            hold("w", Y, 41, "WA402"),
            withdraw("w", C, 40),
        ],
        {"w": 60, "v": 0},
        held={"w": 60},
    ),
    Case(
        "a hold may take everything and no more",
        {"w": 100},
        [hold("w", X, 101, "WA402"), hold("w", X, 100), hold("w", Y, 1, "WA402")],
        {"w": 100},
        held={"w": 100},
    ),
    Case("an empty wallet has nothing to hold", {"w": 0}, [hold("w", X, 1, "WA402")], {"w": 0}),
    Case(
        "a capture takes what is held",
        {"w": 100},
        [hold("w", X, 100), withdraw("w", A, 100, hold=X), withdraw("w", B, 1, "WA402")],
        {"w": 0},
    ),
    Case(
        "a capture of part gives the rest back",
        {"w": 100},
        [hold("w", X, 100), withdraw("w", A, 30, hold=X), withdraw("w", B, 71, "WA402"), withdraw("w", C, 70)],
        {"w": 0},
    ),
    Case(
        "a capture never takes more than its hold",
        {"w": 100, "v": 0},
        [hold("w", X, 60), withdraw("w", A, 61, "WA402", hold=X), transfer("w", "v", B, 61, "WA402", hold=X)],
        {"w": 100, "v": 0},
        held={"w": 60},
    ),
    Case(
        "a transfer captures for any payee",
        {"w": 100, "v": 0, "u": 0},
        [
            hold("w", X, 60),
            hold("w", Y, 40),
            transfer("w", "v", A, 50, hold=X),
            transfer("w", "u", B, 40, hold=Y),
            withdraw("v", C, 50),
            withdraw("w", D, 10),
        ],
        {"w": 0, "v": 0, "u": 40},
    ),
    Case(
        "a payee's holds stay",
        {"w": 100, "v": 10},
        [hold("v", X, 10), transfer("w", "v", A, 50), withdraw("v", B, 51, "WA402"), withdraw("v", C, 50)],
        {"w": 50, "v": 10},
        held={"v": 10},
    ),
    Case(
        "a release gives all of it back",
        {"w": 100},
        [hold("w", X, 100), release("w", A, X), withdraw("w", B, 100)],
        {"w": 0},
    ),
    Case(
        "a captured hold is closed",
        {"w": 600, "v": 0},
        [
            hold("w", X, 60),
            withdraw("w", A, 10, hold=X),
            withdraw("w", B, 10, "WA410", hold=X),
            transfer("w", "v", C, 10, "WA410", hold=X),
            release("w", D, X, "WA410"),
        ],
        {"w": 590, "v": 0},
        holds=[hold("w", Y, 500)],
        held={"w": 500},
    ),
    Case(
        "a released hold is closed",
        {"w": 600, "v": 0},
        [
            hold("w", X, 60),
            release("w", A, X),
            release("w", B, X, "WA410"),
            withdraw("w", C, 10, "WA410", hold=X),
            transfer("w", "v", D, 10, "WA410", hold=X),
        ],
        {"w": 600, "v": 0},
        holds=[hold("w", Y, 500)],
        held={"w": 500},
    ),
    Case(
        "a hold that was there before has one end too",
        {"w": 100},
        [
            release("w", A, X),
            withdraw("w", B, 60, "WA410", hold=X),
            withdraw("w", C, 30, hold=Y),
            release("w", D, Y, "WA410"),
        ],
        {"w": 70},
        holds=[hold("w", X, 60), hold("w", Y, 40)],
    ),
    Case(
        "a capture before its hold finds none",
        {"w": 100},
        [withdraw("w", A, 60, "WA424", hold=X), hold("w", X, 60), withdraw("w", A, 60, hold=X)],
        {"w": 40},
    ),
    Case(
        "a release before its hold finds none",
        {"w": 100},
        [release("w", A, X, "WA424"), hold("w", X, 60), release("w", A, X), hold("w", Y, 100)],
        {"w": 100},
        held={"w": 100},
    ),
    Case(
        "what is no hold is not found",
        {"w": 100},
        [
            deposit("w", A, 5),
            withdraw("w", B, 5, "WA424", hold=A),
            release("w", C, A, "WA424"),
            withdraw("w", D, 5, "WA424", hold=D),
        ],
        {"w": 105},
    ),
    Case(
        "another wallet's hold is not found",
        {"w": 100, "v": 100},
        [
            hold("w", X, 60),
            withdraw("v", A, 5, "WA424", hold=X),
            transfer("v", "w", B, 5, "WA424", hold=X),
            release("v", C, X, "WA424"),
            withdraw("w", D, 60, hold=X),
            withdraw("v", A, 5, "WA424", hold=X),
        ],
        {"w": 40, "v": 100},
    ),
    Case(
        "a refused hold is not found and may be tried again",
        {"w": 0},
        [
            hold("w", X, 10, "WA402"),
            release("w", A, X, "WA424"),
            deposit("w", B, 10),
            hold("w", X, 10),
            release("w", A, X),
        ],
        {"w": 10},
    ),
    Case(
        "a hold is made once",
        {"w": 100, "v": 100},
        [
            hold("w", X, 60),
            hold("w", X, 60, "WA409"),
            hold("v", X, 60, "WA409"),
            withdraw("w", A, 60, hold=X),
            hold("w", X, 10, "WA409"),
            deposit("v", X, 10, "WA409"),
        ],
        {"w": 40, "v": 100},
    ),
    Case(
        "a repeated end exists",
        {"w": 100},
        [
            hold("w", X, 60),
            withdraw("w", A, 60, hold=X),
            withdraw("w", A, 60, "WA409", hold=X),
            withdraw("w", A, 61, "WA409", hold=X),
            release("w", A, X, "WA409"),
            hold("w", Y, 40),
            release("w", B, Y),
            release("w", B, Y, "WA409"),
        ],
        {"w": 40},
    ),
    Case(
        "a capture under its hold's name exists",
        {"w": 100},
        [hold("w", X, 60), withdraw("w", X, 60, "WA409", hold=X), release("w", X, X, "WA409")],
        {"w": 100},
        held={"w": 60},
    ),
    Case(
        "a hold and its capture and a fee",
        {"w": 100, "v": 0, "fees": 0},
        [hold("w", X, 100), transfer("w", "v", A, 95, hold=X), transfer("w", "fees", B, 5)],
        {"w": 0, "v": 95, "fees": 5},
    ),
    Case(
        "what is held counts for the range",
        {"w": MAX, "v": 1},
        [
            hold("w", X, MAX),
            deposit("w", A, 1, "WA416"),
            transfer("v", "w", B, 1, "WA416"),
            withdraw("w", C, MAX, hold=X),
        ],
        {"w": 0, "v": 1},
    ),
    Case(
        "a payee's range goes after the hold's amount",
        {"w": 10, "v": MAX},
        [hold("w", X, 5), transfer("w", "v", A, 6, "WA402", hold=X), transfer("w", "v", A, 5, "WA416", hold=X)],
        {"w": 10, "v": MAX},
        held={"w": 5},
    ),
    Case(
        "holds end and begin in turns",
        {"w": 1},
        [
            hold("w", X, 1),
            release("w", A, X),
            hold("w", Y, 1),
            withdraw("w", B, 1, hold=Y),
            deposit("w", C, 2),
            hold("w", D, 2, expires_at=FUTURE),
        ],
        {"w": 2},
        held={"w": 2},
    ),
    Case(
        "a frozen wallet holds and captures nothing and releases",
        {"w": 100, "v": 0},
        [
            withdraw("w", A, 10, "WA403", hold=X),
            transfer("w", "v", A, 10, "WA403", hold=X),
            hold("w", B, 10, "WA403"),
            release("w", C, X),
            transfer("w", "v", D, 10, "WA403"),
            deposit("w", A, 1),
        ],
        {"w": 101, "v": 0},
        statuses={"w": "FROZEN"},
        holds=[hold("w", X, 60)],
    ),
    Case(
        "of several reasons concerning a hold the first in the table is told",
        {"w": 100, "v": 0, "u": 0, "t": 0},
        [
            withdraw("nobody", A, 1, "WA404", hold=Y),
            transfer("w", "nobody", A, 1, "WA404", hold=Y),
            withdraw("t", A, 1, "WA424", hold=X),
            release("t", A, X, "WA424"),
            transfer("w", "t", A, 1, "WA424", hold=Y),
            hold("t", A, 1, "WA410", expires_at=PAST),
            hold("t", A, 1, "WA405"),
            transfer("w", "t", A, 61, "WA405", hold=X),
            transfer("w", "u", A, 61, "WA422", hold=X),
            transfer("w", "v", A, 61, "WA402", hold=X),
            hold("w", X, 1, "WA409", expires_at=PAST),
            withdraw("v", X, 1, "WA409", hold=X),
        ],
        {"w": 100, "v": 0, "u": 0, "t": 0},
        currencies={"u": "EUR"},
        statuses={"t": "CLOSED"},
        holds=[hold("w", X, 60)],
        held={"w": 60},
    ),
    Case(
        "a closed hold goes before a frozen wallet and a duplicate before both",
        {"w": 100},
        [
            release("w", A, X),
            withdraw("w", B, 1, "WA410", hold=X),
            release("w", A, X, "WA409"),
            withdraw("w", C, 1, "WA403"),
        ],
        {"w": 100},
        statuses={"w": "FROZEN"},
        holds=[hold("w", X, 60)],
    ),
    Case(
        "a refused hold lends the hold that it names to nobody",
        {"w": 100},
        [
            hold("w", X, 1, "WA400", hold=Y),
            withdraw("w", A, 5, "WA424", hold=D),
            hold("w", D, 1, "WA400", hold=Y),
            withdraw("w", A, 5, "WA424", hold=D),
            withdraw("w", A, 11, "WA402", hold=X),
            release("w", B, X),
            withdraw("w", C, 41, "WA402"),
        ],
        {"w": 100},
        holds=[hold("w", X, 10), hold("w", Y, 60)],
        held={"w": 60},
    ),
    Case(
        "an argument about a hold is good or refused",
        {"w": 100, "v": 0},
        [
            hold("w", A, None, "WA400"),
            hold("w", A, 0, "WA400"),
            hold("w", A, -1, "WA400"),
            hold("w", NIL, 1, "WA400"),
            hold("w", A, 1, "WA400", hold=X),
            hold("w", A, 1, "WA400", counterparty="v"),
            release("w", A, None, "WA400"),
            release("w", A, NIL, "WA400"),
            release("w", A, X, "WA400", counterparty="v"),
            release("w", A, X, "WA400", expires_at=FUTURE),
            Request("w", A, "RELEASE", 60, "WA400", hold=X),
            withdraw("w", A, 1, "WA400", hold=NIL),
            deposit("w", A, 1, "WA400", hold=X),
            deposit("w", A, 1, "WA400", expires_at=FUTURE),
            withdraw("w", A, 1, "WA400", expires_at=FUTURE),
            withdraw("w", A, 1, "WA400", hold=X, expires_at=FUTURE),
            transfer("w", "v", A, 1, "WA400", expires_at=FUTURE),
            Request("w", A, "EXPIRE", None, "WA400", hold=X),
            Request("w", A, "CAPTURE", 1, "WA400", hold=X),
            hold("nobody", A, 1, "WA404"),
            hold("w", A, 40, metadata={"order": 1}),
        ],
        {"w": 100, "v": 0},
        holds=[hold("w", X, 60)],
        held={"w": 100},
    ),
    Case(
        "metadata stands with holds and their ends",
        {"w": 10, "v": 0},
        [
            hold("w", X, 5, metadata={"a": 1}),
            hold("w", Y, 5, expires_at=FUTURE, metadata={}),
            transfer("w", "v", A, 4, hold=X, metadata={"a": 2}),
            release("w", B, Y, metadata={"a": 3}),
        ],
        {"w": 6, "v": 4},
    ),
    # Expiry
    Case(
        "a hold that is due when it is asked for is closed",
        {"w": 10},
        [hold("w", X, 5, "WA410", expires_at=PAST), hold("w", X, 5, expires_at=FUTURE)],
        {"w": 10},
        held={"w": 5},
    ),
    Case(
        "a duplicate goes before a hold that is due",
        {"w": 10},
        [deposit("w", X, 5), hold("w", X, 5, "WA409", expires_at=PAST)],
        {"w": 15},
    ),
    Case(
        "what was held until now is available",
        {"w": 100},
        [withdraw("w", A, 101, "WA402"), withdraw("w", A, 100)],
        {"w": 0},
        due=[hold("w", X, 60), hold("w", Y, 40)],
    ),
    Case(
        "a hold that is due can be held again",
        {"w": 100},
        [hold("w", A, 100), hold("w", X, 60, "WA409")],
        {"w": 100},
        due=[hold("w", X, 60)],
        held={"w": 100},
    ),
    Case(
        "a hold that is due has no other end",
        {"w": 100, "v": 0},
        [
            withdraw("w", A, 60, "WA410", hold=X),
            transfer("w", "v", A, 60, "WA410", hold=X),
            release("w", A, X, "WA410"),
            transfer("w", "v", B, 30),
            withdraw("w", A, 60, "WA410", hold=X),
            release("w", A, X, "WA410"),
        ],
        {"w": 70, "v": 30},
        due=[hold("w", X, 60)],
    ),
    Case(
        "of two holds the one that is due counts no longer",
        {"w": 100},
        [withdraw("w", A, 61, "WA402"), withdraw("w", A, 60), withdraw("w", B, 40, hold=Y)],
        {"w": 0},
        holds=[hold("w", Y, 40, expires_at=FUTURE)],
        due=[hold("w", X, 60)],
    ),
    Case(
        "a payee's hold that is due counts no longer",
        {"w": 100, "v": 50},
        [transfer("w", "v", A, 10), withdraw("v", B, 60)],
        {"w": 90, "v": 0},
        due=[hold("v", X, 50)],
    ),
    Case(
        "a refusal leaves a hold that is due as it is",
        {"w": 100},
        [withdraw("w", A, 101, "WA402"), hold("w", A, 101, "WA402"), withdraw("w", B, 1, "WA424", hold=C)],
        {"w": 100},
        due=[hold("w", X, 60)],
    ),
]
