"""The accepted form of DATABASE_URL: what asyncpg, dbmate (Go's lib/pq) and psql all read alike. The rest is refused.

    postgresql://user:password@host:port/database?sslmode=…

A libpq URI (section 32.1.1.2 of PostgreSQL's manual). `postgres://` is the same. Special characters in a user, a
password or a database are percent-encoded (RFC 3986, section 2.1). A unix socket's folder or an IPv6 address, and its
port, stand behind the question mark: `postgresql://user@/database?host=/run/postgresql&port=5432`.

The exceptions are several hosts (`postgresql://user@one:5432,two:5432/database`) and target_session_attrs: psql reads
them, and the service, which uses the host that takes writes; give dbmate the primary's URL.
"""

import ipaddress
import re
from pathlib import Path
from urllib.parse import unquote

OPTIONS = ("host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey", "application_name", "options")
"""Options that asyncpg, dbmate and psql all read; target_session_attrs is for the service and psql."""
SESSION_ATTRIBUTES = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

_OTHERS = (
    *("user", "password", "passfile", "dbname", "service", "hostaddr", "socket", "search_path"),
    *(
        "connect_timeout",
        "keepalives",
        "statement_timeout",
        "channel_binding",
        "sslpassword",
        "sslcrl",
        "sslnegotiation",
    ),
)
"""Only these are named when they are refused: what looks like another may be a piece of the password."""
_TEXT = r"(?:[A-Za-z0-9._~!$&'()*,;=-]|%[0-9A-Fa-f]{2})*"
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?"
_HOST = rf"{_NAME}(?::[0-9]+)?"
_URL = re.compile(
    rf"postgres(?:ql)?://(?:(?P<user>{_TEXT})(?::(?P<password>{_TEXT}))?@)?"
    rf"(?P<host>{_NAME})?(?::(?P<port>[0-9]+))?(?:/(?P<database>{_TEXT}))?(?:\?(?P<options>[^\s#?+]*))?",
    re.ASCII,
)


def normalised(url: str) -> str:
    """Return a URL as asyncpg and psql read it: an IPv6 address in brackets. Raises ValueError, the reason as its text.

    The text quotes nothing of the URL: it might be part of the password.
    """
    parts = _URL.fullmatch(url)
    if parts is None:
        if _names_several_hosts(url):
            return url
        raise ValueError(_what_is_wrong(url))
    if any("\0" in unquote(parts[name] or "") for name in parts.groupdict()):
        raise ValueError("holds a zero byte")
    if "/" in unquote(parts["database"] or ""):
        raise ValueError("has a slash in the name of its database")
    options = _options(parts["options"] or "")
    if "," in options.get("host", ""):
        if parts["host"] or parts["port"]:
            raise ValueError("names its hosts twice")
        _check_hosts(options["host"].split(","), options.get("port", "").split(","))
        return url
    for name in ("host", "port"):
        if parts[name] and name in options:
            raise ValueError(f"names its {name} twice")
    host, port = options.get("host"), parts["port"] or options.get("port")
    if port is not None:
        _check_port(port)
    if parts["port"] and not parts["host"]:
        raise ValueError("has a port without a host before it: write ?host=…&port=…")
    if host is None or host.startswith("/"):
        return url
    if re.fullmatch(_NAME, host, re.ASCII):
        return url
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError("has a host that is no name, no address and no folder") from None
    if address.scope_id:
        raise ValueError("has an IPv6 address with a scope")
    rest = "&".join(each for each in (parts["options"] or "").split("&") if each.split("=")[0] not in ("host", "port"))
    before, _, after = url.partition("?")[0].partition("://")
    authority, slash, database = after.partition("/")
    return f"{before}://{authority}[{address}]:{port or 5432}{slash}{database}?{rest}".rstrip("?")


def _names_several_hosts(url: str) -> bool:
    """Tell whether a URL names several hosts before its question mark. Raises ValueError."""
    authority = re.match(r"postgres(?:ql)?://(?:[^/?#]*@)?([^/?#@]*)", url)
    if authority is None or not re.fullmatch(rf"{_HOST}(?:,{_HOST})+", authority[1], re.ASCII):
        return False
    if re.search("[?&]port=", url):
        raise ValueError("has a port behind the question mark: write it behind each host, as in one:5432,two:5432")
    one, _, _ = authority[1].partition(",")
    normalised(url.replace(authority[1], one, 1))
    for host in authority[1].split(","):
        if ":" in host:
            _check_port(host.partition(":")[2])
    return True


def _check_hosts(hosts: list[str], ports: list[str]) -> None:
    if not all(host.startswith("/") or re.fullmatch(_NAME, host, re.ASCII) for host in hosts):
        raise ValueError("has a host that is no name and no folder")
    if len(ports) not in (1, len(hosts)):
        raise ValueError("has another number of ports than of hosts")
    for port in filter(None, ports):
        _check_port(port)


def _check_port(port: str) -> None:
    if not (port.isdecimal() and port.isascii() and 1 <= int(port[:9]) <= 65535):
        raise ValueError("has a port that is not from 1 to 65535")


def without_password(url: str) -> tuple[str, str | None]:
    """Split a normalised URL into the URL without its password, for command lines, and the password."""
    scheme, _, rest = url.partition("://")
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    login, at, _ = authority.rpartition("@")
    user, colon, password = login.partition(":")
    if not colon:
        return url, None
    return f"{scheme}://{user}{at}{rest[len(login) + len(at) :]}", unquote(password)


def _options(text: str) -> dict[str, str]:
    """Return what stands behind the question mark, by name."""
    options: dict[str, str] = {}
    for each in text.split("&") if text else ():
        name, _, value = each.partition("=")
        if not name:
            raise ValueError("has an option without a name, or an & too many")
        if name not in OPTIONS and name != "target_session_attrs":
            named = f"{name}, which" if name in _OTHERS else "an option that"
            raise ValueError(f"has {named} the service and dbmate do not read alike; both read {', '.join(OPTIONS)}")
        if name in options:
            raise ValueError(f"has {name} twice")
        if re.search(r"%(?![0-9A-Fa-f]{2})", value) or not value:
            raise ValueError(f"has no value for {name}, or one that is not percent-encoded")
        options[name] = unquote(value)
    if options.get("target_session_attrs", "any") not in SESSION_ATTRIBUTES:
        raise ValueError(f"has a target_session_attrs that is none of {', '.join(SESSION_ATTRIBUTES)}")
    if options.get("sslmode", "disable") not in SSL_MODES:
        raise ValueError(f"has an sslmode that is none of {', '.join(SSL_MODES)}")
    for name in ("sslrootcert", "sslcert", "sslkey"):
        if name in options and not Path(options[name]).is_file():
            raise ValueError(f"names a file as {name} that is not there")
    return options


def _what_is_wrong(url: str) -> str:
    authority = url.partition("://")[2].partition("/")[0].rpartition("@")[2]
    if not url.startswith(("postgres://", "postgresql://")):
        return "is no URI that begins with postgresql://"
    if authority.startswith("["):
        return "has an IPv6 address in brackets, which dbmate does not read: write ?host=::1&port=5432"
    return "is not like postgresql://user:password@host:port/database; are special characters percent-encoded?"
