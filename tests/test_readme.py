"""README.md is run: its sessions are typed in against a new service, and what comes out must be what stands there."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.settings import CHECKOUT
from tests.api.test_keys import make_key
from tests.api.test_process import Service, Start, start, wait_until
from tests.conftest import environment_with
from tests.db.test_readme import END, stripped
from tests.proxy import Http, Point, Proxy

__all__ = ["start"]  # a fixture

README = (CHECKOUT / "README.md").read_text()
KEYS = README.partition("\n## Letting others in\n")[2].partition("\n## ")[0]
"""The chapter whose session needs a service that wants keys."""
NOT_METRICS = {"wallet_uuid", "wallet_app", "wallet_reader", "wallet_owner"}


class Step(NamedTuple):
    """A command line, or what is typed into the psql that one has opened, and what comes out."""

    in_psql: bool
    command: str
    output: str


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def steps(text: str = README.replace(KEYS, "")) -> list[Step]:
    found: list[Step] = []
    for line in "".join(blocks("console", text)).splitlines():
        if typed := re.fullmatch(r"(\$|wallet=>) (.*)", line):
            found.append(Step(typed[1] != "$", typed[2], ""))
        else:
            found[-1] = found[-1]._replace(output=f"{found[-1].output}{line}\n")
    return found


def run(text: str, service: Service, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of the README, with this service's port and this Python."""
    return subprocess.run(
        ["bash", "-c", text.replace("8000", str(service.port)).replace(".venv/bin/python", '"$PYTHON"')],
        cwd=CHECKOUT,
        env=environment_with(PYTHON=sys.executable, WALLET_DATA_DIR=str(service.home), PSQLRC=os.devnull),
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_sessions_go_as_shown(start: Start) -> None:
    service = start()
    session = steps()
    assert {step.in_psql for step in session} == {True, False}
    while session:
        step = session.pop(0)
        if not step.command.endswith("app psql"):
            ran = run(step.command, service)
            assert stripped(ran.stdout + ran.stderr) == stripped(step.output), step.command
            continue
        typed = []
        while session and session[0].in_psql:
            typed.append(session.pop(0))
        ran = run(step.command, service, "".join(f"{one.command}\n\\echo {END}\n\\warn {END}\n" for one in typed))
        answers = zip(ran.stdout.split(f"{END}\n"), ran.stderr.split(f"{END}\n"), strict=True)
        for one, (output, errors) in zip(typed, answers, strict=False):
            assert stripped(output + errors) == stripped(one.output), one.command
    with service.superuser() as superuser:
        assert superuser.execute("select * from wallet.verify()").fetchall() == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_session_with_keys_goes_as_shown(start: Start) -> None:
    """It is typed into one shell, by somebody who takes a second after each change of the keys."""
    service = start(ACCESS="keys")
    session = steps(KEYS)
    assert len(session) > 8
    pauses = ["sleep 1.1" if re.search(r"-m app key (create|revoke)", step.command) else "" for step in session]
    assert any(pauses)
    typed = "".join(f"{step.command}\necho '{END}'\n{pause}\n" for step, pause in zip(session, pauses, strict=True))
    ran = run(f"exec 2>&1\n{typed}", service)
    *answers, rest = ran.stdout.split(f"{END}\n")
    assert rest == ""
    for step, output in zip(session, answers, strict=True):
        assert without_time(output) == without_time(step.output), step.command


def without_time(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "a time", stripped(text))


TOO_MUCH = ('"amount": 500', '"amount": 1501')
"""What makes of the client's transfer one of more than the wallet holds."""


@contextlib.asynccontextmanager
async def running_client(
    service: Service, folder: Path, *changes: tuple[str, str]
) -> AsyncIterator[tuple[Proxy, Callable[[], Awaitable[str]]]]:
    """The README's client, changed, behind a proxy: yields the proxy and what runs the client and returns its words."""
    [client] = blocks("python")
    proxy = Proxy(("127.0.0.1", service.port), Http)
    await proxy.listen(("127.0.0.1", 0))
    for old, new in (("8000", str(proxy.address[1])), *changes):
        assert old in client
        client = client.replace(old, new)
    script = folder / "client.py"
    script.write_text(client)

    async def say() -> str:
        process = await asyncio.create_subprocess_exec(sys.executable, script, stdout=subprocess.PIPE)
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        return said.decode()

    yield proxy, say
    await proxy.close()


@pytest.mark.parametrize("point", [None, *Point])
def test_the_client_that_retries_succeeds_once_whatever_becomes_of_its_connection(
    point: Point | None, start: Start, tmp_path: Path
) -> None:
    service = start()

    async def through_a_proxy() -> str:
        async with running_client(service, tmp_path, ("time.sleep(1)", "time.sleep(0.01)")) as (proxy, say):
            cuts = [] if point is None else [proxy.cut_next(b"/operations/", point) for _ in range(2)]
            said = await say()
            assert all(cut.done() for cut in cuts)
            return said

    assert asyncio.run(through_a_proxy()) == "applied\n"
    assert service.balance("1111111111") == 1000
    assert service.balance("2222222222") == 2000


def test_the_client_that_retries_tells_of_a_refusal(start: Start, tmp_path: Path) -> None:
    service = start()
    [client] = blocks("python")
    script = tmp_path / "client.py"
    script.write_text(client.replace("8000", str(service.port)).replace(*TOO_MUCH))
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("Not enough money\n", "")


def test_the_client_that_retries_believes_no_refusal_while_a_lost_attempt_may_be_applied(
    start: Start, tmp_path: Path
) -> None:
    service = start()

    async def through_a_proxy() -> str:
        async with running_client(service, tmp_path, TOO_MUCH) as (proxy, say):
            cut = proxy.cut_next(b"/operations/", Point.BEFORE_THE_CALL)
            saying = asyncio.create_task(say())
            await cut
            await asyncio.sleep(1.5)  # it has been refused meanwhile
            service.deposit("1111111111", 1)
            return await saying

    assert asyncio.run(through_a_proxy()) == "applied\n"


def test_the_client_that_retries_does_not_take_a_revoked_key_for_a_refusal(start: Start, tmp_path: Path) -> None:
    service = start(ACCESS="keys")
    with service.superuser() as superuser:
        secret = make_key(superuser, "shop", "transfer")
    wait_until(lambda: service.ask("/api/v1/wallets", Authorization=f"Bearer {secret}")[0] == 403)  # known: no 401
    declared = '"Content-Type": "application/json"'
    key = (declared, f'{declared}, "Authorization": "Bearer {secret}"')

    async def through_a_proxy() -> str:
        async with running_client(service, tmp_path, key, ("+ 11", "+ 1")) as (proxy, say):
            cut = proxy.cut_next(b"/operations/", Point.BEFORE_THE_ANSWER)
            saying = asyncio.create_task(say())
            await cut
            with service.superuser() as superuser:
                superuser.execute("select from wallet.revoke_key('shop')")
            return await saying

    assert asyncio.run(through_a_proxy()) == "unknown: an earlier attempt may have been applied\n"
    with service.superuser() as superuser:
        balances = superuser.execute("select balance from wallet.get_wallet('1111111111')").fetchall()
    assert balances == [(1000,)]


def test_every_metric_and_label_that_is_named_exists_and_no_metric_is_left_out(start: Start) -> None:
    """An alert on what does not exist would never be raised."""
    service = start()
    service.deposit("1111111111", 5)
    with urlopen(f"http://127.0.0.1:{service.port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    ours = [family for family in families if re.match("wallet_(?!.*_created$)", family.name)]
    labels = {sample.name: sample.labels for family in ours for sample in family.samples}

    section = README.partition("\n## Operating it\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"\bwallet_[a-z_]+", section)) - NOT_METRICS

    assert named <= labels.keys()
    for family in ours:
        assert any(name.startswith(family.name) for name in named), family.name
    for name, label in re.findall(r"\b(wallet_[a-z_]+)\{([a-z]+)", section):
        assert label in labels[name], (name, label)
    for route in re.findall(r'route="([^"]+)"', section):
        assert route in {sample.labels.get("route") for family in ours for sample in family.samples}


def test_the_first_commands_run_and_test_the_service() -> None:
    """.ci/run takes them from here."""
    run_it, test_it = blocks("sh")[:2]
    assert run_it.rstrip().endswith("-m app")
    assert test_it.rstrip().endswith("-m pytest -q -n 4")
