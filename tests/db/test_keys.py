"""Keys: who is let in over REST. Made, listed and revoked in SQL; the secret is seen once, by whoever made the key."""

import hashlib
import re
from base64 import urlsafe_b64decode
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from app.server.embedded import Postgres
from app.server.migrations import dbmate
from tests.cases import FUTURE, MESSAGES, PAST
from tests.conftest import url_of
from tests.db.door import call
from tests.db.test_functions import BAD_NAMES, refusal
from tests.db.test_wallets import blocked

SCOPES = ["admin", "create", "deposit", "hold", "metrics", "read", "transfer", "withdraw"]
"""In the order in which they are stored."""
COLUMNS = ("name", "scopes", "wallet_prefix", "created_at", "expires_at", "revoked_at")
CHARACTERS = "must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -"
SCOPES_FAULT = (
    "WA400",
    "scopes must be one or more of read, create, deposit, withdraw, transfer, hold, admin and metrics",
)
EXPIRY_FAULT = ("WA400", "expires_at must be in the years 1 to 9999")


def make(connection: psycopg.Connection, name: str, *arguments: object) -> str:
    """Make a key, with the scope read if none are given, and return its secret."""
    return call(connection, "create_key", name, *(arguments or [["read"]]))[0].create_key


def live(connection: psycopg.Connection) -> list[str]:
    return [key.name for key in call(connection, "live_keys")]


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


# What a key is


def test_a_key_is_the_same_row_from_whichever_function(admin: psycopg.Connection, service: psycopg.Connection) -> None:
    secret = make(admin, "shop", ["read", "deposit", "read"], "shop_", FUTURE)

    [key] = call(admin, "list_keys")
    assert key._fields == COLUMNS
    assert (key.name, key.scopes, key.wallet_prefix) == ("shop", ["deposit", "read"], "shop_")
    assert (key.expires_at, key.revoked_at) == (FUTURE, None)
    assert abs(key.created_at - datetime.now(UTC)) < timedelta(minutes=1)
    [known] = call(service, "live_keys")
    assert known._fields == ("name", "digest", "scopes", "wallet_prefix", "expires_at")
    assert known == ("shop", digest(secret), ["deposit", "read"], "shop_", FUTURE)

    [revoked] = call(admin, "revoke_key", "shop")
    assert revoked.revoked_at >= key.created_at
    assert revoked == key._replace(revoked_at=revoked.revoked_at)
    assert call(admin, "list_keys") == [revoked]


def test_a_key_without_a_prefix_and_an_expiry_reaches_everything_for_good(admin: psycopg.Connection) -> None:
    make(admin, "k")
    assert call(admin, "live_keys")[0][3:] == (None, None)


def test_secrets_are_256_random_bits_in_base64url(admin: psycopg.Connection) -> None:
    secrets = [make(admin, f"k{number}") for number in range(200)]
    assert all(re.fullmatch("wk_[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    numbers = [int.from_bytes(urlsafe_b64decode(secret[3:] + "="), "big") for secret in secrets]
    ones = [sum(number >> bit & 1 for number in numbers) for bit in range(256)]
    assert min(ones) > 50  # of 200: seven standard deviations below the mean
    assert max(ones) < 150
    assert max(numbers).bit_length() <= 256
    assert {key.digest for key in call(admin, "live_keys")} == {digest(secret) for secret in secrets}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_may_have_each_scope(scope: str, admin: psycopg.Connection) -> None:
    make(admin, "k", [scope])
    assert call(admin, "live_keys")[0].scopes == [scope]


def test_scopes_are_stored_in_one_order_without_repeats(admin: psycopg.Connection) -> None:
    make(admin, "k", [*reversed(SCOPES), *SCOPES])
    assert call(admin, "live_keys")[0].scopes == SCOPES
    assert call(admin, "list_keys")[0].scopes == SCOPES


@pytest.mark.parametrize("name", ["a", "w" * 64, "_", "-", "1", "AZ-az_09"])
def test_names_and_prefixes_are_of_the_characters_of_wallet_names(name: str, admin: psycopg.Connection) -> None:
    make(admin, name, ["read"], name)
    assert call(admin, "live_keys")[0][:4:3] == (name, name)


def test_keys_are_listed_in_the_order_of_their_bytes(admin: psycopg.Connection) -> None:
    for name in ("b", "a", "_", "B"):
        make(admin, name)
    assert [key.name for key in call(admin, "list_keys")] == live(admin) == ["B", "_", "a", "b"]


# What is refused

REFUSED: list[tuple[str, list[Any], tuple[str, str]]] = [
    *[("create_key", [name, ["read"]], ("WA400", f"name {CHARACTERS}")) for name in BAD_NAMES],
    ("create_key", [None, ["read"]], ("WA400", "name must not be null")),
    ("create_key", ["taken", None], SCOPES_FAULT),
    ("create_key", ["taken", []], SCOPES_FAULT),
    ("create_key", ["taken", ["everything"]], SCOPES_FAULT),
    ("create_key", ["taken", ["read", "Deposit"]], SCOPES_FAULT),
    ("create_key", ["taken", ["read", ""]], SCOPES_FAULT),
    ("create_key", ["taken", ["read", None]], SCOPES_FAULT),
    ("create_key", ["taken", [["read"]]], SCOPES_FAULT),
    ("create_key", ["taken", [["read", "create"], ["admin", "hold"]]], SCOPES_FAULT),
    ("create_key", ["taken", [["read", None]]], SCOPES_FAULT),
    *[("create_key", ["taken", ["read"], prefix], ("WA400", f"wallet_prefix {CHARACTERS}")) for prefix in BAD_NAMES],
    ("create_key", ["taken", ["read"], None, "infinity"], EXPIRY_FAULT),
    ("create_key", ["taken", ["read"], None, "-infinity"], EXPIRY_FAULT),
    ("create_key", ["taken", ["read"], None, "10000-01-01 00:00+00"], EXPIRY_FAULT),
    ("create_key", ["taken", ["read"], None, "0001-12-31 23:59:59.999999+00 BC"], EXPIRY_FAULT),
    ("create_key", ["taken", ["read"]], ("WA420", MESSAGES["WA420"])),
    *[("revoke_key", [name], ("WA400", f"name {CHARACTERS}")) for name in BAD_NAMES],
    ("revoke_key", [None], ("WA400", "name must not be null")),
    ("revoke_key", ["nobody"], ("WA421", MESSAGES["WA421"])),
]


@pytest.mark.parametrize(("function", "arguments", "refused"), REFUSED)
def test_bad_arguments_are_refused_and_change_nothing(
    function: str, arguments: list[Any], refused: tuple[str, str], admin: psycopg.Connection
) -> None:
    make(admin, "taken")
    before = call(admin, "list_keys")
    assert refusal(admin, function, *arguments) == refused
    assert call(admin, "list_keys") == before


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_keys_are_changed_under_read_committed_only(level: str, admin: psycopg.Connection) -> None:
    make(admin, "k")
    admin.execute(f"set default_transaction_isolation = '{level}'".encode())
    assert refusal(admin, "create_key", "v", ["read"])[0] == "0A000"
    assert refusal(admin, "revoke_key", "k")[0] == "0A000"
    assert live(admin) == ["k"]


def test_a_name_stays_taken_once_its_key_is_revoked_or_expired(admin: psycopg.Connection) -> None:
    make(admin, "revoked")
    call(admin, "revoke_key", "revoked")
    make(admin, "expired", ["read"], None, PAST)
    for name in ("revoked", "expired"):
        assert refusal(admin, "create_key", name, ["read"]) == ("WA420", MESSAGES["WA420"])
    assert live(admin) == []


@pytest.mark.parametrize("commits", [True, False])
def test_of_two_who_make_a_key_at_once_one_does(
    commits: bool, admin: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    with ThreadPoolExecutor(1) as pool, psycopg.connect(url_of(superuser, "keeper")) as other:
        first = make(other, "k")
        second = pool.submit(psycopg.Connection.execute, admin, "select wallet.create_key('k', '{read}')")
        blocked(superuser, other)
        if commits:
            other.commit()
            with pytest.raises(psycopg.Error) as refused:
                second.result(30)
            assert refused.value.sqlstate == "WA420"
            kept = first
        else:
            other.rollback()
            [kept] = second.result(30).fetchone() or ()
    assert [key.digest for key in call(admin, "live_keys")] == [digest(kept)]


# How a key ends


def test_two_keys_serve_at_once_and_the_old_one_ends_by_itself(
    admin: psycopg.Connection, service: psycopg.Connection
) -> None:
    secrets = [make(admin, name, ["read", "deposit"], "shop_") for name in ("shop-1", "shop-2")]
    assert [key.digest for key in call(service, "live_keys")] == [digest(secret) for secret in secrets]
    call(admin, "revoke_key", "shop-1")
    assert [key.digest for key in call(service, "live_keys")] == [digest(secrets[1])]


def test_a_key_is_revoked_with_the_commit_and_only_once(admin: psycopg.Connection, service: psycopg.Connection) -> None:
    make(admin, "k")
    with admin.transaction():
        revoked = call(admin, "revoke_key", "k")
        assert live(service) == ["k"]
    assert live(service) == []
    assert call(admin, "revoke_key", "k") == revoked


def test_of_two_who_revoke_a_key_at_once_both_see_the_first(
    admin: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    make(admin, "k")
    with ThreadPoolExecutor(1) as pool, psycopg.connect(url_of(superuser, "keeper")) as other:
        first = call(other, "revoke_key", "k")
        second = pool.submit(call, admin, "revoke_key", "k")
        blocked(superuser, other)
        other.commit()
        assert second.result(30) == first == call(admin, "list_keys")


def test_keys_wait_for_others_no_longer_than_the_lock_timeout(
    admin: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    make(admin, "k")
    admin.execute("set lock_timeout = '50ms'")
    with psycopg.connect(url_of(superuser, "keeper")) as other:
        call(other, "revoke_key", "k")
        make(other, "new")
        assert refusal(admin, "revoke_key", "k")[0] == "55P03"
        assert refusal(admin, "create_key", "new", ["read"])[0] == "55P03"


def test_a_key_expires_by_the_clock_of_the_database(admin: psycopg.Connection, service: psycopg.Connection) -> None:
    """In a transaction too, in which now() stands still."""
    [soon] = admin.execute("select clock_timestamp() + interval '2 s'").fetchone() or ()
    make(admin, "k", ["read"], None, soon)
    with service.transaction():
        service.execute("select now()")
        assert live(service) == ["k"]
        service.execute("select pg_sleep(extract(epoch from %s - clock_timestamp()))", [soon])
        assert live(service) == []
    assert [key.revoked_at for key in call(admin, "list_keys")] == [None]


def test_a_key_that_is_due_already_is_made_and_is_dead(admin: psycopg.Connection) -> None:
    make(admin, "k", ["read"], None, PAST)
    assert [(key.name, key.expires_at) for key in call(admin, "list_keys")] == [("k", PAST)]
    assert live(admin) == []


# The secret

LOGGED = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_min_error_statement": "debug5",
    "log_min_messages": "debug1",
    "log_error_verbosity": "verbose",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "debug_print_parse": "on",
    "debug_print_plan": "on",
}
"""Everything that PostgreSQL can log of a statement."""
LOGGED_BY = {
    "auto_explain": {
        "auto_explain.log_min_duration": "0",
        "auto_explain.log_nested_statements": "on",
        "auto_explain.log_verbose": "on",
        "auto_explain.log_analyze": "on",
    },
    "pg_stat_statements": {"pg_stat_statements.track": "all"},
}
"""The same of libraries that not every installation has."""


def test_the_secret_is_in_the_answer_and_nowhere_else(server: SimpleNamespace) -> None:
    """Neither in the log nor in any file of the server's, not even as bytes that a plan shows one by one."""
    binaries = server.postgres.binaries
    loaded = [name for name in LOGGED_BY if (binaries.parent / "lib" / f"{name}.so").exists()]
    preload = f"shared_preload_libraries={','.join(loaded)}"
    postgres = Postgres(server.postgres.home / "logging", "fsync=off", preload, binaries=binaries)
    postgres.start()
    try:
        dbmate(postgres.url("postgres"), "migrations", "up")
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as superuser:
            superuser.execute("create role keeper login in role wallet_admin")
            for settings in (LOGGED, *(LOGGED_BY[name] for name in loaded)):
                for name, value in settings.items():
                    superuser.execute(f"alter role keeper set {name} = '{value}'".encode())
            if "pg_stat_statements" in loaded:
                superuser.execute("create extension pg_stat_statements")
            with psycopg.connect(postgres.url("keeper"), autocommit=True) as admin:
                secrets = [make(admin, f"k{number}", ["read", "admin"], "p_", FUTURE) for number in range(12)]
                secrets += admin.execute("select wallet.create_key('typed', '{read}')").fetchone() or ()
                admin.execute("do 'begin perform wallet.create_key(''nested'', ''{read}''); end'")
                admin.execute("set lock_timeout = '50ms'")
                with superuser.transaction():
                    superuser.execute("lock table wallet.key")
                    assert refusal(admin, "create_key", "late", ["read"])[0] == "55P03"
                assert refusal(admin, "create_key", "k1", ["read"])[0] == "WA420"
                call(admin, "live_keys")
                call(admin, "revoke_key", "k0")
            if "pg_stat_statements" in loaded:
                seen = [query for (query,) in superuser.execute("select query from pg_stat_statements").fetchall()]
                assert [query for query in seen if "insert into wallet.key" in query]
                assert [query for query in seen for secret in secrets if secret in query] == []
            superuser.execute("analyze")
    finally:
        postgres.stop()

    log = " ".join(postgres.log.read_text().split())  # a plan is broken into lines anywhere
    assert log.count("wallet.create_key") > len(secrets)
    assert "wk_" not in log.replace("'wk_'", "")
    contents = [log.encode(), *(path.read_bytes() for path in postgres.data.rglob("*") if path.is_file())]
    for secret in secrets:
        plain = secret.encode()
        hidden = [plain, plain.hex().encode(), " ".join(map(str, plain)).encode()]
        assert not any(form in content for content in contents for form in hidden)
