"""db/README.md is run: its psql sessions are typed in, and what psql answers must be what stands there."""

import csv
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from app.server.embedded import BINARIES
from app.settings import CHECKOUT
from tests.cases import MESSAGES
from tests.conftest import url_of
from tests.db.door import SIGNATURES
from tests.db.test_migrations import FORMS, dbmate

README = (CHECKOUT / "db" / "README.md").read_text()
END = "<end of answer>"
PROMPT = re.compile(r"wallet(=|-)([>#]) (.*)")


class Step(NamedTuple):
    """What is typed in at the prompt, by whom (`>` the service, `#` a superuser), and what comes out."""

    prompt: str
    command: str
    output: str


def steps(readme: str) -> list[Step]:
    found: list[Step] = []
    for session in re.findall(r"^```console\n(wallet.*?)^```$", readme, re.DOTALL | re.MULTILINE):
        for line in session.splitlines():
            if typed := PROMPT.fullmatch(line):
                if typed[1] == "=":
                    found.append(Step(typed[2], typed[3], ""))
                else:
                    found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{typed[3]}")
            else:
                found[-1] = found[-1]._replace(output=f"{found[-1].output}{line}\n")
    return found


def psql(url: str, commands: list[str], folder: Path) -> list[str]:
    """Type commands into psql, which runs in a folder, and return what it answers to each."""
    typed = "".join(f"{command}\n\\echo {END}\n\\warn {END}\n" for command in commands)
    program = [BINARIES / "psql", "-X", url]
    ran = subprocess.run(program, cwd=folder, input=typed, capture_output=True, text=True, check=True)
    answers = zip(ran.stdout.split(f"{END}\n"), ran.stderr.split(f"{END}\n"), strict=True)
    return [stripped(output + errors) for output, errors in answers]


def stripped(output: str) -> str:
    """Leave out the blanks at the ends of lines and of all."""
    return "\n".join(line.rstrip() for line in output.splitlines()).strip("\n")


@pytest.fixture
def demonstration(superuser: psycopg.Connection) -> Iterator[dict[str, str]]:
    """The URIs, by prompt, of a database with the demonstration wallets; roles that are made there go with it."""
    url = url_of(superuser, "postgres")
    dbmate(url, "testdata migrate")
    yield {"#": url, ">": url_of(superuser, "wallet_service")}
    for role in ("teller", "auditor", "registrar"):
        superuser.execute(f"drop role if exists {role}")


@pytest.mark.parametrize("prompt", ["#", ">"], ids=["superuser", "service"])
def test_psql_answers_what_the_readme_shows(prompt: str, demonstration: dict[str, str], tmp_path: Path) -> None:
    session = [step for step in steps(README) if step.prompt == prompt]
    assert session
    answers = psql(demonstration[prompt], [step.command for step in session], tmp_path)
    for step, answer in zip(session, answers, strict=False):
        assert answer == stripped(step.output), step.command
    for statement in tmp_path.glob("statement.csv"):
        with statement.open() as lines:
            found = [(row["operation_type"], int(row["amount"])) for row in csv.DictReader(lines)]
        assert found == [("RECEIVE", 600), ("WITHDRAW", 100), ("DEPOSIT", 700), ("WITHDRAW", 200)]


def test_the_readme_shows_every_function_every_outcome_and_the_tested_commands() -> None:
    typed = " ".join(step.command for step in steps(README))
    assert {name for name in SIGNATURES if f"wallet.{name}(" not in typed} == set()
    assert dict(re.findall(r"^\| `(WA\d+)` \| ([^|]*?) \|", README, re.MULTILINE)).items() >= MESSAGES.items()
    assert [form for form in FORMS.values() if " ".join(["dbmate --env-file dbmate.env", *form]) not in README] == []
