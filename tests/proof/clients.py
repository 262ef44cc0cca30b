"""64 clients over REST, who write down what they ask before they send it and what came of it, and some readers."""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from app.calls.refusals import NO_SUCCESS
from tests.proof.history import APPLIED, DUPLICATE, NOT_APPLIED, Attempt, History, Operation, Read, Row

CLIENTS = 64
READERS = 4
HOT = "hot"
WALLETS = (HOT, *(f"spread{number}" for number in range(20)))
CIRCLE = ("circle0", "circle1", "circle2")
"""Wallets that only pay each other: their sum stays what it is."""
CAPITAL = 100
"""What each of them is given at first."""
OTHER = "duplicate of another request"
RECENT = 200
"""Operations, answered or not, of which one is sent again now and then; HOLDs, of which one is ended."""
LIVES = (None, None, 3600.0, 0.05, 0.3, 1.0, 3.0)
"""Seconds until a hold expires; None: never."""


class Answer(NamedTuple):
    """A response: the status, the head with the headers in it, the decoded body."""

    status: int
    head: bytes
    body: Any


class Lost(Exception):
    """The connection ended before the answer had come."""


class Connection:
    """A keep-alive connection to the service, over HTTP/1.1."""

    def __init__(self, port: int, patience: float = 30) -> None:
        self._port = port
        self._patience = patience
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.answers = 0
        """Answers that this connection has carried."""

    async def open(self) -> None:
        """Connect unless it is connected, however long nobody listens."""
        while self._writer is None:
            try:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                self.answers = 0
            except OSError:
                await asyncio.sleep(0.02)

    @property
    def is_open(self) -> bool:
        """Tell whether it is connected, as far as is known."""
        return self._writer is not None

    def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None

    async def ask(self, path: str, body: object = None, method: str = "POST") -> Answer:
        """Send a GET, or a body, before anything is awaited. Raises Lost, or TimeoutError if it hangs."""
        assert self._reader is not None
        assert self._writer is not None
        encoded = b"" if body is None else msgspec.json.encode(body)
        method = "GET" if body is None else method
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n"
        try:
            self._writer.write(head.encode() + b"\r\n" + encoded)
            async with asyncio.timeout(self._patience):
                answer = await self._reader.readuntil(b"\r\n\r\n")
                lowered = answer.lower()
                _, _, after = lowered.partition(b"\r\ncontent-length: ")
                content = await self._reader.readexactly(int(after.partition(b"\r\n")[0] or 0))
        except (OSError, asyncio.IncompleteReadError) as error:  # a TimeoutError is an OSError
            self.close()
            if isinstance(error, TimeoutError):
                raise
            raise Lost from None
        self.answers += 1
        if b"\r\nconnection: close" in lowered:
            self.close()
        return Answer(int(answer[9:12]), lowered, msgspec.json.decode(content) if content else None)


class Load:
    """Clients that deposit, withdraw, transfer, hold, capture and release until they are told to stop, over REST.

    Most money is on one hot wallet; withdrawals are larger than deposits, so that wallets are empty again and again.
    Operations are sent again while they are under way and after they were answered, by POST, PUT and in bulk. An atomic
    request is only sent again as a whole.
    """

    def __init__(self, port: int, random: Random, history: History, deadline: float = 10) -> None:
        self.history = history
        self.successes = 0
        self.last_success = 0.0
        """When an operation was last answered with a 200."""
        self.deadline = deadline
        self._port = port
        self._patience = deadline + 10
        self._lingers = deadline + 1
        self._random = random
        self._over = False
        self._recent: deque[Operation] = deque(maxlen=RECENT)
        self._holds: deque[Operation] = deque(maxlen=RECENT)
        self._requests = itertools.count(1)

    @contextlib.asynccontextmanager
    async def running(self, database: str) -> AsyncIterator[None]:
        """Run the clients and the readers, the one over SQL on a database (URI); wait until all have had an answer."""
        self._over = False
        sources = [Random(self._random.getrandbits(64)) for _ in range(CLIENTS + READERS)]
        clients = [asyncio.create_task(self._client(source)) for source in sources[READERS:]]
        readers = [asyncio.create_task(self._read_balances(source)) for source in sources[:READERS]]
        readers.append(asyncio.create_task(self._read_snapshots(database)))
        try:
            yield
        finally:
            self._over = True
            done, hanging = await asyncio.wait(clients, timeout=self._patience + 5)
            for task in (*hanging, *readers):
                task.cancel()
            await asyncio.gather(*hanging, *readers, return_exceptions=True)
            if hanging:
                self.history.complaints["a client had no answer, nor an error, at the end"] += len(hanging)
        for client in done:
            client.result()

    async def progress(self, successes: int, seconds: float = 30) -> None:
        """Wait until so many more operations have succeeded. Raises TimeoutError if they don't."""
        enough = self.successes + successes
        async with asyncio.timeout(seconds):
            while self.successes < enough:
                await asyncio.sleep(0.005)

    async def success_after(self, moment: float, seconds: float = 30) -> float:
        """Wait until an operation is answered with a 200 after a moment, and return when."""
        async with asyncio.timeout(seconds):
            while self.last_success <= moment:
                await asyncio.sleep(0.002)
        return self.last_success

    async def settle(self) -> None:
        """Ask for every operation whose outcome is unknown until it is known, 16 at a time."""
        requests = {operation.together[0].uuid: operation for operation in self.history.open()}
        waiting = list(requests.values())

        async def settle() -> None:
            with contextlib.closing(Connection(self._port, self._patience)) as connection:
                while waiting:
                    operation = waiting.pop()
                    while any(one.is_open for one in operation.together):
                        await asyncio.sleep(
                            max(one.unknown_until or 0 for one in operation.together) - time.monotonic()
                        )
                        await connection.open()
                        await self.ask(connection, operation)

        async with asyncio.timeout(120):
            await asyncio.gather(*(settle() for _ in range(16)))

    async def ask(self, connection: Connection, operation: Operation) -> None:
        """Make one attempt at an operation, or at the atomic request that it is in, and write down what came of it."""
        if operation.bundle:
            await self.ask_for_many(connection, operation.bundle, atomic=True)
            return
        attempt = self._write_down(connection, operation)
        put = self._random.random() < 0.5
        answer = await self._answer_to(connection, operation.wallet, _body(operation), put=put)
        self._note_end(answer, attempt)
        if answer is None:
            return
        if answer.status in (200, 201) and put:
            attempt.outcome = APPLIED if answer.status == 201 else DUPLICATE
            attempt.told = _row(answer.body)
        elif answer.status == 200:
            attempt.outcome = APPLIED
            if answer.body != str(operation.uuid):
                self.history.complaints["a 200 that names another operation"] += 1
        elif answer.status < 500 or answer.body["code"] in NOT_APPLIED:
            attempt.outcome, attempt.told = _refusal(answer.body)
        if answer.status == 409:
            attempt.outcome = OTHER
        self._succeeded(attempt.outcome == APPLIED, attempt.ended)

    async def ask_for_another(self, connection: Connection, operation: Operation) -> None:
        """Ask for a request that differs, under the uuid of an operation that is known to be applied: it is refused."""
        put = self._random.random() < 0.5
        body = _body(operation) | {"amount": operation.amount + 1}
        answer = await self._answer_to(connection, operation.wallet, body, put=put)
        if answer is None or answer.status in (429, 503):
            return
        refused = answer.status == (409 if put else 400) and answer.body["code"] == "duplicate_operation"
        if not refused or answer.body["same_request"] or _row(answer.body["operation"]).uuid != operation.uuid:
            self.history.complaints[f"another request under a uuid was answered {answer.status} {answer.body}"] += 1

    async def ask_for_many(self, connection: Connection, operations: list[Operation], *, atomic: bool = False) -> None:
        """Make one attempt at each of some operations in a bulk request. No uuid stands in it twice."""
        attempts = [self._write_down(connection, operation) for operation in operations]
        number = next(self._requests) if atomic else None
        for attempt in attempts:
            attempt.in_bulk = True
            attempt.request = number
        body = [{"wallet_uuid": operation.wallet, **_body(operation)} for operation in operations]
        answer = await self._answer(connection, "/api/v1/operations", {"operations": body, "atomic": atomic})
        ended = self._note_end(answer, *attempts)
        if answer is not None and answer.status == 200:
            for operation, attempt, result in zip(operations, attempts, answer.body["results"], strict=True):
                if result["applied"]:
                    attempt.outcome, attempt.told = APPLIED, _applied(operation, result)
                else:
                    attempt.outcome, attempt.told = _refusal(result)
        elif answer is not None and (answer.status < 500 or answer.body["code"] in NOT_APPLIED):
            for attempt in attempts:
                attempt.outcome = answer.body["code"]
        self._succeeded(sum(attempt.outcome == APPLIED for attempt in attempts), ended)

    async def deposit_and_read(self, random: Random, over: float) -> None:
        """Deposit and read in turn, on one connection, until a moment."""
        with contextlib.closing(Connection(self._port, self._patience)) as connection:
            while time.monotonic() < over:
                wallet = random.choice(WALLETS)
                await connection.open()
                await self.ask(connection, self._new(random, wallet, "DEPOSIT"))
                await connection.open()
                await self._read(connection, wallet)

    async def create_wallets(self) -> None:
        """Create the wallets: empty, but for those of the circle."""
        with contextlib.closing(Connection(self._port)) as connection:
            for wallet in (*WALLETS, *CIRCLE):
                await connection.open()
                answer = await connection.ask("/api/v1/wallets", {"uuid": wallet})
                assert answer.status == 201, answer
            for wallet in CIRCLE:
                await connection.open()
                await self.ask(connection, self._operation(wallet, "DEPOSIT", CAPITAL))

    async def _client(self, random: Random) -> None:
        again: Operation | None = None
        with contextlib.closing(Connection(self._port, self._patience)) as connection:
            while not self._over:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await connection.open()
                if connection.is_open:
                    again = await self._one_step(connection, random, again)

    async def _one_step(self, connection: Connection, random: Random, again: Operation | None) -> Operation | None:
        """Ask for something and return the operation to ask for next, if the outcome of this one is unknown."""
        choice = random.random()
        if again is None and choice < 0.03:
            await self.ask_for_many(connection, self._some(random, random.randint(1, 20)))
            return None
        if again is None and choice < 0.05 and (applied := self._applied_before(random)):
            await self.ask_for_another(connection, applied)
            return None
        operation = again or self._next(random)
        if again is not None and not again.bundle and random.random() < 0.3:  # it may be asked again on the other path
            await self.ask_for_many(connection, [operation])
        else:
            await self.ask(connection, operation)
        return operation if operation.is_open and random.random() < 0.5 else None

    def _next(self, random: Random) -> Operation:
        """Return an operation to ask for: a new one, one of an atomic request, or one that was asked for before."""
        kinds = ("new", "transfer", "circle", "together", "payment", "hold", "end", "again")
        match random.choices(kinds, (40, 13, 8, 5, 2, 9, 13, 10))[0]:
            case "again" if self._recent:
                return random.choice(self._recent)
            case "together":
                return self._together([self._new(random, transfers=0.4) for _ in range(random.randint(2, 5))])
            case "payment":
                hold = self._hold(random, lives=(None, 3600.0))
                return self._together([hold, self._end(random, hold), self._new(random, hold.wallet, "WITHDRAW")])
            case "hold":
                return self._hold(random)
            case "end" if self._holds:
                return self._end(random, random.choice(self._holds))
            case "transfer":
                return self._new(random, transfers=1)
            case "circle":
                payer, payee = random.sample(CIRCLE, 2)
                return self._operation(payer, "TRANSFER", random.randint(1, CAPITAL), payee)
        return self._new(random)

    def _together(self, bundle: list[Operation]) -> Operation:
        """Put operations in one atomic request and return the first."""
        for operation in bundle:
            operation.bundle = bundle
        return bundle[0]

    def _hold(self, random: Random, lives: tuple[float | None, ...] = LIVES) -> Operation:
        wallet = HOT if random.random() < 0.4 else random.choice(WALLETS)
        operation = self._operation(wallet, "HOLD", random.randint(1, 100))
        seconds = random.choice(lives)
        if seconds is not None:
            operation.due = time.monotonic() + seconds
            operation.expires_at = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        self._holds.append(operation)
        return operation

    def _end(self, random: Random, hold: Operation) -> Operation:
        """Return a capture of a hold, of part of it or now and then of more than it is, or its release."""
        kind = random.choice(("WITHDRAW", "TRANSFER", "RELEASE"))
        payee = random.choice([one for one in WALLETS if one != hold.wallet]) if kind == "TRANSFER" else None
        amount = hold.amount if random.random() < 0.5 else random.randint(1, hold.amount + hold.amount // 4)
        operation = self._operation(hold.wallet, kind, hold.amount if kind == "RELEASE" else amount, payee)
        operation.hold = hold.uuid
        return operation

    def _applied_before(self, random: Random) -> Operation | None:
        """Return an operation with an amount that is known to be applied."""
        known = [one for one in self._recent if one.acknowledged is not None and one.kind != "RELEASE"]
        return random.choice(known) if known else None

    def _new(
        self, random: Random, wallet: str | None = None, kind: str | None = None, transfers: float = 0
    ) -> Operation:
        wallet = wallet or (HOT if random.random() < 0.4 else random.choice(WALLETS))
        if random.random() < transfers:
            payee = random.choice([other for other in WALLETS if other != wallet])
            return self._operation(wallet, "TRANSFER", random.randint(1, 100), payee)
        kind = kind or random.choice(("DEPOSIT", "WITHDRAW"))
        return self._operation(wallet, kind, random.randint(1, 100 if kind == "DEPOSIT" else 150))

    def _operation(self, wallet: str, kind: str, amount: int, payee: str | None = None) -> Operation:
        uuid = UUID(int=self._random.getrandbits(128), version=4)
        operation = Operation(wallet, uuid, kind, amount, payee=payee)
        self.history.operations[uuid] = operation
        self._recent.append(operation)
        return operation

    def _some(self, random: Random, count: int) -> list[Operation]:
        alone = [operation for operation in self._recent if not operation.bundle]
        again = random.sample(alone, min(len(alone), count // 4))
        return [*again, *self._several(random, count - len(again))]

    def _several(self, random: Random, count: int) -> list[Operation]:
        """Return new operations, some of them holds and ends, in any order."""
        several: list[Operation] = []
        while len(several) < count:
            if random.random() < 0.2:
                several.append(self._hold(random))
            if random.random() < 0.3 and self._holds:
                several.append(self._end(random, random.choice((self._holds[-1], random.choice(self._holds)))))
            several.append(self._new(random, transfers=0.3))
        random.shuffle(several)
        return several

    def _write_down(self, connection: Connection, operation: Operation) -> Attempt:
        attempt = Attempt(time.monotonic(), first_on_connection=connection.answers == 0)
        operation.attempts.append(attempt)
        return attempt

    def _note_end(self, answer: Answer | None, *attempts: Attempt) -> float:
        """Write down when a request ended, and whether it may still have an effect; return when."""
        ended = time.monotonic()
        for attempt in attempts:
            attempt.ended = ended
            attempt.lingers = self._lingers if answer is None else 0
        return ended

    async def _answer_to(
        self, connection: Connection, wallet: str, body: dict[str, object], *, put: bool
    ) -> Answer | None:
        """Ask for an operation by PUT or POST."""
        if not put:
            return await self._answer(connection, f"/api/v1/wallets/{wallet}/operation", body)
        path = f"/api/v1/wallets/{wallet}/operations/{body.pop('operation_uuid')}"
        return await self._answer(connection, path, body, "PUT")

    async def _answer(
        self, connection: Connection, path: str, body: object = None, method: str = "POST"
    ) -> Answer | None:
        try:
            answer = await connection.ask(path, body, method)
        except Lost:
            return None
        except TimeoutError:
            self.history.complaints[f"no answer within {self._patience:g} s"] += 1
            return None
        self.history.statuses[answer.status] += 1
        if answer.status in (429, 503) and b"\r\nretry-after: " not in answer.head:
            self.history.complaints[f"a {answer.status} without Retry-After"] += 1
        return answer

    def _succeeded(self, count: int, ended: float) -> None:
        self.successes += count
        if count:
            self.last_success = ended

    async def _read_balances(self, random: Random) -> None:
        with contextlib.closing(Connection(self._port, self._patience)) as connection:
            while True:
                await connection.open()
                await self._read(connection, HOT if random.random() < 0.5 else random.choice(WALLETS))
                await asyncio.sleep(0.005)

    async def _read(self, connection: Connection, wallet: str) -> None:
        sent = time.monotonic()
        path = self._random.choice(("", "/balance"))
        answer = await self._answer(connection, f"/api/v1/wallets/{wallet}{path}")
        if answer is not None and answer.status == 200:
            balance, held = answer.body["balance"], answer.body.get("held")
            self.history.reads.append(Read(wallet, sent, time.monotonic(), balance, held))
            if held is not None and (answer.body["available"] != balance - held or held > balance):
                self.history.complaints["a balance whose available is not what is not held"] += 1

    async def _read_snapshots(self, database: str) -> None:
        """Look at all wallets in one snapshot, again and again: money is in one place at any time."""
        while True:
            try:
                connection = await asyncpg.connect(database, timeout=2)
                try:
                    for number in itertools.count():
                        torn, circle = await connection.fetchrow(TORN, list(CIRCLE), timeout=5)
                        if torn:
                            self.history.complaints["a snapshot with one side of a transfer"] += 1
                        if circle != len(CIRCLE) * CAPITAL:
                            self.history.complaints["a snapshot in which the circle holds another sum"] += 1
                        if number % 25 == 0 and await connection.fetchval(UNBALANCED, timeout=5):
                            self.history.complaints["a snapshot whose sum is not deposits minus withdrawals"] += 1
                        if number % 25 == 0 and await connection.fetchval(MISHELD, timeout=5):
                            self.history.complaints["a snapshot in which ledger and open holds disagree"] += 1
                        await asyncio.sleep(0.02)
                finally:
                    connection.terminate()
            except NO_SUCCESS:
                await asyncio.sleep(0.02)


TORN = """
    select
      (
        select count(*)
        from wallet.wallet as w
        cross join lateral (
          select * from wallet.operation as o where o.wallet_uuid = w.uuid order by o.seq desc limit 20
        ) as o
        where o.operation_type = 'TRANSFER' and not exists (
          select from wallet.operation as p
          where p.operation_uuid = o.operation_uuid and p.operation_type = 'RECEIVE'
            and p.wallet_uuid = o.counterparty_uuid and p.counterparty_uuid = o.wallet_uuid and p.amount = o.amount
        ) or o.operation_type = 'RECEIVE' and not exists (
          select from wallet.operation as p
          where p.operation_uuid = o.operation_uuid and p.operation_type not in ('RECEIVE', 'EXPIRE')
            and p.wallet_uuid = o.counterparty_uuid and p.counterparty_uuid = o.wallet_uuid and p.amount = o.amount
        )
      ),
      (select sum(balance) from wallet.balance where uuid = any($1))
"""
"""How many of the last 20 operations of each wallet lack the other side of their transfer; what some wallets hold."""

UNBALANCED = """
    select (select coalesce(sum(balance), 0) from wallet.balance) <> (
      select coalesce(sum(case operation_type when 'DEPOSIT' then amount when 'WITHDRAW' then -amount else 0 end), 0)
      from wallet.operation
    )
"""
"""Whether the wallets hold anything but deposits minus withdrawals."""

MISHELD = """
    select count(*)
    from wallet.wallet as w
    cross join lateral (
      select o.held_after from wallet.operation as o where o.wallet_uuid = w.uuid order by o.seq desc limit 1
    ) as o
    where o.held_after <> (select coalesce(sum(h.amount), 0) from wallet.hold as h where h.wallet_uuid = w.uuid)
"""
"""How many wallets' open holds sum up to something else than what their last operation says."""


def _body(operation: Operation) -> dict[str, object]:
    body = {
        "operation_uuid": str(operation.uuid),
        "operation_type": operation.kind,
        "amount": None if operation.kind == "RELEASE" else operation.amount,
        "counterparty_uuid": operation.payee,
        "hold_uuid": operation.hold,
        "expires_at": operation.expires_at,
    }
    return {name: value for name, value in body.items() if value is not None}


def _row(shown: dict[str, Any]) -> Row:
    """Return an operation as an answer shows it."""
    return Row(
        shown["wallet_uuid"],
        shown["seq"],
        UUID(shown["operation_uuid"]),
        shown["operation_type"],
        shown["amount"],
        shown["balance_after"],
        shown.get("counterparty_uuid"),
        UUID(shown["hold_uuid"]) if "hold_uuid" in shown else None,
        shown["held_after"],
    )


def _applied(operation: Operation, result: dict[str, Any]) -> Row:
    """Return an operation of a bulk request as its result shows it."""
    return Row(
        operation.wallet,
        result["seq"],
        UUID(result["operation_uuid"]),
        operation.kind,
        operation.amount,
        result["balance_after"],
        operation.payee,
        operation.hold,
        result["held_after"],
    )


def _refusal(problem: dict[str, Any]) -> tuple[str, Row | None]:
    """Return the outcome that a problem or the result of a refused one tells of, and the recorded operation in it."""
    if problem["code"] != "duplicate_operation":
        return problem["code"], None
    if not problem.get("same_request"):
        return OTHER, None
    return DUPLICATE, _row(problem["operation"])
