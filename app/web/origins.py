"""Which web pages may send requests: this service's own, under any of its names. Any page may link to /docs.

A browser sends requests wherever any page tells it to, also to addresses that only this machine can reach. It says
which page was the cause: Sec-Fetch-Site (W3C Fetch Metadata Request Headers), Origin (RFC 6454), and in Host the name
under which it looked the address up, which may be one that a stranger has pointed here (DNS rebinding). Other
clients send none of these, or what their user chose.
"""

import functools
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from app.settings import HOST, Settings, is_loopback
from app.web.problems import Problem

OWN_SITES = ("same-origin", "none")
"""What Sec-Fetch-Site says of this service's own pages, and of what a person typed or opened from a bookmark."""
PAGES = ("/docs", "/docs/")
"""What a link on any page may lead to."""
DEFAULT_PORTS = {"http": 80, "https": 443}


def guard(settings: Settings) -> Callable[[web.Request], None]:
    """Return what raises Problem for a request that another's page caused: 421 for its Host, 403 for its origin."""
    named = settings.allowed_hosts
    any_host = named is None and not is_loopback(settings.host)

    def is_own(host: str, port: int | None) -> bool:
        return (
            _is_loopback_name(host)
            or host == settings.host.lower().strip("[]")
            or any(host == name and wanted in (None, port) for name, wanted in map(split_host, names(named)))
        )

    @functools.lru_cache(1024)
    def is_known(header: str) -> bool:
        try:
            return is_own(*split_host(header))
        except ValueError:
            return False

    def check(request: web.Request) -> None:
        headers = request.headers
        own = headers.get(hdrs.HOST)
        if own is not None and not any_host and not is_known(own):
            raise Problem(421, "misdirected_request", "Host is none of this service's names: see ALLOWED_HOSTS")
        site = headers.get("Sec-Fetch-Site")
        if site is not None and site not in OWN_SITES and not _is_link(request):
            raise foreign_origin()
        origin = headers.get(hdrs.ORIGIN)
        if origin is not None and not _is_same(origin, own, named, is_own):
            raise foreign_origin()

    return check


def foreign_origin() -> Problem:
    """Return the 403 for a request that a page of another origin caused."""
    return Problem(403, "forbidden", "Web pages of another origin may not ask")


def names(allowed_hosts: str | None) -> list[str]:
    """Return the names that ALLOWED_HOSTS lists."""
    return [name.strip().lower() for name in (allowed_hosts or "").split(",") if name.strip()]


def split_host(host: str) -> tuple[str, int | None]:
    """Return the name and the port of `name:port` or `[IPv6]:port`. Raises ValueError."""
    parts = HOST.fullmatch(host.lower())
    if parts is None:
        raise ValueError(f"no host: {host!r}")
    return parts[1].strip("[]"), int(parts[2]) if parts[2] else None


def _is_link(request: web.Request) -> bool:
    """Tell whether somebody follows a link to a page: it opens in a window of its own and shows nothing to others."""
    opens = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
    return opens and request.method in ("GET", "HEAD") and request.path in PAGES


def _is_same(origin: str, own: str | None, named: str | None, is_own: Callable[[str, int | None], bool]) -> bool:
    """Tell whether an Origin is that of the Host, or one of the names in ALLOWED_HOSTS."""
    try:
        parts = urlsplit(origin)
        default = DEFAULT_PORTS[parts.scheme]
        host, port = split_host(parts.netloc)
        if own is not None:
            own_host, own_port = split_host(own)
            if (host, port or default) == (own_host, own_port or default):
                return True
        return named is not None and not _is_loopback_name(host) and is_own(host, port or default)
    except (KeyError, ValueError):
        return False


def _is_loopback_name(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
