"""Three servers under Patroni and etcd, as people run them: who is the primary is theirs to decide."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from app.server.embedded import NOBODY, Postgres, die_with_parent
from tests.api.test_process import is_alive
from tests.conftest import PROGRAMS
from tests.proof.faults import Fault, Outage, Trial
from tests.proof.history import APPLIED
from tests.proof.section import Account, Scale
from tests.proof.stand import migrate, open_to_servers, signal_tree
from tests.replication import Cluster

ETCD = "127.0.1.9"
SCOPE = "wallet"
TRUST = ["local all all trust", "host all,replication all 127.0.0.0/8 trust"]


class Member(Postgres):
    """A server that a Patroni of its own starts and stops, on a loopback address of its own."""

    def __init__(self, home: Path, number: int) -> None:
        super().__init__(home, binaries=PROGRAMS)
        self.name = home.name
        self.address = f"127.0.1.{number}"
        self.data = home / "data"
        self.configuration = home / "patroni.json"
        home.mkdir(mode=0o711)
        self.configuration.write_text(json.dumps(self._configured()))
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)

    def url(self, user: str, database: str = "wallet") -> str:
        return f"postgresql://{user}@{self.address}:5432/{database}?sslmode=disable"

    def start(self) -> None:
        """Start Patroni, which starts the server as what it is to be."""
        self.process = run(self.home, "patroni", str(self.configuration))

    def kill(self) -> None:
        """Kill -9 Patroni and every process of the server."""
        assert self.process is not None
        postmaster = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        for pid in (postmaster, self.process.pid):
            signal_tree(pid, signal.SIGKILL)
        self.process.wait()
        while is_alive(postmaster):
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop Patroni, which stops the server."""
        if self.process is not None and self.is_running():
            self.process.terminate()
            self.process.wait(60)

    def _configured(self) -> dict[str, Any]:
        followed = {"synchronous_mode": True, "synchronous_mode_strict": True}
        parameters = {"wal_log_hints": "on", "wal_keep_size": "256MB", "max_connections": 100}
        dcs = {**followed, "postgresql": {"use_pg_rewind": True, "parameters": parameters}}
        users = {role: {"username": "postgres"} for role in ("superuser", "replication", "rewind")}
        return {
            "scope": SCOPE,
            "name": self.name,
            "etcd3": {"hosts": f"{ETCD}:2379"},
            "restapi": {"listen": f"{self.address}:8008", "connect_address": f"{self.address}:8008"},
            "bootstrap": {"dcs": dcs, "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, {"auth": "trust"}]},
            "postgresql": {
                "listen": f"{self.address}:5432",
                "connect_address": f"{self.address}:5432",
                "data_dir": str(self.data),
                "bin_dir": str(self.binaries),
                "pg_hba": TRUST,
                "pgpass": str(self.home / "pgpass"),
                "authentication": users,
                "parameters": {"unix_socket_directories": ""},
            },
            "watchdog": {"mode": "off"},
        }


class Managed(Cluster):
    """Servers whose primary Patroni chooses. `primary` is the one that was seen last."""

    def __init__(self, *members: Member) -> None:
        self.servers = list(members)
        self.members = members
        self.primary = members[0]

    @property
    def hosts(self) -> str:
        return ",".join(member.address for member in self.members)

    def find_primary(self, but: Postgres | None = None, seconds: float = 120) -> None:
        """Wait until Patroni says that there is a primary, other than one."""
        over = time.monotonic() + seconds
        while True:
            assert time.monotonic() < over, "Patroni finds no primary"
            for told in self._told():
                found = next(one for one in self.members if one.name == told["name"])
                if told["role"] == "leader" and told["state"] == "running" and found is not but:
                    self.primary = found
                    return
            time.sleep(0.05)

    def settle(self, seconds: float = 120) -> None:
        """Wait until both standbys follow, and one is synchronous."""
        over = time.monotonic() + seconds
        while True:
            told = {(one["role"], one["state"]) for one in self._told()}
            if {("leader", "running"), ("sync_standby", "streaming"), ("replica", "streaming")} <= told:
                return
            assert time.monotonic() < over, f"Patroni is not content: {self._told()}"
            time.sleep(0.1)

    def switch_over(self) -> None:
        command = ["patronictl", "-c", str(self.primary.configuration), "switchover", "--force"]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def _told(self) -> list[dict[str, Any]]:
        """Return what the first Patroni that answers says of all members."""
        for member in self.members:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{member.address}:8008/cluster", timeout=1) as answer,
            ):
                members: list[dict[str, Any]] = json.load(answer)["members"]
                return members
        return []


def run(home: Path, *command: str) -> subprocess.Popen[bytes]:
    """Run a program as the owner of a folder, and its log there."""
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    with (home / "log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=home,
            env={"PATH": os.environ["PATH"], "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            **user,
        )


@contextlib.contextmanager
def managed() -> Iterator[Managed]:
    """Patroni's cluster, with the database that each stand's own is cloned from."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wallet-proof-")))
        open_to_servers(folder)
        store = folder / "etcd"
        store.mkdir()
        if os.geteuid() == 0:
            os.chown(store, NOBODY, NOBODY)
        client, peer = f"http://{ETCD}:2379", f"http://{ETCD}:2380"
        listens = ["--listen-client-urls", client, "--listen-peer-urls", peer]
        told = ["--advertise-client-urls", client, "--initial-advertise-peer-urls", peer]
        arguments = ["--name", "etcd", "--data-dir", "data", "--initial-cluster", f"etcd={peer}"]
        etcd = run(store, "etcd", *listens, *told, *arguments)
        stack.callback(etcd.wait, 30)
        stack.callback(etcd.terminate)
        members = [Member(folder / name, number) for number, name in enumerate(Cluster.NAMES, start=1)]
        for member in members:
            stack.callback(member.stop)
            member.start()
        cluster = Managed(*members)
        cluster.find_primary()
        cluster.settle()
        migrate(cluster.primary)
        yield cluster


def patroni(scale: Scale) -> Account:
    """The primary is killed, or Patroni is told to switch over, by turns."""
    if not (shutil.which("patroni") and shutil.which("etcd")):
        account = Account()
        account.counts["skipped: no patroni or no etcd"] += 1
        return account
    return Fault(leader_changes, 10, 2, Outage.LONGER, server=managed)(scale)


async def leader_changes(trial: Trial) -> None:
    """Kill -9 all of the primary, or switch over; Patroni finds another primary, and takes the old one back."""
    await trial.some_progress()
    cluster = trial.stand.cluster
    assert isinstance(cluster, Managed)
    old = cluster.primary
    what = ("kill", "switch-over")[trial.account.counts["faults"] % 2]
    unavailable, began = trial.load.history.statuses[503], time.monotonic()
    await asyncio.to_thread(old.kill if what == "kill" else cluster.switch_over)
    await asyncio.to_thread(cluster.find_primary, old)
    await trial.recovers_in_time(time.monotonic())
    trial.account.counts[f"503 at a {what}"] += trial.load.history.statuses[503] - unavailable
    attempts = (one for operation in trial.load.history.operations.values() for one in operation.attempts)
    moments = sorted(one.ended for one in attempts if one.outcome == APPLIED and one.ended > began)
    pause = max(later - earlier for earlier, later in pairwise([began, *moments]))
    longest = f"longest pause at a {what} s"
    trial.account.figures[longest] = max(trial.account.figures.get(longest, 0), round(pause, 1))
    if what == "kill":
        old.start()
    await asyncio.to_thread(cluster.settle)
