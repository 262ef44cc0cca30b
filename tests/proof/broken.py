"""The service, broken on purpose: `python -m tests.proof.broken answers_early`. The proof must notice."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import asyncpg

from app.__main__ import main
from app.calls import database, dispatch, line
from app.calls.database import connect
from app.calls.line import Line, Outcome, Request
from app.calls.refusals import NO_SUCCESS
from app.settings import Settings

COMMIT_DELAY = 0.05
"""Seconds between an answer that comes too early and its commit."""


class EarlyLine(Line):
    """A line that gives the outcomes of a call before it commits them."""

    def __init__(self, settings: Settings, patience: float = 1) -> None:
        super().__init__(settings, patience)
        self._session: asyncpg.Connection | None = None
        self._commit: asyncio.Task[None] | None = None

    async def apply(self, requests: Sequence[Request], last: float, *, again: bool = False) -> list[Outcome]:
        """Apply requests, and commit later."""
        while True:
            try:
                return await self._apply_early(requests)
            except NO_SUCCESS:
                await asyncio.sleep(0.05)

    async def _apply_early(self, requests: Sequence[Request]) -> list[Outcome]:
        if self._commit is not None:
            commit, self._commit = self._commit, None
            await commit
        if self._session is None or self._session.is_closed():
            self._session = await connect(self._url, self._deadline, "wallet lane")
        transaction = self._session.transaction()
        await transaction.start()
        columns = [list(column) for column in zip(*requests, strict=True)]
        rows = await self._session.fetch(
            f"select {', '.join(Outcome._fields)} from wallet.apply_operations($1, $2, $3, $4)", *columns
        )
        self._commit = asyncio.create_task(self._commit_later(transaction))
        return [Outcome(*row.values()) for row in rows]

    async def _commit_later(self, transaction: asyncpg.transaction.Transaction) -> None:
        await asyncio.sleep(COMMIT_DELAY)
        await transaction.commit()


def answers_early() -> None:
    """Answer before the commit."""
    dispatch.Line = EarlyLine  # type: ignore[misc]


def forgets_its_calls() -> None:
    """Make a lost call again without recognising what it had applied itself."""
    line._recognise = lambda requests, outcomes, own: outcomes


def trusts_the_settings() -> None:
    """Take synchronous_commit as the role or the database has set it."""

    async def connect_only(url: str, _deadline: float, name: str = "wallet", *, lock_timeout: float = 0) -> Any:
        settings = {"application_name": name, "lock_timeout": str(round(lock_timeout * 1000))}
        return await asyncpg.connect(url, server_settings=settings)

    database.connect = line.connect = connect_only  # type: ignore[assignment]


if __name__ == "__main__":
    {
        "answers_early": answers_early,
        "forgets_its_calls": forgets_its_calls,
        "trusts_the_settings": trusts_the_settings,
    }[sys.argv[1]]()
    sys.exit(main([]))
