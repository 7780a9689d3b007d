"""A small Google Cloud Storage on a port of this machine: the JSON API with its preconditions; buckets live in memory.

What PyPI has ignores `ifGenerationMatch`, and so accepts every race that a run's claims are there to win. This one is
held against the raw API, google-cloud-storage, gcsfs, tensorstore and Orbax in tests/training/test_gcs_server.py.

    with Server(buckets=["bucket"]) as server:
        os.environ |= server.environment()
"""

import socket
import struct
import sys
import threading
from collections.abc import Iterable
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch.emulate.objects import Reply, Request
from launch.emulate.storage import Storage

_PIECE_BYTES = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """One connection, kept alive; http.server answers `Expect: 100-continue` at once: libcurl would wait 1 s."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Say nothing."""

    def _serve(self) -> None:
        try:
            self.answer(Request.parse(self.command, self.path, self.headers))
        except ConnectionError:
            self._reset()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - http.server's names

    def answer(self, request: Request) -> None:
        """Serve one request."""
        self.receive(request)
        self.send(self.server.owner.storage.handle(request))

    def pieces(self, size: int, *, outwards: bool) -> Iterable[tuple[int, int]]:
        """Yield the bounds of the pieces in which a content comes, or goes."""
        for start in range(0, size, _PIECE_BYTES):
            yield start, min(size, start + _PIECE_BYTES)

    def receive(self, request: Request) -> None:
        """Read a request's content into it."""
        if "chunked" in request.header("Transfer-Encoding"):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                request.body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
            return
        body = bytearray(int(request.header("Content-Length") or 0))
        view, got = memoryview(body), 0
        try:
            for start, stop in self.pieces(len(body), outwards=False):
                size = self.rfile.readinto(view[start:stop])
                got += size
                if start + size < stop:
                    raise ConnectionError
        except ConnectionError:
            request.body = bytes(view[:got])
            self.server.owner.storage.keep_partial(request)
            raise
        request.body = body

    def send(self, reply: Reply) -> None:
        """Write an answer; its headers go with the first piece of its content."""
        head = f"HTTP/1.1 {reply.status} {responses.get(reply.status, 'Resume Incomplete')}\r\n"
        size = {} if reply.status in (204, 304) else {"Content-Length": str(len(reply.body))}
        head += "".join(f"{name}: {value}\r\n" for name, value in (reply.headers | size).items()) + "\r\n"
        rest = head.encode()
        for start, stop in self.pieces(len(reply.body), outwards=True):
            if stop - start > 65536 or not rest:
                if rest:
                    self.wfile.write(rest)
                self.wfile.write(memoryview(reply.body)[start:stop])
            else:
                self.wfile.write(rest + reply.body[start:stop])
            rest = b""
        if rest:
            self.wfile.write(rest)

    def _reset(self) -> None:
        """End the connection with a TCP reset, as a balancer or a firewall does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()


class Listener(ThreadingHTTPServer):
    """The threads, one for each connection, which end with the server."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, owner: "Server", handler: type[Handler]) -> None:
        self.owner, self.connections = owner, set[socket.socket]()
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, so that closing the server ends it."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that were killed; anything else is a bug of ours and is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Server:
    """A Google Cloud Storage on a port of this machine, for processes of this machine alone unless it has another host.

    Args:
        port: 0 for a free one.
        host: The address of this machine at which it listens.
        buckets: The names of the buckets that are there at the start.
        handler: Serves a connection.

    Raises:
        OSError: If the port is taken.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        buckets: Iterable[str] = ("bucket",),
        handler: type[Handler] = Handler,
    ) -> None:
        self._listener = Listener(host, port, self, handler)
        self.url = f"http://{host}:{self._listener.server_address[1]}"
        self.storage = Storage(self.url)
        self.storage.buckets |= {name: {} for name in buckets}
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._listener.shutdown()
        self._listener.server_close()
        for connection in list(self._listener.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def environment(self) -> dict[str, str]:
        """Return what makes gcsfs, google-cloud-storage, tensorstore and Orbax use this server, without credentials."""
        return environment(self.url)


def environment(url: str) -> dict[str, str]:
    """Return the environment of a process whose Google clients are to use the server at a URL."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GOOGLE_APPLICATION_CREDENTIALS": "",
        "CLOUDSDK_CONFIG": "/nonexistent",
        "NO_GCE_CHECK": "true",
        "GCLOUD_PROJECT": "project",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else a gRPC call for every bucket's type
        # Else Orbax's own gcsfs never sees what others wrote, and asks for credentials.
        "FSSPEC_GS": '{"use_listings_cache": false, "token": "anon"}',
    }
