"""What a call may raise: what the functions in db/ refuse, and errors that leave the outcome unknown."""

import asyncpg

REFUSALS = {
    "WA400": (400, "invalid_request"),
    "WA404": (404, "wallet_not_found"),
    "WA414": (404, "operation_not_found"),
    "WA409": (400, "duplicate_operation"),
    "WA419": (400, "wallet_exists"),
    "WA424": (404, "hold_not_found"),
    "WA410": (400, "hold_closed"),
    "WA405": (400, "wallet_closed"),
    "WA403": (400, "wallet_frozen"),
    "WA422": (400, "currency_mismatch"),
    "WA402": (400, "insufficient_funds"),
    "WA416": (400, "balance_out_of_range"),
    "WA417": (400, "wallet_not_empty"),
    "WA425": (400, "not_applied"),
    "55P03": (503, "wallet_locked"),
}
"""What REST clients may be refused, by SQLSTATE: the HTTP status and the code. The detail is the SQL message."""
DATABASE_REFUSED = (503, "database_refused")
"""The status and the code for any other SQLSTATE. The detail is REFUSED."""


class Refusal(asyncpg.PostgresError):
    """A function in db/ refused the call: a definite answer, nothing was changed."""

    after_a_lost_attempt = False
    """Whether an attempt of the same call was lost before: it may have done what is now refused."""


REFUSED = "Refused by the database: not applied"
"""The detail where the database itself refused: what it said is for the log."""
LOCKED = "Wallet is locked by another transaction: not applied"
"""The detail of a 55P03."""


class NotReplicated(Exception):
    """A commit was answered before its synchronous standby had it: it may still be lost."""


NO_ANSWER = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, NotReplicated)
"""What leaves the outcome unknown: no connection, a lost one, a timeout (an OSError), a commit that may be lost."""
NO_SUCCESS = (asyncpg.PostgresError, *NO_ANSWER)
"""Whatever a call may raise."""

for _sqlstate in REFUSALS:  # asyncpg raises the class that declares the SQLSTATE
    if _sqlstate.startswith("WA"):
        type(f"Refusal{_sqlstate}", (Refusal,), {"sqlstate": _sqlstate})


def code_of(sqlstate: str) -> str:
    """Return the code for what was refused with a SQLSTATE."""
    return REFUSALS.get(sqlstate, DATABASE_REFUSED)[1]


class Overloaded(Exception):
    """Too many requests wait already: this one was not sent, and may be tried again later."""


def message_of(error: asyncpg.PostgresError) -> str:
    """Return what PostgreSQL says, for the log: without its DETAIL, which may hold a row's values."""
    return str(error.args[0])
