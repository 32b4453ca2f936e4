"""The page's addresses and names: with and without brackets, in `Host` and `Origin` headers."""

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

LOCAL = ("localhost", "127.0.0.1", "::1")
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def without_brackets(host: str) -> str:
    """Returns an address without the brackets that URLs have around IPv6 ones."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Args:
        host: a name or an address, IPv6 ones with or without brackets.
        port: the port; 0: a free one.

    Raises:
        ValueError: the port is no port, or the address cannot be had.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ValueError(f"port={port}: must be a whole number from 0 to 65535")
    where = f"host={host} port={port}"
    try:
        name = without_brackets(str(host))
        kind = socket.SOCK_STREAM
        family, *_, address = socket.getaddrinfo(name or "0.0.0.0", port, type=kind, flags=socket.AI_PASSIVE)[0]
        both = name == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except PermissionError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"{where}: {reason}; ports below 1024 are the system's, choose another") from None
    except socket.gaierror as error:
        raise ValueError(f"{where}: {error.strerror}; choose another") from None
    except (OSError, UnicodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) else "not the name of a host"
        raise ValueError(f"{where}: {reason}; choose another") from None


def url(host: str, port: int) -> str:
    """Returns the address to open in a browser on this machine."""
    name = without_brackets(str(host))
    name = WILDCARDS.get(name, name)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@dataclass(frozen=True)
class Hosts:
    """The names under which the page answers.

    A name that an attacker's server resolves to this machine (DNS rebinding) is none of them.

    Args:
        names: names and addresses, in lower case and without brackets.
        addresses: whether the page answers under every address, too, which no server can resolve to another.
    """

    names: frozenset[str]
    addresses: bool

    @classmethod
    def of(cls, host: str, others: Iterable[str]) -> "Hosts":
        """Returns the names of a page that is served on `host`, such as this machine's, and `others`."""
        host = without_brackets(str(host)).lower()
        is_local = host in LOCAL or host.startswith("127.")
        names = {host, *LOCAL, *(without_brackets(str(other)).lower() for other in others)}
        if not is_local:
            names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        return cls(frozenset(names), not is_local)

    def allows(self, host: str | None) -> bool:
        """Returns whether the page answers requests with this `Host` header."""
        name = host_name(host)
        return name is not None and (name in self.names or (self.addresses and is_address(name)))

    def allows_origin(self, origin: str, host: str) -> bool:
        """Returns whether a page of this `Origin` may send requests: the page itself, under `host`, or under a name
        that a proxy in front of it has.
        """
        try:
            parts = urlsplit(origin)
            name, port = parts.hostname, parts.port
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or name is None:
            return False
        default = {"http": 80, "https": 443}[parts.scheme]
        same_port = (port or default) == (host_port(host) or default)
        proxied = name in self.names and name not in LOCAL and not is_address(name)
        return (name == host_name(host) and same_port) or proxied


def host_name(host: str | None) -> str | None:
    """Returns the name in a `Host` header without port, brackets and a last dot, in lower case; None: there is none."""
    try:
        parts = urlsplit(f"//{host or ''}")
        if parts.port is not None and not 0 < parts.port < 2**16:
            return None
        malformed = parts.path or parts.query or parts.fragment or "@" in parts.netloc or parts.hostname is None
        return None if malformed else parts.hostname.removesuffix(".")
    except ValueError:
        return None


def host_port(host: str) -> int | None:
    """Returns the port in a `Host` header that `host_name` can read."""
    return urlsplit(f"//{host}").port


def is_address(name: str) -> bool:
    """Returns whether a name is an IPv4 or IPv6 address."""
    try:
        ip_address(name)
        return True
    except ValueError:
        return False
