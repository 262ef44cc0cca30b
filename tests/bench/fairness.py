"""What one key's flood costs a client with another key, on wallets of its own."""

import contextlib
import http.client
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

from tests.bench.loads import Bench, known_key, percentiles, service, wrk_command

BOUND_MS = 50.0
"""What a p99 beside a flood may be in any case, in milliseconds."""
TIMES_QUIET = 3
"""What it may be at most otherwise, times the p99 without one."""
FLOODS: dict[str, dict[str, int]] = {
    "single operations on one wallet, 500 connections": {"connections": 500},
    "reads, 500 connections": {"connections": 500, "wallets": 5000, "reads": 100},
    "bulk of 1000, 8 connections": {"connections": 8, "wallets": 5000, "size": 1000},
    "bulk of 10000, 8 connections": {"connections": 8, "wallets": 5000, "size": 10_000},
}
"""What floods are made of, for wrk. Their wallets are w00001 to w05000."""
QUIET = {"single operations": 1, "bulk of 100": 100}
"""The operations of a request of the client that is measured."""


def measure(bench: Bench, flood: str, size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure one client that asks again as soon as it is answered: alone, and then beside a flood of another key."""
    with bench.database() as database:
        url = bench.postgres.url("wallet_service", database)
        with service(["app"], DATABASE_URL=url, ACCESS="keys") as port:
            quiet, flooding = (known_key(port, bench.postgres, database, name) for name in ("quiet", "flood"))
            ask(port, quiet, size, 0.5)
            yield ask(port, quiet, size, seconds)
            with flooded(port, flooding, seconds + 3, **FLOODS[flood]) as flood_rate:
                time.sleep(1.5)
                beside = ask(port, quiet, size, seconds)
            yield beside | {"flood_per_second": flood_rate()}
        bench.check_books(database)


@contextlib.contextmanager
def flooded(port: int, secret: str, seconds: float, **load: int) -> Iterator[Callable[[], float]]:
    """Have wrk flood the service meanwhile, and give what tells afterwards how many requests a second were answered."""
    environment = os.environ | {"WALLET_KEY": secret}
    command = wrk_command(port, load.pop("connections"), round(seconds + 0.5), **load)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        result: dict[str, Any] = {}
        yield lambda: (result["requests"] - result["not_2xx"]) / result["seconds"]
        assert process.poll() is None, "the flood ended too early"
        told, _ = process.communicate()
        result |= json.loads(told.splitlines()[-1])


def ask(port: int, secret: str, size: int, seconds: float) -> dict[str, Any]:
    """Ask for deposits on the wallets w05001 to w05100, one request after another, and return the latencies."""
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    latencies, refused = list[float](), 0
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        path, body = deposits(size)
        sent = time.perf_counter()
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        latencies.append(1000 * (time.perf_counter() - sent))
        refused += answer.status != 200
    connection.close()
    return {
        "per_second": size * len(latencies) / seconds,
        "requests": len(latencies),
        "not_2xx": refused,
        **percentiles(sorted(latencies)),
    }


def deposits(size: int) -> tuple[str, bytes]:
    """Return the path and the body of a request for so many deposits."""
    wallets = [f"w{random.randint(5001, 5100):05}" for _ in range(size)]
    operations = [{"operation_uuid": str(uuid4()), "operation_type": "DEPOSIT", "amount": 1} for _ in wallets]
    if size == 1:
        return f"/api/v1/wallets/{wallets[0]}/operation", json.dumps(operations[0]).encode()
    bulk = [{"wallet_uuid": name, **operation} for name, operation in zip(wallets, operations, strict=True)]
    return "/api/v1/operations", json.dumps({"operations": bulk}).encode()
