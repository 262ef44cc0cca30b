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
from datetime import datetime
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
HOLD_CLOSED = "hold_closed"
NO_HOLD = "hold_not_found"
TOGETHER = "not_applied"
"""Another operation of the same atomic request was refused."""
ANSWERS = {APPLIED, DUPLICATE, UNKNOWN, NO_MONEY, HOLD_CLOSED, NO_HOLD, TOGETHER, *NOT_APPLIED}
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
    hold: UUID | None = None
    """The hold that it ends."""
    held_after: int = 0

    @property
    def change(self) -> int:
        """What it does to the balance."""
        return CHANGES[self.kind] * self.amount

    @property
    def is_asked_for(self) -> bool:
        """Tell whether a client asked for it under its name: the others stand beside what one asked for."""
        return self.kind not in BESIDE

    @property
    def other_side(self) -> tuple[str, str | None, UUID, str, int]:
        """What its counterpart in a transfer has as `this_side`."""
        return str(self.counterparty), self.wallet, self.uuid, OTHER_SIDE[self.kind], self.amount

    @property
    def this_side(self) -> tuple[str, str | None, UUID, str, int]:
        """Wallet, counterparty, operation, type and amount."""
        return self.wallet, self.counterparty, self.uuid, self.kind, self.amount


CHANGES = {"DEPOSIT": 1, "RECEIVE": 1, "WITHDRAW": -1, "TRANSFER": -1, "HOLD": 0, "RELEASE": 0, "EXPIRE": 0}
BESIDE = ("RECEIVE", "EXPIRE")
CLOCKS = 0.01
"""Seconds by which the clients' clock may differ from the database's: it is the same, read twice."""
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
    hold: UUID | None = None
    """The hold that it ends; a RELEASE has the hold's amount."""
    expires_at: str | None = None
    """Of a HOLD, as it is sent."""
    due: float | None = None
    """The same by the clients' clock, in the time of the attempts."""
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
    held: int | None = None
    """None: it was not told."""


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
    holds: dict[UUID, tuple[str, int]] = field(default_factory=dict)
    """Wallet and amount of each open hold."""
    created: dict[tuple[str, int], datetime] = field(default_factory=dict)
    """When each row of the ledger was made, by wallet and seq."""
    expiries: dict[UUID, datetime] = field(default_factory=dict)
    """The expires_at of each HOLD in the ledger that has one."""

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
    recorded = {row.uuid for row in books.ledger if row.is_asked_for}
    for operation in history.operations.values():
        if operation.acknowledged is not None and operation.uuid not in recorded:
            yield f"{operation.kind} {operation.amount} {operation.uuid} is lost"


def an_operation_is_recorded_once(_: History, books: Books) -> Iterator[str]:
    rows = Counter((row.uuid, None if row.is_asked_for else row.kind) for row in books.ledger)
    for (uuid, beside), times in rows.items():
        if times > 1:
            yield f"{beside or 'operation'} {uuid} stands {times} times"


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
    recorded = {row.uuid: row for row in books.ledger if row.is_asked_for}
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
        if row.kind == "EXPIRE":
            side = (row.wallet, None, UUID(int=0) if row.hold is None else row.hold, "HOLD", row.amount)
        hold = None if asked is None or not row.is_asked_for else asked.hold
        ended = row.hold if row.is_asked_for else None
        if asked is None or (asked.wallet, asked.payee, asked.uuid, asked.kind, asked.amount) != side or hold != ended:
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
        0 if operation.kind == "TRANSFER" else CHANGES[operation.kind] * operation.amount
        for operation in history.operations.values()
        if operation.acknowledged is not None
    )
    held = sum(balance for balance, _ in books.wallets.values())
    if told != held:
        yield f"deposits minus withdrawals are {told}, the wallets hold {held}"


def what_was_answered_before_comes_before(history: History, books: Books) -> Iterator[str]:
    for rows in books.by_wallet().values():
        known = [
            (row, history.operations[row.uuid])
            for row in rows
            if row.uuid in history.operations and row.kind != "EXPIRE"
        ]
        answered = sorted((one.acknowledged, row.seq) for row, one in known if one.acknowledged is not None)
        latest, place = 0, 0
        for sent, seq in sorted((one.attempts[0].sent, row.seq) for row, one in known):
            while place < len(answered) and answered[place][0] < sent:
                latest = max(latest, answered[place][1])
                place += 1
            if latest > seq:
                yield f"{rows[0].wallet}: seq {seq} was sent after seq {latest} had been answered"


class Timeline:
    """What a wallet can have had at a time: what lies between what was answered before and what was sent after."""

    def __init__(self, rows: list[Row], history: History) -> None:
        self._states = [(0, 0), *((row.balance_after, row.held_after) for row in rows)]
        asked = history.operations
        known = [
            (seq, asked[row.uuid]) for seq, row in enumerate(rows, 1) if row.uuid in asked and row.kind != "EXPIRE"
        ]
        expired = {row.uuid: seq for seq, row in enumerate(rows, 1) if row.kind == "EXPIRE" and row.uuid in asked}
        ends = {row.hold: seq for seq, row in enumerate(rows, 1) if row.hold is not None}
        self._expiring = sorted(
            (due, seq, ends.get(row.uuid, len(rows) + 1), row.amount)
            for seq, row in enumerate(rows, 1)
            if row.kind == "HOLD" and row.uuid in asked and (due := asked[row.uuid].due) is not None
        )
        self._expired = list(accumulate((end for _, _, end, _ in self._expiring), max))
        answered = sorted((one.acknowledged, seq) for seq, one in known if one.acknowledged is not None)
        begun = [(one.attempts[0].sent, seq) for seq, one in known]
        begun += [((asked[hold].due or 0) - CLOCKS, seq) for hold, seq in expired.items()]
        sent = sorted(begun, reverse=True)
        self._answered = [when for when, _ in answered]
        self._done = [0, *accumulate((seq for _, seq in answered), max)]
        self._sent = [when for when, _ in reversed(sent)]
        self._begun = [*reversed(list(accumulate((seq for _, seq in sent), min))), len(rows) + 1]

    def _places(self, began: float, ended: float) -> range:
        """Return the seqs that can have been the last at some moment of an interval."""
        return range(self._done[bisect_left(self._answered, began)], self._begun[bisect_right(self._sent, ended)])

    def balances(self, began: float, ended: float) -> list[int]:
        """Return the balances that it can have had at some moment of an interval."""
        return [self._states[seq][0] for seq in self._places(began, ended)]

    def available(self, began: float, ended: float) -> list[int]:
        """Return what was available at least in each of the states that it can have had in an interval."""
        return [self._states[seq][0] - self._states[seq][1] for seq in self._places(began, ended)]

    def can_hold(self, began: float, ended: float, balance: int, held: int) -> bool:
        """Tell whether it can have had this balance with this held of it, where what is due counts no longer."""
        for seq in self._places(began, ended):
            total, most = self._states[seq]
            least = most
            for due, hold, end, amount in self._expiring[bisect_right(self._expired, seq) :]:
                if due > ended + CLOCKS:
                    break
                if hold <= seq < end:
                    least -= amount
                    most -= amount if due < began - CLOCKS else 0
            if total == balance and least <= held <= most:
                return True
        return False


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


def what_was_read_as_held_was_held(history: History, books: Books) -> Iterator[str]:
    timelines = timelines_of(history, books)
    for read in history.reads:
        if read.held is not None and not timelines[read.wallet].can_hold(
            read.sent, read.ended, read.balance, read.held
        ):
            yield f"of {read.balance} in {read.wallet} {read.held} were said to be held"


def money_is_refused_for_want_of_it_only(history: History, books: Books) -> Iterator[str]:
    """But for the later operations of atomic requests, which may be refused for what the earlier ones took."""
    timelines = timelines_of(history, books)
    for operation in history.operations.values():
        for attempt in operation.attempts if operation.together[0] is operation else ():
            if attempt.outcome == NO_MONEY:
                if operation.hold is None:
                    available = timelines[operation.wallet].available(attempt.sent, attempt.ended)
                else:
                    available = [history.operations[operation.hold].amount]
                if available and min(available) >= operation.amount:
                    yield f"{operation.uuid} of {operation.amount} while {min(available)} at least were available"


def a_hold_has_one_end_at_most(history: History, books: Books) -> Iterator[str]:
    told = Counter(one.hold for one in history.operations.values() if one.hold and one.acknowledged is not None)
    recorded = Counter(row.hold for row in books.ledger if row.hold)
    for hold in told.keys() | recorded.keys():
        if max(told[hold], recorded[hold]) > 1:
            yield f"{hold} has {recorded[hold]} ends, {told[hold]} of which clients were told"


def an_end_comes_after_its_hold(_: History, books: Books) -> Iterator[str]:
    holds = {row.uuid: row for row in books.ledger if row.kind == "HOLD"}
    for row in books.ledger:
        if row.hold is not None:
            hold = holds.get(row.hold)
            if hold is None or hold.wallet != row.wallet or hold.seq >= row.seq:
                yield f"{row} has no hold before it"
            elif row.amount > hold.amount or (row.kind in ("RELEASE", "EXPIRE") and row.amount != hold.amount):
                yield f"{row} takes another amount than {hold.amount}"


def nothing_is_taken_from_a_hold_that_is_due(history: History, books: Books) -> Iterator[str]:
    """By the database's clock, and by that of the clients: what is first sent when a hold is due comes too late."""
    for row in books.ledger:
        created, due = books.created.get((row.wallet, row.seq)), books.expiries.get(row.hold) if row.hold else None
        is_late = created is not None and due is not None and created >= due
        if created != due if row.kind == "EXPIRE" else is_late:
            yield f"{row} was made at {created}, due at {due}"
    for operation in history.operations.values():
        due_by_clients = history.operations[operation.hold].due if operation.hold else None
        if due_by_clients is not None and operation.acknowledged is not None:
            late = operation.attempts[0].sent - due_by_clients
            if late > CLOCKS:
                yield f"{operation.kind} {operation.uuid} was first sent {late:.3f} s after its hold was due"


def nothing_expires_early(history: History, books: Books) -> Iterator[str]:
    """An operation that was answered before a hold was due cannot have recorded its end."""
    for rows in books.by_wallet().values():
        due = 0.0
        for row in rows:
            asked = history.operations.get(row.uuid)
            if row.kind == "EXPIRE" and asked is not None:
                due = max(due, float("inf") if asked.due is None else asked.due)
            elif asked is not None and asked.acknowledged is not None and asked.acknowledged < due - CLOCKS:
                yield f"{row} was answered before the hold was due that had expired before it"


def held_after_follows(_: History, books: Books) -> Iterator[str]:
    amounts = {row.uuid: row.amount for row in books.ledger if row.kind == "HOLD"}
    for rows in books.by_wallet().values():
        held = 0
        for row in rows:
            held += row.amount if row.kind == "HOLD" else -amounts.get(row.hold, 0) if row.hold else 0
            if row.held_after != held or not 0 <= held <= row.balance_after:
                yield f"{row} where {held} are held"
                break


def the_open_holds_are_those_without_an_end(_: History, books: Books) -> Iterator[str]:
    ended = {row.hold for row in books.ledger}
    left = {row.uuid: (row.wallet, row.amount) for row in books.ledger if row.kind == "HOLD" and row.uuid not in ended}
    for hold in left.keys() | books.holds.keys():
        if left.get(hold) != books.holds.get(hold):
            yield f"{hold} is {left.get(hold)} in the ledger, {books.holds.get(hold)} among the open ones"


def a_hold_is_refused_for_a_reason(history: History, books: Books) -> Iterator[str]:
    """Closed because of another end, or because it was due; not found because nobody had been told of it yet."""
    ends: dict[UUID | None, list[Row]] = defaultdict(list)
    for row in books.ledger:
        if row.hold is not None:
            ends[row.hold].append(row)
    for operation in history.operations.values():
        hold = operation if operation.hold is None else history.operations[operation.hold]
        for attempt in operation.attempts if not operation.bundle else ():
            is_due = hold.due is not None and hold.due < attempt.ended + CLOCKS
            may_be_ended = any(
                row.kind != "EXPIRE"
                and row.uuid != operation.uuid
                and row.uuid in history.operations
                and history.operations[row.uuid].attempts[0].sent < attempt.ended
                for row in ends[hold.uuid]
            )
            if attempt.outcome == HOLD_CLOSED and not (is_due or may_be_ended):
                yield f"{operation.kind} {operation.uuid} while {hold.uuid} was open"
            told = hold.acknowledged is not None and hold.acknowledged < attempt.sent
            if attempt.outcome == NO_HOLD and (told or operation.hold is None):
                yield f"{operation.kind} {operation.uuid} after {hold.uuid} had been answered"


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
    what_was_read_as_held_was_held,
    money_is_refused_for_want_of_it_only,
    a_hold_has_one_end_at_most,
    an_end_comes_after_its_hold,
    nothing_is_taken_from_a_hold_that_is_due,
    nothing_expires_early,
    held_after_follows,
    the_open_holds_are_those_without_an_end,
    a_hold_is_refused_for_a_reason,
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
