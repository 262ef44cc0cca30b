"""Bringing the embedded database up to date: migrations, the service's login, the demonstration wallets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import asyncpg

from app.server.embedded import Postgres, clear_pg_variables
from app.settings import CHECKOUT, StartupError

LOGIN = "wallet_service"
"""The role as which the service logs in to its embedded database: a member of wallet_app and nothing else."""
TESTDATA_HISTORY = "wallet_testdata_migrations"


async def bring_up_to_date(postgres: Postgres) -> None:
    """Create and migrate the database; on a new one load the demonstration wallets. Raises StartupError."""
    url = postgres.url("postgres")
    dbmate(url, "migrations", "up")
    connection = await asyncpg.connect(url)
    try:
        if not await connection.fetchval("select exists (select from pg_roles where rolname = $1)", LOGIN):
            await connection.execute(f"create role {LOGIN} login in role wallet_app")
        # `log` leaves out ERRORs: the service or psql reports those of this login.
        await connection.execute(f"alter role {LOGIN} set log_min_messages = log")
        new = await connection.fetchval(
            "select to_regclass($1) is null and not exists (select from wallet.wallet)", TESTDATA_HISTORY
        )
    finally:
        await connection.close()
    if new:  # once, and not where there are others: whoever rolled them back does not want them again
        dbmate(url, "testdata", "--migrations-table", TESTDATA_HISTORY, "migrate")


def dbmate(url: str, folder: str, *command: str) -> None:
    """Run dbmate on a folder of db/. Raises StartupError with what it said."""
    beside_python = str(Path(sys.executable).parent)
    program = shutil.which("dbmate", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if program is None:
        raise StartupError("dbmate is not installed: pip install -r requirements.txt")
    options = [
        "--env-file",
        os.devnull,
        "--url",
        url,
        "--migrations-dir",
        str(CHECKOUT / "db" / folder),
        "--no-dump-schema",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBMATE_")}
    clear_pg_variables(environment)
    ran = subprocess.run([program, *options, *command], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise StartupError(f"dbmate failed: {(ran.stderr or ran.stdout).strip().splitlines()[-1]}")
