"""The settings, and the README's table of them."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import asyncpg
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.database_url import OPTIONS, normalised, without_password
from app.settings import CHECKOUT, Settings, StartupError, access, from_environment


def test_the_readme_lists_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", (CHECKOUT / "README.md").read_text(), re.MULTILINE))
    defaults = {field.name.upper(): field.default for field in msgspec.structs.fields(Settings)}
    assert rows.keys() == defaults.keys()
    for name, default in defaults.items():
        if isinstance(default, float):
            default = f"{default:g}"
        if isinstance(default, bool):
            default = str(default).lower()
        if default is not None and not isinstance(default, Path):
            assert rows[name] == f"`{default}`"


def test_an_empty_variable_counts_as_absent() -> None:
    assert from_environment({"PORT": "", "DATABASE_URL": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"),
        ("PORT", "0"),
        ("WORKERS", "-1"),
        ("REQUEST_DEADLINE", "nan"),
        ("LOG_LEVEL", "LOUD"),
        ("LANES", "1.5"),
        ("ALLOW_FSYNC_OFF", "maybe"),
        ("ACCESS", "closed"),
        ("ACCESS", "OPEN"),
        ("TRUSTED_PROXIES", "proxy.example"),
        ("TRUSTED_PROXIES", "10.0.0.0/8, 10.0.0.0/99"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(StartupError, match=name):
        from_environment({name: value})


@pytest.mark.parametrize("level", ["debug", "Info", "WARNING", "eRRor"])
def test_a_log_level_is_read_in_any_case(level: str) -> None:
    assert from_environment({"LOG_LEVEL": level}).log_level == level.upper()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_whoever_can_reach_a_loopback_address_needs_no_key(host: str) -> None:
    assert access(from_environment({"HOST": host})) == "open"
    assert access(from_environment({"HOST": host, "ACCESS": "keys"})) == "keys"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "does-not-exist.invalid"])
def test_where_others_can_ask_somebody_has_said_whether_they_need_keys(host: str) -> None:
    with pytest.raises(StartupError, match=r"ACCESS=keys.*ACCESS=open") as refused:
        access(from_environment({"HOST": host}))
    assert len(str(refused.value).splitlines()) == 1
    for chosen in ("open", "keys"):
        assert access(from_environment({"HOST": host, "ACCESS": chosen})) == chosen


# DATABASE_URL

SECRET = "s3cret"
GOOD = [
    "postgresql://u:p@127.0.0.1:5432/wallet?sslmode=disable",
    "postgres://u@db.example/wallet",
    "postgres://u@db_1/wallet?sslmode=verify-full",
    "postgresql://u%40x:p%2F%3A%3F%23@db:1/wal%20let?application_name=x&options=-c%20work_mem%3D8MB",
    "postgresql://u@/wallet?host=/run/postgresql&port=65535&sslmode=disable",
    "postgresql://u@/wallet?host=%2Frun%2Fpostgresql",
    "postgresql:///wallet",
    "postgresql://u@/wallet?host=127.0.0.1&port=5432",
]
BAD = [
    "nonsense",
    "mysql://u@db/wallet",
    "POSTGRES://u@db/wallet",
    "postgresql:u@db/wallet",
    f"postgresql://u:{SECRET}@db/wallet?&",
    f"postgresql://u:{SECRET}@db/wallet?sslmode=disable&",
    f"postgresql://u:{SECRET}@db/wallet?sslmode=disable&&options=x",
    f"postgresql://u:{SECRET}@db/wallet?=disable",
    f"postgresql://u:{SECRET}@db:99999/wallet",
    f"postgresql://u:{SECRET}@db:0/wallet",
    f"postgresql://u:{SECRET}@db:{10**30}/wallet",
    f"postgresql://u:{SECRET}@db:-1/wallet",
    f"postgresql://u:{SECRET}@db:x/wallet",
    f"postgresql://u:{SECRET}@db:٣/wallet",
    f"postgresql://u:{SECRET}@db:/wallet",
    f"postgresql://u:{SECRET}@:5432/wallet",
    f"postgresql://u:{SECRET}@[::1]:5432/wallet",
    f"postgresql://u:{SECRET}@[::1/wallet",
    f"postgresql://u:{SECRET}@/wallet?host=one,oth er",
    f"postgresql://u:{SECRET}@/wallet?host=one,other&port=1,2,3",
    f"postgresql://u:{SECRET}@one:1,other:70000/wallet",
    f"postgresql://u:{SECRET}@one:1,other:2/wallet?target_session_attrs=writable",
    f"postgresql://u:{SECRET}@/wallet?host=[::1]",
    f"postgresql://u:{SECRET}@/wallet?host=fe80::1%25eth0",
    f"postgresql://u:{SECRET}@/wallet?host=::1&port=70000",
    f"postgresql://u:{SECRET}@db/wallet?host=other",
    f"postgresql://u:{SECRET}@db:1/wallet?port=2",
    f"postgresql://u:{SECRET}@db/wallet?user=v",
    f"postgresql://u@db/wallet?password={SECRET}",
    f"postgresql://u:{SECRET}@db/wallet?dbname=x",
    f"postgresql://u:{SECRET}@db/wallet?connect_timeout=3",
    f"postgresql://u:{SECRET}@db/wallet?channel_binding=require",
    f"postgresql://u:{SECRET}@db/wallet?sslmode=disable&sslmode=require",
    f"postgresql://u:{SECRET}@db/wallet?sslmode=DISABLE",
    f"postgresql://u:{SECRET}@db/wallet?sslmode=",
    f"postgresql://u:{SECRET}@db/wallet?sslmode=verify-full&sslrootcert=system",
    f"postgresql://u:{SECRET}@db/wallet?sslcert=/nonexistent",
    f"postgresql://u:{SECRET}@db/wallet?options=-c+work_mem%3D8MB",
    f"postgresql://u:{SECRET}@db/wallet?application_name=100%",
    f"postgresql://u:{SECRET}@db/wal/let",
    f"postgresql://u:{SECRET}@db/wal%2Flet",
    f"postgresql://u:{SECRET}@one,other/wallet?port=6000",
    f"postgresql://u:{SECRET}@one/wallet?host=/a,/b",
    f"postgresql://u:{SECRET}@:5433/wallet?host=/a,/b",
    f"postgresql://u:{SECRET}@db/wallet%00",
    f"postgresql://u:{SECRET}@db/wallet#x",
    f"postgresql://u:{SECRET}@db/wal let",
    f"postgresql://u:{SECRET}@db/wallet\n",
    f"postgresql://u:{SECRET}%zz@db/wallet",
    f"postgresql://u:{SECRET}@x@db/wallet",
    f"postgresql://u:x/{SECRET}@db/wallet",
    f"postgresql://u:x?{SECRET}=1@db/wallet",
    f"postgresql://u:x#{SECRET}@db/wallet",
    f"postgresql://u:ä{SECRET}@db/wallet",
]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@one,other/wallet",
        "postgresql://u@one:1,other:2/wallet?target_session_attrs=any",
        "postgresql://u:p@/wallet?host=/a,/b&port=1,2&sslmode=disable",
    ],
)
def test_several_hosts_are_for_the_service(url: str) -> None:
    assert from_environment({"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("url", GOOD)
def test_a_url_that_all_read_alike_is_left_as_it_is(url: str) -> None:
    assert from_environment({"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("url", BAD)
def test_a_url_that_is_not_read_alike_is_refused_in_one_line_without_a_piece_of_it(url: str) -> None:
    with pytest.raises(StartupError, match="DATABASE_URL") as refused:
        from_environment({"DATABASE_URL": url})
    assert len(str(refused.value).splitlines()) == 1
    assert SECRET not in str(refused.value)


PIECES = [
    *("u", "p", "h", "db", "x", "1", "5432", "99999", "require", "/run", "::1", "[::1]", "host=", "port=", "sslmode="),
    *("options=", "@", ":", "/", "?", "&", "=", ",", ".", "%", "%41", "+", "#"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_whatever_is_not_refused_asyncpg_takes_for_a_url(text: str) -> None:
    """It reads the URL, and tries to connect, for which it has no time."""
    try:
        url = normalised(f"postgresql://{text}")
    except ValueError:
        return
    with pytest.raises((TimeoutError, OSError)):
        asyncio.run(asyncpg.connect(url, timeout=0))


def test_an_ipv6_address_is_written_as_dbmate_reads_it() -> None:
    for written, read in (
        ("postgresql://u:p@/wallet?host=::1&port=1&sslmode=disable", "postgresql://u:p@[::1]:1/wallet?sslmode=disable"),
        ("postgresql://u@/wallet?host=%3A%3A1", "postgresql://u@[::1]:5432/wallet"),
        ("postgresql:///wallet?host=2001:db8::2", "postgresql://[2001:db8::2]:5432/wallet"),
    ):
        assert normalised(written) == read
    dbmate = shutil.which("dbmate", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert dbmate is not None
    url = "postgresql://u@/wallet?host=::1&port=1&sslmode=disable"
    ran = subprocess.run([dbmate, "--url", url, "status"], capture_output=True, text=True, timeout=30)
    assert "[::1]:1" in ran.stderr


@pytest.mark.parametrize(
    ("url", "shown", "password"),
    [
        ("postgresql://u:p%40q@db/wallet?sslmode=disable", "postgresql://u@db/wallet?sslmode=disable", "p@q"),
        ("postgresql://u@db/wallet", "postgresql://u@db/wallet", None),
        ("postgresql://u@db?application_name=a:b@c", "postgresql://u@db?application_name=a:b@c", None),
        ("postgresql://u:p@[::1]:1/wallet", "postgresql://u@[::1]:1/wallet", "p"),
        ("postgresql://u:@db/wallet", "postgresql://u@db/wallet", ""),
        ("postgresql:///wallet?application_name=a:b", "postgresql:///wallet?application_name=a:b", None),
    ],
)
def test_a_password_is_taken_out_of_a_url(url: str, shown: str, password: str | None) -> None:
    assert without_password(url) == (shown, password)


def test_the_readme_names_every_option_of_a_url() -> None:
    section = (CHECKOUT / "README.md").read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    assert all(f"`{option}`" in section for option in OPTIONS)
