"""A POST that gets to whom it was meant for: no redirect is followed, and no name leads to a cloud's metadata service.

What a variable or a file names is an address that somebody else may have chosen, and so is what a name resolves to. It
is resolved once, looked at, and what was looked at is connected to. This machine and private networks are fine: that is
where many webhooks are.
"""

import contextlib
import http.client
import ipaddress
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from jobkit.errors import ConfigError

_TIMEOUT_S = 10.0
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "fd00:ec2::254",  # AWS: "Instance metadata service", its IPv6 endpoint
        "fd20:ce::254",  # Google Cloud: "Metadata server endpoints"
        "168.63.129.16",  # Azure: "What is IP address 168.63.129.16?": its wire server
        "100.100.100.200",  # Alibaba Cloud: "Instance metadata"
    )
)
"""Metadata services that are not at a link-local address, as most are."""
_CARRYING_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
"""Compatible, mapped, translated (RFC 7915) and NAT64 (RFC 6052) addresses: the IPv4 address is their last 32 bits."""


class Again(Exception):  # noqa: N818  (it is no error yet)
    """It may work the next time."""


def check(url: str) -> None:
    """Refuse an address that is none, or that needs no resolver to be refused; no word of it is in the message.

    Raises:
        ConfigError: With the remedy.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host = None
    if not host or parts.username is not None:
        raise ConfigError("it is no address of a webhook: write https://host/path, without a user in it")
    with contextlib.suppress(OSError, UnicodeError):
        _resolve(host, port, socket.AI_NUMERICHOST)


def post(url: str, body: bytes, headers: Mapping[str, str]) -> None:
    """Send a POST.

    Raises:
        Again: If nobody answers just now.
        ConfigError: If that address will not do, or refuses.
    """
    check(url)
    parts = urlsplit(url)
    request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
    try:
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.netloc):
            # The proxy resolves the name, and connects; what it alone can resolve is its to judge.
            with contextlib.suppress(OSError):
                _resolve(str(parts.hostname), parts.port or 80)
        with urllib.request.build_opener(_Stay, _Http, _Https).open(request, timeout=_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        text = f"it answered {error.code}"
        if error.code >= 500 or error.code in (408, 425, 429):
            raise Again(text) from None
        raise ConfigError(text) from None
    except ConfigError:
        raise
    except Exception as error:  # the address is not in the words: it may be the secret
        reason = getattr(error, "reason", error)
        unknown = isinstance(reason, socket.gaierror)
        raise Again("no name server knows its host" if unknown else f"no answer: {type(reason).__name__}") from None


def _resolve(host: str, port: int, flags: int = 0) -> list[tuple[Any, ...]]:
    """Return where a name leads to, as `getaddrinfo` does; raise ConfigError if that is, or may be, where none may."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    for *_, where in addresses:
        if _forbidden(str(where[0])):
            raise ConfigError(
                f"its host leads to {where[0]}: link-local addresses, and those of a cloud's metadata service, are no "
                "webhooks; give the address of one"
            )
    return addresses


def _forbidden(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    meant: list[ipaddress.IPv4Address | ipaddress.IPv6Address | None] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        meant.append(ip.sixtofour)
        if any(ip in network for network in _CARRYING_IPV4):
            meant.append(ipaddress.IPv4Address(ip.packed[-4:]))
    return any(one is not None and (one.is_link_local or one in _METADATA) for one in meant)


def _connect(address: tuple[str, int], *arguments: Any, **named: Any) -> socket.socket:
    """Connect as `socket.create_connection` does, to an address that was looked at."""
    failed: OSError | None = None
    for *_, where in _resolve(*address):
        try:
            return socket.create_connection(where[:2], *arguments, **named)
        except OSError as error:
            failed = error
    raise failed or OSError("no address")


def _looking(kind: type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
    """Return what makes connections of a kind, to addresses that were looked at."""

    def made(*arguments: Any, **named: Any) -> http.client.HTTPConnection:
        connection = kind(*arguments, **named)
        connection._create_connection = _connect  # type: ignore[attr-defined]  # kept for this; the certificate's name stays
        return connection

    return made


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_looking(http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_looking(http.client.HTTPSConnection), request)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the body is meant for the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""
