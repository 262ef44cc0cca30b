"""What strangers may send: made-up requests from the description, and bytes that are no HTTP at all."""

import asyncio
import contextlib
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from socket import SO_LINGER, SOL_SOCKET

from app.web.body import BODY_TIMEOUT
from app.web.connections import HEAD_TIMEOUT, WATCH_INTERVAL
from tests.api.test_keys import SCOPES, bearer, make_key
from tests.api.test_openapi import DOCUMENT, METHODS, closed
from tests.api.test_process import Service, wait_until
from tests.proof.clients import Connection, Lost
from tests.proof.section import Account, Scale
from tests.proof.service import database, memory, processes, service

AT_ONCE = 16
"""Attackers at a time."""
PATIENCE = 0.2
"""Seconds that an attacker waits for an answer, or for the end of the connection."""
NEIGHBOUR_SECONDS = 1.0
"""Seconds that a well-behaved client may have to wait for an answer meanwhile."""
WARM_UP = 1000
"""Attacks, at least, until the heap has room for the largest bodies, and grows no more unless something leaks."""
GROWTH = 24 * 2**20
"""Bytes that the service may grow by between the warm-up, at least the first fifth of the attacks, and the end."""
LOG_PER_ATTACK = 1000
"""Bytes of log that an attack may leave, on the average: some are a dozen requests, a line each."""
SILENT_SECONDS = 75.0
"""Seconds until aiohttp closes a connection on which nothing was sent, from its start or its last answer on."""
CLIENTS_FAULT = (b"501", b"505")
"""Answers of 500 and above that say what a client did wrong."""
LINGER_SECONDS = 10.0
"""Seconds that aiohttp goes on reading a body after it was answered."""
SLACK = 3.0
"""Seconds that a close may be late: this machine has other things to do."""


def schemathesis(scale: Scale) -> Account:
    """Make up requests from the description, good and bad, and compare each answer with it.

    They carry a key that may do everything, or none. One check is left out, that good requests succeed: a wallet
    that is unknown or empty is not their fault.
    """
    account = Account()
    with service(ACCESS="keys") as running, tempfile.TemporaryDirectory(prefix="wallet-proof-") as folder:
        description = Path(folder) / "openapi.json"
        description.write_text(json.dumps(closed(DOCUMENT)))
        with database(running, "postgres") as superuser:
            key = bearer(make_key(superuser, "fuzz", *SCOPES))
        wait_until(lambda: running.ask("/api/v1/wallets/1111111111", **key)[0] == 200)
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", str(description)),
                *("--url", f"http://127.0.0.1:{running.port}/", "--phases", "examples,coverage,fuzzing,stateful"),
                *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--warnings", "off", "--no-color"),
                *("--header", f"Authorization: {key['Authorization']}"),
                *(
                    "--max-examples",
                    str(scale.times(2_000, 20)),
                    "--seed",
                    str(scale.random("schemathesis").getrandbits(32)),
                ),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        account.counts["operations"] = sum(len(METHODS & item.keys()) for item in DOCUMENT["paths"].values())
        generated = re.search(r"([\d,]+) generated", ran.stdout)
        account.counts["requests"] = int(generated[1].replace(",", "")) if generated else 0
        if ran.returncode or not generated:
            account.findings.append(ran.stdout)
        look_after(running, account)
    return account


def run(scale: Scale) -> Account:
    """Send bytes that are no HTTP, or nearly none, and see that nobody else notices."""
    account = Account()
    with service(log_level="INFO") as running:
        for wallet in ("neighbour", "target"):
            running.ask("/api/v1/wallets", {"uuid": wallet})
        asyncio.run(Fuzz(running, scale, account).run())
        look_after(running, account)
    return account


def look_after(running: Service, account: Account) -> None:
    """Look whether the service and its books came through."""
    if running.process.poll() is not None:
        account.findings.append(f"the service ended with {running.process.returncode}")
        return
    with database(running) as connection:
        account.findings += [f"verify: {row}" for row in connection.execute("select * from wallet.verify()")]
    said = running.said()
    bad = [line for line in said.splitlines() if "Traceback" in line or '"level":"error"' in line or "Worker " in line]
    if bad:
        account.findings.append(f"{len(bad)} lines in the log that tell of a defect, the first ends: {bad[0][-500:]}")


# What is sent: pieces, with a short pause after each. Each function is a kind of attack.


def valid(chance: Random) -> bytes:
    uuid = f"{chance.getrandbits(128):032x}"
    body = f'{{"operation_uuid": "{uuid}", "operation_type": "DEPOSIT", "amount": {chance.randint(1, 9)}}}'
    return chance.choice(
        [
            post("/api/v1/wallets/target/operation", body.encode()),
            post("/api/v1/operations", f'{{"operations": [{{"wallet_uuid": "target", {body[1:]}]}}'.encode()),
            post("/api/v1/wallets", b"{}"),
            b"GET /api/v1/wallets/target/operations?limit=5 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        ]
    )


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    if not any(header.startswith("Transfer-Encoding") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def random_bytes(chance: Random) -> list[bytes]:
    return [chance.randbytes(chance.choice([1, 10, 100, 1000, 100_000]))]


def bad_http(chance: Random) -> list[bytes]:
    words = [
        "GET",
        "POST",
        "get",
        "\x00",
        "/",
        "/api/v1/wallets/target",
        "*",
        "http://x/",
        "HTTP/1.1",
        "HTTP/9.9",
        "HTTP",
        "",
    ]
    headers = [
        "Host: 127.0.0.1",
        "Host",
        ": x",
        "Content-Length: -1",
        "Content-Length: 1, 2",
        "A\x00: b",
        " x: y",
        "Expect: 1",
    ]
    lines = [" ".join(chance.choices(words, k=chance.randint(1, 4))), *chance.choices(headers, k=chance.randint(0, 5))]
    return [chance.choice(["\r\n", "\n", "\r"]).join([*lines, "", ""]).encode()]


def mutated(chance: Random) -> list[bytes]:
    request = bytearray(valid(chance))
    for _ in range(chance.randint(1, 5)):
        where = chance.randrange(len(request))
        match chance.randrange(4):
            case 0:
                request[where] = chance.randrange(256)
            case 1:
                del request[where : where + chance.randint(1, 20)]
            case 2:
                request[where:where] = chance.randbytes(chance.randint(1, 20))
            case _:
                request[where:where] = request[: chance.randint(1, 200)]
        if not request:
            break
    return [bytes(request)]


def half_a_head(chance: Random) -> list[bytes]:
    head = valid(chance).partition(b"\r\n\r\n")[0]
    return [head[: chance.randint(1, len(head))]]


def half_a_body(chance: Random) -> list[bytes]:
    body = b'{"operation_uuid": "' + b"a" * chance.randint(0, 1000)
    return [post("/api/v1/wallets/target/operation", body + b"x" * 50)[:-50]]


def byte_by_byte(chance: Random) -> list[bytes]:
    request = valid(chance)
    start = chance.randrange(len(request))
    return [request[:start], *(bytes([byte]) for byte in request[start : start + 20]), request[start + 20 :]]


def pipelined_junk(chance: Random) -> list[bytes]:
    return [b"".join([*(valid(chance) for _ in range(chance.randint(1, 6))), chance.randbytes(50), valid(chance)])]


def huge_head(chance: Random) -> list[bytes]:
    size = chance.choice([8_000, 9_000, 70_000, 1_000_000])
    return [
        chance.choice(
            [
                b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * size + b"\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * (size // 6) + b"\r\n",
                b"GET /" + b"x" * size + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                b"X" * size,
            ]
        )
    ]


def bad_chunks(chance: Random) -> list[bytes]:
    sizes = [b"-1", b"5", b"0x5", b"ffffffffffffffffffff", b"", b"zz", b"5;x=" + b"y" * 10_000, b"0", b"00000000000005"]
    chunks = b"".join(chance.choice(sizes) + b"\r\n" + b"{}   \r\n" for _ in range(chance.randint(1, 5)))
    return [
        post(
            "/api/v1/wallets", chunks, "Transfer-Encoding: chunked", *chance.choices(["Content-Length: 3", "X: y"], k=1)
        )
    ]


BOMB = zlib.compress(b" " * 2**24)


def compressed(chance: Random) -> list[bytes]:
    """A bomb of 16 MB, or what does not decompress."""
    body = chance.choice([BOMB, zlib.compress(b"{}")[:-3], chance.randbytes(100)])
    return [post("/api/v1/wallets", body, "Content-Encoding: " + chance.choice(["deflate", "gzip", "br", "zstd", "x"]))]


KINDS: list[Callable[[Random], list[bytes]]] = [
    random_bytes,
    bad_http,
    mutated,
    half_a_head,
    half_a_body,
    byte_by_byte,
    pipelined_junk,
    huge_head,
    bad_chunks,
    compressed,
]


class Fuzz:
    """The attackers, the clients that stall, and their neighbour."""

    def __init__(self, running: Service, scale: Scale, account: Account) -> None:
        self.running = running
        self.account = account
        self.chance = scale.random("fuzz")
        self.attacks = scale.times(20_000, 1500)
        self.short = scale.short
        self.over = False

    async def run(self) -> None:
        neighbour = asyncio.create_task(self.neighbour())
        stalled = asyncio.create_task(self.stall())
        warm = max(self.attacks // 5, WARM_UP)
        await self.attack_all(warm)
        before, log_before = memory(processes(self.running)), self.running.log.stat().st_size
        await self.attack_all(self.attacks - warm)
        after, log_after = memory(processes(self.running)), self.running.log.stat().st_size
        await stalled
        self.over = True
        own_lines = await neighbour

        grown, log = after - before, (log_after - log_before) / (self.attacks - warm)
        self.account.figures |= {"memory grown (MB)": grown / 2**20, "log per attack, neighbour included (bytes)": log}
        if grown > GROWTH:
            self.account.findings.append(f"the service has grown by {grown} bytes")
        if log * (self.attacks - warm) - own_lines * 250 > LOG_PER_ATTACK * (self.attacks - warm):
            self.account.findings.append(f"an attack leaves {log:.0f} bytes of log")

    async def attack_all(self, number: int) -> None:
        todo = [self.chance.getrandbits(64) for _ in range(number)]

        async def attacker() -> None:
            while todo:
                await self.attack(Random(todo.pop()))

        await asyncio.gather(*(attacker() for _ in range(AT_ONCE)))

    async def attack(self, chance: Random) -> None:
        """Send something and read what comes back; 5xx is a finding."""
        kind = chance.choice(KINDS)
        self.account.counts[kind.__name__.replace("_", " ")] += 1
        self.account.counts["attacks"] += 1
        pieces = kind(chance)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.running.port)
        except OSError as error:
            self.account.findings.append(f"no connection: {error}")
            return
        said = bytearray()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if chance.random() < 0.3:
                    writer.write_eof()
            async with asyncio.timeout(PATIENCE * chance.random()):
                while data := await reader.read(2**16):
                    said += data
        if chance.random() < 0.5:  # hang up with a reset, unless the service was first
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        for status in re.findall(rb"HTTP/1\.[01] (\d{3})", said):
            self.account.counts["answers"] += 1
            if status.startswith(b"5") and status not in CLIENTS_FAULT:
                self.account.findings.append(f"{status.decode()} for {b''.join(pieces)[:500]!r}")

    async def neighbour(self) -> int:
        """Deposit and read, one after another, until all is over; return the number of requests."""
        deposits, slowest, waits = 0, 0.0, []
        connection = Connection(self.running.port)
        await connection.open()  # once: nobody may cut it
        while not self.over:
            uuid = f"{self.chance.getrandbits(128):032x}"
            deposit = {"operation_uuid": uuid, "operation_type": "DEPOSIT", "amount": 1}
            deposits += 1
            for path, body in (("/operation", deposit), ("", None)):
                began = time.monotonic()
                try:
                    answer = await connection.ask(f"/api/v1/wallets/neighbour{path}", body)
                except (Lost, TimeoutError) as error:
                    self.account.findings.append(f"the neighbour has no answer: {error!r}")
                    return deposits * 2
                waits.append(time.monotonic() - began)
                if answer.status != 200 or (body is None and answer.body["balance"] != deposits):
                    self.account.findings.append(f"the neighbour is told {answer}")
            await asyncio.sleep(0.005)
        connection.close()
        slowest = max(waits)
        self.account.counts["requests of the neighbour"] = len(waits)
        self.account.figures["slowest answer to the neighbour (ms)"] = slowest * 1000
        self.account.figures["p99 of the neighbour (ms)"] = sorted(waits)[len(waits) * 99 // 100] * 1000
        if slowest > NEIGHBOUR_SECONDS:
            self.account.findings.append(f"the neighbour waited {slowest:.2f} seconds")
        return len(waits)

    async def stall(self) -> None:
        """Begin requests and never end them: the service closes each within its time. A slow one sends a byte a second.

        The short form does not wait for the heads.
        """
        body = post("/api/v1/wallets/target/operation", b"{" + b" " * 500)
        chunked = post("/api/v1/wallets", b"5\r\n{", "Transfer-Encoding: chunked")
        head = b"GET /api/v1/wallets/target HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
        bodies = BODY_TIMEOUT + LINGER_SECONDS
        heads = HEAD_TIMEOUT + WATCH_INTERVAL
        clients = [
            ("half-sent body", body[:-400], b"", bodies),
            ("half-sent chunk", chunked, b"", bodies),
            ("slow body", body[:-400], b" ", bodies),
            (
                "body that nobody reads",
                b"POST /nowhere" + body[5:-400].partition(b" ")[2].join([b" ", b""]),
                b"",
                LINGER_SECONDS,
            ),
        ]
        if not self.short:
            clients += [
                ("half-sent head", head, b"", heads),
                (
                    "half-sent head after an answer",
                    b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + head,
                    b"",
                    heads,
                ),
                ("slow head", head, b"x", heads),
                ("silent connection", b"", b"", SILENT_SECONDS),
            ]
        await asyncio.gather(*(self.stalled(*client) for client in clients for _ in range(3)))

    async def stalled(self, kind: str, sent: bytes, drip: bytes, bound: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.running.port)
        began = time.monotonic()
        writer.write(sent)
        closed_after = None
        while closed_after is None and time.monotonic() - began < bound + SLACK:
            try:
                async with asyncio.timeout(1):
                    if not await reader.read(2**16):
                        closed_after = time.monotonic() - began
            except TimeoutError:
                writer.write(drip)
            except OSError:
                closed_after = time.monotonic() - began
        writer.close()
        self.account.counts[f"{kind} closed"] += closed_after is not None
        if closed_after is None:
            self.account.findings.append(f"{kind}: still open after {bound + SLACK:.0f} seconds")
        else:
            name = f"{kind} closed after (s)"
            self.account.figures[name] = max(self.account.figures.get(name, 0), closed_after)
