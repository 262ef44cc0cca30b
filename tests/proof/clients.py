"""64 clients over REST, who write down what they ask before they send it and what came of it, and some readers."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from app.calls.refusals import NO_SUCCESS
from tests.proof.history import APPLIED, DUPLICATE, NOT_APPLIED, UNKNOWN, Attempt, History, Operation, Read

CLIENTS = 64
READERS = 4
HOT = "hot"
WALLETS = (HOT, *(f"spread{number}" for number in range(20)))
RECENT = 200
"""Operations, answered or not, of which one is sent again now and then."""


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

    async def ask(self, path: str, body: object = None) -> Answer:
        """Send a GET, or a POST of a body, before anything is awaited. Raises Lost, or TimeoutError if it hangs."""
        assert self._reader is not None
        assert self._writer is not None
        encoded = b"" if body is None else msgspec.json.encode(body)
        method = "GET" if body is None else "POST"
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
    """Clients that deposit and withdraw until they are told to stop, through the REST door on a port.

    Most money is on one hot wallet; withdrawals are larger than deposits, so that wallets are empty again and again.
    Operations are sent again while they are under way and after they were answered, one by one and in bulk.
    """

    def __init__(self, port: int, random: Random, history: History, deadline: float = 10) -> None:
        self.history = history
        self.successes = 0
        self.last_success = 0.0
        """When an operation was last answered with a 200."""
        self._port = port
        self._patience = deadline + 10
        self._lingers = deadline + 1
        self._random = random
        self._over = False
        self._recent: deque[Operation] = deque(maxlen=RECENT)

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
        waiting = self.history.open()

        async def settle() -> None:
            with contextlib.closing(Connection(self._port, self._patience)) as connection:
                while waiting:
                    operation = waiting.pop()
                    while operation.is_open:
                        await asyncio.sleep((operation.unknown_until or 0) - time.monotonic())
                        await connection.open()
                        await self.ask(connection, operation)

        async with asyncio.timeout(120):
            await asyncio.gather(*(settle() for _ in range(16)))

    async def ask(self, connection: Connection, operation: Operation) -> None:
        """Make one attempt at an operation and write down what came of it."""
        attempt = self._write_down(connection, operation)
        answer = await self._answer(connection, f"/api/v1/wallets/{operation.wallet}/operation", _body(operation))
        self._note_end(answer, attempt)
        if answer is not None and answer.status == 503 and answer.body["code"] in NOT_APPLIED:
            attempt.outcome = answer.body["code"]
        if answer is None or answer.status >= 500:
            return
        if answer.status == 200:
            attempt.outcome = APPLIED
            self._succeeded(1, attempt.ended)
            if answer.body != str(operation.uuid):
                self.history.complaints["a 200 that names another operation"] += 1
        elif answer.body["code"] != "duplicate_operation":
            attempt.outcome = answer.body["code"]
        else:
            attempt.outcome = DUPLICATE if answer.body.get("same_request") else "duplicate of another request"

    async def ask_for_many(self, connection: Connection, operations: list[Operation]) -> None:
        """Make one attempt at each of some operations in a bulk request. No uuid stands in it twice."""
        attempts = [self._write_down(connection, operation) for operation in operations]
        for attempt in attempts:
            attempt.in_bulk = True
        body = [{"wallet_uuid": operation.wallet, **_body(operation)} for operation in operations]
        answer = await self._answer(connection, "/api/v1/operations", {"operations": body})
        ended = self._note_end(answer, *attempts)
        if answer is not None and answer.status == 200:
            outcomes = [one.get("code", APPLIED) for one in answer.body["results"]]
        elif answer is not None and answer.status < 500:
            outcomes = [answer.body["code"]] * len(attempts)
        else:
            outcomes = [UNKNOWN] * len(attempts)
        for attempt, outcome in zip(attempts, outcomes, strict=True):
            attempt.outcome = DUPLICATE if outcome == "duplicate_operation" else outcome
        self._succeeded(outcomes.count(APPLIED), ended)

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
        """Create the wallets, empty."""
        with contextlib.closing(Connection(self._port)) as connection:
            for wallet in WALLETS:
                await connection.open()
                answer = await connection.ask("/api/v1/wallets", {"uuid": wallet})
                assert answer.status == 201, answer

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
        repeated = self._recent and choice < 0.1
        operation = again or (random.choice(self._recent) if repeated else self._new(random))
        if again is not None and random.random() < 0.3:  # a client may ask again through the other path
            await self.ask_for_many(connection, [operation])
        else:
            await self.ask(connection, operation)
        return operation if operation.is_open and random.random() < 0.5 else None

    def _new(self, random: Random, wallet: str | None = None, kind: str | None = None) -> Operation:
        wallet = wallet or (HOT if random.random() < 0.4 else random.choice(WALLETS))
        kind = kind or random.choice(("DEPOSIT", "WITHDRAW"))
        amount = random.randint(1, 100 if kind == "DEPOSIT" else 150)
        operation = Operation(wallet, UUID(int=random.getrandbits(128), version=4), kind, amount)
        self.history.operations[operation.uuid] = operation
        self._recent.append(operation)
        return operation

    def _some(self, random: Random, count: int) -> list[Operation]:
        again = random.sample(self._recent, min(len(self._recent), count // 4))
        return [*again, *(self._new(random) for _ in range(count - len(again)))]

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

    async def _answer(self, connection: Connection, path: str, body: object = None) -> Answer | None:
        try:
            answer = await connection.ask(path, body)
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
        answer = await self._answer(connection, f"/api/v1/wallets/{wallet}")
        if answer is not None and answer.status == 200:
            self.history.reads.append(Read(wallet, sent, time.monotonic(), answer.body["balance"]))

    async def _read_snapshots(self, database: str) -> None:
        """Look at all wallets in one snapshot, again and again: no balance is but what the last operation left."""
        wrong = """
            select count(*) from wallet.wallet as w
            left join wallet.operation as o on o.wallet_uuid = w.uuid and o.seq = w.seq
            where w.balance < 0 or w.balance <> coalesce(o.balance_after, 0)
        """
        while True:
            try:
                connection = await asyncpg.connect(database, timeout=2)
                try:
                    while True:
                        if await connection.fetchval(wrong, timeout=5):
                            self.history.complaints["a snapshot in which balance and ledger disagree"] += 1
                        await asyncio.sleep(0.02)
                finally:
                    connection.terminate()
            except NO_SUCCESS:
                await asyncio.sleep(0.02)


def _body(operation: Operation) -> dict[str, object]:
    return {"operation_uuid": str(operation.uuid), "operation_type": operation.kind, "amount": operation.amount}
