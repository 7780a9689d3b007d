"""Where a webhook's name may lead: real sockets, a real certificate; only the resolver says what a test wants."""

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from jobkit.errors import ConfigError
from launch.lifecycle import webhook

HERE = "127.0.0.1"
METADATA = "169.254.169.254"


class Hook(BaseHTTPRequestHandler):
    """Write down who was meant, answer 200."""

    def do_POST(self) -> None:
        """Answer."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Run a server."""
    with ThreadingHTTPServer((HERE, 0), Hook) as running:
        running.hosts = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


class Resolver:
    """Answers for the name 'hook', each time with the next list of addresses; all else is the system's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.asked = 0
        self._answers, self._real = answers, socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: int, *arguments: Any, **named: Any) -> list[Any]:
        """Resolve a name."""
        if host != "hook":
            return self._real(host, port, *arguments, **named)
        if named.get("flags"):
            raise socket.gaierror("it is no number")
        answer = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        return [one for address in answer for one in self._real(address, port, *arguments, **named)]


def test_a_name_is_resolved_once(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was looked at is connected to: a name that leads elsewhere a moment later gets nowhere."""
    resolver = Resolver(monkeypatch, [HERE], [METADATA])
    webhook.post(f"http://hook:{server.server_port}/x", b"{}", {})
    assert resolver.asked == 1
    assert server.hosts == [f"hook:{server.server_port}"]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("answer", [[METADATA], [HERE, METADATA], ["fe80::1"], ["::ffff:a9fe:a9fe"], ["fd00:ec2::254"]])
def test_a_name_that_leads_to_the_metadata(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, answer: list[str]
) -> None:
    """One address of a name that is link-local or a metadata service's, and nothing is sent to any of them."""
    Resolver(monkeypatch, answer)
    with pytest.raises(ConfigError, match="link-local addresses, and those"):
        webhook.post(f"http://hook:{server.server_port}/x", b"{}", {})
    assert server.hosts == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "host",
    [METADATA, "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]",
     "[::a9fe:a9fe]", "[2002:a9fe:a9fe::1]", "[fe80::1]", "[fd20:ce::254]", "168.63.129.16"],
)  # fmt: skip
def test_a_number_that_leads_to_the_metadata(host: str) -> None:
    """However it is written, it is refused before anything is sent, and by the submit."""
    for refuse in (webhook.check, lambda url: webhook.post(url, b"{}", {})):
        with pytest.raises(ConfigError, match="its host leads to"):
            refuse(f"http://{host}/latest/meta-data/")


@given(st.ip_addresses())
def test_other_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """All that is neither link-local nor a metadata service, nor carries such an address, is allowed."""
    inside = ipaddress.IPv4Address(address.packed[-4:]).is_link_local
    if not address.is_link_local and not inside and getattr(address, "sixtofour", None) is None:
        webhook.check(f"http://[{address}]/" if address.version == 6 else f"http://{address}/")


def test_a_proxy_is_not_asked_for_the_metadata(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a proxy too what can be resolved here is looked at; a name that only it knows is its own to judge."""
    monkeypatch.setenv("http_proxy", f"http://{HERE}:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    Resolver(monkeypatch, [METADATA])
    with pytest.raises(ConfigError, match="its host leads to"):
        webhook.post("http://hook/x", b"{}", {})
    webhook.post("http://behind-the-proxy/x", b"{}", {})
    assert server.hosts == ["behind-the-proxy"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "sent"), [("hook", True), ("other", False)])
def test_a_certificate_is_of_the_name(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, sent: bool
) -> None:
    """The address that was looked at has to have the certificate of the name that was given."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    whole = tmp_path / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    whole.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(whole)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(whole))
    Resolver(monkeypatch, [HERE])
    url = f"https://hook:{server.server_port}/x"
    if sent:
        webhook.post(url, b"{}", {})
    else:
        with pytest.raises(webhook.Again, match="no answer: SSLCertVerificationError"):
            webhook.post(url, b"{}", {})
    assert bool(server.hosts) == sent  # type: ignore[attr-defined]


def test_a_host_that_nobody_knows() -> None:
    """A name that leads nowhere is said in words, without the address."""
    with pytest.raises(webhook.Again, match="no name server knows its host") as caught:
        webhook.post("https://hooks.invalid/hush", b"{}", {})
    assert "hush" not in str(caught.value)
