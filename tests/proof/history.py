"""What clients asked for and were told, what the database holds, and the rules by which the two must agree.

A client writes down each attempt before it sends it. An attempt that got no answer, or a 503, is unknown: its operation
is asked for again, under the same operation_uuid, until the answer is definite. A success always is. A refusal is,
unless an attempt that nobody answered can still be on its way: that one is applied within the deadline of a request or
not at all.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple
from uuid import UUID

APPLIED = "applied"
DUPLICATE = "duplicate"
"""Refused because it stands in the ledger already: the same as applied."""
UNKNOWN = "unknown"
OVERLOADED = "overloaded"
"""A 429: this attempt was not applied. It says nothing about the attempts before it."""
LOCKED = "wallet_locked"
REFUSED = "database_refused"
NOT_APPLIED = {OVERLOADED, LOCKED, REFUSED}
"""As said of a 429: of these three one is as good as the others."""
NO_MONEY = "insufficient_funds"
TOGETHER = "not_applied"
"""Another operation of the same atomic request was refused."""
ANSWERS = {APPLIED, DUPLICATE, UNKNOWN, NO_MONEY, TOGETHER, *NOT_APPLIED}
"""What may come of an attempt; a refusal goes by its code."""

SHOWN = 3
"""Violations of one rule that are told one by one."""


class Row(NamedTuple):
    """A row of the ledger."""

    wallet: str
    seq: int
    uuid: UUID
    kind: str
    amount: int
    balance_after: int
    counterparty: str | None = None

    @property
    def change(self) -> int:
        """What it does to the balance."""
        return self.amount if self.kind in ("DEPOSIT", "RECEIVE") else -self.amount

    @property
    def other_side(self) -> tuple[str, str | None, UUID, str, int]:
        """What its counterpart in a transfer has as `this_side`."""
        return str(self.counterparty), self.wallet, self.uuid, OTHER_SIDE[self.kind], self.amount

    @property
    def this_side(self) -> tuple[str, str | None, UUID, str, int]:
        """Wallet, counterparty, operation, type and amount."""
        return self.wallet, self.counterparty, self.uuid, self.kind, self.amount


OTHER_SIDE = {"TRANSFER": "RECEIVE", "RECEIVE": "TRANSFER"}


@dataclass(slots=True, eq=False)
class Attempt:
    """A request for an operation. Times are monotonic."""

    sent: float
    ended: float = float("inf")
    outcome: str = UNKNOWN
    first_on_connection: bool = False
    in_bulk: bool = False
    lingers: float = 0.0
    """Seconds after its end in which an unknown one can still be applied. After a 503 there are none."""
    request: int | None = None
    """The atomic request that it was a part of."""
    told: Row | None = None
    """The operation as the answer shows it: the applied one, or the recorded one for a duplicate."""


@dataclass(slots=True, eq=False)
class Operation:
    """An operation that a client wants, with all its attempts in the order in which they were sent."""

    wallet: str
    uuid: UUID
    kind: str
    amount: int
    attempts: list[Attempt] = field(default_factory=list)
    payee: str | None = None
    """Who gets the money of a TRANSFER."""
    bundle: "list[Operation]" = field(default_factory=list)
    """The operations of the atomic request in which it is always asked for, this one too; empty if there is none."""

    @property
    def together(self) -> "list[Operation]":
        """The operations that are asked for in one request: it alone, or its bundle."""
        return self.bundle or [self]

    @property
    def wallets(self) -> set[str | None]:
        """The wallets that decide what becomes of it."""
        return {wallet for one in self.together for wallet in (one.wallet, one.payee)}

    @property
    def acknowledged(self) -> float | None:
        """When a client first heard that it was applied."""
        return min((one.ended for one in self.attempts if one.outcome in (APPLIED, DUPLICATE)), default=None)

    @property
    def unknown_until(self) -> float | None:
        """When the last of the unknown attempts has become final; None if there is none."""
        return max((one.ended + one.lingers for one in self.attempts if one.outcome == UNKNOWN), default=None)

    @property
    def is_open(self) -> bool:
        """Tell whether it may have been applied and may not: none was decided after the unknown ones were final."""
        if self.acknowledged is not None or self.unknown_until is None:
            return False
        decided = max((one.sent for one in self.attempts if one.outcome not in (UNKNOWN, *NOT_APPLIED)), default=-1.0)
        return self.unknown_until > decided


class Read(NamedTuple):
    """A balance that a client was told."""

    wallet: str
    sent: float
    ended: float
    balance: int


@dataclass
class History:
    """Everything that the clients of one service wrote down."""

    operations: dict[UUID, Operation] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    complaints: Counter[str] = field(default_factory=Counter)
    """What was wrong as soon as it was seen."""
    statuses: Counter[int] = field(default_factory=Counter)
    no_call_is_lost: bool = False
    """Whether nothing was done that can make the service repeat a call of its own."""

    def open(self) -> list[Operation]:
        """Return the operations of which nobody knows whether they were applied."""
        return [operation for operation in self.operations.values() if operation.is_open]


@dataclass
class Books:
    """What the database holds: the ledger in the order of wallet and seq, balance and seq of each wallet, verify()."""

    ledger: list[Row]
    wallets: dict[str, tuple[int, int]]
    verified: list[str] = field(default_factory=list)

    def by_wallet(self) -> dict[str, list[Row]]:
        """Return each wallet's part of the ledger."""
        parts: dict[str, list[Row]] = {wallet: [] for wallet in self.wallets}
        for row in self.ledger:
            parts.setdefault(row.wallet, []).append(row)
        return parts


def every_operation_has_a_definite_answer(history: History, _: Books) -> Iterator[str]:
    for operation in history.open():
        yield f"{operation.uuid} is unknown after {len(operation.attempts)} attempts"


def every_answer_is_one_that_may_come(history: History, _: Books) -> Iterator[str]:
    for operation in history.operations.values():
        for attempt in operation.attempts:
            if attempt.outcome not in ANSWERS:
                yield f"{operation.uuid} was answered {attempt.outcome}"


def an_acknowledged_operation_is_recorded(history: History, books: Books) -> Iterator[str]:
    recorded = {row.uuid for row in books.ledger if row.kind != "RECEIVE"}
    for operation in history.operations.values():
        if operation.acknowledged is not None and operation.uuid not in recorded:
            yield f"{operation.kind} {operation.amount} {operation.uuid} is lost"


def an_operation_is_recorded_once(_: History, books: Books) -> Iterator[str]:
    for (uuid, received), times in Counter((row.uuid, row.kind == "RECEIVE") for row in books.ledger).items():
        if times > 1:
            yield f"{uuid} {'is received' if received else 'stands'} {times} times"


def a_transfer_is_in_both_ledgers_or_in_none(_: History, books: Books) -> Iterator[str]:
    sides = {row.this_side for row in books.ledger}
    for row in books.ledger:
        if row.kind in OTHER_SIDE and row.other_side not in sides:
            yield f"{row} has no other side"


def an_atomic_request_is_applied_as_a_whole_or_not_at_all(history: History, books: Books) -> Iterator[str]:
    recorded = {row.uuid for row in books.ledger}
    for operation in history.operations.values():
        if operation.bundle and operation.bundle[0] is operation:
            applied = sum(one.uuid in recorded for one in operation.bundle)
            if 0 < applied < len(operation.bundle):
                yield f"{applied} of {len(operation.bundle)} operations with {operation.uuid} are recorded"


def an_atomic_request_is_answered_as_a_whole(history: History, _: Books) -> Iterator[str]:
    requests: dict[int, list[Attempt]] = defaultdict(list)
    for operation in history.operations.values():
        for attempt in operation.attempts:
            if attempt.request is not None:
                requests[attempt.request].append(attempt)
            elif attempt.outcome == TOGETHER:
                yield f"{operation.uuid} was asked alone and answered {TOGETHER}"
    for attempts in requests.values():
        outcomes = {attempt.outcome for attempt in attempts}
        if APPLIED in outcomes and len(outcomes) > 1:
            yield f"one answer has {sorted(outcomes)}"
        if outcomes == {TOGETHER}:
            yield f"{len(attempts)} operations were not applied, each because of another"


def what_was_told_is_what_is_recorded(history: History, books: Books) -> Iterator[str]:
    recorded = {row.uuid: row for row in books.ledger if row.kind != "RECEIVE"}
    for operation in history.operations.values():
        for attempt in operation.attempts:
            if attempt.told is not None and attempt.told != recorded.get(operation.uuid):
                yield f"{attempt.told} was told, {recorded.get(operation.uuid)} is recorded"


def a_repeat_is_no_news(history: History, _: Books) -> Iterator[str]:
    """Where no call of the service was lost: after that it answers a repeat as the success that it may have been."""
    for operation in history.operations.values():
        acknowledged = operation.acknowledged
        for attempt in operation.attempts:
            late = acknowledged is not None and acknowledged < attempt.sent
            if history.no_call_is_lost and late and attempt.outcome == APPLIED:
                yield f"{operation.uuid} was applied once more after it had been acknowledged"


def a_rejected_operation_is_not_recorded(history: History, books: Books) -> Iterator[str]:
    recorded = {row.uuid for row in books.ledger}
    for operation in history.operations.values():
        if operation.uuid in recorded and operation.acknowledged is None and not operation.is_open:
            yield f"{operation.uuid} was told {[attempt.outcome for attempt in operation.attempts]}"


def a_recorded_operation_was_asked_for(history: History, books: Books) -> Iterator[str]:
    for row in books.ledger:
        asked = history.operations.get(row.uuid)
        side = row.other_side if row.kind == "RECEIVE" else row.this_side
        if asked is None or (asked.wallet, asked.payee, asked.uuid, asked.kind, asked.amount) != side:
            yield f"{row} is not what a client asked for"


def a_duplicate_has_an_earlier_attempt(history: History, _: Books) -> Iterator[str]:
    for operation in history.operations.values():
        if operation.attempts and operation.attempts[0].outcome == DUPLICATE:
            first = operation.attempts[0]
            if not any(other.sent < first.ended for other in operation.attempts[1:]):
                yield f"{operation.uuid} was asked for once and answered as a duplicate"


def seq_has_no_gap_and_balances_follow(_: History, books: Books) -> Iterator[str]:
    for rows in books.by_wallet().values():
        balance = 0
        for seq, row in enumerate(rows, 1):
            balance += row.change
            if row.seq != seq or row.balance_after != balance or balance < 0:
                yield f"{row} at place {seq}, where the balance is {balance}"
                break


def a_balance_is_that_of_its_ledger(_: History, books: Books) -> Iterator[str]:
    for wallet, rows in books.by_wallet().items():
        balance, seq = books.wallets.get(wallet, (0, 0))
        last = rows[-1].balance_after if rows else 0
        total = sum(row.change for row in rows)
        if not balance == last == total or seq != len(rows):
            yield f"{wallet}: balance {balance}, last {last}, sum {total}; seq {seq}, {len(rows)} operations"


def no_balance_is_negative(_: History, books: Books) -> Iterator[str]:
    for wallet, (balance, _seq) in books.wallets.items():
        if balance < 0:
            yield f"{wallet} holds {balance}"
    for row in books.ledger:
        if row.balance_after < 0:
            yield f"{row}"


def the_money_is_what_was_acknowledged(history: History, books: Books) -> Iterator[str]:
    told = sum(
        {"DEPOSIT": operation.amount, "WITHDRAW": -operation.amount, "TRANSFER": 0}[operation.kind]
        for operation in history.operations.values()
        if operation.acknowledged is not None
    )
    held = sum(balance for balance, _ in books.wallets.values())
    if told != held:
        yield f"deposits minus withdrawals are {told}, the wallets hold {held}"


def what_was_answered_before_comes_before(history: History, books: Books) -> Iterator[str]:
    for rows in books.by_wallet().values():
        known = [(row, history.operations[row.uuid]) for row in rows if row.uuid in history.operations]
        answered = sorted((one.acknowledged, row.seq) for row, one in known if one.acknowledged is not None)
        latest, place = 0, 0
        for sent, seq in sorted((one.attempts[0].sent, row.seq) for row, one in known):
            while place < len(answered) and answered[place][0] < sent:
                latest = max(latest, answered[place][1])
                place += 1
            if latest > seq:
                yield f"{rows[0].wallet}: seq {seq} was sent after seq {latest} had been answered"


class Timeline:
    """The balances that a wallet can have had at a time: those between what was answered before and sent after."""

    def __init__(self, rows: list[Row], history: History) -> None:
        self._balances = [0, *(row.balance_after for row in rows)]
        asked = history.operations
        known = [(seq, asked[row.uuid]) for seq, row in enumerate(rows, 1) if row.uuid in asked]
        answered = sorted((one.acknowledged, seq) for seq, one in known if one.acknowledged is not None)
        sent = sorted(((one.attempts[0].sent, seq) for seq, one in known), reverse=True)
        self._answered = [when for when, _ in answered]
        self._done = [0, *accumulate((seq for _, seq in answered), max)]
        self._sent = [when for when, _ in reversed(sent)]
        self._begun = [*reversed(list(accumulate((seq for _, seq in sent), min))), len(rows) + 1]

    def balances(self, began: float, ended: float) -> list[int]:
        """Return the balances that it can have had at some moment of an interval."""
        first = self._done[bisect_left(self._answered, began)]
        after = self._begun[bisect_right(self._sent, ended)]
        return self._balances[first:after]


def timelines_of(history: History, books: Books) -> defaultdict[str, Timeline]:
    """Return the timeline of each wallet, an empty one for a wallet that is not in the books."""
    timelines: defaultdict[str, Timeline] = defaultdict(lambda: Timeline([], history))
    timelines.update((wallet, Timeline(rows, history)) for wallet, rows in books.by_wallet().items())
    return timelines


def a_balance_that_was_read_was_the_balance(history: History, books: Books) -> Iterator[str]:
    timelines = timelines_of(history, books)
    for read in history.reads:
        if read.balance < 0 or read.balance not in timelines[read.wallet].balances(read.sent, read.ended):
            yield f"{read.wallet} was said to hold {read.balance}"


def money_is_refused_for_want_of_it_only(history: History, books: Books) -> Iterator[str]:
    """But for the later operations of atomic requests, which may be refused for what the earlier ones took."""
    timelines = timelines_of(history, books)
    for operation in history.operations.values():
        for attempt in operation.attempts if operation.together[0] is operation else ():
            if attempt.outcome == NO_MONEY:
                held = timelines[operation.wallet].balances(attempt.sent, attempt.ended)
                if held and min(held) >= operation.amount:
                    yield f"{operation.uuid} of {operation.amount} while {operation.wallet} held {min(held)} at least"


def verify_agrees(_: History, books: Books) -> Iterator[str]:
    yield from books.verified


def nobody_complained(history: History, _: Books) -> Iterator[str]:
    for complaint, times in history.complaints.items():
        yield f"{complaint} ({times} times)"


RULES: tuple[Callable[[History, Books], Iterator[str]], ...] = (
    every_operation_has_a_definite_answer,
    every_answer_is_one_that_may_come,
    an_acknowledged_operation_is_recorded,
    an_operation_is_recorded_once,
    a_transfer_is_in_both_ledgers_or_in_none,
    an_atomic_request_is_applied_as_a_whole_or_not_at_all,
    an_atomic_request_is_answered_as_a_whole,
    what_was_told_is_what_is_recorded,
    a_repeat_is_no_news,
    a_rejected_operation_is_not_recorded,
    a_recorded_operation_was_asked_for,
    a_duplicate_has_an_earlier_attempt,
    seq_has_no_gap_and_balances_follow,
    a_balance_is_that_of_its_ledger,
    no_balance_is_negative,
    the_money_is_what_was_acknowledged,
    what_was_answered_before_comes_before,
    a_balance_that_was_read_was_the_balance,
    money_is_refused_for_want_of_it_only,
    verify_agrees,
    nobody_complained,
)


def violations(history: History, books: Books) -> dict[str, list[str]]:
    """Return what breaks each rule, by the rule's name; nothing if the books are what the clients were told."""
    found: dict[str, list[str]] = defaultdict(list)
    for rule in RULES:
        for violation in rule(history, books):
            found[rule.__name__.replace("_", " ")].append(violation)
    return found


def findings(history: History, books: Books) -> list[str]:
    """Return the violations, a few of each rule and the number of the others."""
    told = []
    for rule, some in violations(history, books).items():
        told += [f"{rule}: {one}" for one in some[:SHOWN]]
        if len(some) > SHOWN:
            told.append(f"{rule}: {len(some) - SHOWN} more")
    return told
