"""Objects of a bucket as Google Cloud Storage has them: requests, answers, generations and their preconditions."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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
GIVEN = ["contentType", "contentEncoding", "cacheControl", "contentDisposition", "contentLanguage", "customTime"]
"""What a client may give of an object, beside metadata of its own."""


@dataclass
class Request:
    """One request as the API sees it; the parts of a batch are such requests too."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes | bytearray = b""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """The query as it came: a name may be repeated."""

    @classmethod
    def parse(cls, method: str, target: str, headers: Any) -> "Request":
        """Split a request line's target; the path stays percent-encoded, as names may hold slashes."""
        parts = urlsplit(target)
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        return cls(method, parts.path, dict(pairs), headers, pairs=pairs)

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


def in_base64(content: bytes) -> str:
    """Return bytes as the API writes them."""
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
        return in_base64(value.to_bytes(4, "big"))

    @cached_property
    def md5(self) -> str:
        """The digest; a composed object has none, as on Google's."""
        return "" if self.components else in_base64(hashlib.md5(self.data, usedforsecurity=False).digest())

    @property
    def etag(self) -> str:
        """What changes with every generation and every change of metadata."""
        return in_base64(f"{self.generation}/{self.metageneration}".encode())

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
