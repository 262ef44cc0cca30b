"""Whose request it is: to whom it is counted."""

from aiohttp import web

from app.web.keys import CALLER, Key


def party_of(request: web.Request) -> str:
    """Return the name of the key that a request carries; "" where none is needed."""
    caller: Key = request[CALLER]
    return caller.name
