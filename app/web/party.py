"""Whose request it is: to whom it is counted."""

from aiohttp import web


def party_of(_request: web.Request) -> str:
    """Return the name of the key that a request carries; "" where there are no keys."""
    return ""
