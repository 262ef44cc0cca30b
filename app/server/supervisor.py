"""The process that was started: it keeps PostgreSQL and the workers running, and stops them in order."""

import asyncio
import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import msgspec
import uvloop
from aiohttp import web
from prometheus_client.multiprocess import mark_process_dead

from app import logs
from app.server import preconditions
from app.server.embedded import Postgres, clear_pg_variables, die_with_parent, running_server
from app.server.migrations import LOGIN, bring_up_to_date
from app.server.preconditions import sessions
from app.settings import Settings, StartupError, access
from app.web.application import make_app
from app.web.connections import raise_file_limit

BACKLOG = 1024
"""Connections that may wait to be accepted."""
OTHER_SESSIONS = 20
"""Sessions of the embedded server for psql, superusers (who have 3 of them to themselves) and programs of others."""

LOOK_AT_LOG = 10.0
"""Seconds between looks at how large PostgreSQL's log is."""

_log = logging.getLogger("wallet")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
_fork = multiprocessing.get_context("fork")


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises StartupError if that cannot begin."""
    raise_file_limit()
    logs.configure(settings.log_level)
    with contextlib.ExitStack() as stack:
        stack.callback(logs.finish)
        sockets = [stack.enter_context(listening) for listening in listen(settings)]
        wants_keys = access(settings) == "keys"
        postgres = None
        if settings.database_url is None:
            postgres = embedded_postgres(settings)
            stack.callback(postgres.stop)
            settings = start_embedded(postgres, settings)
        asyncio.run(preconditions.check(settings))
        announce(settings, sockets[0], postgres, wants_keys=wants_keys)
        supervise(settings, sockets, postgres)


def listen(settings: Settings) -> list[socket.socket]:
    """Return a listening socket for each worker. Raises StartupError if the address cannot be had.

    The first is bound without SO_REUSEPORT: that fails if another service uses the port, even with SO_REUSEPORT.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()  # any address: IPv4's too
        bind = functools.partial(socket.create_server, address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
        alone = bind()
        if settings.workers == 1:
            return [alone]
        alone.close()
        return [bind(reuse_port=True) for _ in range(settings.workers)]
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise StartupError(f"cannot listen on {_authority(settings.host, settings.port)}: {reason}") from None


def _authority(host: str, port: int) -> str:
    """Return host and port as they stand in a URL: an IPv6 address in brackets (RFC 3986, section 3.2.2)."""
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"


def embedded_postgres(settings: Settings) -> Postgres:
    """Return the embedded server, not started, with room for all sessions of these settings and others' beside them."""
    room = max(sessions(settings) + OTHER_SESSIONS, 100)
    return Postgres(settings.wallet_data_dir, f"max_connections={room}")


def start_embedded(postgres: Postgres, settings: Settings) -> Settings:
    """Start the embedded database, bring it up to date and return the settings that name it.

    From here on this process and its children know of no other server: asyncpg reads the environment too.
    """
    clear_pg_variables(os.environ)
    postgres.start()
    asyncio.run(bring_up_to_date(postgres))
    return msgspec.structs.replace(settings, database_url=postgres.url(LOGIN))


@contextlib.contextmanager
def embedded_socket(settings: Settings) -> Iterator[str]:
    """Yield the folder of the embedded database's socket. If the database isn't running, run it until the block ends.

    Raises StartupError.
    """
    clear_pg_variables(os.environ)
    with contextlib.ExitStack() as stack:
        running = running_server(settings.wallet_data_dir)
        if running is None:
            postgres = embedded_postgres(settings)
            stack.callback(postgres.stop)
            start_embedded(postgres, settings)
            yield str(postgres.socket_dir)
        else:
            yield running[1]


def announce(
    settings: Settings, listening: socket.socket, postgres: Postgres | None, *, wants_keys: bool = False
) -> None:
    """Say where the service listens, where its data lies and what to try.

    For people, on standard output. If that and standard error are one pipe, a program reads it: then these are log
    records.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening.getsockname()[0], settings.host)
    url = f"http://{_authority(host, settings.port)}"
    say = logs.tell if logs.share_a_pipe(1, 2) else print
    say(f"Listening on {url}")
    say(f"Data in {postgres.home} (embedded PostgreSQL)" if postgres else "Data in the PostgreSQL of DATABASE_URL")
    key = "-H 'Authorization: Bearer wk_...' " if wants_keys else ""
    say(f"Try: curl {key}{url}/api/v1/wallets/1111111111")
    sys.stdout.flush()


def supervise(settings: Settings, sockets: list[socket.socket], postgres: Postgres | None) -> None:
    """Run a worker on each socket, start again what ends by itself, and return when a signal says so."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    workers = [start_worker(settings, sockets, number) for number in range(len(sockets))]
    happened = None  # look first: a SIGCHLD from before the signals were blocked is lost
    while happened is None or happened.si_signo == signal.SIGCHLD:
        if postgres is not None:
            if not postgres.is_running():
                _log.error("PostgreSQL ended; starting it again")
                try:
                    postgres.start()
                except StartupError as error:
                    _log.critical("PostgreSQL does not start again: %s", error)
                    raise SystemExit(1) from None
            postgres.bound_log()
        for number, worker in enumerate(workers):
            if not worker.is_alive():
                _log.error("worker %s ended with %s; starting another", worker.pid, worker.exitcode)
                time.sleep(0.5)
                if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
                    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
                workers[number] = start_worker(settings, sockets, number)
        happened = signal.sigtimedwait(_SIGNALS, LOOK_AT_LOG)

    for listening in sockets:
        listening.close()
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + settings.shutdown_timeout + 5
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0.1))
        worker.kill()


def start_worker(settings: Settings, sockets: list[socket.socket], number: int) -> BaseProcess:
    """Fork a worker that serves the socket of this number."""
    worker = _fork.Process(target=work, args=(settings, sockets, number, os.getpid()), daemon=True)
    worker.start()
    return worker


def work(settings: Settings, sockets: list[socket.socket], number: int, supervisor: int) -> None:
    """Serve one socket until SIGTERM; then answer what is in flight."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != supervisor:
        return
    listening = sockets[number]
    for other in sockets:
        if other is not listening:  # else it would go on taking connections once its own worker is gone
            other.close()
    os.setsid()  # a Ctrl-C is for the supervisor, which then stops the workers in its turn
    logs.configure(settings.log_level)
    spare_the_collector()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        web.run_app(
            make_app(settings),
            sock=listening,
            loop=uvloop.new_event_loop(),
            print=None,
            access_log=None,
            shutdown_timeout=max(settings.shutdown_timeout / 2, 0.001),  # waited for twice; 0 would be for ever
        )
    except KeyboardInterrupt:  # before it served
        pass
    except Exception:
        _log.exception("a worker failed")
        raise SystemExit(1) from None
    finally:
        logs.finish()


def spare_the_collector() -> None:
    """Exempt what start-up made from the cyclic garbage collector, and have it look less often: there are few cycles.

    New objects are looked at in small steps. Full collections are as rare as with thresholds of 20 and 50, but with
    those the process stopped for 90 ms at a time while large requests held 200,000 objects.
    """
    gc.freeze()
    gc.set_threshold(10_000, 1, 500)
