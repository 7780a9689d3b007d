"""Buckets in memory, and an answer to every kind of request of Google Cloud Storage's JSON API."""

import base64
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from http.client import responses
from typing import Any
from urllib.parse import quote, unquote, urlencode

from launch.emulate.objects import (
    CHUNK_BYTES,
    GIVEN,
    Blob,
    RefusedError,
    Reply,
    Request,
    Upload,
    byte_range,
    check_conditions,
    check_hashes,
    in_base64,
    split_multipart,
)

_OBJECT = "/storage/v1/b/([^/]+)/o/([^/]+)"
_ROUTES = [
    ("GET", "/storage/v1/b", "bucket.list"),
    ("POST", "/storage/v1/b", "bucket.insert"),
    ("GET", "/storage/v1/b/([^/]+)", "bucket.get"),
    ("DELETE", "/storage/v1/b/([^/]+)", "bucket.delete"),
    ("GET", "/storage/v1/b/([^/]+)/iam", "bucket.policy"),
    ("GET", "/storage/v1/b/([^/]+)/iam/testPermissions", "bucket.permissions"),
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


class Storage:
    """The buckets, and an answer to every kind of request on them."""

    def __init__(self, url: str) -> None:
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Blob]] = {}
        self.uploads: dict[str, Upload] = {}
        self.ahead_s = 0.0
        """How far the server's clock is ahead of this machine's."""
        self.locations: dict[str, str] = {}
        """Where buckets are; others are in the multi-region US."""
        self.policies: dict[str, list[dict[str, Any]]] = {}
        """Who may what in which bucket, as the API writes bindings; nobody is refused for want of one."""
        self.withheld: set[str] = set()
        """Permissions that whoever asks has not, as far as the API says."""
        self._url, self._last = url, 0

    def handle(self, request: Request) -> Reply:
        """Answer a request."""
        kind, names = route(request)
        answer: Callable[..., Reply] | None = getattr(self, "_" + kind.replace(".", "_"), None)
        if answer is None:
            return Reply.error(501, f"{request.method} {request.path} is not emulated")
        try:
            return answer(request, *names)
        except RefusedError as refusal:
            reply = Reply.error(refusal.status, refusal.message)
            if kind == "object.media":  # where content is asked for, Google's words come as they are
                return Reply(refusal.status, refusal.message.encode(), {"Content-Type": "text/html; charset=UTF-8"})
            return reply

    def make(self, name: str) -> None:
        """Make a bucket; raises RefusedError if it has no bucket's name, or is there."""
        if not re.fullmatch("[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
            raise RefusedError(400, f"Invalid bucket name: '{name}'")
        with self.lock:
            if name in self.buckets:
                raise RefusedError(
                    409, "Your previous request to create the named bucket succeeded and you already own it."
                )
            self.buckets[name] = {}

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
        found = {"kind": "storage#bucket", "id": name, "name": name, "storageClass": "STANDARD"}
        found["location"] = self.locations.get(name, "US")
        return found | {"metageneration": "1", "etag": "CAE=", "timeCreated": stamp, "updated": stamp}

    def _bucket_list(self, request: Request) -> Reply:
        prefix = request.query.get("prefix", "")
        items = [self._resource(name) for name in sorted(self.buckets) if name.startswith(prefix)]
        return Reply.json({"kind": "storage#buckets", "items": items})

    def _bucket_insert(self, request: Request) -> Reply:
        name = str(request.json().get("name", ""))
        self.make(name)
        return Reply.json(self._resource(name))

    def _bucket_get(self, request: Request, bucket: str) -> Reply:
        self.bucket(bucket)
        return Reply.json(self._resource(bucket))

    def _bucket_policy(self, request: Request, bucket: str) -> Reply:
        self.bucket(bucket)
        found = {"kind": "storage#policy", "resourceId": f"projects/_/buckets/{bucket}", "version": 1, "etag": "CAE="}
        return Reply.json(found | {"bindings": self.policies.get(bucket, [])})

    def _bucket_permissions(self, request: Request, bucket: str) -> Reply:
        self.bucket(bucket)
        held = [value for name, value in request.pairs if name == "permissions" and value not in self.withheld]
        return Reply.json({"kind": "storage#testIamPermissionsResponse"} | ({"permissions": held} if held else {}))

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
            page["nextPageToken"] = in_base64(entries[limit - 1][0].encode())
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
            given = found.given | {key: change[key] for key in GIVEN if change.get(key)}
            if isinstance(change.get("metadata"), dict):
                merged = found.given.get("metadata", {}) | change["metadata"]
                given["metadata"] = {key: value for key, value in merged.items() if value is not None}
            changed = replace(found, given=given, metageneration=found.metageneration + 1)
            self.buckets[bucket][name] = changed
        return Reply.json(changed.resource())

    def _duplicate(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Blob:
        found = self.find(bucket, name, request.query.get("sourceGeneration"))
        check_conditions(found, request.query, source="Source")
        given = found.given | {key: value for key, value in request.json().items() if key in [*GIVEN, "metadata"]}
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
        kept = {key: value for key, value in given.items() if key in [*GIVEN, "metadata"] and value}
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
