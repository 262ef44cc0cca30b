"""Write the next migration from what changed in db/functions and db/grants.sql: `python db/generate.py NAME`.

dbmate has no repeatable migrations, so functions and grants are edited in their own files, and a migration carries a
copy of what changed: upwards the new text, downwards the one before. What was there before is read from the
migrations themselves, which are never edited once they have landed. The one that has this NAME
already is written again: what stands in it between `-- By hand` and `-- Generated`, upwards and downwards, stays
before the rest.
"""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

DB = Path(__file__).resolve().parent
MIGRATIONS = DB / "migrations"
ROLES = ("wallet_app", "wallet_reader", "wallet_admin")
"""Whom anything is granted to."""

FUNCTION = re.compile(
    r"(?:^--[^\n]*\n)*^create or replace function wallet\.(?P<name>\w+)\(.*?"
    r"^comment on function (?P<signature>wallet\.\w+\([^)]*\)) is$.*?';$",
    re.DOTALL | re.MULTILINE,
)
BY_HAND = re.compile(r"^-- By hand$.*?^-- Generated$", re.DOTALL | re.MULTILINE)
GRANTS = re.compile(r"^-- wallet_app calls functions.*?(?=^reset role;$|\Z)", re.DOTALL | re.MULTILINE)


class Function(NamedTuple):
    """A function's signature, as `drop function` takes it, and its source with its comment."""

    signature: str
    source: str


class State(NamedTuple):
    """The functions by name, and the text of the grants."""

    functions: dict[str, Function]
    grants: str


def files() -> State:
    """Return what the files say."""
    sources = "\n\n".join(path.read_text().strip() for path in sorted((DB / "functions").glob("*.sql")))
    return State(_functions(sources), (DB / "grants.sql").read_text().strip())


def migrated(migrations: list[Path]) -> State:
    """Return what migrations, applied in this order, have made of the functions and grants."""
    functions: dict[str, Function] = {}
    grants = ""
    for path in migrations:
        up, _, _ = path.read_text().partition("-- migrate:down")
        for signature in re.findall(r"^drop function (.*);$", up, re.MULTILINE):
            functions = {name: one for name, one in functions.items() if one.signature != signature}
        functions |= _functions(up)
        if found := GRANTS.search(up):
            grants = found[0].strip()
    return State(functions, grants)


def migration(before: State, after: State, written: str = "") -> str:
    """Return the text of the migration from one state to another. `written`: its text so far, with what is by hand."""
    up, _, down = written.partition("-- migrate:down")
    return "\n".join(
        ["-- migrate:up", "", *_section(before, after, up), "-- migrate:down", "", *_section(after, before, down)]
    )


def _section(before: State, after: State, written: str) -> list[str]:
    """Return the lines that lead from one state to another. Grants go with new functions, so they come along."""
    by_hand = BY_HAND.search(written)
    dropped = [
        one.signature
        for name, one in before.functions.items()
        if name not in after.functions or after.functions[name].signature != one.signature
    ]
    roles = ", ".join(role for role in ROLES if role in before.grants + after.grants)
    changed = [one.source for name, one in sorted(after.functions.items()) if before.functions.get(name) != one]
    return [
        "set local search_path = pg_catalog, pg_temp;",
        "set local role wallet_owner;",
        "",
        *([by_hand[0], ""] if by_hand else []),
        *[f"drop function {signature};" for signature in dropped],
        *[""][: len(dropped)],
        *[f"{source}\n" for source in changed],
        "grant all on all tables in schema wallet to wallet_owner;",
        f"revoke all on all tables in schema wallet from {roles};",
        f"revoke all on all functions in schema wallet from {roles};",
        "",
        after.grants,
        "",
        "reset role;",
        "reset search_path;",
        "",
    ]


def _functions(text: str) -> dict[str, Function]:
    return {found["name"]: Function(found["signature"], found[0]) for found in FUNCTION.finditer(text)}


def main(name: str) -> None:
    """Write the migration."""
    migrations = sorted(MIGRATIONS.glob("*.sql"))
    path, written = MIGRATIONS / f"{datetime.now(UTC):%Y%m%d%H%M%S}_{name}.sql", ""
    for number, one in enumerate(migrations, 1):
        if one.stem.partition("_")[2] == name:
            if number < len(migrations):
                sys.exit(f"there are later migrations than {one.name}: choose another name")
            path, written = one, one.read_text()
            migrations.pop()
            break
    before, after = migrated(migrations), files()
    if before == after:
        sys.exit("nothing changed")
    path.write_text(migration(before, after, written))
    print(path)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not re.fullmatch("[a-z0-9_]+", sys.argv[1]):
        sys.exit("usage: python db/generate.py NAME")
    main(sys.argv[1])
