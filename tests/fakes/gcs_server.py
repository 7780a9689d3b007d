"""A small Google Cloud Storage on this machine: the JSON API with its preconditions, and faults on demand.

What PyPI has ignores `ifGenerationMatch`, so it accepts every race that our tests want to catch. This one is held
against the raw API, google-cloud-storage, gcsfs, tensorstore and Orbax in test_gcs_server.py. Buckets live in memory.

In a test:

    with GcsServer(buckets=["bucket"]) as server:
        server.faults.latency_s = 0.05
        server.faults.fail(503, count=5, match="commit.json")

As a process, whose first line is its URL: `python -m tests.fakes.gcs_server --port 0 --bucket bucket`; there, faults
are set with `control(url, latency_s=0.05, fail={"status": 503, "count": 5})`.
"""

import argparse
import base64
import hashlib
import json
import re
import secrets
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import google_crc32c

CHUNK_BYTES = 256 * 1024
"""Every chunk of a resumable upload but the last is a multiple: cloud.google.com/storage/docs/resumable-uploads."""

_REASONS = {
    400: "invalid",
    401: "authError",
    403: "forbidden",
    404: "notFound",
    409: "conflict",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
}
_GIVEN = ["contentType", "contentEncoding", "cacheControl", "contentDisposition", "contentLanguage", "customTime"]


@dataclass
class Request:
    """One request as the API sees it; the parts of a batch are such requests too."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes | bytearray = b""

    @classmethod
    def parse(cls, method: str, target: str, headers: Any) -> "Request":
        """Split a request line's target; the path stays percent-encoded, as names may hold slashes."""
        parts = urlsplit(target)
        return cls(method, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), headers)

    def json(self) -> dict[str, Any]:
        """Return the body as an object; an absent one is empty."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            raise RefusedError(400, "Parse Error") from None
        return found if isinstance(found, dict) else {}

    def header(self, name: str) -> str:
        """Return a header, or nothing."""
        return self.headers.get(name) or ""

    def boundary(self) -> bytes:
        """Return what separates the parts of a multipart body."""
        found = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', self.header("Content-Type"))
        if not found:
            raise RefusedError(400, "Missing boundary in multipart body")
        return b"--" + (found[1] or found[2]).encode()


@dataclass
class Reply:
    """An answer: a status, headers, and a body."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content: Any, status: int = 200) -> "Reply":
        """Answer with JSON."""
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    @classmethod
    def error(cls, status: int, message: str) -> "Reply":
        """Answer as Google does when it refuses; a 304 and a cancelled upload have no body."""
        if status in (304, 499):
            return cls(status)
        reason = _REASONS.get(status, "backendError")
        each = {"message": message, "domain": "global", "reason": reason}
        return cls.json({"error": {"code": status, "message": message, "errors": [each]}}, status)


class RefusedError(Exception):
    """A request that the API refuses, with the status and Google's words."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status, self.message = status, message


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@dataclass(frozen=True)
class Blob:
    """One generation of an object."""

    bucket: str
    name: str
    data: bytes | bytearray
    generation: int
    given: dict[str, Any]
    metageneration: int = 1
    created: float = field(default_factory=time.time)
    components: int = 0

    @cached_property
    def crc32c(self) -> str:
        """The checksum that the API and the downloads state."""
        value, view = 0, memoryview(self.data)
        for start in range(0, len(view), 1 << 20):  # it takes nothing but bytes: copy little
            value = google_crc32c.extend(value, bytes(view[start : start + (1 << 20)]))
        return _base64(value.to_bytes(4, "big"))

    @cached_property
    def md5(self) -> str:
        """The digest; a composed object has none, as on Google's."""
        return "" if self.components else _base64(hashlib.md5(self.data, usedforsecurity=False).digest())

    @property
    def etag(self) -> str:
        """What changes with every generation and every change of metadata."""
        return _base64(f"{self.generation}/{self.metageneration}".encode())

    def resource(self) -> dict[str, Any]:
        """Return the JSON that describes the object."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.created))
        found: dict[str, Any] = {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "bucket": self.bucket,
            "name": self.name,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "size": str(len(self.data)),
            "storageClass": "STANDARD",
            "crc32c": self.crc32c,
            "etag": self.etag,
            "timeCreated": stamp,
            "updated": stamp,
        }
        digest = {"componentCount": self.components} if self.components else {"md5Hash": self.md5}
        return found | digest | {"contentType": "application/octet-stream"} | self.given

    def headers(self) -> dict[str, str]:
        """Return the headers of a download."""
        return {
            "Content-Type": self.given.get("contentType", "application/octet-stream"),
            "ETag": self.etag,
            "x-goog-generation": str(self.generation),
            "x-goog-metageneration": str(self.metageneration),
            "x-goog-hash": f"crc32c={self.crc32c}" + (f",md5={self.md5}" if self.md5 else ""),
            "x-goog-stored-content-length": str(len(self.data)),
            "x-goog-stored-content-encoding": "identity",
            "x-goog-storage-class": "STANDARD",
        }


@dataclass
class Upload:
    """A resumable upload that is under way, or was."""

    bucket: str
    name: str
    query: dict[str, str]
    given: dict[str, Any]
    data: bytearray = field(default_factory=bytearray)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: Blob | None = None
    cancelled: bool = False


_OBJECT = "/storage/v1/b/([^/]+)/o/([^/]+)"
_ROUTES = [
    ("GET", "/storage/v1/b", "bucket.list"),
    ("POST", "/storage/v1/b", "bucket.insert"),
    ("GET", "/storage/v1/b/([^/]+)", "bucket.get"),
    ("DELETE", "/storage/v1/b/([^/]+)", "bucket.delete"),
    ("GET", "/storage/v1/b/([^/]+)/o", "object.list"),
    ("GET", "(?:/download)?" + _OBJECT, "object.get"),
    ("DELETE", _OBJECT, "object.delete"),
    ("PATCH", _OBJECT, "object.patch"),
    ("PUT", _OBJECT, "object.patch"),
    ("POST", _OBJECT + "/compose", "object.compose"),
    ("POST", _OBJECT + "/copyTo/b/([^/]+)/o/([^/]+)", "object.copy"),
    ("POST", _OBJECT + "/rewriteTo/b/([^/]+)/o/([^/]+)", "object.rewrite"),
    ("POST", _OBJECT + "/moveTo/o/([^/]+)", "object.move"),
    ("POST|PUT|DELETE", "(?:/resumable)?/upload/storage/v1/b/([^/]+)/o", "upload"),
    ("POST", "/batch/storage/v1", "batch"),
]
"""Which method and path is which kind of request; the kind names the function of `Storage` that answers it."""


def route(request: Request) -> tuple[str, list[str]]:
    """Return a request's kind and the names in its path."""
    for methods, pattern, kind in _ROUTES:
        found = re.fullmatch(pattern, request.path)
        if found and request.method in methods.split("|"):
            names = [unquote(name) for name in found.groups()]
            if kind == "object.get" and request.query.get("alt") == "media":
                return "object.media", names
            if kind != "upload":
                return kind, names
            if request.query.get("upload_id"):
                return ("upload.cancel" if request.method == "DELETE" else "upload.chunk"), names
            return f"upload.{request.query.get('uploadType', 'media')}", names
    return "unknown", []


def subject_of(kind: str, request: Request, head: bytes = b"") -> str:
    """Return the text that a fault's `match` is searched in: kind, method, path and query, all decoded.

    A multipart upload's object is named in its body only, whose first bytes are `head`.
    """
    name = re.search(rb'"name":\s*("(?:[^"\\]|\\.)*")', head)
    query = " ".join(f"{key}={value}" for key, value in request.query.items())
    return f"{kind} {request.method} {unquote(request.path)} {query} {json.loads(name[1]) if name else ''}"


def check_conditions(found: Blob | None, query: Mapping[str, str], *, reading: bool = False, source: str = "") -> None:
    """Refuse a request whose preconditions do not hold.

    Args:
        found: The object's live generation, if there is one; an absent one has generation 0.
        query: The request's, whose ifGenerationMatch, ifMetagenerationNotMatch and the like are looked at.
        reading: A read answers 304 to a failed NotMatch, a write 412.
        source: 'Source' to look at ifSourceGenerationMatch and the like.
    """
    for what, number in [("Generation", "generation"), ("Metageneration", "metageneration")]:
        now = getattr(found, number) if found else 0
        wanted, unwanted = (query.get(f"if{source}{what}{how}Match") for how in ("", "Not"))
        if not all(text is None or text.isdigit() for text in (wanted, unwanted)):
            raise RefusedError(400, f"Invalid value for if{source}{what}Match")
        if wanted is not None and int(wanted) != now:
            raise RefusedError(412, "At least one of the pre-conditions you specified did not hold.")
        if unwanted is not None and int(unwanted) == now:
            raise RefusedError(
                304 if reading else 412, "At least one of the pre-conditions you specified did not hold."
            )


def check_hashes(blob: Blob, given: Mapping[str, Any], header: str) -> None:
    """Refuse content that is not what its sender computed, told in the metadata or in x-goog-hash."""
    told = dict(part.strip().split("=", 1) for part in header.split(",") if "=" in part)
    for name, values in [
        ("crc32c", (given.get("crc32c"), told.get("crc32c"))),
        ("md5", (given.get("md5Hash"), told.get("md5"))),
    ]:
        for value in values:
            if value and value != getattr(blob, name):
                calculated = getattr(blob, name)
                text = f'Provided {name.upper()} hash "{value}" doesn\'t match calculated {name.upper()} hash'
                raise RefusedError(400, f'{text} "{calculated}".')


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the first byte and the one behind the last that a Range header asks for; None for everything."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not found or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
    if start >= size or stop <= start:
        raise RefusedError(416, "Request range not satisfiable")
    return start, stop


def split_multipart(request: Request) -> tuple[bytes, str, bytearray | bytes]:
    r"""Return the metadata, content type and content of a multipart upload; gcsfs separates lines with a bare \n."""
    body, mark = request.body, request.boundary()
    first = body.find(mark)
    line = b"\r\n" if body[first + len(mark) :][:2] == b"\r\n" else b"\n"
    second, last = body.find(line + mark, first + 1), body.rfind(line + mark + b"--")
    start, content = body.find(2 * line, first), body.find(2 * line, second + 1)
    if min(first, second, start, content) < 0 or not second < content <= last:
        raise RefusedError(400, "Malformed multipart body.")
    kind = re.search(rb"(?i)content-type: *([^\r\n]+)", body[second:content])
    return (
        bytes(body[start:second]).strip(),
        kind[1].decode() if kind else "application/octet-stream",
        body[content + 2 * len(line) : last],
    )


class Storage:
    """The buckets, and an answer to every kind of request on them."""

    def __init__(self, url: str) -> None:
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Blob]] = {}
        self.uploads: dict[str, Upload] = {}
        self.ahead_s = 0.0
        """How far the server's clock is ahead of this machine's."""
        self._url, self._last = url, 0

    def handle(self, request: Request) -> Reply:
        """Answer a request."""
        kind, names = route(request)
        answer: Callable[..., Reply] | None = getattr(self, "_" + kind.replace(".", "_"), None)
        if answer is None:
            return Reply.error(501, f"{request.method} {request.path} is not written in tests/fakes/gcs_server.py")
        try:
            return answer(request, *names)
        except RefusedError as refusal:
            reply = Reply.error(refusal.status, refusal.message)
            if kind == "object.media":  # where content is asked for, Google's words come as they are
                return Reply(refusal.status, refusal.message.encode(), {"Content-Type": "text/html; charset=UTF-8"})
            return reply

    def bucket(self, name: str) -> dict[str, Blob]:
        """Return a bucket's objects."""
        if name not in self.buckets:
            raise RefusedError(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def find(self, bucket: str, name: str, generation: Any = None) -> Blob:
        """Return an object's live generation, which is the one asked for if one is."""
        found = self.bucket(bucket).get(name)
        if found is None or str(generation or found.generation) != str(found.generation):
            raise RefusedError(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, blob: Blob, query: Mapping[str, str]) -> Blob:
        """Make content the live generation of an object if the preconditions hold; of several callers one at a time."""
        if not 0 < len(blob.name.encode()) <= 1024:
            raise RefusedError(400, "The name of an object has 1 to 1024 bytes in UTF-8.")
        assert blob.crc32c  # outside the lock
        with self.lock:
            objects = self.bucket(blob.bucket)
            check_conditions(objects.get(blob.name), query)
            self._last = max(self._last + 1, time.time_ns() // 1000)
            objects[blob.name] = made = replace(blob, generation=self._last, created=time.time() + self.ahead_s)
            made.__dict__["crc32c"] = blob.crc32c  # a cached property, which `replace` drops
        return made

    # Buckets.

    def _resource(self, name: str) -> dict[str, Any]:
        stamp = "2026-01-01T00:00:00.000Z"
        found = {"kind": "storage#bucket", "id": name, "name": name, "location": "US", "storageClass": "STANDARD"}
        return found | {"metageneration": "1", "etag": "CAE=", "timeCreated": stamp, "updated": stamp}

    def _bucket_list(self, request: Request) -> Reply:
        prefix = request.query.get("prefix", "")
        items = [self._resource(name) for name in sorted(self.buckets) if name.startswith(prefix)]
        return Reply.json({"kind": "storage#buckets", "items": items})

    def _bucket_insert(self, request: Request) -> Reply:
        name = str(request.json().get("name", ""))
        if not re.fullmatch("[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
            raise RefusedError(400, f"Invalid bucket name: '{name}'")
        with self.lock:
            if name in self.buckets:
                raise RefusedError(
                    409, "Your previous request to create the named bucket succeeded and you already own it."
                )
            self.buckets[name] = {}
        return Reply.json(self._resource(name))

    def _bucket_get(self, request: Request, bucket: str) -> Reply:
        self.bucket(bucket)
        return Reply.json(self._resource(bucket))

    def _bucket_delete(self, request: Request, bucket: str) -> Reply:
        with self.lock:
            if self.bucket(bucket):
                raise RefusedError(409, "The bucket you tried to delete is not empty.")
            del self.buckets[bucket]
        return Reply(204)

    # Objects.

    def _object_list(self, request: Request, bucket: str) -> Reply:
        query = request.query
        limit, after = min(1000, int(query.get("maxResults") or 1000)), base64.b64decode(query.get("pageToken", ""))
        with self.lock:
            entries = [entry for entry in self._entries(bucket, query) if entry[0].encode() > after]
        page: dict[str, Any] = {"kind": "storage#objects"}
        delimiter = query.get("delimiter", "")
        for name, blob in entries[:limit]:
            if delimiter and name.endswith(delimiter) and name != query.get("prefix"):
                page.setdefault("prefixes", []).append(name)
            if blob is not None:
                page.setdefault("items", []).append(blob.resource())
        if len(entries) > limit:
            page["nextPageToken"] = _base64(entries[limit - 1][0].encode())
        return Reply.json(page)

    def _entries(self, bucket: str, query: Mapping[str, str]) -> list[tuple[str, Blob | None]]:
        """Return what a listing shows, in order: objects, and prefixes, with an object that ends a prefix if wanted."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, stop = query.get("startOffset", ""), query.get("endOffset", "")
        found: dict[str, Blob | None] = {}
        for name, blob in sorted(self.bucket(bucket).items()):
            if not name.startswith(prefix) or name < start or (stop and name >= stop):
                continue
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if end < 0 else name[: end + len(delimiter)]
            shown = end < 0 or (entry == name and query.get("includeTrailingDelimiter") == "true")
            found.setdefault(entry, blob if shown else None)
        return list(found.items())

    def _object_get(self, request: Request, bucket: str, name: str) -> Reply:
        found = self.find(bucket, name, request.query.get("generation"))
        check_conditions(found, request.query, reading=True)
        return Reply.json(found.resource())

    def _object_media(self, request: Request, bucket: str, name: str) -> Reply:
        found = self.find(bucket, name, request.query.get("generation"))
        check_conditions(found, request.query, reading=True)
        asked = byte_range(request.header("Range"), len(found.data))
        if asked is None:
            return Reply(200, memoryview(found.data), found.headers())
        told = {"Content-Range": f"bytes {asked[0]}-{asked[1] - 1}/{len(found.data)}"}
        return Reply(206, memoryview(found.data)[slice(*asked)], found.headers() | told)

    def _object_delete(self, request: Request, bucket: str, name: str) -> Reply:
        with self.lock:
            check_conditions(self.find(bucket, name, request.query.get("generation")), request.query)
            del self.buckets[bucket][name]
        return Reply(204)

    def _object_patch(self, request: Request, bucket: str, name: str) -> Reply:
        change = request.json()
        with self.lock:
            found = self.find(bucket, name, request.query.get("generation"))
            check_conditions(found, request.query)
            given = found.given | {key: change[key] for key in _GIVEN if change.get(key)}
            if isinstance(change.get("metadata"), dict):
                merged = found.given.get("metadata", {}) | change["metadata"]
                given["metadata"] = {key: value for key, value in merged.items() if value is not None}
            changed = replace(found, given=given, metageneration=found.metageneration + 1)
            self.buckets[bucket][name] = changed
        return Reply.json(changed.resource())

    def _duplicate(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Blob:
        found = self.find(bucket, name, request.query.get("sourceGeneration"))
        check_conditions(found, request.query, source="Source")
        given = found.given | {key: value for key, value in request.json().items() if key in [*_GIVEN, "metadata"]}
        return self.put(replace(found, bucket=to_bucket, name=to_name, given=given, metageneration=1), request.query)

    def _object_copy(self, request: Request, *names: str) -> Reply:
        return Reply.json(self._duplicate(request, *names).resource())

    def _object_rewrite(self, request: Request, *names: str) -> Reply:
        made = self._duplicate(request, *names)
        size = str(len(made.data))
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return Reply.json(done | {"resource": made.resource()})

    def _object_move(self, request: Request, bucket: str, name: str, to_name: str) -> Reply:
        with self.lock:
            made = self._duplicate(request, bucket, name, bucket, to_name)
            if to_name != name:
                del self.buckets[bucket][name]
        return Reply.json(made.resource())

    def _object_compose(self, request: Request, bucket: str, name: str) -> Reply:
        wanted = request.json()
        sources = wanted.get("sourceObjects") or []
        if not 1 <= len(sources) <= 32:
            raise RefusedError(400, "The number of source components provided is not between 1 and 32.")
        parts = []
        for source in sources:
            parts.append(self.find(bucket, source["name"], source.get("generation")))
            conditions = source.get("objectPreconditions") or {}
            check_conditions(parts[-1], {key: str(value) for key, value in conditions.items()})
        count = sum(part.components or 1 for part in parts)
        blob = self._blob(bucket, name, b"".join(part.data for part in parts), wanted.get("destination") or {})
        return Reply.json(self.put(replace(blob, components=count), request.query).resource())

    # Uploads.

    def _blob(self, bucket: str, name: str, data: bytes | bytearray, given: Mapping[str, Any]) -> Blob:
        kept = {key: value for key, value in given.items() if key in [*_GIVEN, "metadata"] and value}
        return Blob(bucket, name, data, 0, kept)

    def _insert(self, request: Request, bucket: str, data: bytes | bytearray, given: dict[str, Any]) -> Reply:
        self.bucket(bucket)
        blob = self._blob(bucket, str(request.query.get("name") or given.get("name") or ""), data, given)
        check_hashes(blob, given, request.header("x-goog-hash"))
        return Reply.json(self.put(blob, request.query).resource())

    def _upload_media(self, request: Request, bucket: str) -> Reply:
        return self._insert(request, bucket, request.body, {"contentType": request.header("Content-Type")})

    def _upload_multipart(self, request: Request, bucket: str) -> Reply:
        metadata, kind, data = split_multipart(request)
        given = Request("POST", "", {}, {}, metadata).json()
        return self._insert(request, bucket, data, {"contentType": kind} | given)

    def _upload_resumable(self, request: Request, bucket: str) -> Reply:
        given = {"contentType": request.header("X-Upload-Content-Type")} | request.json()
        name = str(request.query.get("name") or given.get("name") or "")
        with self.lock:
            check_conditions(self.bucket(bucket).get(name), request.query)
            token = secrets.token_urlsafe(24)
            self.uploads[token] = Upload(bucket, name, request.query, given)
        query = urlencode(request.query | {"name": name, "upload_id": token})
        place = f"{self._url}/upload/storage/v1/b/{quote(bucket, safe='')}/o?{query}"
        return Reply(200, b"", {"Location": place, "X-GUploader-UploadID": token})

    def upload(self, request: Request) -> Upload:
        """Return the resumable upload that a request continues, which has not been cancelled."""
        found = self.uploads.get(request.query["upload_id"])
        if found is None:
            raise RefusedError(404, "The upload ID is not known, or has expired.")
        if found.cancelled:
            raise RefusedError(499)
        return found

    def _upload_cancel(self, request: Request, bucket: str) -> Reply:
        self.upload(request).cancelled = True
        return Reply(499)

    def _upload_chunk(self, request: Request, bucket: str) -> Reply:
        upload = self.upload(request)
        with upload.lock:
            if upload.done:  # a client that lost the answer asks again
                return Reply.json(upload.done.resource())
            total = self._append(upload, request)
            if total is None or len(upload.data) < total:
                got = len(upload.data)
                return Reply(308, b"", {"Range": f"bytes=0-{got - 1}"} if got else {})
            try:
                blob = self._blob(upload.bucket, upload.name, upload.data, upload.given)
                check_hashes(blob, upload.given, request.header("x-goog-hash"))
                upload.done = self.put(blob, upload.query)
            except RefusedError:
                upload.cancelled = True
                raise
            return Reply.json(upload.done.resource())

    def _append(self, upload: Upload, request: Request) -> int | None:
        """Add a chunk behind what is there and return the upload's total size, once its sender knows it."""
        size = len(request.body)
        told = request.header("Content-Range") or (f"bytes 0-{size - 1}/{size}" if size else "bytes */0")
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", told)
        if not found:
            raise RefusedError(400, f"Failed to parse Content-Range header: {told}")
        total = None if found[3] == "*" else int(found[3])
        if found[1] is None:
            return total
        first, last, kept = int(found[1]), int(found[2]), len(upload.data)
        if last - first + 1 != size or first > kept or (total is not None and last >= total):
            raise RefusedError(400, f"Invalid request. {size} bytes came for {told}, and {kept} bytes are there.")
        if (total is None or last + 1 < total) and size % CHUNK_BYTES:
            raise RefusedError(
                400, f"Invalid request. A chunk that is not the last has a multiple of {CHUNK_BYTES} bytes."
            )
        upload.data += memoryview(request.body)[kept - first :]
        return total

    def keep_partial(self, request: Request) -> None:
        """Keep what came of a chunk whose connection broke, in whole units of 256 KiB, as Google does."""
        upload = self.uploads.get(request.query.get("upload_id", ""))
        found = re.match(r"bytes (\d+)-", request.header("Content-Range"))
        if upload and found and not upload.done:
            with upload.lock:
                fresh = memoryview(request.body)[max(0, len(upload.data) - int(found[1])) :]
                upload.data += fresh[: len(fresh) // CHUNK_BYTES * CHUNK_BYTES]

    def _batch(self, request: Request) -> Reply:
        mark = request.boundary()
        parts = bytes(request.body).replace(b"\r\n", b"\n").split(mark)[1:-1]
        if len(parts) > 100:
            raise RefusedError(400, "The batch request has more than 100 calls.")
        answers = []
        for part in parts:
            outer, _, inner = part.strip(b"\n").partition(b"\n\n")
            head, _, body = inner.partition(b"\n\n")
            method, target, _ = head.split(b"\n")[0].decode().split(" ", 2)
            lines = (line.partition(": ") for line in head.decode().split("\n")[1:])
            one = Request.parse(method, target, {name.title(): value for name, _, value in lines})
            one.body = body
            reply = self.handle(one)
            found = re.search(rb"(?i)content-id: *<([^>]*)>", outer)
            told = f"Content-ID: <response-{found[1].decode() if found else ''}>"
            answers += ["--batch", "Content-Type: application/http", told, ""]
            answers += [f"HTTP/1.1 {reply.status} {responses.get(reply.status, 'OK')}"]
            answers += [f"{name}: {value}" for name, value in reply.headers.items()]
            answers += [f"Content-Length: {len(reply.body)}", "", bytes(reply.body).decode()]
        answers.append("--batch--\r\n")
        return Reply(200, "\r\n".join(answers).encode(), {"Content-Type": "multipart/mixed; boundary=batch"})


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
        self.down: str | None = None
        """'503' answers everything so; 'closed' resets every connection that asks something."""
        self._rules: list[_Rule] = []
        self._stale: set[str] | None = None

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


def _denied(subject: str) -> str:
    """Return Google's words for a permission that is missing."""
    kind = subject.split(" ")[0]
    verbs = {"get": "get", "media": "get", "list": "list", "delete": "delete", "patch": "update", "insert": "create"}
    what = "buckets" if kind.startswith("bucket") else "objects"
    permission = f"storage.{what}.{verbs.get(kind.partition('.')[2], 'create')}"
    return (
        f"tester@project.iam.gserviceaccount.com does not have {permission} access to the Google Cloud Storage "
        f"{what[:-1]}. Permission '{permission}' denied on resource (or it may not exist)."
    )


class _BrokenError(Exception):
    """A connection that is to end here."""


class _Handler(BaseHTTPRequestHandler):
    """One connection, kept alive; http.server answers `Expect: 100-continue` at once: libcurl would wait 1 s."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Listener"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Say nothing: the server keeps a log of its own."""

    def _serve(self) -> None:
        request = Request.parse(self.command, self.path, self.headers)
        try:
            if request.path == "/control":
                request.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._send(Reply.json(self.server.gcs.control(request.json())), None)
            else:
                self._answer(request)
        except (_BrokenError, ConnectionError):
            self._reset()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _answer(self, request: Request) -> None:
        gcs, (kind, _) = self.server.gcs, route(request)
        head = self.rfile.peek(4096) if kind == "upload.multipart" else b""  # type: ignore[attr-defined]
        subject = subject_of(kind, request, head)
        gcs.record(kind, subject)
        if gcs.faults.down == "closed":
            gcs.faults.fired["down"] += 1
            raise _BrokenError
        refused = gcs.faults.refuse(subject, request.header("Authorization"))
        gcs.wait(gcs.faults.latency_s)
        self._receive(request, subject, limited=refused is None)
        reply = refused or gcs.storage.handle(request)
        if refused is None and gcs.faults.take("lost", subject):
            raise _BrokenError
        self._send(reply, subject if refused is None else None)

    def _receive(self, request: Request, subject: str, *, limited: bool) -> None:
        """Read a request's content into it, at the pace of the wire."""
        if "chunked" in request.header("Transfer-Encoding"):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                request.body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
            return
        body = bytearray(int(request.header("Content-Length") or 0))
        view, got = memoryview(body), 0
        try:
            for start, stop in self._pieces(len(body), subject if limited else None, self.server.gcs.wire_in):
                size = self.rfile.readinto(view[start:stop])
                got += size
                if start + size < stop:
                    raise _BrokenError
        except (_BrokenError, ConnectionError):
            request.body = bytes(view[:got])
            self.server.gcs.storage.keep_partial(request)
            raise
        request.body = body

    def _send(self, reply: Reply, subject: str | None) -> None:
        """Write an answer; its headers go with the first piece of its content."""
        head = f"HTTP/1.1 {reply.status} {responses.get(reply.status, 'Resume Incomplete')}\r\n"
        size = {} if reply.status in (204, 304) else {"Content-Length": str(len(reply.body))}
        head += "".join(f"{name}: {value}\r\n" for name, value in (reply.headers | size).items()) + "\r\n"
        rest = head.encode()
        for start, stop in self._pieces(len(reply.body), subject, self.server.gcs.wire_out):
            if stop - start > 65536 or not rest:
                if rest:
                    self.wfile.write(rest)
                self.wfile.write(memoryview(reply.body)[start:stop])
            else:
                self.wfile.write(rest + reply.body[start:stop])
            rest = b""
        if rest:
            self.wfile.write(rest)

    def _pieces(self, size: int, subject: str | None, wire: _Pace) -> Iterable[tuple[int, int]]:
        """Yield the bounds of a content's pieces, each when it has had its time on the wire, and break where told."""
        gcs, stream = self.server.gcs, _Pace()
        outwards = wire is gcs.wire_out
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
        self.server.gcs.wait(rule.value)

    def _reset(self) -> None:
        """End the connection with a TCP reset, as a balancer or a firewall does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()


class _Listener(ThreadingHTTPServer):
    """The threads, one for each connection, which end with the server."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, gcs: "GcsServer") -> None:
        self.gcs, self.connections = gcs, set[socket.socket]()
        super().__init__(("127.0.0.1", port), _Handler)

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


class GcsServer:
    """A Google Cloud Storage on a port of this machine.

    Args:
        port: 0 for a free one.
        buckets: The names of the buckets that are there at the start.
    """

    def __init__(self, *, port: int = 0, buckets: Iterable[str] = ("bucket",)) -> None:
        self.faults = Faults()
        self.log: list[tuple[str, str]] = []
        """Kind and subject of every request, in order of arrival."""
        self.wire_in, self.wire_out = _Pace(), _Pace()
        self._closing = threading.Event()
        self._listener = _Listener(port, self)
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self.storage = Storage(self.url)
        self.storage.buckets |= {name: {} for name in buckets}
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "GcsServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        for connection in list(self._listener.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

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
        return {"requests": self.requests, "fired": self.faults.fired, "uploads_open": self.uploads_open()}

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
        "FSSPEC_GS": '{"use_listings_cache": false}',  # else Orbax's own gcsfs never sees what others wrote
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
