"""A model of the service in a few lines of Python, and Hypothesis to find what tells the two apart.

A sequence starts from an empty ledger and takes its names, operation_uuids and amounts from small sets, so that
repeats, unknown wallets, empty wallets and full ones come about by themselves. After each step both doors are read.
Time passes for a hold in a step of its own, which sets its `expires_at` to the database's clock.
"""

import http.client
import json
import traceback
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import UUID

import hypothesis
import psycopg
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.types.json import Jsonb

from tests.api.test_process import Service
from tests.cases import FUTURE, MAX, MESSAGES, NIL, PAST, PROBLEMS
from tests.db.door import call
from tests.proof.section import Account, Scale
from tests.proof.service import database, service

STEPS = 16
"""Steps of a sequence."""

NAMES = ["a", "A", "z" * 64]
BAD_NAMES = ["", "a b", "a\n", "wället", "z" * 65, None]
OPERATIONS = [UUID(int=number << 64 | 7) for number in range(1, 13)]
AMOUNTS = [1, 2, 3, 50, 2**62, MAX - 2, MAX - 1, MAX]
TYPES = ["DEPOSIT", "WITHDRAW", "TRANSFER", "HOLD", "RELEASE"]
CURRENCIES = [None, "EUR", "POINTS"]
BAD_CURRENCIES = ["", "eur", "EU", "E" * 13]
STATUSES = ["OPEN", "FROZEN", "CLOSED"]
BAD_STATUSES = ["", "open"]
LARGEST = {"": "x" * (2048 - len('{"": ""}'))}
METADATA: list[Any] = [None, {}, {"a": 1}, {"b": ["ü", None], "a": 1}, LARGEST]
TOO_LARGE = {"": LARGEST[""] + "x"}
BAD_METADATA: list[Any] = [[], "text", 1, TOO_LARGE]


class Request(NamedTuple):
    wallet: Any
    operation: Any
    type: Any
    amount: Any
    counterparty: Any = None
    hold: Any = None
    expires_at: Any = None
    metadata: Any = None


class Recorded(NamedTuple):
    """An operation of a wallet's history."""

    wallet: str
    operation: UUID
    type: str
    amount: int
    counterparty: str | None
    hold: UUID | None
    expires_at: datetime | None
    metadata: Any
    balance_after: int
    held_after: int
    seq: int

    def is_same(self, asked: Request) -> bool:
        """Tell whether it is what somebody asks for."""
        amount = self.amount if asked.type == "RELEASE" else asked.amount
        return self[1:8] == (*asked[1:3], amount, *asked[4:7], asked.metadata or None)


@dataclass
class Hold:
    """A hold for which no end is recorded."""

    uuid: UUID
    seq: int
    amount: int
    expires_at: datetime | None
    is_due: bool = False


@dataclass
class Wallet:
    currency: str | None
    status: str = "OPEN"
    history: list[Recorded] = field(default_factory=list)
    holds: dict[UUID, Hold] = field(default_factory=dict)

    @property
    def balance(self) -> int:
        return self.history[-1].balance_after if self.history else 0

    @property
    def open_holds(self) -> list[Hold]:
        return [hold for hold in self.holds.values() if not hold.is_due]

    @property
    def due_holds(self) -> list[Hold]:
        """Those whose end is due, in the order in which it is to be recorded."""
        due = [(hold.expires_at, hold.seq, hold) for hold in self.holds.values() if hold.is_due and hold.expires_at]
        return [hold for *_, hold in sorted(due)]

    @property
    def held(self) -> int:
        return sum(hold.amount for hold in self.open_holds)

    @property
    def available(self) -> int:
        return self.balance - self.held


class Model:
    """What the service is supposed to be."""

    def __init__(self) -> None:
        self.wallets: dict[str, Wallet] = {}
        self.operations: dict[UUID, Recorded] = {}
        """What somebody asked for, by its name: no `RECEIVE`, no `EXPIRE`."""

    def create(self, wallet: str, currency: str | None = None) -> str | None:
        """Create a wallet and return None, or the SQLSTATE of the refusal."""
        if wallet in BAD_NAMES or currency in BAD_CURRENCIES:
            return "WA400"
        if wallet in self.wallets:
            return "WA419"
        self.wallets[wallet] = Wallet(currency)
        return None

    def set_status(self, name: str, status: str) -> str | None:
        """Change a wallet's status and return None, or the SQLSTATE of the refusal."""
        if name in BAD_NAMES or status not in STATUSES:
            return "WA400"
        if name not in self.wallets:
            return "WA404"
        if status == "CLOSED" and self.wallets[name].balance:
            return "WA417"
        self.wallets[name].status = status
        return None

    def apply(self, asked: Request) -> str | None:
        """Apply an operation and return None, or the SQLSTATE of the refusal."""
        if self._is_malformed(asked):
            return "WA400"
        is_transfer = asked.type == "TRANSFER"
        if asked.wallet not in self.wallets or (is_transfer and asked.counterparty not in self.wallets):
            return "WA404"
        if asked.operation in self.operations:
            return "WA409"
        wallet = self.wallets[asked.wallet]
        payee = self.wallets[asked.counterparty] if is_transfer else None
        held = self.operations.get(asked.hold)
        if asked.hold and (held is None or (held.wallet, held.type) != (asked.wallet, "HOLD")):
            return "WA424"
        hold = wallet.holds.get(asked.hold)
        if asked.expires_at == PAST or (asked.hold and (hold is None or hold.is_due)):
            return "WA410"
        if "CLOSED" in (wallet.status, payee and payee.status):
            return "WA405"
        if wallet.status == "FROZEN" and asked.type not in ("DEPOSIT", "RELEASE"):
            return "WA403"
        if payee and wallet.currency != payee.currency:
            return "WA422"
        available = hold.amount if hold else wallet.available
        if asked.type in ("WITHDRAW", "TRANSFER", "HOLD") and available < asked.amount:
            return "WA402"
        gaining = wallet if asked.type == "DEPOSIT" else payee
        if gaining and gaining.balance + asked.amount > MAX:
            return "WA416"

        self.expire(asked.wallet)
        change = {"DEPOSIT": 1, "WITHDRAW": -1, "TRANSFER": -1}.get(asked.type, 0) * (asked.amount or 0)
        released = wallet.holds.pop(asked.hold).amount if hold else -asked.amount if asked.type == "HOLD" else 0
        if asked.type == "RELEASE":
            asked = asked._replace(amount=released)
        recorded = self._record(asked, change, -released)
        self.operations[asked.operation] = recorded
        if asked.type == "HOLD":
            wallet.holds[asked.operation] = Hold(asked.operation, recorded.seq, asked.amount, asked.expires_at)
        if payee:
            self.expire(asked.counterparty)
            received = Request(asked.counterparty, asked.operation, "RECEIVE", asked.amount, asked.wallet)
            self._record(received._replace(metadata=asked.metadata), -change, 0)
        return None

    def _is_malformed(self, asked: Request) -> bool:
        """Tell whether no wallet could accept it."""
        is_transfer = asked.type == "TRANSFER"
        return (
            asked.wallet in BAD_NAMES
            or asked.operation in (None, NIL)
            or asked.type not in TYPES
            or (asked.type == "RELEASE") is not (asked.amount is None)
            or (asked.amount is not None and asked.amount < 1)
            or is_transfer is (asked.counterparty is None)
            or (is_transfer and asked.counterparty in (asked.wallet, *BAD_NAMES))
            or asked.hold == NIL
            or (asked.hold is not None and asked.type in ("DEPOSIT", "HOLD"))
            or (asked.hold is None and asked.type == "RELEASE")
            or (asked.expires_at is not None and asked.type != "HOLD")
            or asked.metadata in BAD_METADATA
        )

    def expire(self, name: str, limit: int | None = None) -> int:
        """Record the end of holds that are due, the first `limit` of them, and return how many."""
        wallet = self.wallets[name]
        due = wallet.due_holds[:limit]
        for hold in due:
            del wallet.holds[hold.uuid]
            self._record(Request(name, hold.uuid, "EXPIRE", hold.amount, None, hold.uuid), 0, -hold.amount)
        return len(due)

    def _record(self, asked: Request, change: int, held: int) -> Recorded:
        """Record an operation that changes the balance, and what is held, by so much."""
        history = self.wallets[asked.wallet].history
        held += history[-1].held_after if history else 0
        balance = self.wallets[asked.wallet].balance + change
        recorded = Recorded(*asked[:7], asked.metadata or None, balance, held, len(history) + 1)
        history.append(recorded)
        return recorded

    def apply_all(self, batch: list[Request], atomic: bool) -> list[str | None]:
        """Apply operations in order and return their outcomes; take all back if it is atomic and one is refused."""
        before = deepcopy((self.wallets, self.operations)) if atomic else None
        outcomes = [self.apply(asked) for asked in batch]
        if before is not None and any(outcomes):
            self.wallets, self.operations = before
            return [outcome or "WA425" for outcome in outcomes]
        return outcomes

    def recorded(self, asked: Request, sqlstate: str | None) -> Recorded | None:
        """Return the operation that an outcome shows: the applied one, or for a duplicate the wallet's own."""
        recorded = self.operations.get(asked.operation)
        shown = sqlstate is None or (sqlstate == "WA409" and recorded is not None and recorded.wallet == asked.wallet)
        return recorded if shown else None

    def same_request(self, asked: Request, sqlstate: str | None) -> bool | None:
        """Return what an outcome says of the operation that is recorded: None if it doesn't tell of any."""
        if sqlstate not in (None, "WA409") or asked.operation not in self.operations:
            return None
        recorded = self.recorded(asked, sqlstate)
        return recorded is not None and recorded.is_same(asked)

    def find(self, wallet: str, operation: UUID) -> tuple[str | None, Recorded | None]:
        """Return the operation of a wallet, or the SQLSTATE of the refusal."""
        if wallet not in self.wallets:
            return "WA404", None
        found = [recorded for recorded in self.wallets[wallet].history if recorded.operation == operation]
        return (None, found[0]) if found else ("WA414", None)


class Doors:
    """A running service: its two doors, and the way behind them to an empty ledger."""

    def __init__(self, running: Service) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        self._sql = database(running)
        self._superuser = database(running, "postgres")

    def empty(self) -> None:
        self._superuser.execute("truncate wallet.wallet, wallet.operation, wallet.hold")

    def make_due(self, wallet: str, holds: list[UUID]) -> datetime:
        """Let holds expire now, and return when that is."""
        now = self._superuser.execute("select clock_timestamp()").fetchone()
        assert now is not None
        for table, name in (("hold", "hold_uuid"), ("operation", "operation_uuid")):
            self._superuser.execute(
                f"update wallet.{table} set expires_at = %s where wallet_uuid = %s and {name} = any(%s)"
                + (" and operation_type = 'HOLD'" if table == "operation" else ""),
                [now[0], wallet, holds],
            )
        moment: datetime = now[0]
        return moment

    def close(self) -> None:
        self._http.close()
        self._sql.close()
        self._superuser.close()

    def rest(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Send a request and return status and answer."""
        try:
            self._http.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = self._http.getresponse()
            return answer.status, json.loads(answer.read())
        except BaseException:
            self._http.close()
            raise

    def sql(self, function: str, *arguments: object) -> tuple[str | None, list[Any]]:
        """Call a function; return None and its rows, or the SQLSTATE of the refusal, whose message is checked."""
        try:
            return None, call(self._sql, function, *arguments)
        except psycopg.Error as error:
            refusal = error
        assert refusal.sqlstate in PROBLEMS, refusal
        assert refusal.diag.message_primary == MESSAGES.get(refusal.sqlstate, refusal.diag.message_primary)
        return refusal.sqlstate, []

    def books(self, wallets: list[str]) -> tuple[dict[str, tuple[Any, ...]], list[Recorded], list[Any]]:
        """Return what each wallet is, their operations newest first, and what the audit finds."""
        held = self._sql.execute(
            "select w.uuid, w.currency, w.status, w.balance, w.seq, w.held, w.available"
            " from unnest(%s::text[]) as name, wallet.get_wallet(name) as w",
            [wallets],
        )
        operations = self._sql.execute(
            "select o.wallet_uuid, o.operation_uuid, o.operation_type, o.amount, o.counterparty_uuid, o.hold_uuid,"
            " o.expires_at, o.metadata, o.balance_after, o.held_after, o.seq"
            " from unnest(%s::text[]) as name, wallet.list_operations(name, null, 1000) as o",
            [wallets],
        )
        return (
            {uuid: tuple(rest) for uuid, *rest in held},
            [Recorded(*row) for row in operations],
            self._sql.execute("select * from wallet.verify()").fetchall(),
        )


ITS_WALLET = -1
"""Stands for the wallet of the hold that a request names."""
wallets = st.integers(0, 4)
"""Which of a sequence's names: those in NAMES, and then the random ones that the service made up."""
names = st.sampled_from(OPERATIONS)
amounts = st.sampled_from(AMOUNTS)
metadata = st.sampled_from([None] * 8 + METADATA)
nothing = st.none()
payments = st.tuples(wallets, names, st.sampled_from(TYPES[:2]), amounts, nothing, nothing, nothing, metadata)
transfers = st.tuples(wallets, names, st.just("TRANSFER"), amounts, wallets, nothing, nothing, metadata)
held = st.sampled_from(AMOUNTS[:4] * 4 + AMOUNTS)
expiries = st.sampled_from([None, None, FUTURE, FUTURE, PAST])
holds = st.tuples(wallets, names, st.just("HOLD"), held, nothing, nothing, expiries, metadata)
payers = st.sampled_from([ITS_WALLET] * 8 + [0, 1, 2])
which_holds = st.integers(0, 7)
"""The wallet of an end, mostly that of its hold; which of the HOLDs that are recorded, the latest first."""
ends = st.one_of(
    st.tuples(payers, names, st.just("WITHDRAW"), held, nothing, which_holds, nothing, metadata),
    st.tuples(payers, names, st.just("TRANSFER"), held, wallets, which_holds, nothing, metadata),
    st.tuples(payers, names, st.just("RELEASE"), nothing, nothing, which_holds, nothing, metadata),
)
good = payments | transfers | holds | ends
BAD = [
    *((0, name) for name in BAD_NAMES),
    *((1, operation) for operation in (NIL, None)),
    *((2, kind) for kind in ("deposit", "", None)),
    *((3, amount) for amount in (0, -1, -MAX - 1, None)),
    *((4, payee) for payee in (*BAD_NAMES, 1)),
    *((5, hold) for hold in (NIL, None, OPERATIONS[0])),
    (6, FUTURE),
    *((7, metadata) for metadata in BAD_METADATA),
]
"""What is wrong with a request: the position of a field, and a value for it."""


def spoil(asked: tuple[Any, ...], wrong: tuple[int, Any] | None) -> tuple[Any, ...]:
    return asked if wrong is None else (*asked[: wrong[0]], wrong[1], *asked[wrong[0] + 1 :])


mostly_good = st.builds(spoil, good, st.sampled_from([*[None] * 64, *BAD]))
ITS_OWN_FAULT = [(1, NIL), (3, None), (4, None), (5, NIL), (5, None), (6, FUTURE), (7, TOO_LARGE)]
"""What is wrong with a request as SQL sees it: in a bulk request it is refused, and the others are not."""
sendable = st.builds(spoil, good, st.sampled_from([*[None] * 40, *ITS_OWN_FAULT]))
doors = st.sampled_from(["POST", "PUT", "SQL", "batch"])
repeats = st.tuples(
    st.integers(0, 30),
    st.sampled_from(["", "", "wallet", "type", "amount", "counterparty", "hold", "expires_at", "metadata", "payee"]),
    wallets,
    st.sampled_from(AMOUNTS),
    st.sampled_from(METADATA),
)
"""Which of the applied operations, what is different, and how. `payee`: the payee of a transfer asks for a deposit."""
uneven_arrays = (
    st.lists(st.integers(0, 3) | st.none(), min_size=4, max_size=4)
    .filter(lambda lengths: len(set(lengths)) > 1)
    .map(
        lambda lengths: [
            None if length is None else [value] * length
            for value, length in zip((NAMES[0], OPERATIONS[0], "DEPOSIT", 1), lengths, strict=True)
        ]
    )
)
NO_JSON = [b"", b"{", b"\xff", b"{} {}", b"[]", b"null", b'"text"', b"{}", b"[" * 20_000]
WRONG_AMOUNTS: list[Any] = [0, -1, MAX + 1, 10**400, 1.5, 2.0**53, "1", True, [], float("nan")]
WRONG_FIELDS: list[dict[str, Any]] = [
    *({"amount": amount} for amount in WRONG_AMOUNTS),
    *({"operation_type": kind} for kind in ("deposit", "", None, 1, ["DEPOSIT"])),
    *({"operation_uuid": uuid} for uuid in ("", "x", None, 1, str(OPERATIONS[0])[:-1])),
    {"unknown": 1},
    *({"metadata": metadata} for metadata in (*BAD_METADATA[:-1], True)),
    *({"counterparty_uuid": name} for name in (*BAD_NAMES[:-1], 1)),
    *({"hold_uuid": uuid} for uuid in ("", "x", 1)),
    *({"expires_at": moment} for moment in ("", "2030-01-01", "2030-01-01T00:00:00", "infinity", 1)),
]


class Wallets(RuleBasedStateMachine):
    """Steps that a sequence is made of. Each says the same to the service and to the model, and compares."""

    def __init__(self, doors: Doors, account: Account) -> None:
        super().__init__()
        self.doors = doors
        self.counts = account.counts
        self.model = Model()
        self.names = list(NAMES)
        self.touched: set[str] = set()
        doors.empty()
        self.counts["sequences"] += 1

    def step(self, kind: str, *outcomes: str | None) -> None:
        self.counts["steps"] += 1
        self.counts[kind] += 1
        for outcome in outcomes:
            self.counts[f"outcome {outcome or 'applied'}"] += 1

    def name(self, wallet: Any) -> Any:
        return self.names[wallet % len(self.names)] if isinstance(wallet, int) else wallet

    def hold(self, which: Any) -> Any:
        """Return the name of a HOLD that is recorded, the latest first, or of any operation where there are fewer."""
        if not isinstance(which, int):
            return which
        recorded = [one.operation for one in self.model.operations.values() if one.type == "HOLD"][::-1]
        return recorded[which] if which < len(recorded) else OPERATIONS[which]

    def request(self, asked: tuple[Any, ...]) -> Request:
        hold = self.hold(asked[5])
        wallet = self.name(asked[0])
        if asked[0] == ITS_WALLET:
            wallet = self.model.operations[hold].wallet if hold in self.model.operations else self.name(0)
        request = Request(wallet, *asked[1:4], self.name(asked[4]), hold, *asked[6:])
        self.touched |= {request.wallet, request.counterparty}
        return request

    # Wallets

    @initialize(expires=st.sampled_from([False, None, FUTURE]))
    def create_first(self, expires: Any) -> None:
        for wallet in (0, 1):
            assert self.model.create(self.name(wallet)) is None
            assert self.doors.sql("create_wallet", self.name(wallet))[0] is None
        self.over_rest(Request(self.name(0), OPERATIONS[0], "DEPOSIT", 50))
        if expires is not False:
            self.over_rest(Request(self.name(0), OPERATIONS[1], "HOLD", 3, expires_at=expires))

    @rule(
        wallet=wallets | st.sampled_from(BAD_NAMES[:-1]),
        currency=st.sampled_from([*CURRENCIES * 4, *BAD_CURRENCIES]),
        door=st.sampled_from(["POST", "PUT", "SQL"]),
    )
    def create(self, wallet: Any, currency: str | None, door: str) -> None:
        name = self.name(wallet)
        expected = self.model.create(name, currency)
        self.touched.add(name)
        match door:
            case "POST":
                answer = self.rest("POST", "/api/v1/wallets", {"uuid": name, "currency": currency})
                if expected is None:
                    assert answer[0] == 201
                    assert (answer[1]["uuid"], answer[1]["balance"]) == (name, 0)
                else:
                    refused(answer, expected)
            case "PUT" if name:
                answer = self.rest("PUT", f"/api/v1/wallets/{quote(name)}", {"currency": currency})
                if expected == "WA419" and self.model.wallets[name].currency == currency:
                    assert answer[0] == 200
                    self.shows_the_wallet(name, answer[1])
                elif expected == "WA419":
                    assert (answer[0], answer[1]["code"]) == (409, "wallet_exists")
                elif expected is None:
                    assert answer[0] == 201
                    self.shows_the_wallet(name, answer[1])
                else:
                    refused(answer, expected)
            case _:
                assert self.doors.sql("create_wallet", name, currency)[0] == expected
        self.step("create a wallet", expected)

    @rule(
        wallet=wallets | st.sampled_from(BAD_NAMES[1:-1]),
        status=st.sampled_from([*STATUSES * 4, *BAD_STATUSES]),
        over_rest=st.booleans(),
    )
    def set_status(self, wallet: Any, status: str, over_rest: bool) -> None:
        name = self.name(wallet)
        expected = self.model.set_status(name, status)
        self.touched.add(name)
        if not over_rest:
            assert self.doors.sql("set_status", name, status)[0] == expected
        elif expected is None:
            answered, answer = self.rest("PATCH", f"/api/v1/wallets/{quote(name)}", {"status": status})
            assert answered == 200
            self.shows_the_wallet(name, answer)
        else:
            refused(self.rest("PATCH", f"/api/v1/wallets/{quote(name)}", {"status": status}), expected)
        self.step("set a status", expected)

    @rule(over_rest=st.booleans())
    def create_random(self, over_rest: bool) -> None:
        if over_rest:
            status, answer = self.doors.rest("POST", "/api/v1/wallets")
            assert (status, answer["balance"]) == (201, 0)
            name = answer["uuid"]
        else:
            name = self.doors.sql("create_wallet")[1][0].uuid
        assert self.model.create(name) is None
        self.names.append(name)
        self.touched.add(name)
        self.step("create a wallet with a random name", None)

    # Operations

    @rule(asked=sendable)
    def apply_over_rest(self, asked: tuple[Any, ...]) -> None:
        self.step("operation over REST", self.over_rest(self.request(asked)))

    @rule(asked=sendable)
    def put_over_rest(self, asked: tuple[Any, ...]) -> None:
        self.step("operation by PUT", self.by_put(self.request(asked)))

    @rule(asked=mostly_good)
    def apply_over_sql(self, asked: tuple[Any, ...]) -> None:
        self.step("operation over SQL", self.over_sql(self.request(asked)))

    @precondition(lambda self: self.model.operations)
    @rule(repeat=repeats, door=doors)
    def repeat(self, repeat: tuple[Any, ...], door: str) -> None:
        self.step(f"repeat by {door}", self.by(door, self.repeated(*repeat)))

    def by(self, door: str, asked: Request) -> str | None:
        match door:
            case "POST":
                return self.over_rest(asked)
            case "PUT":
                return self.by_put(asked)
            case "SQL":
                return self.over_sql(asked)
            case _:
                return self.by_batch([asked], atomic=False)[0]

    def repeated(self, which: int, differs: str, wallet: int, amount: int, metadata: Any) -> Request:
        """Return a request for what was applied: the very same, or one that differs in one thing."""
        recorded = list(self.model.operations.values())
        first = Request(*recorded[which % len(recorded)][:8])
        if first.type == "RELEASE":
            first = first._replace(amount=None)
        other = self.name(wallet)
        match differs:
            case "wallet":
                first = first._replace(wallet=other)
            case "type":
                kind = "DEPOSIT" if first.type == "WITHDRAW" else "WITHDRAW"
                first = Request(*first[:2], kind, first.amount or amount, metadata=first.metadata)
            case "amount" if first.amount:
                first = first._replace(amount=amount)
            case "counterparty" if first.amount:
                first = first._replace(type="TRANSFER", counterparty=other, expires_at=None)
            case "hold" if first.type in ("WITHDRAW", "TRANSFER", "RELEASE"):
                first = first._replace(hold=OPERATIONS[which % len(OPERATIONS)])
            case "expires_at" if first.type == "HOLD":
                first = first._replace(expires_at=FUTURE if first.expires_at is None else None)
            case "metadata":
                first = first._replace(metadata=metadata)
            case "payee" if first.counterparty:
                first = first._replace(wallet=first.counterparty, type="DEPOSIT", counterparty=None, hold=None)
        self.touched |= {first.wallet, first.counterparty}
        return first

    @rule(batch=st.lists(mostly_good, max_size=8), atomic=st.booleans())
    def batch_over_sql(self, batch: list[tuple[Any, ...]], atomic: bool) -> None:
        self.step("batch over SQL", *self.by_batch([self.request(one) for one in batch], atomic))

    @rule(batch=st.lists(payments | transfers, min_size=1, max_size=3))
    def atomic_twice(self, batch: list[tuple[Any, ...]]) -> None:
        """Send an atomic request twice, over SQL and over REST: the second is recognised if the first was applied."""
        asked = [self.request(one) for one in batch]
        self.step("atomic request twice", *self.by_batch(asked, atomic=True), *self.by_bulk(asked, atomic=True))

    @rule(batch=st.lists(sendable, max_size=8), atomic=st.booleans())
    def bulk_over_rest(self, batch: list[tuple[Any, ...]], atomic: bool) -> None:
        self.step("bulk over REST", *self.by_bulk([self.request(one) for one in batch], atomic))

    @rule(asked=good, wrong=st.sampled_from([*NO_JSON, *WRONG_FIELDS]), bulk=st.booleans(), arrays=uneven_arrays)
    def malformed(self, asked: tuple[Any, ...], wrong: bytes | dict[str, Any], bulk: bool, arrays: list[Any]) -> None:
        """Send a body that is none, or has a wrong field; and call with arrays that do not belong together."""
        request = self.request(asked)
        path = "/api/v1/operations" if bulk else f"/api/v1/wallets/{request.wallet}/operation"
        if isinstance(wrong, bytes):
            body = wrong
        else:
            fields = body_of(request) | wrong
            body = json.dumps({"operations": [{"wallet_uuid": request.wallet} | fields]} if bulk else fields).encode()
        refused(self.doors.rest("POST", path, body), "WA400")
        assert self.doors.sql("apply_operations", *arrays)[0] == "WA400"
        self.step("malformed", "WA400", "WA400")

    # Holds

    @rule(
        hold=holds,
        ends=st.lists(ends, min_size=1, max_size=3),
        order=st.randoms(use_true_random=False),
        door=st.booleans(),
    )
    def hold_and_end_in_one_batch(self, hold: Any, ends: list[Any], order: Random, door: bool) -> None:
        """A HOLD and several ends of it, in any order."""
        first = self.request(hold)
        batch = [first, *(self.request((hold[0], *end[1:5], first.operation, *end[6:])) for end in ends)]
        order.shuffle(batch)
        outcomes = self.by_bulk(batch, atomic=False) if door else self.by_batch(batch, atomic=False)
        self.step("hold and its end in one batch", *outcomes)

    @precondition(lambda self: any(wallet.open_holds for wallet in self.model.wallets.values()))
    @rule(which=st.integers(0, 7), many=st.booleans(), then=st.none() | payments | transfers | ends, door=doors)
    def time_passes(self, which: int, many: bool, then: Any, door: str) -> None:
        """A hold becomes due, or all of its wallet do at one moment; nothing is recorded until something is applied."""
        holds = [(name, hold) for name, wallet in self.model.wallets.items() for hold in wallet.open_holds]
        name, chosen = holds[which % len(holds)]
        wallet = self.model.wallets[name]
        due = wallet.open_holds if many else [chosen]
        moment = self.doors.make_due(name, [hold.uuid for hold in due])
        for hold in due:
            hold.expires_at, hold.is_due = moment, True
            recorded = self.model.operations[hold.uuid]._replace(expires_at=moment)
            wallet.history[hold.seq - 1] = self.model.operations[hold.uuid] = recorded
        self.touched.add(name)
        self.both_doors_agree_with_the_model()
        self.step("time passes", *([] if then is None else [self.by(door, self.request(then))]))

    @rule(wallet=wallets, limit=st.integers(0, 3))
    def expire_holds(self, wallet: int, limit: int) -> None:
        name = self.name(wallet)
        sqlstate, rows = self.doors.sql("expire_holds", name, limit)
        expected = "WA400" if limit == 0 else None if name in self.model.wallets else "WA404"
        assert sqlstate == expected
        if expected is None:
            assert rows[0][0] == self.model.expire(name, limit)
        self.touched.add(name)
        self.step("expire holds", expected)

    @rule(wallet=wallets, limit=st.integers(1, 3))
    def list_holds(self, wallet: int, limit: int) -> None:
        name = self.name(wallet)
        if name not in self.model.wallets:
            assert self.doors.sql("list_holds", name)[0] == "WA404"
            refused(self.doors.rest("GET", f"/api/v1/wallets/{name}/holds"), "WA404")
            return
        over_rest: list[tuple[Any, ...]] = []
        over_sql: list[tuple[Any, ...]] = []
        after: int | None = None
        while True:
            query = f"limit={limit}" + (f"&after={after}" if after else "")
            status, page = self.doors.rest("GET", f"/api/v1/wallets/{name}/holds?{query}")
            assert status == 200
            assert len(page["holds"]) <= limit
            over_rest += [
                (UUID(one["hold_uuid"]), one["seq"], one["amount"], moment_of(one.get("expires_at")))
                for one in page["holds"]
            ]
            over_sql += [
                (row.hold_uuid, row.seq, row.amount, row.expires_at)
                for row in self.doors.sql("list_holds", name, after, limit)[1]
            ]
            after = page["next"]
            if after is None:
                break
        expected = [(one.uuid, one.seq, one.amount, one.expires_at) for one in self.model.wallets[name].open_holds]
        assert over_rest == over_sql == expected
        self.step("list holds")

    # Reads

    @rule(wallet=wallets, operation=st.sampled_from(OPERATIONS))
    def read_operation(self, wallet: int, operation: UUID) -> None:
        name = self.name(wallet)
        expected, recorded = self.model.find(name, operation)
        answer = self.doors.rest("GET", f"/api/v1/wallets/{name}/operations/{operation}")
        sqlstate, rows = self.doors.sql("get_operation", name, operation)
        assert sqlstate == expected
        if expected is None:
            assert (answer[0], told(answer[1])) == (200, recorded)
            assert shown(rows[0]) == recorded
        else:
            refused(answer, expected)
        self.step("read an operation", expected)

    @rule(wallet=wallets, limit=st.integers(1, 4))
    def read_pages(self, wallet: int, limit: int) -> None:
        name = self.name(wallet)
        if name not in self.model.wallets:
            refused(self.doors.rest("GET", f"/api/v1/wallets/{name}"), "WA404")
            refused(self.doors.rest("GET", f"/api/v1/wallets/{name}/operations"), "WA404")
            assert self.doors.sql("get_wallet", name)[0] == "WA404"
            assert self.doors.sql("list_operations", name)[0] == "WA404"
        else:
            over_rest: list[Recorded] = []
            over_sql: list[Recorded] = []
            before: int | None = None
            while True:
                query = f"limit={limit}" + (f"&before={before}" if before else "")
                status, page = self.doors.rest("GET", f"/api/v1/wallets/{name}/operations?{query}")
                assert status == 200
                assert len(page["operations"]) <= limit
                over_rest += map(told, page["operations"])
                over_sql += map(shown, self.doors.sql("list_operations", name, before, limit)[1])  # type: ignore[arg-type]
                before = page["next"]
                if before is None:
                    break
            assert over_rest == over_sql == self.model.wallets[name].history[::-1]
        self.step("read a history in pages")

    @rule(wallet=wallets, which=st.integers(0, 30), width=st.integers(0, 5))
    def read_at_a_moment(self, wallet: int, which: int, width: int) -> None:
        """Read the wallet as it was when one of its operations was applied, and what came between that and another."""
        name = self.name(wallet)
        if name not in self.model.wallets:
            moment = datetime.now(UTC)
            assert self.doors.sql("get_wallet", name, moment)[0] == "WA404"
            refused(self.doors.rest("GET", f"/api/v1/wallets/{name}/balance?at={rfc3339(moment)}"), "WA404")
            return
        rows = self.doors.sql("list_operations", name, None, 1000)[1][::-1]
        moments = [row.created_at for row in rows]
        assert moments == sorted(moments)
        if not rows:
            return
        due = [(hold.expires_at, hold.amount) for hold in self.model.wallets[name].due_holds]
        moments += [moment for moment, _ in due]
        begin = moments[which % len(moments)]
        end = moments[min(which % len(moments) + width, len(moments) - 1)]
        last = shown(next(row for row in reversed(rows) if row.created_at <= begin))
        assert last is not None
        held = self.doors.sql("get_wallet", name, begin)[1][0]
        assert (held.balance, held.seq) == (last.balance_after, last.seq)
        held_then = last.held_after - sum(amount for moment, amount in due if moment <= begin)
        assert (held.held, held.available) == (held_then, held.balance - held_then)
        status, told_then = self.doors.rest("GET", f"/api/v1/wallets/{name}/balance?at={rfc3339(begin)}")
        assert (status, told_then["balance"], told_then["seq"]) == (200, held.balance, held.seq)
        assert (told_then["held"], told_then["available"]) == (held.held, held.available)
        between = [shown(row) for row in reversed(rows) if begin <= row.created_at < end]
        found = self.doors.sql("list_operations", name, None, 1000, begin, end)[1]
        assert [shown(row) for row in found] == between
        query = f"from={rfc3339(begin)}&to={rfc3339(end)}"
        status, page = self.doors.rest("GET", f"/api/v1/wallets/{name}/operations?{query}")
        assert (status, [told(one) for one in page["operations"]]) == (200, between)
        self.step("read at a moment")

    @rule(after=st.none() | wallets, limit=st.integers(1, 4), prefix=st.sampled_from([None, "", "a", "z"]))
    def list_wallets(self, after: int | None, limit: int, prefix: str | None) -> None:
        name = None if after is None else self.name(after)
        names = sorted(one for one in self.model.wallets if one > (name or ""))
        rows = self.doors.sql("list_wallets", name, limit, prefix)[1]
        assert [row.uuid for row in rows] == [one for one in names if one.startswith(prefix or "")][:limit]
        query = f"limit={limit}" + (f"&after={name}" if name else "")
        status, page = self.doors.rest("GET", f"/api/v1/wallets?{query}")
        assert (status, [one["uuid"] for one in page["wallets"]]) == (200, names[:limit])
        assert page["next"] == (names[limit - 1] if len(names) > limit else None)
        for one in page["wallets"]:
            self.shows_the_wallet(one["uuid"], one)
        self.step("list wallets")

    # What holds after each step

    @invariant()
    def both_doors_agree_with_the_model(self) -> None:
        names = list(self.model.wallets)
        held, operations, found = self.doors.books(names)
        assert held == {
            name: (one.currency, one.status, one.balance, len(one.history), one.held, one.available)
            for name, one in self.model.wallets.items()
        }
        assert operations == [one for name in names for one in reversed(self.model.wallets[name].history)]
        assert found == []
        for name in self.touched:
            self.look_at(name)
        self.touched.clear()

    def look_at(self, name: Any) -> None:
        """Compare a wallet and its history as the REST door shows them."""
        if not name:
            return
        path = f"/api/v1/wallets/{quote(name)}"
        if name not in self.model.wallets:
            refused(self.doors.rest("GET", path), "WA400" if name in BAD_NAMES else "WA404")
            return
        status, wallet = self.doors.rest("GET", path)
        assert status == 200
        assert wallet == {"id": wallet["id"], "uuid": name, "balance": self.model.wallets[name].balance}
        status, answer = self.doors.rest("GET", f"{path}/balance")
        assert (status, answer["id"]) == (200, wallet["id"])
        self.shows_the_wallet(name, answer)
        status, page = self.doors.rest("GET", f"{path}/operations?limit=1000")
        assert (status, page["next"]) == (200, None)
        assert [told(operation) for operation in page["operations"]] == self.model.wallets[name].history[::-1]

    def shows_the_wallet(self, name: str, answer: dict[str, Any]) -> None:
        wallet = self.model.wallets[name]
        expected = {"uuid": name, "currency": wallet.currency, "status": wallet.status, "balance": wallet.balance}
        expected |= {"held": wallet.held, "available": wallet.available, "seq": len(wallet.history)}
        assert {key: answer[key] for key in expected} == expected
        assert answer.keys() - expected.keys() == {"id", "created_at", "updated_at"}

    # Operations through one door

    def rest(self, method: str, path: str, body: object) -> tuple[int, Any]:
        return self.doors.rest(method, path, json.dumps(body).encode())

    def over_rest(self, asked: Request) -> str | None:
        answer = self.rest("POST", f"/api/v1/wallets/{asked.wallet}/operation", body_of(asked))
        expected = self.model.apply(asked)
        if expected is None:
            assert answer == (200, str(asked.operation))
            return None
        refused(answer, expected)
        self.tells_of_a_duplicate(asked, expected, answer[1])
        return expected

    def by_put(self, asked: Request) -> str | None:
        body = body_of(asked)
        path = f"/api/v1/wallets/{asked.wallet}/operations/{body.pop('operation_uuid')}"
        status, answer = self.rest("PUT", path, body)
        expected = self.model.apply(asked)
        if expected is None or self.model.same_request(asked, expected):
            assert (status, told(answer)) == (201 if expected is None else 200, self.model.operations[asked.operation])
        elif expected == "WA409":
            assert (status, answer["code"], answer["detail"]) == (409, "duplicate_operation", MESSAGES["WA409"])
            self.tells_of_a_duplicate(asked, expected, answer)
        else:
            refused((status, answer), expected)
        return expected

    def tells_of_a_duplicate(self, asked: Request, outcome: str, answer: dict[str, Any]) -> None:
        """Compare what a refusal tells of the operation that is recorded; only of the same wallet's is there any."""
        recorded = self.model.recorded(asked, outcome)
        if recorded is None:
            assert "operation" not in answer
            assert "same_request" not in answer
        else:
            assert told(answer["operation"]) == recorded
            assert answer["same_request"] is self.model.same_request(asked, outcome)

    def over_sql(self, asked: Request) -> str | None:
        sqlstate, rows = self.doors.sql("apply_operation", *arguments_of(asked))
        expected = self.model.apply(asked)
        assert sqlstate == expected
        if expected is None:
            assert shown(rows[0]) == self.model.operations[asked.operation]
        return expected

    def by_batch(self, asked: list[Request], atomic: bool) -> list[str | None]:
        outcomes = self.model.apply_all(asked, atomic)
        expected = [
            (one, self.model.recorded(request, one), self.model.same_request(request, one))
            for request, one in zip(asked, outcomes, strict=True)
        ]
        columns = [list(column) for column in zip(*map(arguments_of, asked), strict=True)] or [[]] * 8
        sqlstate, rows = self.doors.sql("apply_operations", *columns, atomic)
        assert sqlstate is None
        assert [row.ordinal for row in rows] == [*range(1, len(asked) + 1)]
        assert [(row.sqlstate, shown(row), row.same_request) for row in rows] == expected
        assert all(row.message == MESSAGES.get(row.sqlstate, row.message) for row in rows)
        assert all((row.message is None) == (row.sqlstate is None) for row in rows)
        return outcomes

    def by_bulk(self, asked: list[Request], atomic: bool) -> list[str | None]:
        operations = [{"wallet_uuid": one.wallet} | body_of(one) for one in asked]
        status, answer = self.rest("POST", "/api/v1/operations", {"operations": operations, "atomic": atomic})
        outcomes = self.model.apply_all(asked, atomic)
        assert status == 200
        for one, outcome, shown_result in zip(asked, outcomes, answer["results"], strict=True):
            result: dict[str, Any] = {"operation_uuid": str(one.operation), "applied": outcome is None}
            if outcome is None:
                recorded = self.model.operations[one.operation]
                result |= {"balance_after": recorded.balance_after, "held_after": recorded.held_after}
                result |= {"seq": recorded.seq}
            else:
                detail = MESSAGES.get(outcome, shown_result["detail"])
                result |= {"code": CODES[outcome], "detail": detail}
                self.tells_of_a_duplicate(one, outcome, shown_result)
                result |= {name: shown_result[name] for name in ("operation", "same_request") if name in shown_result}
            assert shown_result == result
        return outcomes


CODES = {sqlstate: code for sqlstate, (_, code) in PROBLEMS.items()} | {"WA425": "not_applied"}


def rfc3339(moment: datetime) -> str:
    return quote(moment.astimezone(UTC).isoformat().replace("+00:00", "Z"))


def moment_of(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def body_of(asked: Request) -> dict[str, Any]:
    body = {"operation_uuid": str(asked.operation), "operation_type": asked.type}
    optional = {
        "amount": asked.amount,
        "counterparty_uuid": asked.counterparty,
        "hold_uuid": None if asked.hold is None else str(asked.hold),
        "expires_at": None if asked.expires_at is None else asked.expires_at.isoformat(),
        "metadata": asked.metadata,
    }
    return body | {name: value for name, value in optional.items() if value is not None}


def arguments_of(asked: Request) -> tuple[Any, ...]:
    """Return the arguments of apply_operation for a request."""
    metadata = None if asked.metadata is None else Jsonb(asked.metadata)
    return (*asked[:7], metadata)


def refused(answer: tuple[int, Any], sqlstate: str) -> None:
    """Assert that an answer is the problem for a SQLSTATE."""
    status, problem = answer
    assert (status, problem["code"]) == PROBLEMS[sqlstate], problem
    assert problem["detail"] == MESSAGES.get(sqlstate, problem["detail"])


def told(operation: dict[str, Any]) -> Recorded:
    """Return an operation as the REST door shows it."""
    assert None not in operation.values()
    return Recorded(
        operation["wallet_uuid"],
        UUID(operation["operation_uuid"]),
        operation["operation_type"],
        operation["amount"],
        operation.get("counterparty_uuid"),
        UUID(operation["hold_uuid"]) if "hold_uuid" in operation else None,
        moment_of(operation.get("expires_at")),
        operation.get("metadata"),
        operation["balance_after"],
        operation["held_after"],
        operation["seq"],
    )


def shown(row: Any) -> Recorded | None:
    """Return an operation as the SQL door shows it."""
    if row.seq is None:
        return None
    return Recorded(
        row.wallet_uuid,
        row.operation_uuid,
        row.operation_type,
        row.amount,
        row.counterparty_uuid,
        row.hold_uuid,
        row.expires_at,
        row.metadata,
        row.balance_after,
        row.held_after,
        row.seq,
    )


def run(scale: Scale) -> Account:
    """Run random sequences of steps against the service and the model; a finding is the shortest that differs."""
    account = Account()
    with service() as running:
        doors = Doors(running)

        @hypothesis.seed(scale.random("model").getrandbits(64))
        def wallets_of_a_sequence() -> Wallets:
            return Wallets(doors, account)

        try:
            run_state_machine_as_test(
                wallets_of_a_sequence,  # type: ignore[arg-type] # "or a function", says its documentation
                settings=hypothesis.settings(
                    max_examples=scale.times(10_000, 200),
                    stateful_step_count=STEPS,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck),
                    database=None,
                    deadline=None,
                    report_multiple_bugs=False,
                ),
            )
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            steps = getattr(error, "__notes__", [])
            account.findings.append("\n".join([repr(error), f"{where.name}: {where.line}", *steps]))
        finally:
            doors.close()
    return account
