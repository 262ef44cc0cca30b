"""The settings, and the README's table of them."""

import re
from pathlib import Path

import msgspec
import pytest

from app.settings import CHECKOUT, Settings, StartupError, from_environment


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
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(StartupError, match=name):
        from_environment({name: value})
