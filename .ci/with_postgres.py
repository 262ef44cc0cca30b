"""Run a command with DATABASE_URL naming a database that does not exist yet, on a throwaway embedded PostgreSQL.

PATH begins with the programs of that PostgreSQL, so that pg_dump is of its version.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from app.server.embedded import BINARIES, Postgres

with tempfile.TemporaryDirectory() as home:
    postgres = Postgres(Path(home), "fsync=off")
    postgres.start()
    try:
        environment = {"DATABASE_URL": postgres.url("postgres"), "PATH": f"{BINARIES}:{os.environ['PATH']}"}
        sys.exit(subprocess.call(sys.argv[1:], env=os.environ | environment))
    finally:
        postgres.stop()
