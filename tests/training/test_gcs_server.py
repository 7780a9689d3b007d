"""The server that stands for Google Cloud Storage in our tests: the raw API, four real clients, and every fault."""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import google_crc32c
import pytest
import requests

from tests.fakes.gcs_server import CHUNK_BYTES, GcsServer, control

# Read when gcsfs is imported; else it asks a gRPC service for every bucket's type, as soon as it has a token.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
gcsfs = pytest.importorskip("gcsfs")
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[GcsServer]:
    """One server, for which the process's environment is set: tensorstore reads it once."""
    with GcsServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def server(shared: GcsServer) -> GcsServer:
    """The shared server, empty and without faults."""
    shared.faults.clear()
    shared.faults.fired.clear()
    shared.log.clear()
    shared.storage.buckets = {"bucket": {}}
    shared.storage.uploads.clear()
    return shared


class Raw:
    """The API as it is, over one kept-alive connection."""

    def __init__(self, url: str) -> None:
        self.url, self.session = url, requests.Session()

    def object(self, name: str, action: str = "", bucket: str = "bucket") -> str:
        """Return an object's URL."""
        return f"{self.url}/storage/v1/b/{bucket}/o/{quote(name, safe='')}{action}"

    def __call__(self, method: str, url: str, status: int | None = None, **given: Any) -> requests.Response:
        """Send a request; the keywords that requests does not know go into the query."""
        known = {key: given.pop(key) for key in ("data", "json", "headers", "timeout") if key in given}
        reply = self.session.request(method, url, params=given, **({"timeout": 20} | known))
        assert status in (None, reply.status_code), f"{reply.status_code}: {reply.text[:300]}"
        return reply

    def put(self, name: str, data: bytes = b"x", status: int = 200, **given: Any) -> requests.Response:
        """Upload content with the simplest of the three ways."""
        place = f"{self.url}/upload/storage/v1/b/{given.pop('bucket', 'bucket')}/o"
        return self("POST", place, status, uploadType="media", name=name, data=data, **given)

    def begin(self, name: str, status: int = 200, **given: Any) -> str:
        """Begin a resumable upload and return its URL."""
        place = f"{self.url}/upload/storage/v1/b/bucket/o"
        reply = self("POST", place, status, uploadType="resumable", json={"name": name}, **given)
        return reply.headers.get("Location", "")

    def list(self, **given: Any) -> tuple[list[str], list[str], str | None]:
        """Return names, prefixes and the token of a page."""
        page = self("GET", f"{self.url}/storage/v1/b/bucket/o", 200, **given).json()
        names = [item["name"] for item in page.get("items", [])]
        return names, page.get("prefixes", []), page.get("nextPageToken")


@pytest.fixture
def raw(server: GcsServer) -> Iterator[Raw]:
    """The raw API of the server."""
    api = Raw(server.url)
    yield api
    api.session.close()


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


# The raw API.


def test_an_object_is_described_and_read(raw: Raw) -> None:
    """Uploaded content comes back from both addresses, with checksums, size and generation in metadata and headers."""
    data = os.urandom(1000)
    made = raw.put("a/b c%", data).json()
    assert made == raw("GET", raw.object("a/b c%"), 200).json()
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    assert (made["size"], made["crc32c"], made["md5Hash"]) == ("1000", crc32c(data), md5)
    assert made["metageneration"] == "1"
    for prefix in ("", "/download"):
        reply = raw("GET", raw.object("a/b c%").replace("/storage", prefix + "/storage", 1), 200, alt="media")
        assert reply.content == data
        assert reply.headers["x-goog-generation"] == made["generation"]
        assert reply.headers["x-goog-hash"] == f"crc32c={made['crc32c']},md5={md5}"
        assert reply.headers["x-goog-stored-content-length"] == "1000"


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("0-9", 0, 10), ("90-", 90, 100), ("90-1000", 90, 100), ("-7", 93, 100), ("-1000", 0, 100), ("99-99", 99, 100)],
)
def test_a_range_is_read(raw: Raw, asked: str, start: int, stop: int) -> None:
    """Every form of a range gives 206, its bytes and where they lie."""
    data = os.urandom(100)
    raw.put("a", data)
    reply = raw("GET", raw.object("a"), 206, alt="media", headers={"Range": f"bytes={asked}"})
    assert reply.content == data[start:stop]
    assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/100"


def test_a_range_behind_the_end_is_refused(raw: Raw) -> None:
    """A range that starts at or behind the end is 416."""
    raw.put("a", b"12345")
    for asked in ("5-", "7-9"):
        raw("GET", raw.object("a"), 416, alt="media", headers={"Range": f"bytes={asked}"})


def test_conditions_of_an_insert(raw: Raw) -> None:
    """Generation 0 means absent; a stale generation is 412 and changes nothing; NotMatch is the contrary."""
    first = raw.put("a", b"1", ifGenerationMatch=0).json()["generation"]
    error = raw.put("a", b"2", 412, ifGenerationMatch=0).json()["error"]
    assert (error["code"], error["errors"][0]["reason"]) == (412, "conditionNotMet")
    second = raw.put("a", b"2", ifGenerationMatch=first).json()["generation"]
    assert int(second) > int(first)
    raw.put("a", b"3", 412, ifGenerationMatch=first)
    raw.put("a", b"3", 412, ifGenerationNotMatch=second)
    raw.put("b", b"3", 412, ifGenerationNotMatch=0)
    raw.put("a", b"3", 412, ifMetagenerationMatch=2)
    assert raw("GET", raw.object("a"), 200, alt="media").content == b"2"
    raw.put("a", b"3", ifGenerationNotMatch=first, ifMetagenerationMatch=1)


def test_conditions_of_a_read(raw: Raw) -> None:
    """A read with the wrong generation is 412, with one that is known already 304; an old generation is gone."""
    made = raw.put("a").json()["generation"]
    for media in ({}, {"alt": "media"}):
        raw("GET", raw.object("a"), 200, ifGenerationMatch=made, **media)
        raw("GET", raw.object("a"), 412, ifGenerationMatch=1, **media)
        raw("GET", raw.object("a"), 304, ifGenerationNotMatch=made, **media)
        raw("GET", raw.object("a"), 404, generation=1, **media)
        raw("GET", raw.object("a"), 304, ifMetagenerationNotMatch=1, **media)


def test_conditions_of_a_change_and_a_delete(raw: Raw) -> None:
    """A patch raises the metageneration, and the old one is refused from then on; a delete looks at both numbers."""
    made = raw.put("a").json()["generation"]
    patched = raw("PATCH", raw.object("a"), 200, json={"metadata": {"k": "v"}}, ifMetagenerationMatch=1).json()
    assert (patched["metadata"], patched["metageneration"], patched["generation"]) == ({"k": "v"}, "2", made)
    raw("PATCH", raw.object("a"), 412, json={}, ifMetagenerationMatch=1)
    raw("DELETE", raw.object("a"), 412, ifGenerationMatch=1)
    raw("DELETE", raw.object("a"), 412, ifMetagenerationMatch=1)
    assert raw("DELETE", raw.object("a"), 204, ifGenerationMatch=made).content == b""
    raw("DELETE", raw.object("a"), 404)
    raw("PATCH", raw.object("a"), 404, json={})


def test_what_is_absent(raw: Raw) -> None:
    """An absent object and an absent bucket are told apart in Google's JSON, and a stranger's endpoint is 501."""
    error = raw("GET", raw.object("no"), 404).json()["error"]
    assert (error["message"], error["errors"][0]["reason"]) == ("No such object: bucket/no", "notFound")
    error = raw.put("a", status=404, bucket="none").json()["error"]
    assert error["message"] == "The specified bucket does not exist."
    raw("GET", f"{raw.url}/storage/v1/b/none", 404)
    raw("GET", f"{raw.url}/storage/v1/b/none/o", 404)
    assert raw("GET", raw.object("no"), 404, alt="media").text == "No such object: bucket/no"
    raw("GET", f"{raw.url}/storage/v1/b/bucket/acl", 501)


def test_buckets(raw: Raw) -> None:
    """A bucket is made once, listed, and removed once it is empty."""
    buckets = f"{raw.url}/storage/v1/b"
    raw("POST", buckets, 200, json={"name": "another"})
    raw("POST", buckets, 409, json={"name": "another"})
    raw("POST", buckets, 400, json={"name": "Not_a_name!"})
    assert [item["name"] for item in raw("GET", buckets, 200).json()["items"]] == ["another", "bucket"]
    raw.put("a", bucket="another")
    raw("DELETE", f"{buckets}/another", 409)
    raw("DELETE", raw.object("a", bucket="another"), 204)
    raw("DELETE", f"{buckets}/another", 204)
    raw("GET", f"{buckets}/another", 404)


@pytest.mark.parametrize("line", ["\r\n", "\n"])
def test_a_multipart_upload(raw: Raw, line: str) -> None:
    """Content is taken to the byte, whichever way the parts' lines end and whatever the content looks like."""
    data = b"\r\n\r\n--b" + os.urandom(500) + b"\n\n\r"
    head = {"name": "a", "metadata": {"k": "v"}, "contentType": "text/x", "crc32c": crc32c(data)}
    text = f"--b\nContent-Type: application/json\n\n{json.dumps(head)}\n--b\nContent-Type: text/y\n\n".replace(
        "\n", line
    )
    body = text.encode() + data + f"{line}--b--".encode()
    place, headers = f"{raw.url}/upload/storage/v1/b/bucket/o", {"Content-Type": 'multipart/related; boundary="b"'}
    made = raw("POST", place, 200, uploadType="multipart", data=body, headers=headers, ifGenerationMatch=0).json()
    assert (made["metadata"], made["contentType"]) == ({"k": "v"}, "text/x")
    assert raw("GET", raw.object("a"), 200, alt="media").content == data
    raw("POST", place, 412, uploadType="multipart", data=body, headers=headers, ifGenerationMatch=0)
    raw("POST", place, 400, uploadType="multipart", data=body[:-40], headers=headers)


def test_content_that_is_not_what_was_sent_is_refused(server: GcsServer, raw: Raw) -> None:
    """A wrong checksum in the metadata or in x-goog-hash is 400, in all three ways, and nothing is stored."""
    good, bad = f"crc32c={crc32c(b'x')}", f"crc32c={crc32c(b'y')}"
    raw.put("a", b"x", 400, headers={"x-goog-hash": bad})
    raw.put("a", b"x", 400, headers={"x-goog-hash": f"{good},md5={base64.b64encode(bytes(16)).decode()}"})
    raw("PUT", raw.begin("a"), 400, data=b"x", headers={"x-goog-hash": bad})
    head = json.dumps({"name": "a", "crc32c": crc32c(b"y")})
    body = f"--b\n\n{head}\n--b\nContent-Type: a/b\n\nx\n--b--"
    place, headers = f"{raw.url}/upload/storage/v1/b/bucket/o", {"Content-Type": "multipart/related; boundary=b"}
    error = raw("POST", place, 400, uploadType="multipart", data=body, headers=headers).json()["error"]
    assert "doesn't match calculated CRC32C" in error["message"]
    assert server.names() == server.uploads_open() == []
    raw.put("a", b"x", headers={"x-goog-hash": good})


def test_a_resumable_upload(server: GcsServer, raw: Raw) -> None:
    """Chunks add up; a status query tells how far; a chunk sent twice counts once; the end may be asked for again."""
    data = os.urandom(2 * CHUNK_BYTES + 100)
    place = raw.begin("a b")
    assert server.uploads_open() == ["bucket/a b"]
    assert "Range" not in raw("PUT", place, 308, headers={"Content-Range": "bytes */*"}).headers
    for _ in range(2):
        told = {"Content-Range": f"bytes 0-{CHUNK_BYTES - 1}/*"}
        assert raw("PUT", place, 308, data=data[:CHUNK_BYTES], headers=told).headers["Range"] == "bytes=0-262143"
    raw("PUT", place, 400, data=b"x" * 100, headers={"Content-Range": f"bytes {CHUNK_BYTES}-{CHUNK_BYTES + 99}/*"})
    raw("PUT", place, 400, data=b"x", headers={"Content-Range": "bytes 999999-999999/1000000"})
    status = raw("PUT", place, 308, headers={"Content-Range": f"bytes */{len(data)}"})
    assert status.headers["Range"] == "bytes=0-262143"
    assert server.names() == []
    told = {"Content-Range": f"bytes {CHUNK_BYTES}-{len(data) - 1}/{len(data)}"}
    made = raw("POST", place, 200, data=data[CHUNK_BYTES:], headers=told).json()
    assert made == raw("PUT", place, 200, headers={"Content-Range": f"bytes */{len(data)}"}).json()
    assert made["crc32c"] == crc32c(data)
    assert server.uploads_open() == []
    assert server.requests["upload.chunk"] == 8


def test_a_resumable_upload_ends_early(server: GcsServer, raw: Raw) -> None:
    """A cancelled upload is 499 for good; a condition counts at the start and at the end; an unknown one is 404."""
    place = raw.begin("a", ifGenerationMatch=0)
    raw.put("a", b"another was faster")
    raw.begin("a", 412, ifGenerationMatch=0)
    raw("PUT", place, 412, data=b"late")
    assert server.read("a") == b"another was faster"
    place = raw.begin("b")
    raw("DELETE", place, 499)
    raw("PUT", place, 499, data=b"x")
    raw("PUT", place + "x", 404, data=b"x")
    assert server.uploads_open() == []


def test_listing(server: GcsServer, raw: Raw) -> None:
    """Names come in order, by prefix, delimiter and offsets; one page after the other gives each once."""
    for name in ["a", "a/1", "a/2/x", "a/2/y", "a/3/", "a/3/z", "b", "c"]:
        server.write(name, b"")
    assert raw.list()[0] == server.names()
    assert raw.list(delimiter="/") == (["a", "b", "c"], ["a/"], None)
    assert raw.list(delimiter="/", prefix="a/") == (["a/1"], ["a/2/", "a/3/"], None)
    assert raw.list(delimiter="/", prefix="a/", includeTrailingDelimiter="true")[0] == ["a/1", "a/3/"]
    assert raw.list(delimiter="/", prefix="a/3/") == (["a/3/", "a/3/z"], [], None)
    assert raw.list(startOffset="a/2/y", endOffset="b")[0] == ["a/2/y", "a/3/", "a/3/z"]
    assert raw.list(prefix="none") == ([], [], None)
    for given in ({}, {"delimiter": "/"}, {"delimiter": "/", "prefix": "a/", "includeTrailingDelimiter": "true"}):
        found: list[str] = []
        token: str | None = ""
        while token is not None:
            names, prefixes, token = raw.list(maxResults=1, pageToken=token, **given)
            assert len({*names, *prefixes}) == 1
            found += [*names, *prefixes]
        names, prefixes, _ = raw.list(**given)
        assert sorted(found) == sorted(names + prefixes)


def test_a_listing_has_at_most_a_thousand_names(server: GcsServer, raw: Raw) -> None:
    """Google gives no more than 1000 names at once, whatever is asked."""
    for number in range(1001):
        server.write(f"{number:04}", b"")
    names, _, token = raw.list(maxResults=5000)
    assert len(names) == 1000
    assert raw.list(pageToken=token) == (["1000"], [], None)


def test_copies_and_moves(server: GcsServer, raw: Raw) -> None:
    """Copy, rewrite and move look at both sides' generations, keep content and metadata, and take effect at once."""
    made = raw.put("a", b"content", headers={"Content-Type": "text/x"}).json()["generation"]
    raw("POST", raw.object("a", "/copyTo/b/bucket/o/b%2F1"), 412, ifSourceGenerationMatch=1)
    copied = raw("POST", raw.object("a", "/copyTo/b/bucket/o/b%2F1"), 200, ifSourceGenerationMatch=made).json()
    assert (copied["name"], copied["contentType"], copied["crc32c"]) == ("b/1", "text/x", crc32c(b"content"))
    raw("POST", raw.object("a", "/rewriteTo/b/bucket/o/b%2F1"), 412, ifGenerationMatch=0)
    rewritten = raw("POST", raw.object("a", "/rewriteTo/b/bucket/o/c"), 200, ifGenerationMatch=0).json()
    assert (rewritten["done"], rewritten["resource"]["name"]) == (True, "c")
    raw("POST", raw.object("a", "/moveTo/o/c"), 412, ifGenerationMatch=0)
    raw("POST", raw.object("a", "/moveTo/o/d"), 412, ifSourceGenerationMatch=1)
    raw("POST", raw.object("a", "/moveTo/o/c"), 200)
    assert server.names() == ["b/1", "c"]
    raw("POST", raw.object("a", "/moveTo/o/d"), 404)
    raw("POST", raw.object("c", "/copyTo/b/none/o/x"), 404)


def test_composing(server: GcsServer, raw: Raw) -> None:
    """Up to 32 objects become one, which has a crc32c and no md5; a source may be named with its generation."""
    numbers = [raw.put(f"part{i}", str(i).encode()).json()["generation"] for i in range(3)]
    wanted = [{"name": f"part{i}", "objectPreconditions": {"ifGenerationMatch": numbers[i]}} for i in range(3)]
    compose = raw.object("all", "/compose")
    made = raw("POST", compose, 200, json={"sourceObjects": wanted}, ifGenerationMatch=0).json()
    assert (made["componentCount"], made["crc32c"], "md5Hash" in made) == (3, crc32c(b"012"), False)
    raw("POST", compose, 412, json={"sourceObjects": wanted}, ifGenerationMatch=0)
    raw("POST", compose, 404, json={"sourceObjects": [{"name": "part0", "generation": "1"}]})
    raw("POST", compose, 412, json={"sourceObjects": [wanted[0] | {"objectPreconditions": {"ifGenerationMatch": 1}}]})
    raw("POST", compose, 400, json={"sourceObjects": [{"name": "part0"}] * 33})
    assert server.read("all") == b"012"


@pytest.mark.timing
def test_continue_is_told_at_once(server: GcsServer) -> None:
    """A client that waits for 100 before it sends its content gets it before any latency; libcurl would wait 1 s."""
    server.faults.latency_s = 0.3
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=5) as connection:
        head = "POST /upload/storage/v1/b/bucket/o?uploadType=media&name=a HTTP/1.1\r\nHost: x\r\n"
        start = time.monotonic()
        connection.sendall(f"{head}Content-Length: 3\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        assert time.monotonic() - start < 0.15
        connection.sendall(b"abc")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert server.read("a") == b"abc"


def test_chunked_content(server: GcsServer, raw: Raw) -> None:
    """Content whose length is not told in advance arrives, and the connection can be used again."""
    raw.put("a", iter([b"one", b"two"]))  # type: ignore[arg-type]
    raw.put("b", b"three")
    assert [server.read("a"), server.read("b")] == [b"onetwo", b"three"]


# The real clients.


@pytest.fixture
def client(server: GcsServer) -> Any:
    """Google's own client, which takes the server's address from the environment."""
    storage = pytest.importorskip("google.cloud.storage")
    from google.auth.credentials import AnonymousCredentials

    return storage.Client(project="project", credentials=AnonymousCredentials())


def test_google_cloud_storage(server: GcsServer, client: Any, tmp_path: Any) -> None:
    """Google's client uploads in every way, reads, lists by pages, composes, moves and deletes in a batch."""
    from google.api_core import exceptions

    bucket, data = client.bucket("bucket"), os.urandom(9 * MIB)
    blob = bucket.blob("dir/small")
    blob.upload_from_string(b"small", checksum="crc32c", if_generation_match=0)
    (tmp_path / "file").write_bytes(data)
    large = bucket.blob("dir/large", chunk_size=4 * MIB)
    large.upload_from_filename(tmp_path / "file", checksum="crc32c")
    assert server.requests["upload.chunk"] == 3
    assert large.download_as_bytes(checksum="crc32c") == data
    assert large.download_as_bytes(start=5, end=9) == data[5:10]
    with pytest.raises(exceptions.PreconditionFailed):
        blob.upload_from_string(b"again", if_generation_match=0)
    with pytest.raises(exceptions.NotFound):
        client.bucket("none").blob("a").download_as_bytes()
    pages = [[blob.name for blob in page] for page in client.list_blobs("bucket", page_size=1).pages]
    assert pages == [["dir/large"], ["dir/small"]]
    whole = bucket.blob("whole")
    whole.compose([large, blob])
    assert whole.download_as_bytes() == data + b"small"
    bucket.rename_blob(whole, "renamed")
    assert server.names() == ["dir/large", "dir/small", "renamed"]
    with client.batch():
        for name in ("dir/large", "dir/small"):
            bucket.delete_blob(name)
    assert server.names() == ["renamed"]
    with pytest.raises(exceptions.NotFound), client.batch():
        bucket.delete_blob("dir/large")
    assert server.requests["batch"] == 2
    assert client.get_bucket("bucket").name == "bucket"


def one_winner(create: Callable[[bytes], bool], server: GcsServer) -> None:
    """Assert that of 16 threads exactly one creates an object, with its content."""
    gate = threading.Barrier(16)

    def race(number: int) -> bytes | None:
        content = b"%d" % number
        gate.wait()
        return content if create(content) else None

    with ThreadPoolExecutor(16) as pool:
        winners = [content for content in pool.map(race, range(16)) if content is not None]
    assert [server.read("race")] == winners


def test_one_creator_wins_with_google_cloud_storage(server: GcsServer, client: Any) -> None:
    """Of 16 threads that create one object, one wins and 15 get PreconditionFailed."""
    from google.api_core.exceptions import PreconditionFailed

    def create(content: bytes) -> bool:
        try:
            client.bucket("bucket").blob("race").upload_from_string(content, if_generation_match=0)
        except PreconditionFailed:
            return False
        return True

    one_winner(create, server)


@pytest.fixture
def fs(server: GcsServer) -> Any:
    """A file system of gcsfs that remembers nothing."""
    return gcsfs.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


def test_gcsfs(server: GcsServer, fs: Any, tmp_path: Any) -> None:
    """Gcsfs writes in every way, reads ranges, lists, finds, moves and removes."""
    data = os.urandom(6 * MIB)
    fs.pipe_file("bucket/dir/small", b"0123456789")
    (tmp_path / "up").write_bytes(data)
    fs.put_file(str(tmp_path / "up"), "bucket/dir/large", chunksize=2 * MIB)
    assert server.requests["upload.chunk"] == 3
    with fs.open("bucket/dir/open", "wb", block_size=CHUNK_BYTES) as file:
        for start in range(0, MIB + 5, 1000):
            file.write(data[start : min(start + 1000, MIB + 5)])
    assert server.read("dir/open") == data[: MIB + 5]
    assert server.uploads_open() == []
    fs.get_file("bucket/dir/large", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == data
    assert fs.cat_file("bucket/dir/small", start=2, end=5) == b"234"
    assert fs.cat_ranges(["bucket/dir/small"] * 2, [0, 8], [1, 10]) == [b"0", b"89"]
    with fs.open("bucket/dir/large", "rb", block_size=MIB) as file:
        file.seek(3 * MIB)
        assert file.read(10) == data[3 * MIB :][:10]
    assert fs.ls("bucket", detail=False) == ["bucket/dir"]
    assert fs.find("bucket") == ["bucket/dir/large", "bucket/dir/open", "bucket/dir/small"]
    fs.mv("bucket/dir/small", "bucket/moved")
    fs.cp_file("bucket/moved", "bucket/copied")
    assert (server.requests["object.move"], server.requests["object.rewrite"]) == (1, 1)
    fs.rm("bucket/dir", recursive=True)
    assert server.names() == ["copied", "moved"]
    with pytest.raises(FileNotFoundError):
        fs.rm_file("bucket/none")
    with pytest.raises(FileNotFoundError):
        fs.cat_file("none/a")
    with pytest.raises(FileNotFoundError):
        fs.find("none")


def test_gcsfs_deletes_in_a_batch(server: GcsServer, fs: Any) -> None:
    """The batch that gcsfs sends to Google (to no other address by itself) deletes, and names what was absent."""
    import fsspec.asyn

    for name in ("a", "b/c d"):
        server.write(name, b"")
    found = fsspec.asyn.sync(fs.loop, fs._rm_files, ["bucket/a", "bucket/none", "bucket/b/c d"])
    assert [found[0], found[2]] == ["bucket/a", "bucket/b/c d"]
    assert "No such object" in str(found[1])
    assert server.names() == []
    assert server.requests == {"batch": 1}


def test_gcsfs_creates_exclusively(server: GcsServer, fs: Any, tmp_path: Any) -> None:
    """mode='create' and open('xb') send ifGenerationMatch=0, small and resumable; the loser gets FileExistsError."""
    (tmp_path / "large").write_bytes(bytes(6 * MIB))
    fs.pipe_file("bucket/a", b"1", mode="create")
    fs.put_file(str(tmp_path / "large"), "bucket/b", mode="create")
    with fs.open("bucket/c", "xb") as file:
        file.write(b"1")
    with pytest.raises(FileExistsError):
        fs.pipe_file("bucket/a", b"2", mode="create")
    with pytest.raises(FileExistsError):
        fs.put_file(str(tmp_path / "large"), "bucket/b", mode="create")
    with pytest.raises(FileExistsError), fs.open("bucket/c", "xb") as file:
        file.write(b"2")
    assert [server.read("a"), len(server.read("b")), server.read("c")] == [b"1", 6 * MIB, b"1"]

    def create(content: bytes) -> bool:
        try:
            fs.pipe_file("bucket/race", content, mode="create")
        except FileExistsError:
            return False
        return True

    one_winner(create, server)


@pytest.mark.timing
def test_tensorstore(server: GcsServer) -> None:
    """Tensorstore writes on condition, reads ranges, lists and deletes a range, and does not wait for 100."""
    tensorstore = pytest.importorskip("tensorstore")
    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "ts/"}).result()
    absent = store.read("a").result().stamp.generation
    first = store.write("a", b"0123456789", if_equal=absent).result().generation
    assert store.write("a", b"stale", if_equal=absent).result().generation == b""  # refused
    store.write("a", b"abcdefghij", if_equal=first).result()
    assert store.write("a", b"stale", if_equal=first).result().generation == b""
    found = store.read("a").result()
    assert found.value == b"abcdefghij"
    assert store.read("a", if_not_equal=found.stamp.generation).result().state == "unspecified"
    assert store.read("a", byte_range=slice(2, 5)).result().value == b"cde"
    for name in "bcde":
        store.write(name, name.encode()).result()
    listed = store.list(tensorstore.KvStore.KeyRange("b", "d")).result()
    assert listed == [b"b", b"c"]
    store.delete_range(tensorstore.KvStore.KeyRange("b", "d")).result()
    assert server.names() == ["ts/a", "ts/d", "ts/e"]
    start = time.monotonic()
    store.write("large", bytes(3 * MIB)).result()
    assert time.monotonic() - start < 0.9


ORBAX = """
import jax, numpy as np, orbax.checkpoint as ocp
state = {"w": np.arange(1000.0), "step": np.array(3)}
with ocp.CheckpointManager("gs://bucket/run") as manager:
    manager.save(3, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    found = manager.restore(3, args=ocp.args.StandardRestore(state))
    assert manager.all_steps() == [3]
assert (found["w"] == state["w"]).all()
"""


def test_orbax(server: GcsServer) -> None:
    """A process that has only the server's environment saves and restores with plain Orbax on gs://."""
    pytest.importorskip("orbax.checkpoint")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FSSPEC")}
    subprocess.run([sys.executable, "-c", ORBAX], env=environment | server.environment(), check=True, timeout=60)
    assert "run/3/commit_success.txt" in server.names()
    assert server.uploads_open() == []


# Faults: each fires, and is counted.


@pytest.mark.timing
def test_latency(server: GcsServer, raw: Raw) -> None:
    """Every answer comes that much later, for all connections at once."""
    raw.put("a")
    server.faults.latency_s = 0.1
    with ThreadPoolExecutor(8) as pool:
        start = time.monotonic()
        list(pool.map(lambda _: requests.get(raw.object("a"), timeout=10).raise_for_status(), range(8)))
    assert 0.1 <= time.monotonic() - start < 0.5


@pytest.mark.parametrize("streams", [1, 4])
def test_bandwidth(server: GcsServer, streams: int) -> None:
    """One stream gets its share, several no more than the total, in both directions."""
    server.faults.bandwidth_per_stream, server.faults.bandwidth_total = 10e6, 20e6
    share = min(10e6, 20e6 / streams)
    data = bytes(int(share * 0.4))
    sessions = [Raw(server.url) for _ in range(streams)]
    with ThreadPoolExecutor(streams) as pool:
        start = time.monotonic()
        list(pool.map(lambda one: one.put(f"a{id(one)}", data), sessions))
        up = time.monotonic() - start
        list(pool.map(lambda one: one("GET", one.object(f"a{id(one)}"), 200, alt="media"), sessions))
        down = time.monotonic() - start - up
    assert 0.36 < up < 1.5
    assert 0.36 < down < 1.5


def test_failures(server: GcsServer, raw: Raw) -> None:
    """The next requests that fit fail with the status and Retry-After given, then things go well; nothing is stored."""
    server.faults.fail(429, count=2, method="POST", match="name=a", retry_after=7)
    server.faults.fail()
    reply = raw.put("a", bytes(MIB), 429)
    assert reply.headers["Retry-After"] == "7"
    assert reply.json()["error"]["errors"][0]["reason"] == "rateLimitExceeded"
    raw.put("b", status=503)
    raw.put("b")
    raw.put("a", status=429)
    assert server.names() == ["b"]
    raw.put("a")
    assert server.faults.fired == {"fail": 3, "expired": 0, "down": 0}


def test_a_fault_fires_as_often_as_told(server: GcsServer) -> None:
    """Of many requests at once exactly as many fail as were to fail."""
    server.faults.fail(503, count=7)
    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(lambda _: requests.get(f"{server.url}/storage/v1/b", timeout=10).status_code, range(40)))
    assert (told.count(503), told.count(200)) == (7, 33)


def test_a_fault_finds_an_object_by_its_name(server: GcsServer, fs: Any, client: Any, tmp_path: Any) -> None:
    """`match` sees the name of an object in every way of uploading, also where only the content says it."""
    (tmp_path / "large").write_bytes(bytes(6 * MIB))
    server.faults.forbid("commit.json")
    for create in (
        lambda: fs.pipe_file("bucket/x/commit.json", b""),
        lambda: fs.put_file(str(tmp_path / "large"), "bucket/x/commit.json"),
        lambda: client.bucket("bucket").blob("x/commit.json").upload_from_string(b""),
    ):
        with pytest.raises(Exception, match=r"storage\.objects\.create"):
            create()
    fs.pipe_file("bucket/x/other", b"")
    assert server.faults.fired["forbid"] == 3


def test_permission_denied(server: GcsServer, fs: Any) -> None:
    """Gcsfs gets a 403 with the identity and the permission, and does not try again."""
    server.faults.forbid("object.delete")
    fs.pipe_file("bucket/a", b"")
    with pytest.raises(OSError, match=r"Forbidden: (?s:.*)tester@project.* storage\.objects\.delete") as caught:
        fs.rm_file("bucket/a")
    assert type(caught.value) is OSError
    assert server.requests["object.delete"] == 1


def test_a_reset_while_uploading(server: GcsServer, raw: Raw) -> None:
    """The connection is reset in the middle; a resumable upload goes on behind the whole units that came."""
    server.faults.reset_mid_body(2, after_bytes=CHUNK_BYTES + 1000)
    with pytest.raises(requests.ConnectionError):
        raw.put("a", bytes(3 * MIB))
    place, data = raw.begin("a"), os.urandom(3 * MIB)
    with pytest.raises(requests.ConnectionError):
        raw("PUT", place, data=data)
    # Without a Content-Range nothing is kept; with one, 256 KiB of it are.
    server.faults.reset_mid_body(1, after_bytes=CHUNK_BYTES + 1000)
    with pytest.raises(requests.ConnectionError):
        raw("PUT", place, data=data, headers={"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"})
    assert raw("PUT", place, 308, headers={"Content-Range": "bytes */*"}).headers["Range"] == "bytes=0-262143"
    told = {"Content-Range": f"bytes {CHUNK_BYTES}-{len(data) - 1}/{len(data)}"}
    raw("PUT", place, 200, data=data[CHUNK_BYTES:], headers=told)
    assert server.read("a") == data
    assert server.faults.fired["reset"] == 3


def test_a_reset_while_downloading(server: GcsServer, raw: Raw) -> None:
    """A part of the content comes, then a TCP reset instead of an end; the next try gets all."""
    data = os.urandom(MIB)
    server.write("a", data)
    server.faults.reset_mid_body(1, 100_000, match="object.media")
    got: list[bytes] = []
    reply = requests.get(raw.object("a"), params={"alt": "media"}, stream=True, timeout=5)
    with reply, pytest.raises(requests.exceptions.ChunkedEncodingError, match="reset by peer"):
        got.extend(reply.iter_content(1000))
    assert 0 < len(b"".join(got)) <= 100_000
    assert raw("GET", raw.object("a"), 200, alt="media").content == data


def test_a_lost_answer(server: GcsServer, raw: Raw) -> None:
    """What was asked is done, and the client gets a reset instead of being told."""
    server.faults.lose_answer(match="name=a")
    with pytest.raises(requests.ConnectionError):
        raw.put("a", b"x", ifGenerationMatch=0)
    raw.put("a", b"x", 412, ifGenerationMatch=0)
    assert server.read("a") == b"x"
    assert server.faults.fired["lost"] == 1


@pytest.mark.timing
def test_a_stall(server: GcsServer, raw: Raw) -> None:
    """The server falls silent: before an answer, in the middle of a download, in the middle of an upload."""
    server.write("a", bytes(MIB))
    server.faults.stall(0.4, match="object.get")
    with pytest.raises(requests.ReadTimeout):
        raw("GET", raw.object("a"), timeout=0.15)
    server.faults.stall(0.4, match="object.media", after_bytes=1000)
    with pytest.raises(requests.ConnectionError, match="timed out"):
        raw("GET", raw.object("a"), alt="media", timeout=0.15)
    server.faults.stall(0.2, match="upload", after_bytes=1000)
    start = time.monotonic()
    raw.put("b", bytes(MIB))
    assert time.monotonic() - start >= 0.2
    assert server.faults.fired["stall"] == 3


def test_expired_tokens(server: GcsServer, raw: Raw) -> None:
    """A token seen before is refused until another one comes; a count refuses that many requests of anybody."""
    old, new = {"Authorization": "Bearer old"}, {"Authorization": "Bearer new"}
    raw.put("a", headers=old)
    server.faults.expire_tokens()
    assert raw.put("a", status=401, headers=old).json()["error"]["message"] == "Invalid Credentials"
    raw.put("a", status=401)
    raw.put("a", headers=new)
    raw.put("a", status=401, headers=old)
    server.faults.clear()
    server.faults.expire_tokens(2)
    raw.put("a", status=401, headers=new)
    raw.put("a", status=401)
    raw.put("a")
    assert server.faults.fired["expired"] == 5


def test_gcsfs_gets_another_token(server: GcsServer) -> None:
    """After a 401 gcsfs comes with a new token, once its credentials say that the old one is used up."""
    from google.auth.credentials import Credentials

    class Tokens(Credentials):  # type: ignore[misc,no-untyped-call]
        """Credentials whose every refresh gives another token."""

        def __init__(self) -> None:
            super().__init__()
            self.number = 0

        def refresh(self, request: Any) -> None:
            """Count up."""
            self.number += 1
            self.token = f"token{self.number}"

    tokens = Tokens()
    fs = gcsfs.GCSFileSystem(token=tokens, skip_instance_cache=True)
    fs.pipe_file("bucket/a", b"1")
    server.faults.expire_tokens()
    threading.Timer(0.3, lambda: setattr(tokens, "token", None)).start()
    fs.pipe_file("bucket/a", b"2")
    assert (tokens.number, server.read("a")) == (2, b"2")
    assert server.faults.fired["expired"] >= 1


def test_an_outage(server: GcsServer, raw: Raw) -> None:
    """While it is down, everything is 503 or every connection ends at once, and all is well again afterwards."""
    raw.put("a")
    server.faults.down = "503"
    raw("GET", raw.object("a"), 503)
    server.faults.down = "closed"
    with pytest.raises(requests.ConnectionError):
        raw("GET", raw.object("a"))
    server.faults.down = None
    raw("GET", raw.object("a"), 200)
    assert server.faults.fired["down"] == 2


def test_closing_ends_connections() -> None:
    """A server that is closed ends a stall, answers no kept connection any more, and its port refuses."""
    server = GcsServer()
    kept = Raw(server.url)
    kept.put("a")
    server.faults.stall(30, match="object.get")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(requests.get, kept.object("a"), timeout=20)
        while not server.faults.fired["stall"]:
            time.sleep(0.01)
        server.close()
        waiting.exception(5)
    with pytest.raises(requests.ConnectionError):
        kept.put("a")
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url, timeout=5)


def test_as_a_process() -> None:
    """It prints its URL first, is set from outside, and tells what came."""
    command = [sys.executable, "-m", "tests.fakes.gcs_server", "--bucket", "b-1", "--latency-s", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            raw = Raw(process.stdout.readline().strip())
            start = time.monotonic()
            raw.put("a", bucket="b-1")
            assert time.monotonic() - start > 0.05
            control(raw.url, latency_s=0, fail={"status": 429, "count": 1})
            raw.put("a", bucket="b-1", status=429)
            told = control(raw.url, clear={}, down="503")
            assert (told["requests"], told["fired"]["fail"], told["uploads_open"]) == ({"upload.media": 2}, 1, [])
            raw.put("a", bucket="b-1", status=503)
        finally:
            process.kill()
