"""A client's address: the one connected or, behind trusted proxies, the one they name."""

import functools
import ipaddress
from collections.abc import Callable

from aiohttp import hdrs, web

from app.settings import HOST, Settings, networks


def finder(settings: Settings) -> Callable[[web.Request], str]:
    """Return what tells the address of a request's client, as text.

    Behind a trusted proxy it is the last address in X-Forwarded-For that is no trusted proxy's: what stands before it
    may be forged. Text that is no address is not believed: the client is then the proxy that passed it on.
    """
    trusted = networks(settings.trusted_proxies)

    @functools.lru_cache(1024)
    def is_trusted(text: str) -> bool:
        address = ipaddress.ip_address(text)
        return any(address in network for network in trusted)

    def find(request: web.Request) -> str:
        peer = request.remote or ""
        if trusted and peer and hdrs.X_FORWARDED_FOR in request.headers:
            told = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR)).split(",")
            while told and is_trusted(_plain(peer)) and (before := _address(told.pop())):
                peer = before
        return peer

    return find


def _address(text: str) -> str | None:
    """Return an address as it stands in X-Forwarded-For, where some add its port; None for what is none."""
    text = text.strip()
    if parts := HOST.fullmatch(text):
        text = parts[1].strip("[]")
    try:
        return _plain(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    """Return an address in its usual form, IPv4's in IPv6 (RFC 4291, section 2.5.5.2) as IPv4's. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)
