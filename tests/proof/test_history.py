"""The checker notices each kind of disagreement, and nothing else, in histories that are forged for it."""

import time
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

import pytest

from tests.proof.history import (
    APPLIED,
    DUPLICATE,
    HOLD_CLOSED,
    NO_HOLD,
    NO_MONEY,
    OVERLOADED,
    TOGETHER,
    UNKNOWN,
    Attempt,
    Books,
    History,
    Operation,
    Read,
    Row,
    violations,
)


def uuid(number: int) -> UUID:
    return UUID(int=number)


def asked(number: int, kind: str, amount: int, *attempts: tuple[float, float, str], wallet: str = "w") -> Operation:
    return Operation(wallet, uuid(number), kind, amount, [Attempt(*attempt) for attempt in attempts])


def history_of(*operations: Operation) -> History:
    return History({operation.uuid: operation for operation in operations})


def rows(*changes: tuple[int, int], wallet: str = "w") -> list[Row]:
    """Return a wallet's ledger: the number of each operation, and what it adds."""
    ledger, balance = [], 0
    for seq, (number, change) in enumerate(changes, 1):
        balance += change
        kind = "DEPOSIT" if change > 0 else "WITHDRAW"
        ledger.append(Row(wallet, seq, uuid(number), kind, abs(change), balance))
    return ledger


def transferred(number: int, *, payer: int, payee: int, amount: int, before: int = 0) -> list[Row]:
    """Return both rows of a transfer from w to v, after seq `payer` and `payee`; `before` is what v holds."""
    return [
        Row("w", payer + 1, uuid(number), "TRANSFER", amount, 3 - amount, "v"),
        Row("v", payee + 1, uuid(number), "RECEIVE", amount, before + amount, "w"),
    ]


def asked_together(*operations: Operation, request: int = 1) -> list[Operation]:
    """Put operations in one atomic request, with their first attempts."""
    for operation in operations:
        operation.bundle = list(operations)
        operation.attempts[0].request = request
    return list(operations)


@pytest.fixture
def history() -> History:
    """Deposits of 10 (1) and 5 (2), a withdrawal of 12 (3), one that is refused (4); some sent again; two reads."""
    forged = history_of(
        asked(1, "DEPOSIT", 10, (0, 1, APPLIED), (7, 8, DUPLICATE)),
        asked(2, "DEPOSIT", 5, (2, 3, UNKNOWN), (3, 4, OVERLOADED), (4, 5, DUPLICATE)),
        asked(3, "WITHDRAW", 12, (6, 7, APPLIED)),
        asked(4, "WITHDRAW", 4, (8, 9, NO_MONEY)),
    )
    forged.reads = [Read("w", 1.2, 1.4, 10), Read("w", 8, 9, 3)]
    return forged


@pytest.fixture
def books() -> Books:
    return Books(rows((1, 10), (2, 5), (3, -12)), {"w": (3, 3)})


def broken(history: History, books: Books) -> set[str]:
    return set(violations(history, books))


def test_books_that_agree(history: History, books: Books) -> None:
    assert violations(history, books) == {}


def test_an_operation_that_nobody_asked_again_for(history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "WITHDRAW", 20, (5, 6, NO_MONEY), (6, 7, UNKNOWN), (8, 9, OVERLOADED))
    assert broken(history, books) == {"every operation has a definite answer"}


def test_a_refusal_during_an_unknown_attempt_decides_nothing() -> None:
    assert asked(1, "WITHDRAW", 1, (0, 5, UNKNOWN), (4, 6, NO_MONEY)).is_open
    assert not asked(1, "WITHDRAW", 1, (0, 5, UNKNOWN), (5, 6, NO_MONEY)).is_open
    assert not asked(1, "WITHDRAW", 1, (0, 5, UNKNOWN), (4, 6, DUPLICATE)).is_open


def test_a_refusal_while_an_unanswered_attempt_may_be_on_its_way_decides_nothing() -> None:
    operation = asked(1, "WITHDRAW", 1, (0, 5, UNKNOWN), (14, 15, NO_MONEY))
    assert not operation.is_open
    operation.attempts[0].lingers = 10
    assert operation.is_open
    operation.attempts.append(Attempt(15, 16, NO_MONEY))
    assert not operation.is_open


@pytest.mark.parametrize("code", ["wallet_not_found", "internal_error", "duplicate of another request"])
def test_an_answer_that_cannot_be(code: str, history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "DEPOSIT", 1, (0, 1, code))
    assert broken(history, books) == {"every answer is one that may come"}


def test_a_lost_operation(history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "DEPOSIT", 1, (8, 9, APPLIED))
    assert broken(history, books) == {"an acknowledged operation is recorded", "the money is what was acknowledged"}


def test_a_lost_operation_that_was_settled_as_a_duplicate(history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "DEPOSIT", 1, (8, 9, UNKNOWN), (9, 10, DUPLICATE))
    assert broken(history, books) == {"an acknowledged operation is recorded", "the money is what was acknowledged"}


def test_an_operation_that_is_applied_twice(history: History) -> None:
    books = Books(rows((1, 10), (2, 5), (3, -12), (1, 10)), {"w": (13, 4)})
    assert {"an operation is recorded once", "the money is what was acknowledged"} <= broken(history, books)


def test_an_operation_that_is_applied_twice_on_two_wallets(history: History, books: Books) -> None:
    books.ledger += rows((1, 10), wallet="x")
    books.wallets["x"] = (10, 1)
    assert {"an operation is recorded once", "a recorded operation was asked for"} <= broken(history, books)


def test_a_rejected_operation_that_is_applied(history: History) -> None:
    history.operations[uuid(5)] = asked(5, "WITHDRAW", 1, (2, 3, UNKNOWN), (3, 3.5, NO_MONEY))
    books = Books(rows((1, 10), (2, 5), (3, -12), (5, -1)), {"w": (2, 4)})
    assert "a rejected operation is not recorded" in broken(history, books)


def test_an_overloaded_operation_that_is_applied(history: History) -> None:
    history.operations[uuid(5)] = asked(5, "DEPOSIT", 1, (8, 9, OVERLOADED))
    books = Books(rows((1, 10), (2, 5), (3, -12), (5, 1)), {"w": (4, 4)})
    assert "a rejected operation is not recorded" in broken(history, books)


@pytest.mark.parametrize(
    "row", [Row("w", 4, uuid(9), "DEPOSIT", 1, 4), Row("w", 4, uuid(4), "WITHDRAW", 3, 0)], ids=["nobody", "another"]
)
def test_an_operation_that_nobody_asked_for(row: Row, history: History, books: Books) -> None:
    books.ledger.append(row)
    books.wallets["w"] = (row.balance_after, 4)
    assert "a recorded operation was asked for" in broken(history, books)


def test_a_duplicate_of_nothing(history: History, books: Books) -> None:
    history.operations[uuid(3)].attempts[0].outcome = DUPLICATE
    assert broken(history, books) == {"a duplicate has an earlier attempt"}
    history.operations[uuid(3)].attempts.append(Attempt(6.5, 8, APPLIED))
    assert broken(history, books) == set()


def test_a_gap(history: History, books: Books) -> None:
    books.ledger[2] = books.ledger[2]._replace(seq=4)
    assert broken(history, books) == {"seq has no gap and balances follow"}


def test_a_balance_that_does_not_follow(history: History, books: Books) -> None:
    books.ledger[1] = books.ledger[1]._replace(balance_after=16)
    assert broken(history, books) == {"seq has no gap and balances follow"}


def test_a_wallet_that_holds_something_else(history: History, books: Books) -> None:
    books.wallets["w"] = (4, 3)
    assert broken(history, books) == {"a balance is that of its ledger", "the money is what was acknowledged"}


def test_a_ledger_without_a_wallet(history: History, books: Books) -> None:
    del books.wallets["w"]
    assert "a balance is that of its ledger" in broken(history, books)


def test_a_wallet_that_counts_something_else(history: History, books: Books) -> None:
    books.wallets["w"] = (3, 4)
    assert broken(history, books) == {"a balance is that of its ledger"}


@pytest.fixture
def transfer(history: History, books: Books) -> Operation:
    """A transfer of 2 from w to v (5), in history and books."""
    operation = asked(5, "TRANSFER", 2, (9, 10, APPLIED))
    operation.payee = "v"
    history.operations[uuid(5)] = operation
    books.ledger += transferred(5, payer=3, payee=0, amount=2)
    books.wallets |= {"w": (1, 4), "v": (2, 1)}
    return operation


def test_a_transfer_that_agrees(transfer: Operation, history: History, books: Books) -> None:
    history.reads += [Read("v", 8, 8.5, 0), Read("v", 9, 9.5, 0), Read("v", 9, 9.5, 2), Read("v", 11, 12, 2)]
    assert transfer.acknowledged == 10
    assert broken(history, books) == set()


@pytest.mark.usefixtures("transfer")
def test_a_transfer_that_nobody_received(history: History, books: Books) -> None:
    del books.ledger[-1]
    books.wallets["v"] = (0, 0)
    assert broken(history, books) == {
        "a transfer is in both ledgers or in none",
        "the money is what was acknowledged",
    }


@pytest.mark.usefixtures("transfer")
def test_a_transfer_that_nobody_sent(history: History, books: Books) -> None:
    del books.ledger[-2]
    books.wallets["w"] = (3, 3)
    assert broken(history, books) == {
        "an acknowledged operation is recorded",
        "a transfer is in both ledgers or in none",
        "the money is what was acknowledged",
    }


@pytest.mark.parametrize(
    "change", [{"wallet": "x"}, {"amount": 1, "balance_after": 1}, {"counterparty": "v"}, {"counterparty": None}]
)
@pytest.mark.usefixtures("transfer")
def test_a_transfer_whose_sides_differ(change: dict[str, object], history: History, books: Books) -> None:
    books.ledger[-1] = books.ledger[-1]._replace(**change)  # type: ignore[arg-type]
    assert {"a transfer is in both ledgers or in none", "a recorded operation was asked for"} <= broken(history, books)


@pytest.mark.usefixtures("transfer")
def test_a_transfer_that_is_received_twice(history: History, books: Books) -> None:
    books.ledger.append(books.ledger[-1]._replace(seq=2, balance_after=4))
    books.wallets["v"] = (4, 2)
    assert broken(history, books) == {"an operation is recorded once", "the money is what was acknowledged"}


def test_a_transfer_to_somebody_else(transfer: Operation, history: History, books: Books) -> None:
    transfer.payee = "x"
    assert broken(history, books) == {"a recorded operation was asked for"}


def test_a_payee_who_held_nothing_after_the_answer(transfer: Operation, history: History, books: Books) -> None:
    assert transfer.acknowledged is not None
    history.reads.append(Read("v", transfer.acknowledged + 1, transfer.acknowledged + 2, 0))
    assert broken(history, books) == {"a balance that was read was the balance"}


def test_an_atomic_request_of_which_a_part_is_applied(history: History, books: Books) -> None:
    together = asked_together(asked(1, "DEPOSIT", 10, (0, 1, APPLIED)), asked(5, "DEPOSIT", 1, (0, 1, APPLIED)))
    history.operations |= {operation.uuid: operation for operation in together}
    assert broken(history, books) == {
        "an acknowledged operation is recorded",
        "the money is what was acknowledged",
        "an atomic request is applied as a whole or not at all",
    }


@pytest.mark.parametrize("outcomes", [(APPLIED, TOGETHER), (APPLIED, NO_MONEY), (APPLIED, DUPLICATE), (TOGETHER,) * 2])
def test_an_atomic_request_that_is_answered_in_parts(outcomes: tuple[str, str]) -> None:
    forged = history_of(*asked_together(*(asked(n, "DEPOSIT", 1, (0, 1, one)) for n, one in enumerate(outcomes))))
    assert "an atomic request is answered as a whole" in broken(forged, Books([], {}))


@pytest.mark.parametrize("outcomes", [(TOGETHER, NO_MONEY), (NO_MONEY, NO_MONEY), (OVERLOADED, OVERLOADED)])
def test_an_atomic_request_that_is_refused(outcomes: tuple[str, str]) -> None:
    forged = history_of(*asked_together(*(asked(n, "WITHDRAW", 1, (0, 1, one)) for n, one in enumerate(outcomes))))
    assert broken(forged, Books([], {"w": (0, 0)})) == set()


def test_an_operation_that_was_refused_because_of_nothing(history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "DEPOSIT", 1, (8, 9, TOGETHER))
    assert broken(history, books) == {"an atomic request is answered as a whole"}


@pytest.mark.parametrize("change", [{}, {"seq": 2}, {"balance_after": 11}, {"amount": 9}, {"counterparty": "v"}])
def test_an_answer_that_shows_another_operation(change: dict[str, object], history: History, books: Books) -> None:
    for attempt in history.operations[uuid(1)].attempts:
        attempt.told = books.ledger[0]._replace(**change)  # type: ignore[arg-type]
    assert broken(history, books) == ({"what was told is what is recorded"} if change else set())


def test_a_repeat_that_is_answered_as_applied_now(history: History, books: Books) -> None:
    history.operations[uuid(1)].attempts[1].outcome = APPLIED
    assert broken(history, books) == set()
    history.no_call_is_lost = True
    assert broken(history, books) == {"a repeat is no news"}
    history.operations[uuid(1)].attempts[1].sent = 0.5
    assert broken(history, books) == set()


def test_a_negative_balance(history: History) -> None:
    books = Books(rows((3, -12), (1, 10), (2, 5)), {"w": (3, 3)})
    assert "no balance is negative" in broken(history, books)


def test_money_that_moved_for_a_withdrawal_that_was_refused(history: History) -> None:
    books = Books(rows((1, 10), (2, 5), (3, -12), (4, -3)), {"w": (0, 4)})
    assert "the money is what was acknowledged" in broken(history, books)


def test_an_operation_before_one_that_was_answered_before_it_was_sent(history: History) -> None:
    history.reads.clear()
    books = Books(rows((2, 5), (1, 10), (3, -12)), {"w": (3, 3)})
    assert broken(history, books) == {"what was answered before comes before"}


def test_operations_under_way_at_once_come_in_any_order(history: History) -> None:
    history.reads.clear()
    history.operations[uuid(1)].attempts[0].ended = 2.5
    books = Books(rows((2, 5), (1, 10), (3, -12)), {"w": (3, 3)})
    assert broken(history, books) == set()


@pytest.mark.parametrize(
    "read", [Read("w", 1.2, 1.4, 15), Read("w", 8, 9, 15), Read("w", 8, 9, -1), Read("x", 0, 1, 1)]
)
def test_a_balance_that_never_was_or_was_no_more(read: Read, history: History, books: Books) -> None:
    history.reads.append(read)
    assert broken(history, books) == {"a balance that was read was the balance"}


@pytest.mark.parametrize("balance", [10, 15])
def test_a_balance_that_was_read_during_an_operation(balance: int, history: History, books: Books) -> None:
    history.reads.append(Read("w", 2.5, 2.6, balance))
    assert broken(history, books) == set()


def test_a_withdrawal_that_was_refused_with_the_money_there(history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "WITHDRAW", 3, (8, 9, NO_MONEY))
    assert broken(history, books) == {"money is refused for want of it only"}


def test_a_withdrawal_that_was_refused_before_the_money_came(history: History, books: Books) -> None:
    history.operations[uuid(5)] = asked(5, "WITHDRAW", 11, (1.2, 2.5, NO_MONEY))
    assert broken(history, books) == set()


BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
"""When the clients' clock stood at 0."""


def second(number: float) -> datetime:
    return BEGAN + timedelta(seconds=number)


@pytest.fixture
def holds(history: History, books: Books) -> dict[int, Operation]:
    """Of the 3 in w, 2 are held (5) until 20 and one captured (6); 1 is held (7) until 24 and expires; 1 is held (8).

    A deposit of 4 (9) meets the expiry.
    """
    made = {
        5: asked(5, "HOLD", 2, (10, 11, APPLIED)),
        6: asked(6, "WITHDRAW", 1, (12, 13, APPLIED)),
        7: asked(7, "HOLD", 1, (14, 15, APPLIED)),
        8: asked(8, "HOLD", 1, (16, 17, APPLIED)),
        9: asked(9, "DEPOSIT", 4, (30, 31, APPLIED)),
    }
    made[5].due, made[6].hold, made[7].due = 20, uuid(5), 24
    history.operations |= {operation.uuid: operation for operation in made.values()}
    books.ledger += [
        Row("w", 4, uuid(5), "HOLD", 2, 3, held_after=2),
        Row("w", 5, uuid(6), "WITHDRAW", 1, 2, hold=uuid(5)),
        Row("w", 6, uuid(7), "HOLD", 1, 2, held_after=1),
        Row("w", 7, uuid(8), "HOLD", 1, 2, held_after=2),
        Row("w", 8, uuid(7), "EXPIRE", 1, 2, hold=uuid(7), held_after=1),
        Row("w", 9, uuid(9), "DEPOSIT", 4, 6, held_after=1),
    ]
    books.wallets["w"] = (6, 9)
    books.holds = {uuid(8): ("w", 1)}
    books.expiries = {uuid(5): second(20), uuid(7): second(24)}
    moments = (10.5, 12.5, 14.5, 16.5, 24, 30.5)
    books.created = {("w", seq): second(moment) for seq, moment in enumerate(moments, 4)}
    return made


@pytest.mark.usefixtures("holds")
def test_holds_that_agree(history: History, books: Books) -> None:
    history.reads += [Read("w", 11.2, 11.8, 3, 2), Read("w", 18, 19, 2, 2), Read("w", 23, 24.5, 2, 2)]
    history.reads += [Read("w", 23, 25, 2, 1), Read("w", 25, 26, 2, 1), Read("w", 32, 33, 6, 1)]
    history.operations |= {
        uuid(10): asked(10, "WITHDRAW", 2, (18, 19, NO_MONEY)),
        uuid(11): asked(11, "RELEASE", 1, (25, 26, HOLD_CLOSED)),
        uuid(12): asked(12, "RELEASE", 1, (13.5, 14.5, NO_HOLD)),
    }
    history.operations[uuid(11)].hold = history.operations[uuid(12)].hold = uuid(7)
    assert violations(history, books) == {}


@pytest.mark.parametrize(
    "read", [Read("w", 11.2, 11.8, 3, 0), Read("w", 18, 19, 2, 1), Read("w", 25, 26, 2, 2), Read("w", 32, 33, 6, 2)]
)
@pytest.mark.usefixtures("holds")
def test_what_was_not_held_or_no_longer(read: Read, history: History, books: Books) -> None:
    history.reads.append(read)
    assert broken(history, books) == {"what was read as held was held"}


@pytest.mark.parametrize("kind", ["WITHDRAW", "RELEASE"])
def test_a_hold_with_two_ends(kind: str, holds: dict[int, Operation], history: History, books: Books) -> None:
    history.operations[uuid(10)] = second_end = asked(10, kind, 2, (32, 33, APPLIED))
    second_end.hold = uuid(5)
    books.ledger.append(Row("w", 10, uuid(10), kind, 2, 4 if kind == "WITHDRAW" else 6, hold=uuid(5)))
    books.wallets["w"] = (4 if kind == "WITHDRAW" else 6, 10)
    assert {"a hold has one end at most", "held after follows"} <= broken(history, books)


def test_a_client_who_was_told_of_another_end(holds: dict[int, Operation], history: History, books: Books) -> None:
    history.operations[uuid(10)] = asked(10, "RELEASE", 2, (13, 14, APPLIED))
    history.operations[uuid(10)].hold = uuid(5)
    assert broken(history, books) == {"an acknowledged operation is recorded", "a hold has one end at most"}


@pytest.mark.usefixtures("holds")
def test_a_capture_before_its_hold(history: History, books: Books) -> None:
    hold, capture = books.ledger[3:5]
    books.ledger[3:5] = [capture._replace(seq=4), hold._replace(seq=5, balance_after=2)]
    assert "an end comes after its hold" in broken(history, books)


@pytest.mark.parametrize("change", [{"wallet": "v"}, {"hold": uuid(1)}, {"amount": 3}])
@pytest.mark.usefixtures("holds")
def test_a_capture_of_another_hold(change: dict[str, object], history: History, books: Books) -> None:
    books.ledger[4] = books.ledger[4]._replace(**change)  # type: ignore[arg-type]
    assert {"an end comes after its hold", "a recorded operation was asked for"} <= broken(history, books)


@pytest.mark.usefixtures("holds")
def test_a_capture_that_was_made_when_its_hold_was_due(history: History, books: Books) -> None:
    books.expiries[uuid(5)] = second(12.5)
    assert broken(history, books) == {"nothing is taken from a hold that is due"}


def test_a_capture_that_was_sent_when_its_hold_was_due(
    holds: dict[int, Operation], history: History, books: Books
) -> None:
    holds[5].due = 11.9
    assert broken(history, books) == {"nothing is taken from a hold that is due"}


@pytest.mark.usefixtures("holds")
def test_an_end_that_was_recorded_under_another_moment(history: History, books: Books) -> None:
    books.created["w", 8] = second(24.1)
    assert broken(history, books) == {"nothing is taken from a hold that is due"}


def test_a_hold_that_expired_early(holds: dict[int, Operation], history: History, books: Books) -> None:
    holds[7].due = 32
    assert broken(history, books) == {"nothing expires early"}


@pytest.mark.usefixtures("holds")
def test_held_after_that_does_not_follow(history: History, books: Books) -> None:
    books.ledger[4] = books.ledger[4]._replace(held_after=1)
    assert broken(history, books) == {"held after follows"}


@pytest.mark.parametrize("left", [{}, {8: ("w", 2)}, {8: ("v", 1)}, {5: ("w", 2), 8: ("w", 1)}])
@pytest.mark.usefixtures("holds")
def test_an_open_hold_too_many_or_too_few(left: dict[int, tuple[str, int]], history: History, books: Books) -> None:
    books.holds = {uuid(number): hold for number, hold in left.items()}
    assert broken(history, books) == {"the open holds are those without an end"}


@pytest.mark.parametrize(("hold", "outcome"), [(8, HOLD_CLOSED), (7, HOLD_CLOSED), (8, NO_HOLD)])
@pytest.mark.usefixtures("holds")
def test_a_hold_that_was_refused_without_a_reason(hold: int, outcome: str, history: History, books: Books) -> None:
    history.operations[uuid(10)] = asked(10, "RELEASE", 1, (18, 19, outcome))
    history.operations[uuid(10)].hold = uuid(hold)
    assert broken(history, books) == {"a hold is refused for a reason"}


@pytest.mark.usefixtures("holds")
def test_money_that_was_available(history: History, books: Books) -> None:
    history.operations[uuid(10)] = asked(10, "WITHDRAW", 5, (32, 33, NO_MONEY))
    assert broken(history, books) == {"money is refused for want of it only"}
    history.operations[uuid(10)].amount = 6
    assert broken(history, books) == set()


@pytest.mark.usefixtures("holds")
def test_a_capture_that_was_refused_with_the_money_there(history: History, books: Books) -> None:
    history.operations[uuid(10)] = asked(10, "WITHDRAW", 1, (18, 19, NO_MONEY))
    history.operations[uuid(10)].hold = uuid(8)
    assert broken(history, books) == {"money is refused for want of it only"}


def test_what_verify_says(history: History, books: Books) -> None:
    books.verified = ["seq has no gap"]
    assert broken(history, books) == {"verify agrees"}


def test_what_a_reader_saw(history: History, books: Books) -> None:
    history.complaints["a snapshot in which balance and ledger disagree"] += 1
    assert broken(history, books) == {"nobody complained"}


def test_a_hundred_thousand_operations_take_seconds() -> None:
    random, forged, changes = Random(1), History(), []
    for number in range(1, 100_001):
        sent = number + random.random() * 50
        operation = asked(number, "DEPOSIT", 1, (sent, number + 100, APPLIED))
        forged.operations[operation.uuid] = operation
        changes.append((number, 1))
    began = time.process_time()
    assert violations(forged, Books(rows(*changes), {"w": (100_000, 100_000)})) == {}
    assert time.process_time() - began < 20
