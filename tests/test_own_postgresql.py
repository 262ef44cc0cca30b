"""README.md's "With your own PostgreSQL" is run as it stands there, on a server where nothing is yet."""

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psycopg

from app.server.embedded import Postgres
from app.settings import CHECKOUT
from tests.api.test_process import free_port, wait_until
from tests.conftest import environment_with

README = (CHECKOUT / "README.md").read_text()


def commands(socket_dir: Path) -> list[str]:
    """Return the section's blocks, with this Python's programs, for a server that listens in this folder."""
    section = README.partition("\n## With your own PostgreSQL\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    programs = shlex.quote(str(Path(sys.executable).parent))
    return [
        re.sub(r"@127\.0\.0\.1:5432/(\w+)\?", rf"@/\1?host={socket_dir}&", block).replace(".venv/bin", programs)
        for block in blocks
    ]


def test_the_walk_through_ends_with_a_service_that_runs(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path / "server", "fsync=off")
    postgres.start()
    port = free_port()
    environment = environment_with(
        PATH=os.pathsep.join([str(postgres.binaries), os.environ["PATH"]]), PORT=str(port), ALLOW_FSYNC_OFF="true"
    )

    def bash(script: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", "-euc", script], cwd=CHECKOUT, env=environment)

    def answers() -> bool:
        assert service.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        role, schema, start = commands(postgres.socket_dir)
        for script in (role, schema):
            assert bash(script).wait(60) == 0
        service = bash(start.replace("\n" + start.splitlines()[-1], "\nexec " + start.splitlines()[-1]))
        try:
            wait_until(answers)
            with psycopg.connect(postgres.url("postgres")) as superuser:
                query = "select distinct usename from pg_stat_activity where application_name like 'wallet%'"
                assert superuser.execute(query).fetchall() == [("wallet_service",)]
        finally:
            service.send_signal(signal.SIGTERM)
            assert service.wait(60) == 0
    finally:
        postgres.stop()
