"""What a cloud says of the machine we are on: the metadata servers of Google Compute Engine, Amazon EC2 and Azure.

A thread of the supervisor's asks the one server that there is, and the supervisor takes what it says as notices. Which
cloud this is stands in the machine's firmware tables (as cloud-init and google-auth read it too), so that on a laptop
or a cluster no packet is ever sent. http.client rather than urllib: it knows neither proxies nor redirects.

| cloud | asked | how long until the end |
|---|---|---|
| gce | `instance/preempted`, a request that waits for a change | "up to 30 seconds" |
| aws | `spot/instance-action` every 5 s, with a token (IMDSv2) | the time in the answer, 2 minutes |
| azure | scheduled events every second: Preempt, Terminate | NotBefore, 30 s or more |

Sources: cloud.google.com/compute/docs/instances/preemptible, docs.aws.amazon.com "Spot Instance interruption notices",
learn.microsoft.com/azure/virtual-machines/linux/scheduled-events.
"""

import email.utils
import http.client
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import tenacity

from jobkit import contract
from jobkit.errors import ConfigError

_LINK_LOCAL = "http://169.254.169.254"
_CONNECT_S, _ANSWER_S = 2.0, 10.0
_HANG_S = 30
"""How long one request to GCE waits for a change."""
_PATIENCE_S = 60.0
"""A server that is silent for so long is told of, once; it is asked on all the same."""
_DMI = Path("/sys/class/dmi/id")
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
"""The chassis asset tag of every machine on Azure (cloud-init knows it by this too)."""


class Kind(StrEnum):
    """What is to be done about what a server said."""

    NOTICE = "notice"
    """The machine goes away: stop."""
    INFORMATION = "information"
    """Worth writing down."""
    WITHDRAWN = "withdrawn"
    """The machine stays after all."""


@dataclass(frozen=True)
class CloudEvent:
    """Something that a metadata server said.

    Args:
        source: 'gce', 'aws' or 'azure'.
        reason: In words, for a person.
        deadline_at: When the machine goes away, on the clock of `time.monotonic`; None where nobody said.
    """

    kind: Kind
    source: str
    reason: str
    deadline_at: float | None = None


class _Cloud(Protocol):
    name: str
    pause_s: float
    """Seconds between one look and the next."""

    def look(self) -> dict[str, CloudEvent]:
        """Return all that stands against the machine now, by a name that stays while it does.

        Raises:
            OSError, http.client.HTTPException: If the server does not answer as it should.
        """


class _Gce:
    name, pause_s = "gce", 1.0

    def __init__(self, environ: Mapping[str, str]) -> None:
        host = environ.get("GCE_METADATA_HOST")
        self._base = f"http://{host}" if host else _LINK_LOCAL
        self._etag = ""
        self._noticed_at: float | None = None

    def look(self) -> dict[str, CloudEvent]:
        """See `_Cloud`."""
        wait = f"?wait_for_change=true&last_etag={self._etag}&timeout_sec={_HANG_S}" if self._etag else ""
        preempted, self._etag = self._get(f"instance/preempted{wait}")
        maintenance, _ = self._get("instance/maintenance-event")
        events = {}
        if preempted == "TRUE":
            self._noticed_at = self._noticed_at or time.monotonic()
            reason = "Google Compute Engine preempts this VM"
            events["preempted"] = CloudEvent(Kind.NOTICE, self.name, reason, self._noticed_at + 30.0)
        # A VM that can be moved is moved; one that cannot (with GPUs) is told an hour before, then stopped by SIGTERM.
        if maintenance not in ("NONE", ""):
            events[maintenance] = CloudEvent(Kind.INFORMATION, self.name, f"maintenance of the host: {maintenance}")
        return events

    def _get(self, name: str) -> tuple[str, str]:
        path = f"/computeMetadata/v1/{name}"
        status, text, etag = _ask(self._base, path, {"Metadata-Flavor": "Google"}, answer_s=_HANG_S + _ANSWER_S)
        return ("", "") if status == 404 else (_good(status, text).strip(), etag)


class _Aws:
    name, pause_s = "aws", 5.0

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._base = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _LINK_LOCAL
        self._token = ""

    def look(self) -> dict[str, CloudEvent]:
        """See `_Cloud`."""
        events = {}
        if action := self._get("spot/instance-action"):
            notice = json.loads(action)
            at = datetime.fromisoformat(str(notice["time"]).replace("Z", "+00:00")).timestamp()
            reason = f"Amazon EC2 takes this instance back ({notice.get('action', 'terminate')})"
            events["action"] = CloudEvent(Kind.NOTICE, self.name, reason, _monotonic(at))
        if self._get("events/recommendations/rebalance"):
            reason = "Amazon EC2 says that an interruption of this instance has become likelier"
            events["rebalance"] = CloudEvent(Kind.INFORMATION, self.name, reason)
        return events

    def _get(self, name: str) -> str:
        """Return a value, empty where there is none."""
        for _ in range(2):
            if not self._token:
                asked = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                self._token = _good(*_ask(self._base, "/latest/api/token", asked, method="PUT")[:2])
            mine = {"X-aws-ec2-metadata-token": self._token}
            status, text, _ = _ask(self._base, f"/latest/meta-data/{name}", mine)
            if status != 401:  # the token has expired
                return "" if status == 404 else _good(status, text)
            self._token = ""
        raise OSError("the metadata server refuses its own token")


class _Azure:
    name, pause_s = "azure", 1.0
    _ACT = ("Preempt", "Terminate")

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._base = environ.get(contract.ENV_AZURE_METADATA) or _LINK_LOCAL
        self._vm = ""

    def look(self) -> dict[str, CloudEvent]:
        """See `_Cloud`."""
        # A scale set's machines are told of each other's events: only those that name us are ours.
        self._vm = self._vm or self._get("instance/compute/name?api-version=2021-02-01&format=text").strip()
        events = json.loads(self._get("scheduledevents?api-version=2020-07-01"))["Events"]
        return {event["EventId"]: self._read(event) for event in events if self._vm in event["Resources"]}

    def _read(self, event: dict[str, str]) -> CloudEvent:
        kind = Kind.NOTICE if event["EventType"] in self._ACT else Kind.INFORMATION
        not_before = email.utils.parsedate_tz(event["NotBefore"])  # none any more once it has begun
        deadline_at = _monotonic(email.utils.mktime_tz(not_before)) if not_before else None
        return CloudEvent(
            kind, self.name, f"Azure has scheduled an event for this VM: {event['EventType']}", deadline_at
        )

    def _get(self, name: str) -> str:
        return _good(*_ask(self._base, f"/metadata/{name}", {"Metadata": "true"})[:2])


_CLOUDS: dict[str, Callable[[Mapping[str, str]], _Cloud]] = {"gce": _Gce, "aws": _Aws, "azure": _Azure}


def cloud_of(environ: Mapping[str, str] = os.environ, dmi: Path = _DMI) -> str | None:
    """Name the cloud whose metadata server is to be watched, None for none.

    Args:
        environ: JOBKIT_METADATA names it, or says 'off'; in 'auto' the variables that name a server count next, then
            the firmware.
        dmi: The kernel's view of the firmware tables.

    Raises:
        ConfigError: If JOBKIT_METADATA has another value.
    """
    asked = environ.get(contract.ENV_METADATA) or "auto"
    if asked not in ("auto", "off", *_CLOUDS):
        raise ConfigError(f"{contract.ENV_METADATA} is {asked!r}; give auto, off, {', '.join(_CLOUDS)}")
    if asked != "auto":
        return None if asked == "off" else asked
    aws = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true"
    if environ.get("GCE_METADATA_HOST"):
        return "gce"
    if environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") and aws:
        return "aws"
    if environ.get(contract.ENV_AZURE_METADATA):
        return "azure"
    if _firmware(dmi, "product_name").startswith("Google"):
        return "gce"
    if _firmware(dmi, "chassis_asset_tag") == _AZURE_TAG:
        return "azure"
    vendors = " ".join(_firmware(dmi, name) for name in ("sys_vendor", "bios_vendor", "bios_version")).lower()
    return "aws" if "amazon" in vendors and aws else None


def _firmware(dmi: Path, name: str) -> str:
    try:
        return (dmi / name).read_text(errors="replace").strip()
    except OSError:
        return ""


class Watch:
    """Asks the metadata server on a thread of its own, from `start` until the process ends or `close`.

    A notice is acted on at once, however far its deadline is, and cannot be taken back: the program has committed and
    is leaving. One that the cloud withdraws is told of as such, and the run goes on with its next attempt.

    Args:
        cloud: 'gce', 'aws', 'azure', or None to watch nothing.
    """

    def __init__(self, cloud: str | None, environ: Mapping[str, str] = os.environ) -> None:
        self._cloud: _Cloud | None = _CLOUDS[cloud](environ) if cloud else None
        self._events: deque[CloudEvent] = deque()  # filled by the thread
        self._stop = threading.Event()

    def start(self) -> None:
        """Start asking; returns at once."""
        if self._cloud is not None:
            threading.Thread(target=self._watch, args=(self._cloud,), name="jobkit-metadata", daemon=True).start()

    def close(self) -> None:
        """Stop asking; a request that waits is not waited for."""
        self._stop.set()

    def events(self) -> Iterator[CloudEvent]:
        """Yield what has been said since the last call; never waits."""
        while self._events:
            yield self._events.popleft()

    def _watch(self, cloud: _Cloud) -> None:
        known: dict[str, CloudEvent] = {}
        while not self._stop.is_set():
            now = self._look(cloud)
            for name, event in now.items():
                if name not in known:
                    self._events.append(event)
            for name, event in known.items():
                if name not in now and event.kind is Kind.NOTICE:
                    self._events.append(CloudEvent(Kind.WITHDRAWN, event.source, f"taken back: {event.reason}"))
            known = now
            self._stop.wait(cloud.pause_s)

    def _look(self, cloud: _Cloud) -> dict[str, CloudEvent]:
        """Ask until there is an answer; say once that there is none."""
        since, silent = time.monotonic(), False

        def before_sleep(tried: tenacity.RetryCallState) -> None:
            nonlocal silent
            if not silent and time.monotonic() - since >= _PATIENCE_S:
                silent = True
                error = tried.outcome.exception() if tried.outcome is not None else None
                message = (
                    f"the metadata server does not answer ({error}), so nothing will warn of a preemption; in a "
                    "container use the host's network, or on EC2 a hop limit of 2"
                )
                self._events.append(CloudEvent(Kind.INFORMATION, cloud.name, message))

        retrying = tenacity.Retrying(
            wait=tenacity.wait_exponential(0.2, 5.0) + tenacity.wait_random(0, 0.2),
            retry=tenacity.retry_if_exception_type((OSError, http.client.HTTPException, ValueError, LookupError)),
            stop=tenacity.stop_when_event_set(self._stop),
            sleep=tenacity.sleep_using_event(self._stop),
            before_sleep=before_sleep,
            retry_error_callback=lambda _: {},
        )
        events: dict[str, CloudEvent] = retrying(cloud.look)
        return events


def _ask(
    base: str, path: str, headers: dict[str, str], *, method: str = "GET", answer_s: float = _ANSWER_S
) -> tuple[int, str, str]:
    """Make one request; return status, text and ETag."""
    url = urlsplit(base)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=_CONNECT_S)
    try:
        connection.connect()
        connection.sock.settimeout(answer_s)
        connection.request(method, f"{url.path.rstrip('/')}{path}", headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace"), response.headers.get("ETag", "")
    finally:
        connection.close()


def _good(status: int, text: str) -> str:
    if status != 200:
        raise OSError(f"status {status}")
    return text


def _monotonic(at: float) -> float:
    """Translate a time of the wall clock, never to one that is past."""
    return time.monotonic() + max(0.0, at - time.time())
