"""`python -m app key`: what it prints where, on whose database, and with which exit code."""

import hashlib
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from app.server.embedded import connection_url, running_server
from app.settings import CHECKOUT
from tests.api.test_process import COMMAND, Start, run, start
from tests.cases import MESSAGES
from tests.conftest import environment_with, url_of
from tests.db.door import call

__all__ = ["start"]


@pytest.fixture
def url(superuser: psycopg.Connection) -> str:
    """The URI of this test's database for a login that is a member of wallet_admin."""
    return url_of(superuser, "keeper")


def test_a_key_is_made_listed_and_revoked(url: str, admin: psycopg.Connection) -> None:
    options = ["--scopes", "read,deposit", "--prefix", "shop_", "--expires", "90d"]
    made = run("key", "create", "shop", *options, DATABASE_URL=url)
    assert made.returncode == 0
    [secret] = made.stdout.splitlines()
    assert secret not in made.stderr
    [key] = call(admin, "live_keys")
    assert key[:4] == ("shop", hashlib.sha256(secret.encode()).digest(), ["deposit", "read"], "shop_")
    assert abs(key.expires_at - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=5)

    listed = run("key", "list", DATABASE_URL=url)
    assert (listed.returncode, listed.stderr) == (0, "")
    heads, row = (line.split() for line in listed.stdout.splitlines())
    assert heads == ["name", "scopes", "wallet_prefix", "created_at", "expires_at", "revoked_at"]
    assert row[:3] + row[4:] == ["shop", "deposit,read", "shop_", f"{key.expires_at:%Y-%m-%dT%H:%M:%SZ}", "-"]

    for _ in range(2):
        revoked = run("key", "revoke", "shop", DATABASE_URL=url)
        assert (revoked.returncode, revoked.stdout) == (0, "")
    assert call(admin, "live_keys") == []
    [moment] = run("key", "list", DATABASE_URL=url).stdout.split()[-1:]
    assert moment == f"{call(admin, 'list_keys')[0].revoked_at:%Y-%m-%dT%H:%M:%SZ}"


@pytest.mark.parametrize(
    ("text", "time"),
    [("30m", timedelta(minutes=30)), ("12h", timedelta(hours=12)), ("99999d", timedelta(days=99999)), (None, None)],
)
def test_a_time_is_minutes_hours_or_days(
    text: str | None, time: timedelta | None, url: str, admin: psycopg.Connection
) -> None:
    expires = [] if text is None else ["--expires", text]
    assert run("key", "create", "k", "--scopes", "read", *expires, DATABASE_URL=url).returncode == 0
    [key] = call(admin, "list_keys")
    if time is None:
        assert key.expires_at is None
    else:
        assert abs(key.expires_at - key.created_at - time) < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["create", "taken", "--scopes", "read"], MESSAGES["WA420"]),
        (["create", "k", "--scopes", "everything"], "scopes must be one or more of"),
        (["create", "k", "--scopes", ""], "scopes must be one or more of"),
        (["create", "k", "--scopes", "read", "--prefix", ""], "wallet_prefix must be 1 to 64 characters"),
        (["create", "a b", "--scopes", "read"], "name must be 1 to 64 characters"),
        (["revoke", "nobody"], MESSAGES["WA421"]),
    ],
)
def test_what_is_refused_is_told_in_one_line(
    arguments: list[str], told: str, url: str, admin: psycopg.Connection
) -> None:
    call(admin, "create_key", "taken", ["read"])
    refused = run("key", *arguments, DATABASE_URL=url)
    assert (refused.returncode, refused.stdout) == (1, "")
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"error: {told}")
    assert [key.name for key in call(admin, "list_keys")] == ["taken"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["make"],
        ["create"],
        ["create", "k"],
        ["create", "k", "v", "--scopes", "read"],
        *(["create", "k", "--scopes", "read", "--expires", time] for time in ("90", "0d", "-1d", "1w", "1.5h", "1d ")),
        ["revoke"],
        ["list", "k"],
    ],
)
def test_what_is_no_command_line_is_told_how_to_use_it(arguments: list[str]) -> None:
    refused = run("key", *arguments, DATABASE_URL="postgresql://nowhere.invalid/wallet")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("usage: python -m app key")


def test_help_is_no_error() -> None:
    for command in ([], ["create"], ["list"], ["revoke"]):
        ran = run("key", *command, "--help")
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.startswith("usage: python -m app key")


@pytest.mark.parametrize("command", [["create", "k", "--scopes", "read"], ["list"], ["revoke", "k"]])
def test_a_login_without_the_right_is_told_what_it_lacks(command: list[str], database_url: str) -> None:
    refused = run("key", *command, DATABASE_URL=database_url)
    assert (refused.returncode, refused.stdout) == (1, "")
    [line] = refused.stderr.splitlines()
    assert "must be a member of wallet_admin" in line


def test_a_database_that_is_not_migrated_or_not_there_is_told_so(superuser: psycopg.Connection) -> None:
    superuser.execute("drop function wallet.list_keys")
    for url, told in (
        (url_of(superuser, "keeper"), "run dbmate --env-file dbmate.env migrate"),
        ("postgresql://keeper@127.0.0.1:1/wallet", "cannot reach the database"),
        ("mysql://keeper@127.0.0.1/wallet", "DATABASE_URL is no URI"),
    ):
        refused = run("key", "list", DATABASE_URL=url)
        assert (refused.returncode, refused.stdout) == (1, "")
        [line] = refused.stderr.splitlines()
        assert told in line


def test_a_key_whose_secret_could_not_be_printed_is_not_made(url: str, admin: psycopg.Connection) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [*COMMAND, "key", "create", "k", "--scopes", "read"],
            cwd=CHECKOUT,
            env=environment_with(DATABASE_URL=url),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == ["error: cannot print the secret: No space left on device; no key was made"]
    assert call(admin, "list_keys") == []


def test_keys_of_the_embedded_database_are_made_whether_the_service_runs_or_not(start: Start) -> None:
    service = start()
    home = str(service.home)
    assert run("key", "create", "first", "--scopes", "read", WALLET_DATA_DIR=home).returncode == 0
    with psycopg.connect(connection_url(service.server()[1], "wallet_service", "wallet")) as connection:
        assert [key.name for key in call(connection, "live_keys")] == ["first"]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            call(connection, "create_key", "mine", ["admin"])
    service.stop()

    assert run("key", "create", "second", "--scopes", "read", WALLET_DATA_DIR=home).returncode == 0
    assert running_server(service.home) is None
    listed = run("key", "list", WALLET_DATA_DIR=home)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["name", "first", "second"]
