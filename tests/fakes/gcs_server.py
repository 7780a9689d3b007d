"""The bucket of `jobkit emulate`, with faults on demand.

In a test:

    with GcsServer(buckets=["bucket"]) as server:
        server.faults.latency_s = 0.05
        server.faults.fail(503, count=5, match="commit.json")

As a process, whose first line is its URL: `python -m tests.fakes.gcs_server --port 0 --bucket bucket`; there, faults
are set with `control(url, latency_s=0.05, fail={"status": 503, "count": 5})`.
"""

import argparse
import json
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from launch.emulate.objects import CHUNK_BYTES, Blob, Reply, Request
from launch.emulate.server import Handler, Listener, Server, environment
from launch.emulate.storage import route

__all__ = ["CHUNK_BYTES", "GcsServer", "control", "environment"]


def subject_of(kind: str, request: Request, head: bytes = b"") -> str:
    """Return the text that a fault's `match` is searched in: kind, method, path and query, all decoded.

    A multipart upload's object is named in its body only, whose first bytes are `head`.
    """
    name = re.search(rb'"name":\s*("(?:[^"\\]|\\.)*")', head)
    query = " ".join(f"{key}={value}" for key, value in request.query.items())
    return f"{kind} {request.method} {unquote(request.path)} {query} {json.loads(name[1]) if name else ''}"


class _Pace:
    """A wire of limited width: every byte goes after those that were taken before it."""

    def __init__(self) -> None:
        self._lock, self._free = threading.Lock(), time.monotonic()

    def take(self, size: int, rate: float | None) -> float:
        """Return how many seconds to wait until that many bytes have gone."""
        if not rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free = max(now - 0.005, self._free) + size / rate  # 5 ms back: a sleep always lasts a bit too long
            return max(0.0, self._free - now)


@dataclass
class _Rule:
    """A fault that is waiting for its request."""

    kind: str
    count: float
    match: str
    method: str
    value: Any = None
    after_bytes: int = 0


class Faults:
    """What goes wrong, settable at any time from any thread; `fired` counts what really did, by kind."""

    def __init__(self) -> None:
        self.fired: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Let everything go well again; `fired` stays."""
        self.latency_s = 0.0
        """Seconds before every answer."""
        self.bandwidth_per_stream: float | None = None
        """Bytes per second of one request's or answer's content."""
        self.bandwidth_total: float | None = None
        """Bytes per second of all contents, in each direction."""
        self.object_writes_s: float | None = None
        """How often a second one object may be written; 429 beyond."""
        self.writes_s: float | None = None
        self.reads_s: float | None = None
        """How many requests that write, and read, the bucket takes in a second; 429 beyond."""
        self.down: str | None = None
        """'503' answers everything so; 'closed' resets every connection that asks something."""
        self._rules: list[_Rule] = []
        self._stale: set[str] | None = None
        self._written: dict[str, float] = {}
        self._taken: dict[str, tuple[float, int]] = {}

    def _add(self, kind: str, count: int | None, match: str, method: str, value: Any = None, after: int = 0) -> None:
        with self._lock:
            self._rules.append(_Rule(kind, float("inf") if count is None else count, match, method, value, after))

    def fail(
        self,
        status: int = 503,
        *,
        count: int | None = 1,
        match: str = "",
        method: str = "",
        retry_after: int | None = None,
    ) -> None:
        """Refuse the next `count` requests (None: all) with that status, where `match` is found in `subject_of`."""
        self._add("fail", count, match, method, (status, retry_after))

    def forbid(self, match: str = "", *, method: str = "", count: int | None = None) -> None:
        """Deny permission until cleared."""
        self._add("forbid", count, match, method)

    def reset_mid_body(self, count: int | None = 1, after_bytes: int = 0, *, match: str = "", method: str = "") -> None:
        """Reset connections once that many bytes of a longer content have come or gone."""
        self._add("reset", count, match, method, None, after_bytes)

    def stall(
        self, seconds: float, count: int | None = 1, *, match: str = "", method: str = "", after_bytes: int = 0
    ) -> None:
        """Fall silent for a while once that many bytes of a longer content have come or gone."""
        self._add("stall", count, match, method, seconds, after_bytes)

    def lose_answer(self, count: int | None = 1, *, match: str = "", method: str = "") -> None:
        """Do what is asked, then reset the connection instead of telling so."""
        self._add("lost", count, match, method)

    def expire_tokens(self, count: int | None = None) -> None:
        """Answer 401 to the next `count` requests; without a count, to all with a token seen before, or with none."""
        if count is not None:
            self._add("expired", count, "", "")
        else:
            with self._lock:
                self._stale = {"", *self._seen}

    def take(self, kind: str, subject: str, size: float = float("inf")) -> _Rule | None:
        """Use up one turn of the first fault of a kind that fits a request with a content of that size."""
        with self._lock:
            for rule in self._rules:
                fits = rule.kind == kind and rule.count > 0 and size > rule.after_bytes
                if fits and subject.split(" ")[1] in (rule.method or subject) and re.search(rule.match, subject):
                    rule.count -= 1
                    self.fired[kind] += 1
                    return rule
        return None

    def refuse(self, subject: str, token: str) -> Reply | None:
        """Return the answer to a request that is refused, whatever it asks."""
        with self._lock:
            self._seen |= {token} - {""}
            expired = self._stale is not None and token in self._stale
            self.fired["expired"] += expired
            self.fired["down"] += self.down is not None
        if self.down:
            return Reply.error(503, "The service is currently unavailable.")
        if self._is_too_much(subject):
            return Reply.error(429, "The rate of requests is over the limit. Please reduce it.")
        if expired or self.take("expired", subject):
            return Reply.error(401, "Invalid Credentials")
        if self.take("forbid", subject):
            return Reply.error(403, _denied(subject))
        rule = self.take("fail", subject)
        if rule is None:
            return None
        status, retry_after = rule.value
        reply = Reply.error(status, "We encountered an internal error. Please try again.")
        reply.headers |= {} if retry_after is None else {"Retry-After": str(retry_after)}
        return reply

    def _is_too_much(self, subject: str) -> bool:
        """Tell whether a request comes too soon after others, which it then does not count among."""
        method, now = subject.split(" ")[1], time.monotonic()
        what, limit = ("reads", self.reads_s) if method == "GET" else ("writes", self.writes_s)
        with self._lock:
            since, count = self._taken.get(what, (now, 0))
            since, count = (since, count) if now < since + 1 else (now, 0)
            name = "" if method == "GET" else subject.partition(" ")[2]
            per_object = bool(name) and self.object_writes_s is not None
            too_much = limit is not None and count >= limit
            too_much |= per_object and now < self._written.get(name, 0.0) + 1 / (self.object_writes_s or 1)
            if too_much:
                self.fired["limited"] += 1
                return True
            self._taken[what] = since, count + 1
            if per_object:
                self._written[name] = now
            return False


def _denied(subject: str) -> str:
    """Return Google's words for a permission that is missing."""
    kind = subject.split(" ")[0]
    verbs = {"get": "get", "media": "get", "list": "list", "delete": "delete", "patch": "update", "insert": "create"}
    verbs |= {"policy": "getIamPolicy"}
    what = "buckets" if kind.startswith("bucket") else "objects"
    permission = f"storage.{what}.{verbs.get(kind.partition('.')[2], 'create')}"
    return (
        f"tester@project.iam.gserviceaccount.com does not have {permission} access to the Google Cloud Storage "
        f"{what[:-1]}. Permission '{permission}' denied on resource (or it may not exist)."
    )


class _BrokenError(ConnectionError):
    """A connection that is to end here."""


class _Handler(Handler):
    """One connection, with the faults of its server."""

    server: "_Listener"
    _subject: str | None = None
    """Of the request that is served, for the faults that may befall its content."""

    def answer(self, request: Request) -> None:
        """See `Handler`."""
        gcs, (kind, _) = self.server.owner, route(request)
        self._subject = None
        if request.path == "/control":
            self.receive(request)
            self.send(Reply.json(gcs.control(request.json())))
            return
        head = self.rfile.peek(4096) if kind == "upload.multipart" else b""  # type: ignore[attr-defined]
        subject = subject_of(kind, request, head)
        gcs.record(kind, subject)
        if gcs.faults.down == "closed":
            gcs.faults.fired["down"] += 1
            raise _BrokenError
        refused = gcs.faults.refuse(subject, request.header("Authorization"))
        gcs.wait(gcs.faults.latency_s)
        self._subject = subject if refused is None else None
        self.receive(request)
        reply = refused or gcs.storage.handle(request)
        if refused is None and gcs.faults.take("lost", subject):
            raise _BrokenError
        self.send(reply)

    def pieces(self, size: int, *, outwards: bool) -> Iterable[tuple[int, int]]:
        """Yield the bounds of a content's pieces, each when it has had its time on the wire, and break where told."""
        gcs, stream, subject = self.server.owner, _Pace(), self._subject
        wire = gcs.wire_out if outwards else gcs.wire_in
        gcs.bytes_out += size if outwards else 0
        cuts = []
        if subject is not None:
            length = max(size, 1) if outwards else size  # an answer without content can break as well
            cuts = [rule for kind in ("reset", "stall") if (rule := gcs.faults.take(kind, subject, length))]
        bounds = sorted({0, size, *(rule.after_bytes for rule in cuts)})
        for start, stop in zip(bounds, [*bounds[1:], size], strict=True):
            for rule in cuts:
                if rule.after_bytes == start:
                    self._fire(rule)
            while start < stop:
                faults = gcs.faults
                limited = subject is not None and (faults.bandwidth_per_stream or faults.bandwidth_total)
                end = min(stop, start + (CHUNK_BYTES // 2 if limited else 1 << 20))
                if limited:
                    total = wire.take(end - start, faults.bandwidth_total)
                    gcs.wait(max(total, stream.take(end - start, faults.bandwidth_per_stream)))
                yield start, end
                start = end

    def _fire(self, rule: _Rule) -> None:
        if rule.kind == "reset":
            raise _BrokenError
        self.server.owner.wait(rule.value)


class _Listener(Listener):
    owner: "GcsServer"


class GcsServer(Server):
    """A Google Cloud Storage on a port of this machine, and what goes wrong with it.

    Args:
        port: 0 for a free one.
        host: The address of this machine at which it listens.
        buckets: The names of the buckets that are there at the start.
    """

    def __init__(self, *, port: int = 0, host: str = "127.0.0.1", buckets: Iterable[str] = ("bucket",)) -> None:
        self.faults = Faults()
        self.log: list[tuple[str, str]] = []
        """Kind and subject of every request, in order of arrival."""
        self.wire_in, self.wire_out = _Pace(), _Pace()
        self.bytes_out = 0
        """Bytes of contents that were read."""
        self._closing = threading.Event()
        super().__init__(port=port, host=host, buckets=buckets, handler=_Handler)

    def __enter__(self) -> "GcsServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._closing.set()
        super().close()

    def wait(self, seconds: float) -> None:
        """Sleep, unless the server is closed."""
        if seconds > 0:
            self._closing.wait(seconds)

    def record(self, kind: str, subject: str) -> None:
        """Note a request."""
        self.log.append((kind, subject))

    @property
    def requests(self) -> Counter[str]:
        """How many requests of each kind came: 'object.media', 'upload.multipart', 'upload.chunk', ..."""
        return Counter(kind for kind, _ in list(self.log))

    def uploads_open(self) -> list[str]:
        """Name the objects whose resumable upload was begun and neither ended nor cancelled."""
        uploads = list(self.storage.uploads.values())
        return [f"{upload.bucket}/{upload.name}" for upload in uploads if not upload.done and not upload.cancelled]

    def names(self, bucket: str = "bucket", prefix: str = "") -> list[str]:
        """List a bucket's objects, past the API and its faults."""
        return sorted(name for name in list(self.storage.bucket(bucket)) if name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        """Return an object's content, past the API and its faults."""
        return bytes(self.storage.find(bucket, name).data)

    def write(self, name: str, data: bytes, bucket: str = "bucket") -> None:
        """Replace an object's content, past the API and its faults, as a new generation."""
        self.storage.put(Blob(bucket, name, data, 0, {}), {})

    def remove(self, name: str, bucket: str = "bucket") -> None:
        """Remove an object, past the API and its faults."""
        del self.storage.bucket(bucket)[name]

    def age(self, name: str, seconds: float, bucket: str = "bucket") -> None:
        """Make an object's content older, past the API and its faults."""
        objects = self.storage.bucket(bucket)
        objects[name] = replace(objects[name], created=objects[name].created - seconds)

    def control(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Set faults from outside the process (see the function `control`), and tell what has happened so far."""
        for name, value in wanted.items():
            known = getattr(self.faults, name)
            if callable(known):
                known(**value)
            else:
                setattr(self.faults, name, value)
        return {
            "requests": self.requests,
            "fired": self.faults.fired,
            "uploads_open": self.uploads_open(),
            "cpu_s": time.process_time(),
        }


def control(url: str, **wanted: Any) -> dict[str, Any]:
    """Set faults of a server in another process, as `down='503'`, `fail={'count': 2}` or `clear={}`."""
    request = urllib.request.Request(f"{url}/control", json.dumps(wanted).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=10) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append")
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--bandwidth-per-stream", type=float, help="bytes per second")
    parser.add_argument("--bandwidth-total", type=float, help="bytes per second")
    given = parser.parse_args(arguments)
    server = GcsServer(port=given.port, buckets=given.bucket or ["bucket"])
    server.faults.latency_s = given.latency_s
    server.faults.bandwidth_per_stream, server.faults.bandwidth_total = (
        given.bandwidth_per_stream,
        given.bandwidth_total,
    )
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
