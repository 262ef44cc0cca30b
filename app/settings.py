"""Settings: environment variables, all optional. The table in the README says the same."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from app import database_url

CHECKOUT = Path(__file__).resolve().parent.parent


HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\s]+)(?::([0-9]{0,5}))?")
"""A name or an address, and a port if there is one (RFC 3986, section 3.2)."""


class StartupError(Exception):
    """The service cannot start; the message is one line for the person who started it."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What can be set; each field is the environment variable of the same name in capitals."""

    database_url: str | None = None
    """The PostgreSQL to use, as a URI in the dialect of app/database_url.py; none: an embedded one."""
    wallet_data_dir: Path = CHECKOUT / ".wallet"
    """Where the embedded PostgreSQL keeps its data."""
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: str | None = None
    """Names, separated by commas, that a request's Host may have besides loopback names and `host`.

    None: any, unless `host` is a loopback address.
    """
    access: str | None = None
    """`keys`: requests need a key; `open`: none does. None: open on a loopback address, and no start on another one."""
    trusted_proxies: str | None = None
    """Addresses or networks, separated by commas, of proxies whose X-Forwarded-For is believed."""
    workers: int = 1
    """Processes that serve requests."""
    pool_size: int = 10
    """Connections for reads, new wallets and statuses, at most, in each worker; beside those of the lanes."""
    lanes: int = 2
    """Lanes in each worker: how many calls it has in flight, beside those of bulk requests and of the siding."""
    lane_batch: int = 512
    """Operations that go in one call of a lane, at most."""
    lane_queue: int = 4096
    """Requests that may wait in a lane; one more gets a 429. One key alone may have half of the places."""
    bulk_queue: int = 32
    """Bulk requests that may wait in a worker; one more gets a 429. One key alone may have half of the places."""
    key_requests: int = 512
    """Requests of one key that a worker has in flight, at most; one more gets a 429."""
    connections: int = 4096
    """Connections of clients in each worker, at most."""
    body_memory: int = 64
    """MiB for the bodies over 64 KiB that a worker receives at once; one that does not fit in gets a 429.

    One key alone may have half of it.
    """
    request_deadline: float = 10.0
    """Seconds until a request that the database has not answered gets a 503."""
    allow_fsync_off: bool = False
    """Whether to start on a database with fsync = off, which loses answered operations if its machine crashes."""
    log_level: str = "INFO"
    """DEBUG, INFO (a line a request), WARNING or ERROR, in upper or lower case."""
    shutdown_timeout: float = 30.0
    """Seconds that requests in flight have to finish once the service is told to stop."""


_BOUNDS = {
    "port": (1, 65535),
    "workers": (1, 64),
    "pool_size": (1, 1000),
    "lanes": (1, 64),
    "lane_batch": (1, 10_000),
    "lane_queue": (1, 1_000_000),
    "bulk_queue": (1, 1000),
    "key_requests": (1, 1_000_000),
    "connections": (1, 1_000_000),
    "body_memory": (4, 65_536),
    "request_deadline": (0.1, 3600),
    "shutdown_timeout": (0, 3600),
}


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. An empty variable counts as absent. Raises StartupError, naming the variable."""
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(Settings):
        name, text = field.name.upper(), environment.get(field.name.upper(), "")
        if not text:
            continue
        if field.type is Path:
            values[field.name] = Path(text).absolute()
            continue
        try:
            value = msgspec.convert(text, field.type, strict=False)
        except msgspec.ValidationError:
            kind = "true or false" if field.type is bool else "a number"
            raise StartupError(f"{name}: not {kind}: {text!r}") from None
        low, high = _BOUNDS.get(field.name, (None, None))
        if low is not None and high is not None and not low <= value <= high:
            raise StartupError(f"{name}: must be from {low} to {high}, not {text}")
        values[field.name] = value
    settings = msgspec.convert(values, Settings)
    for name in (settings.allowed_hosts or "").split(","):
        if name.strip() and not HOST.fullmatch(name.strip()):
            raise StartupError(f"ALLOWED_HOSTS: must be names like wallet.example or wallet.example:8443, not {name}")
    if settings.access not in (None, "open", "keys"):
        raise StartupError(f"ACCESS: must be open or keys, not {settings.access!r}")
    networks(settings.trusted_proxies)
    level = settings.log_level.upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise StartupError(f"LOG_LEVEL: must be DEBUG, INFO, WARNING or ERROR, not {settings.log_level!r}")
    url = settings.database_url
    if url is not None:
        try:
            url = database_url.normalised(url)
        except ValueError as error:
            raise StartupError(f"cannot use the database: DATABASE_URL {error}") from None
    return msgspec.structs.replace(settings, log_level=level, database_url=url)


def access(settings: Settings) -> str:
    """Return whether requests need keys: `open` or `keys`. Raises StartupError if it must be set and is not."""
    if settings.access is None and not is_loopback(settings.host):
        raise StartupError(
            f"others can reach HOST {settings.host}: set ACCESS=keys (requests need a key: python -m app key create) "
            "or ACCESS=open (whoever reaches the port may do everything)"
        )
    return settings.access or "open"


def is_loopback(host: str) -> bool:
    """Tell whether a host to listen on can be reached from this machine only."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def networks(trusted_proxies: str | None) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return the networks that TRUSTED_PROXIES lists. Raises StartupError."""
    try:
        names = (name.strip() for name in (trusted_proxies or "").split(","))
        return [ipaddress.ip_network(name, strict=False) for name in names if name]
    except ValueError as error:
        raise StartupError(f"TRUSTED_PROXIES: must be addresses or networks like 10.0.0.0/8: {error}") from None
