"""A run directory on an object store, through fsspec: retried, bounded in time, and created only once.

Nothing here runs on the training thread. Every call ends within its deadline: what is worth retrying (429, 5xx, a
reset connection, a token being refreshed) is retried with jittered backoff; what is not (403, no such bucket, bad
credentials) is a `ConfigError` that says so.
"""

import asyncio
import contextlib
import datetime
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from jobkit import names, versions
from jobkit.errors import ConfigError, JobkitError, OutsideError, StorageError

T = TypeVar("T")

PARALLEL = 16
"""Transfers at a time; one stream gets a small part of what a bucket gives (measured: 16 streams 1.3x the wire)."""
IN_MEMORY_BYTES = 512 << 20
"""Of the files on their way so many bytes are in memory, or one file."""
_NEEDS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
"""The package that fsspec reaches a store with, by the scheme of its URL."""
_BELOW = {"s3fs": ("botocore",)}
"""What decides below it whether an object is created only once."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "gcsfs": {"requests_timeout": 120.0},
    "s3fs": {"config_kwargs": {"connect_timeout": 20, "read_timeout": 120, "retries": {"total_max_attempts": 1}}},
}
"""No single request may hang for ever; a part of 64 MiB at 1 MB/s must still get through."""
_CALL_S = 120.0
"""How long one try of one call may take, whatever the client does meanwhile."""


class Remote:
    """The objects below one URL.

    Args:
        url: Such as gs://bucket/run, s3://bucket/run, memory://run.
        deadline_s: Seconds after which a call that keeps failing gives up.
    """

    def __init__(self, url: str, *, deadline_s: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None

    def _fs(self) -> tuple[Any, str]:
        """Open the file system on first use: importing gcsfs takes a second."""
        with self._lock:
            if self._opened is None:
                # Else gcsfs asks a gRPC service for the bucket's type, for up to 60 s where gRPC is blocked.
                os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
                logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs each retry as an error; we say it once
                scheme = self.url.partition("://")[0]
                needed = _NEEDS.get(scheme, "")
                versions.check(("fsspec", needed, *_BELOW.get(needed, ())))
                if scheme in ("http", "https", "data"):
                    raise ConfigError(f"{self.url} cannot be written to: give a path, or a URL such as gs://bucket/run")
                try:
                    import fsspec

                    options = _OPTIONS.get(needed, {}) | _credentials(needed)
                    fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
                except ImportError as error:
                    remedy = f"pip install {_NEEDS[scheme]}" if scheme in _NEEDS else str(error)
                    raise ConfigError(f"{self.url} needs a package that is not installed: {remedy}") from None
                except ValueError as error:
                    raise ConfigError(f"{self.url} is not a URL that fsspec knows: {error}") from None
                except Exception as error:
                    raise translate(error, f"cannot open {self.url}") from error
                _retry_only_here(fs)
                self._opened = fs, str(root).rstrip("/")
            return self._opened

    def _call(
        self,
        doing: str,
        method: str | Callable[..., Any],
        name: str,
        *arguments: Any,
        fence: Callable[[], None] = lambda: None,
        **named: Any,
    ) -> Any:
        if name and not names.inside(name):
            raise OutsideError(f"{name!a} is no name inside {self.url}")
        fs, root = self._fs()
        path = f"{root}/{name}" if name else root
        if getattr(fs, "async_impl", False):
            named["timeout"] = _CALL_S
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self._deadline_s),
            wait=tenacity.wait_exponential(0.2, 3.0) + tenacity.wait_random(0, 0.3),
            retry=tenacity.retry_if_exception(worth_retrying),
            before=lambda tried: fence() if tried.attempt_number > 1 else None,
            before_sleep=lambda tried: _forget_token(fs, tried),
            reraise=True,
        )
        call = getattr(fs, method) if isinstance(method, str) else functools.partial(method, fs)
        try:
            return retrying(call, path, *arguments, **named)
        except FileNotFoundError:
            if method == "pipe_file":  # only a missing bucket stops an object from being written
                raise ConfigError(
                    f"cannot {doing} {self.url}/{name}: there is no such bucket: create it, or give another URL"
                ) from None
            raise
        except (FileExistsError, JobkitError):
            raise
        except Exception as error:
            if _code(error) == 412:  # a precondition failed; not every S3 store says which
                raise FileExistsError(path) from None
            raise translate(error, f"cannot {doing} {self.url}/{name}".rstrip("/")) from error

    def read(self, name: str) -> bytes:
        """Return an object's content; raises FileNotFoundError if there is none."""
        content: bytes = self._call("read", "cat_file", name)
        return content

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Return some bytes of an object; raises FileNotFoundError if there is none."""
        content: bytes = self._call("read", "cat_file", name, start=begin, end=end)
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write an object, replacing an earlier one."""
        self._call("write", "pipe_file", name, content)

    def create(self, name: str, content: bytes, *, fence: Callable[[], None] = lambda: None) -> bool:
        """Create an object if there is none; of several callers exactly one gets True.

        A retry after a lost answer finds the object there: it counts as ours if its content is.

        Args:
            name: Of the object.
            content: Its bytes.
            fence: Called before each retry, to raise if nothing may be created any more: after an answer that was lost
                the object may have been there, and been removed by others.
        """
        try:
            self._call("create", "pipe_file", name, content, fence=fence, mode="create")
        except FileExistsError:
            return self.read(name) == content and len(content) > 0
        return True

    def find(self, name: str = "") -> dict[str, int]:
        """List every object below a name, with its size in bytes; names are relative to the URL.

        Whoever may write there chooses the names: those that are not one's inside are left out (see names.py).
        """
        try:
            listing = self._call("list", "find", name, detail=True)
        except FileNotFoundError:
            return {}
        _, root = self._fs()
        # s3fs names the place itself, as a directory, if its first object appears between two of its own requests.
        sizes = {
            path.removeprefix(root + "/"): int(info["size"] or 0)
            for path, info in listing.items()
            if info.get("type") == "file" and path.startswith(root + "/")
        }
        # Consoles show folders by empty objects whose name ends in a slash.
        objects = (path for path, size in sizes.items() if size or (path and not path.endswith("/")))
        return {path: sizes[path] for path in names.sift(objects, where=self.url)}

    def has(self, name: str) -> bool:
        """Tell whether there is an object, with one small request however large it is."""
        try:
            self._call("read", _first_byte, name)
        except FileNotFoundError:
            return False
        return True

    def numbers(self, name: str) -> list[int]:
        """List what there is right below a name and is a number, in rising order; one request per thousand of them."""
        try:
            listing = self._call("list", "ls", name, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        below = {path.rstrip("/").rpartition("/")[2] for path in listing}
        return sorted(number for entry in below if (number := names.number(entry)) is not None)

    def modified(self, name: str) -> float:
        """Return when an object was last written, in seconds since the epoch by the store's clock, not by ours.

        Raises:
            FileNotFoundError: If there is none.
            StorageError: If the store does not tell.
        """
        info = self._call("look at", "info", name)
        for key in ("LastModified", "mtime", "last_modified", "created"):  # of S3, Google's and files, Azure, memory
            if isinstance(mtime := info.get(key), datetime.datetime):
                return mtime.timestamp()
            if isinstance(mtime, int | float):
                return float(mtime)
        raise StorageError(f"{self.url} does not tell when {name} was written")

    def remove(self, objects: Iterable[str]) -> None:
        """Remove objects, in parallel; absent ones are no error."""

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._call("remove", "rm_file", name)

        carry("", dict.fromkeys(objects, 0), one, shown=False)

    def remove_this(self, name: str, content: bytes | None) -> bool:
        """Remove an object that has this very content; tell whether that, or none, was there.

        Google's store has it as a precondition, so that what replaces it at this very moment stays; elsewhere it goes.
        """
        try:
            generation = self._call("look at", "info", name).get("generation")
            if self.read(name) != content:
                return False
            if generation is None:
                self._call("remove", "rm_file", name)
            else:
                self._call("remove", _remove_generation, name, generation)
        except FileExistsError:
            return False
        except FileNotFoundError:
            pass
        return True

    def abort_uploads(self) -> int:
        """End multipart uploads below the URL that nobody completed; return their number.

        S3 keeps, and bills, their parts until then. GCS forgets its resumable uploads by itself, after a week.
        """
        fs, root = self._fs()
        if not hasattr(fs, "call_s3"):
            return 0
        bucket, _, prefix = root.partition("/")
        try:
            listed = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
            uploads = [(upload["Key"], upload["UploadId"]) for upload in listed.get("Uploads") or []]
            for key, upload in uploads:
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        except Exception as error:
            raise translate(error, f"cannot end old uploads to {self.url}") from error
        return len(uploads)

    def fetch(self, name: str, target: Path) -> None:
        """Write an object's content to a local file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.read(name))


def _first_byte(fs: Any, path: str, **options: Any) -> None:
    try:
        fs.cat_file(path, start=0, end=1, **options)
    except Exception as error:
        if _code(error) != 416:  # it has none
            raise


def _credentials(package: str) -> dict[str, Any]:
    """Return none for an emulated bucket, as Google's own client does; those that fsspec is configured with stand.

    Else gcsfs asks for some, of a VM's metadata server too, and google-auth warns that there are none.
    """
    import fsspec

    emulated = package == "gcsfs" and os.environ.get("STORAGE_EMULATOR_HOST", "")
    given = any("token" in fsspec.config.conf.get(scheme, {}) for scheme in ("gs", "gcs"))
    return {"token": "anon"} if emulated and not given else {}


def _remove_generation(fs: Any, path: str, generation: str, timeout: float) -> None:
    """Remove an object of Google's unless it has been replaced, for which gcsfs has no method of its own."""
    bucket, key, _ = fs.split_path(path)
    fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation, timeout=timeout)


def _retry_only_here(fs: Any) -> None:
    """Turn the clients' own retries off: nested in ours they make minutes of a burst of refusals.

    gcsfs tries each request six times over 34 s, s3fs five times over botocore's five. There is no public switch for
    gcsfs; a test holds that a burst passes quickly.
    """
    kind = type(fs)
    if kind.__module__.startswith("gcsfs") and hasattr(kind._request, "__wrapped__"):
        fs._request = functools.partial(kind._request.__wrapped__, fs)
    if kind.__module__.startswith("s3fs"):
        fs.retries = 1


def _forget_token(fs: Any, tried: tenacity.RetryCallState) -> None:
    """Make gcsfs fetch a new token after a 401: by itself it keeps one that does not look expired."""
    error = tried.outcome.exception() if tried.outcome is not None else None
    if error is not None and _code(error) == 401:
        credentials: Any = getattr(getattr(fs, "credentials", None), "credentials", None)
        if credentials is not None and credentials.token:
            credentials.token = None


class _Budget:
    """Bytes of memory that several threads share."""

    def __init__(self, nbytes: int) -> None:
        self._all = self._left = nbytes
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until so many are left, and hold them; what is more than there are takes all."""
        held = min(nbytes, self._all)
        with self._freed:
            self._freed.wait_for(lambda: self._left >= held)
            self._left -= held
        try:
            yield
        finally:
            with self._freed:
                self._left += held
                self._freed.notify_all()


def carry(doing: str, sizes: Mapping[str, int], one: Callable[[str], T], *, shown: bool = True) -> list[T]:
    """Call a function for every file, several at a time, as many as `IN_MEMORY_BYTES` lets; the first error ends it.

    Args:
        doing: What is said beside a progress bar, which is there where a person is looking: standard error is a
            terminal.
        sizes: Bytes of the files, by name.
        one: Carries a file.
        shown: False where nobody is to be bothered.

    Returns:
        What it returned, file by file.
    """
    budget = _Budget(IN_MEMORY_BYTES)
    with _bar(doing, sum(sizes.values()), shown=shown) as advance:

        def carried(name: str) -> T:
            with budget.hold(sizes[name]):
                answer = one(name)
            advance(sizes[name])
            return answer

        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="jobkit-transfer") as pool:
            return list(pool.map(carried, sizes))


@contextlib.contextmanager
def _bar(doing: str, nbytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how far a transfer is; yield what is told of each piece that has arrived, from any thread."""
    if not shown or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich import progress
    from rich.console import Console

    remaining = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(), *remaining)
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)


def _code(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of gcsfs, botocore or aiohttp, or behind what it was raised from."""
    for one in filter(None, (error, error.__cause__)):
        for value in (getattr(one, "code", None), getattr(one, "status", None)):
            if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
                return int(value)
        response = getattr(one, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") == "PreconditionFailed":
            return 412  # whatever the status: stores that speak S3 differ
        if isinstance(response, dict) and (status := response.get("ResponseMetadata", {}).get("HTTPStatusCode")):
            return int(status)
    return None


def worth_retrying(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | JobkitError):
        return False
    code = _code(error)
    if code is not None:
        return code in (401, 408, 429) or code >= 500
    names = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(error).__mro__}
    if names & {"google.DefaultCredentialsError", "botocore.NoCredentialsError"} or "Forbidden" in str(error):
        return False
    transient = {
        "aiohttp.ClientError",
        "requests.RequestException",
        "google.TransportError",
        "botocore.HTTPClientError",
    }
    return (
        bool(names & transient)
        or isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError)
        or (isinstance(error, OSError) and error.errno is not None)
    )


def translate(error: BaseException, doing: str) -> JobkitError:
    """Say an error of a cloud's client in one sentence, with who was refused what where that is known."""
    if isinstance(error, JobkitError):
        return error
    text = " ".join(str(error).split())[:300] or type(error).__name__
    code = _code(error)
    if isinstance(error, PermissionError) or code == 403 or "Forbidden" in text:
        return ConfigError(
            f"{doing}: permission denied for {identity()}: give it read and write access to the bucket's objects "
            "(on Google Cloud roles/storage.objectUser; on AWS s3:GetObject, PutObject, DeleteObject, ListBucket): "
            f"{text}"
        )
    if code == 401 or "Credentials" in type(error).__name__:
        return ConfigError(f"{doing}: the credentials of {identity()} were refused: sign in again: {text}")
    return StorageError(f"{doing}: {type(error).__name__}: {text}")


def identity() -> str:
    """Name the account that the cloud's clients use, as far as the environment tells; never a secret."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE"):
        if os.environ.get(name):
            return f"{name}={os.environ[name]}"
    return "AWS_ACCESS_KEY_ID" if os.environ.get("AWS_ACCESS_KEY_ID") else "this machine's default account"
