"""A model of the service in a few lines of Python, and Hypothesis to find what tells the two apart.

A sequence starts from an empty ledger and takes its names, operation_uuids and amounts from small sets, so that
repeats, unknown wallets, empty wallets and full ones come about by themselves. After each step both doors are read.
"""

import http.client
import json
import traceback
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

from tests.api.test_process import Service
from tests.cases import MAX, MESSAGES, NIL, NIL_MESSAGE, PROBLEMS
from tests.db.door import call
from tests.proof.section import Account, Scale
from tests.proof.service import database, service

STEPS = 16
"""Steps of a sequence."""

NAMES = ["a", "A", "z" * 64]
BAD_NAMES = ["", "a b", "a\n", "wället", "z" * 65, None]
OPERATIONS = [UUID(int=number << 64 | 7) for number in range(1, 13)]
AMOUNTS = [1, 2, 3, 50, 2**62, MAX - 2, MAX - 1, MAX]
TYPES = ["DEPOSIT", "WITHDRAW"]


class Request(NamedTuple):
    wallet: Any
    operation: Any
    type: Any
    amount: Any


class Recorded(NamedTuple):
    """An operation of a wallet's history."""

    wallet: str
    operation: UUID
    type: str
    amount: int
    balance_after: int
    seq: int


class Model:
    """What the service is supposed to be."""

    def __init__(self) -> None:
        self.wallets: dict[str, list[Recorded]] = {}
        self.operations: dict[UUID, Recorded] = {}

    def create(self, wallet: str) -> str | None:
        """Create a wallet and return None, or the SQLSTATE of the refusal."""
        if wallet in BAD_NAMES:
            return "WA400"
        if wallet in self.wallets:
            return "WA419"
        self.wallets[wallet] = []
        return None

    def balance(self, wallet: str) -> int:
        history = self.wallets[wallet]
        return history[-1].balance_after if history else 0

    def apply(self, asked: Request) -> str | None:
        """Apply an operation and return None, or the SQLSTATE of the refusal."""
        if (
            asked.wallet in BAD_NAMES
            or asked.operation in (None, NIL)
            or asked.type not in TYPES
            or asked.amount is None
            or asked.amount < 1
        ):
            return "WA400"
        if asked.wallet not in self.wallets:
            return "WA404"
        if asked.operation in self.operations:
            return "WA409"
        after = self.balance(asked.wallet) + (asked.amount if asked.type == "DEPOSIT" else -asked.amount)
        if after < 0:
            return "WA402"
        if after > MAX:
            return "WA416"
        history = self.wallets[asked.wallet]
        recorded = Recorded(*asked, after, len(history) + 1)
        history.append(recorded)
        self.operations[asked.operation] = recorded
        return None

    def recorded(self, asked: Request, sqlstate: str | None) -> Recorded | None:
        """Return the operation that an outcome shows: the applied one, or for a duplicate the wallet's own."""
        recorded = self.operations.get(asked.operation)
        shown = sqlstate is None or (sqlstate == "WA409" and recorded is not None and recorded.wallet == asked.wallet)
        return recorded if shown else None

    def find(self, wallet: str, operation: UUID) -> str | None:
        """Return None for an operation of a wallet, or the SQLSTATE of the refusal."""
        if wallet not in self.wallets:
            return "WA404"
        return None if operation in {recorded.operation for recorded in self.wallets[wallet]} else "WA414"


class Doors:
    """A running service: its two doors, and the way behind them to an empty ledger."""

    def __init__(self, running: Service) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        self._sql = database(running)
        self._superuser = database(running, "postgres")

    def empty(self) -> None:
        self._superuser.execute("truncate wallet.wallet, wallet.operation")

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

    def books(self, wallets: list[str]) -> tuple[dict[str, tuple[int, int]], list[Recorded], list[Any]]:
        """Return each wallet's balance and seq, their operations newest first, and what the audit finds."""
        held = self._sql.execute(
            "select w.uuid, w.balance, w.seq from unnest(%s::text[]) as name, wallet.get_wallet(name) as w", [wallets]
        )
        operations = self._sql.execute(
            "select o.wallet_uuid, o.operation_uuid, o.operation_type, o.amount, o.balance_after, o.seq"
            " from unnest(%s::text[]) as name, wallet.list_operations(name, null, 1000) as o",
            [wallets],
        )
        return (
            {uuid: (balance, seq) for uuid, balance, seq in held},
            [Recorded(*row) for row in operations],
            self._sql.execute("select * from wallet.verify()").fetchall(),
        )


wallets = st.integers(0, 4)
"""Which of a sequence's names: those in NAMES, and then the random ones that the service made up."""
good = st.tuples(wallets, st.sampled_from(OPERATIONS), st.sampled_from(TYPES), st.sampled_from(AMOUNTS))
BAD = [
    *((0, name) for name in BAD_NAMES),
    *((1, operation) for operation in (NIL, None)),
    *((2, kind) for kind in ("deposit", "", None)),
    *((3, amount) for amount in (0, -1, -MAX - 1, None)),
]
"""What is wrong with a request: the position of a field, and a value for it."""


def spoil(asked: tuple[Any, ...], wrong: tuple[int, Any] | None) -> tuple[Any, ...]:
    return asked if wrong is None else (*asked[: wrong[0]], wrong[1], *asked[wrong[0] + 1 :])


mostly_good = st.builds(spoil, good, st.sampled_from([*[None] * 60, *BAD]))
good_or_nil = st.builds(spoil, good, st.sampled_from([*[None] * 15, (1, NIL)]))
repeats = st.tuples(
    st.integers(0, 30), st.none() | wallets, st.none() | st.sampled_from(TYPES), st.none() | st.sampled_from(AMOUNTS)
)
"""Which of the applied operations, and what is different: the wallet, the type, the amount."""
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
WRONG_AMOUNTS: list[Any] = [0, -1, MAX + 1, 10**400, 1.5, 2.0**53, "1", True, None, [], float("nan")]
WRONG_FIELDS: list[dict[str, Any]] = [
    *({"amount": amount} for amount in WRONG_AMOUNTS),
    *({"operation_type": kind} for kind in ("deposit", "", None, 1, ["DEPOSIT"])),
    *({"operation_uuid": uuid} for uuid in ("", "x", None, 1, str(OPERATIONS[0])[:-1])),
    {"unknown": 1},
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

    def request(self, asked: tuple[Any, ...]) -> Request:
        request = Request(self.name(asked[0]), *asked[1:])
        self.touched.add(request.wallet)
        return request

    # Wallets

    @initialize()
    def create_first(self) -> None:
        self.create(0, over_rest=True)
        self.over_rest(Request(self.name(0), OPERATIONS[0], "DEPOSIT", 50))

    @rule(wallet=wallets | st.sampled_from(BAD_NAMES[:-1]), over_rest=st.booleans())
    def create(self, wallet: Any, over_rest: bool) -> None:
        name = self.name(wallet)
        expected = self.model.create(name)
        self.touched.add(name)
        if over_rest:
            answer = self.doors.rest("POST", "/api/v1/wallets", json.dumps({"uuid": name}).encode())
            if expected is None:
                assert answer[0] == 201
                assert (answer[1]["uuid"], answer[1]["balance"]) == (name, 0)
            else:
                refused(answer, expected)
        else:
            assert self.doors.sql("create_wallet", name)[0] == expected
        self.step("create a wallet", expected)

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

    @rule(asked=good_or_nil)
    def apply_over_rest(self, asked: tuple[Any, ...]) -> None:
        self.step("operation over REST", self.over_rest(self.request(asked)))

    @rule(asked=mostly_good)
    def apply_over_sql(self, asked: tuple[Any, ...]) -> None:
        self.step("operation over SQL", self.over_sql(self.request(asked)))

    @precondition(lambda self: self.model.operations)
    @rule(repeat=repeats)
    def repeat_over_rest(self, repeat: tuple[Any, ...]) -> None:
        self.step("repeat over REST", self.over_rest(self.repeat(*repeat)))

    @precondition(lambda self: self.model.operations)
    @rule(repeat=repeats)
    def repeat_over_sql(self, repeat: tuple[Any, ...]) -> None:
        self.step("repeat over SQL", self.over_sql(self.repeat(*repeat)))

    def repeat(self, which: int, wallet: int | None, kind: str | None, amount: int | None) -> Request:
        """Return a request for what was applied: the very same, or with another wallet, type or amount."""
        recorded = list(self.model.operations.values())
        first = recorded[which % len(recorded)]
        name = first.wallet if wallet is None else self.name(wallet)
        self.touched.add(name)
        return Request(name, first.operation, kind or first.type, amount or first.amount)

    @rule(batch=st.lists(mostly_good, max_size=8))
    def batch_over_sql(self, batch: list[tuple[Any, ...]]) -> None:
        asked = [self.request(one) for one in batch]
        expected = []
        for one in asked:
            outcome = self.model.apply(one)
            expected.append((outcome, self.model.recorded(one, outcome)))
        columns = [list(column) for column in zip(*asked, strict=True)] or [[], [], [], []]
        sqlstate, rows = self.doors.sql("apply_operations", *columns)
        assert sqlstate is None
        assert [row.ordinal for row in rows] == [*range(1, len(asked) + 1)]
        assert [(row.sqlstate, shown(row)) for row in rows] == expected
        assert all(row.message == MESSAGES.get(row.sqlstate, row.message) for row in rows)
        assert all((row.message is None) == (row.sqlstate is None) for row in rows)
        self.step("batch over SQL", *(outcome for outcome, _ in expected))

    @rule(batch=st.lists(good_or_nil, max_size=8))
    def bulk_over_rest(self, batch: list[tuple[Any, ...]]) -> None:
        asked = [self.request(one) for one in batch]
        outcomes = [(one, self.model.apply(one)) for one in asked]
        operations = [{"wallet_uuid": one.wallet} | body_of(one) for one in asked]
        status, answer = self.doors.rest("POST", "/api/v1/operations", json.dumps({"operations": operations}).encode())
        assert status == 200
        expected = []
        for (one, outcome), shown_result in zip(outcomes, answer["results"], strict=True):
            result: dict[str, Any] = {"operation_uuid": str(one.operation), "applied": outcome is None}
            if outcome is None:
                recorded = self.model.operations[one.operation]
                result |= {"balance_after": recorded.balance_after, "seq": recorded.seq}
            else:
                result |= {"code": PROBLEMS[outcome][1], "detail": MESSAGES.get(outcome, NIL_MESSAGE)}
                self.tells_of_a_duplicate(one, outcome, shown_result)
                result |= {name: shown_result[name] for name in ("operation", "same_request") if name in shown_result}
            expected.append(result)
        assert answer == {"results": expected}
        self.step("bulk over REST", *(outcome for _, outcome in outcomes))

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

    # Reads

    @rule(wallet=wallets, operation=st.sampled_from(OPERATIONS))
    def read_operation(self, wallet: int, operation: UUID) -> None:
        name = self.name(wallet)
        expected = self.model.find(name, operation)
        answer = self.doors.rest("GET", f"/api/v1/wallets/{name}/operations/{operation}")
        sqlstate, rows = self.doors.sql("get_operation", name, operation)
        assert sqlstate == expected
        if expected is None:
            assert (answer[0], told(answer[1])) == (200, self.model.operations[operation])
            assert shown(rows[0]) == self.model.operations[operation]
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
            assert over_rest == over_sql == self.model.wallets[name][::-1]
        self.step("read a history in pages")

    # What holds after each step

    @invariant()
    def both_doors_agree_with_the_model(self) -> None:
        names = list(self.model.wallets)
        held, operations, found = self.doors.books(names)
        assert held == {name: (self.model.balance(name), len(self.model.wallets[name])) for name in names}
        assert operations == [one for name in names for one in reversed(self.model.wallets[name])]
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
        assert (status, wallet["uuid"], wallet["balance"]) == (200, name, self.model.balance(name))
        status, page = self.doors.rest("GET", f"{path}/operations?limit=1000")
        assert (status, page["next"]) == (200, None)
        assert [told(operation) for operation in page["operations"]] == self.model.wallets[name][::-1]

    # One operation through one door

    def over_rest(self, asked: Request) -> str | None:
        answer = self.doors.rest(
            "POST", f"/api/v1/wallets/{asked.wallet}/operation", json.dumps(body_of(asked)).encode()
        )
        expected = self.model.apply(asked)
        if expected is None:
            assert answer == (200, str(asked.operation))
            return None
        refused(answer, expected)
        self.tells_of_a_duplicate(asked, expected, answer[1])
        return expected

    def tells_of_a_duplicate(self, asked: Request, outcome: str, answer: dict[str, Any]) -> None:
        """Compare what a refusal tells of the operation that is recorded; only of the same wallet's is there any."""
        recorded = self.model.recorded(asked, outcome)
        if recorded is None:
            assert "operation" not in answer
            assert "same_request" not in answer
        else:
            assert told(answer["operation"]) == recorded
            assert answer["same_request"] is ((asked.type, asked.amount) == (recorded.type, recorded.amount))

    def over_sql(self, asked: Request) -> str | None:
        sqlstate, rows = self.doors.sql("apply_operation", *asked)
        expected = self.model.apply(asked)
        assert sqlstate == expected
        if expected is None:
            assert shown(rows[0]) == self.model.operations[asked.operation]
        return expected


def body_of(asked: Request) -> dict[str, Any]:
    return {"operation_uuid": str(asked.operation), "operation_type": asked.type, "amount": asked.amount}


def refused(answer: tuple[int, Any], sqlstate: str) -> None:
    """Assert that an answer is the problem for a SQLSTATE."""
    status, problem = answer
    assert (status, problem["code"]) == PROBLEMS[sqlstate], problem
    assert problem["detail"] == MESSAGES.get(sqlstate, problem["detail"])


def told(operation: dict[str, Any]) -> Recorded:
    """Return an operation as the REST door shows it."""
    return Recorded(
        operation["wallet_uuid"],
        UUID(operation["operation_uuid"]),
        operation["operation_type"],
        operation["amount"],
        operation["balance_after"],
        operation["seq"],
    )


def shown(row: Any) -> Recorded | None:
    """Return an operation as the SQL door shows it."""
    if row.seq is None:
        return None
    return Recorded(row.wallet_uuid, row.operation_uuid, row.operation_type, row.amount, row.balance_after, row.seq)


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
