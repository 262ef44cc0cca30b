"""Whose request it is: to whom it is counted."""

from aiohttp import web

from app.web.keys import ANYBODY, CALLER, Key


def party_of(request: web.Request) -> str:
    """Return the name of the key that a request carries; "" where none is needed."""
    caller: Key = request.get(CALLER, ANYBODY)
    return caller.name
