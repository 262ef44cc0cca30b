"""A session of PostgreSQL on which only a commit that did all its waiting is a success."""

import logging
from typing import Any

import asyncpg

from app.calls.refusals import NotReplicated

_log = logging.getLogger("wallet")


class Session(asyncpg.Connection):
    """A connection whose calls raise NotReplicated if their commit was not waited for until its standby had it.

    Where that wait is cancelled, or ended with the session, PostgreSQL answers as after any commit, and sends a WARNING
    before. Its text is in the server's language and its SQLSTATE that of any RAISE WARNING: it is known by the function
    that sends it (src/backend/replication/syncrep.c).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.replicated = True
        self.add_log_listener(_note)

    async def fetch(self, *arguments: Any, **more: Any) -> Any:
        """Make a call and return its rows."""
        return self._seen(await super().fetch(*arguments, **more))

    async def fetchrow(self, *arguments: Any, **more: Any) -> Any:
        """Make a call and return its first row."""
        return self._seen(await super().fetchrow(*arguments, **more))

    async def execute(self, *arguments: Any, **more: Any) -> Any:
        """Run statements, such as the commit of a transaction."""
        return self._seen(await super().execute(*arguments, **more))

    def _seen(self, answer: Any) -> Any:
        if not self.replicated:
            raise NotReplicated("the commit's wait for its synchronous standby was ended")
        return answer


def _note(session: Any, warning: asyncpg.PostgresLogMessage) -> None:
    """Note that a commit did not wait, or log the WARNING. asyncpg calls this before it passes on the answer."""
    if warning.server_source_function == "SyncRepWaitForLSN":
        session.replicated = False
    elif warning.severity_en == "WARNING":
        extra = {"sqlstate": warning.sqlstate}
        _log.warning("the database says: SQLSTATE %s: %s", warning.sqlstate, warning.message, extra=extra)
