"""The service, broken on purpose: `python -m tests.proof.broken answers_early`. The proof must notice."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import asyncpg
import msgspec
from aiohttp import web

from app.__main__ import main
from app.calls import database, dispatch, line, session
from app.calls.database import connect
from app.calls.line import Line, Outcome, Request
from app.calls.records import Operation
from app.calls.refusals import NO_SUCCESS
from app.calls.session import open_session
from app.settings import Settings
from app.web import handlers

COMMIT_DELAY = 0.05
"""Seconds between an answer that comes too early and its commit."""


class EarlyLine(Line):
    """A line that gives the outcomes of a call before it commits them."""

    def __init__(self, settings: Settings, patience: float = 1, *, thorough: bool = False) -> None:
        super().__init__(settings, patience, thorough=thorough)
        self._session: asyncpg.Connection | None = None
        self._commit: asyncio.Task[None] | None = None

    async def apply(
        self,
        requests: Sequence[Request],
        last: float,
        *,
        again: bool = False,
        atomic: bool = False,
        most: int | None = None,
    ) -> list[Outcome]:
        """Apply requests, and commit later."""
        while True:
            try:
                return await self._apply_early(requests, atomic=atomic)
            except NO_SUCCESS:
                await asyncio.sleep(0.05)

    async def _apply_early(self, requests: Sequence[Request], *, atomic: bool) -> list[Outcome]:
        if self._commit is not None:
            commit, self._commit = self._commit, None
            await commit
        if self._session is None or self._session.is_closed():
            self._session = await connect(self._url, self._deadline, "wallet lane")
        transaction = self._session.transaction()
        await transaction.start()
        wallets, operations, types, amounts, counterparties, *more, _ = zip(*requests, strict=True)
        texts = line._literal(wallets), operations, line._literal(types), amounts
        others = line._literal_or_null(counterparties), *more, atomic, None
        rows = await self._session.fetch(line._APPLY_WHOLE, *texts, *others)
        self._commit = asyncio.create_task(self._commit_later(transaction))
        return [Outcome(*row.values()) for row in rows]

    async def _commit_later(self, transaction: asyncpg.transaction.Transaction) -> None:
        await asyncio.sleep(COMMIT_DELAY)
        await transaction.commit()


class PiecemealLine(Line):
    """A line that applies of an atomic request what it can."""

    async def apply(
        self,
        requests: Sequence[Request],
        last: float,
        *,
        again: bool = False,
        atomic: bool = False,
        most: int | None = None,
    ) -> list[Outcome]:
        """Apply requests, each by itself."""
        return await super().apply(requests, last, again=again)


def applies_parts() -> None:
    """Apply what can be applied of an atomic request."""
    dispatch.Line = PiecemealLine  # type: ignore[misc]


def calls_repeats_new() -> None:
    """Answer 201 to a PUT whatever it did."""

    def respond(told: Any, status: int = 200, **more: Any) -> web.Response:
        return good(told, 201 if isinstance(told, Operation) else status, **more)

    good, handlers.respond = handlers.respond, respond


def tells_another() -> None:
    """Show an operation with another seq than it has."""

    def respond(told: Any, status: int = 200, **more: Any) -> web.Response:
        another = msgspec.structs.replace(told, seq=told.seq + 1) if isinstance(told, Operation) else told
        return good(another, status, **more)

    good, handlers.respond = handlers.respond, respond


def answers_early() -> None:
    """Answer before the commit."""
    dispatch.Line = EarlyLine  # type: ignore[misc]


def forgets_its_calls() -> None:
    """Make a lost call again without recognising what it had applied itself."""
    line._recognise = lambda requests, outcomes, own, atomic: outcomes


def trusts_the_settings() -> None:
    """Take synchronous_commit as the role or the database has set it."""

    async def connect_only(url: str, _deadline: float, name: str = "wallet", *, lock_timeout: float = 0) -> Any:
        settings = {"application_name": name, "lock_timeout": str(round(lock_timeout * 1000))}
        return await open_session(url, server_settings=settings)

    database.connect = line.connect = connect_only  # type: ignore[assignment]


def ignores_the_warning() -> None:
    """Take a commit for a success whose wait for the standby was ended."""
    session._note = lambda *_: None


if __name__ == "__main__":
    {
        "answers_early": answers_early,
        "applies_parts": applies_parts,
        "calls_repeats_new": calls_repeats_new,
        "tells_another": tells_another,
        "forgets_its_calls": forgets_its_calls,
        "ignores_the_warning": ignores_the_warning,
        "trusts_the_settings": trusts_the_settings,
    }[sys.argv[1]]()
    sys.exit(main([]))
