"""`python -m app` serves; `… psql` opens psql on the service's database; `… key` makes, lists and revokes keys."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from app import database_url, settings
from app.server import embedded

USAGE = "usage: python -m app [psql [argument ...] | key {create,list,revoke} ...]"


def main(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    try:
        match arguments:
            case []:
                serve(settings.from_environment())
                return 0
            case ["psql", *rest]:
                return psql(settings.from_environment(), rest)
            case ["key", *rest]:
                from app import keys

                asked = keys.parse(rest)
                keys.run(asked, settings.from_environment())
                return 0
            case ["-h" | "--help"]:
                print(USAGE)
                return 0
        print(USAGE, file=sys.stderr)
        return 2
    except settings.StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def serve(configured: settings.Settings) -> None:
    """Serve until told to stop. The workers' folder for metrics must exist before prometheus-client is imported."""
    # First: PID 1 ignores a signal without a handler, and imports take long.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        if configured.workers > 1:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wallet-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from app.server import supervisor

        supervisor.serve(configured)


def psql(configured: settings.Settings, arguments: list[str]) -> int:
    """Run psql on the service's database as the service's login; on the embedded one `-U postgres` is the superuser."""
    from app.calls.session import several_hosts
    from app.server.migrations import LOGIN
    from app.server.supervisor import embedded_socket

    if configured.database_url is not None:
        program = shutil.which("psql") or str(embedded.BINARIES / "psql")
        url, password = database_url.without_password(configured.database_url)
        more = {} if password is None else {"PGPASSWORD": password}  # others can read a command line
        if several_hosts(url):
            more["PGTARGETSESSIONATTRS"] = "read-write"
        return subprocess.call([program, "--dbname", url, *arguments], env=os.environ | more)
    with embedded_socket(configured) as socket_dir:
        connection = {"PGHOST": socket_dir, "PGPORT": "5432", "PGUSER": LOGIN, "PGDATABASE": "wallet"}
        signal.signal(signal.SIGINT, lambda *_: None)  # a Ctrl-C is for psql
        return subprocess.call([embedded.BINARIES / "psql", *arguments], env=os.environ | connection)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
