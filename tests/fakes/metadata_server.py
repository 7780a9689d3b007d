"""The metadata servers of three clouds on this machine: real HTTP on loopback, as a VM sees it.

In a test:

    with Gce() as cloud:
        start(env=os.environ | cloud.environment)  # GCE_METADATA_HOST and what google-auth looks at
        cloud.preempt()

Each answers as its documentation says, the refusals included: a missing header, an expired token, a forwarded request.
"""

import email.utils
import json
import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        self._serve("GET")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        cloud = self.server.cloud
        cloud.requests.append(f"{method} {self.path}")
        wrong = next((code for code in cloud.failures if code), 0)
        if wrong:
            cloud.failures.remove(wrong)
            self.answer(wrong, "")
        elif "X-Forwarded-For" in self.headers:  # all three refuse what came through a proxy
            self.answer(403, "")
        else:
            cloud.answer(method, self)

    def answer(self, status: int, body: str | dict[str, Any], **headers: str) -> None:
        """Send a response."""
        text = body if isinstance(body, str) else json.dumps(body)
        try:
            self.send_response(status)
            kind = "application/text" if isinstance(body, str) else "application/json"
            for name, value in {"Content-Type": kind, "Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(text.encode())
        except ConnectionError:  # a client that was killed while it waited
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    cloud: "Cloud"


class Cloud:
    """What the three have in common: `url`, `environment`, the `requests` that came, and `failures` to answer first."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.failures: list[int] = []
        """Status codes with which the next requests are answered, one each."""
        self.changed = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.cloud = self
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"
        self._closed = False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What a process on such a VM is told, so that it finds this server instead of the link-local address."""
        raise NotImplementedError

    def answer(self, method: str, request: _Handler) -> None:
        """Answer one request."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop; requests that wait are answered first."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Gce(Cloud):
    """Google Compute Engine's: preemption, maintenance, and the tokens that google-auth asks for.

    Args:
        project: The project's id.
        token: The access token of the VM's service account.
        token_s: How long a token is said to be valid.
    """

    def __init__(
        self, *, project: str = "test-project", token: str = "ya29.metadata-server", token_s: float = 3599
    ) -> None:
        account = {"email": "job@test-project.iam.gserviceaccount.com", "aliases": ["default"], "scopes": [_SCOPE]}
        self.token, self.token_s = token, token_s
        self._values: dict[str, str | dict[str, Any]] = {
            "project/project-id": project,
            "project/numeric-project-id": "123456789",
            "instance/id": "4520031799277581759",
            "instance/name": "vm",
            "instance/zone": "projects/123456789/zones/us-central1-a",
            "instance/preempted": "FALSE",
            "instance/maintenance-event": "NONE",
            "instance/scheduling/preemptible": "TRUE",
            "instance/service-accounts/default/": account,
            f"instance/service-accounts/{account['email']}/": account,  # what google-auth asks when it refreshes
            "instance/service-accounts/default/email": str(account["email"]),
            "universe/universe-domain": "googleapis.com",
        }
        self._etags = {name: secrets.token_hex(8) for name in self._values}
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        """Where google-auth, gcsfs and jobkit look for the server."""
        return {"GCE_METADATA_HOST": self.host, "GCE_METADATA_IP": self.host, "GCE_METADATA_MTLS_MODE": "none"}

    def preempt(self) -> None:
        """Say that the VM is being preempted; who waits hears it at once."""
        self.set("instance/preempted", "TRUE")

    def restore(self) -> None:
        """Say that the VM is not being preempted: as on the VM that comes after."""
        self.set("instance/preempted", "FALSE")

    def set(self, name: str, value: str) -> None:
        """Change a value, such as instance/maintenance-event."""
        with self.changed:
            self._values[name] = value
            self._etags[name] = secrets.token_hex(8)
            self.changed.notify_all()

    def answer(self, method: str, request: _Handler) -> None:
        """Answer one request."""
        url = urlsplit(request.path)
        google = {"Metadata_Flavor": "Google", "Server": "Metadata Server for VM"}
        if url.path == "/":  # how google-auth finds out where it is
            request.answer(200, "computeMetadata/\n", **google)
            return
        name = url.path.removeprefix("/computeMetadata/v1/")
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if request.headers.get("Metadata-Flavor") != "Google":
            request.answer(403, "Missing required header: Metadata-Flavor")
            return
        if name.startswith("instance/service-accounts/") and name.endswith("/token"):
            told = {"access_token": self.token, "expires_in": int(self.token_s), "token_type": "Bearer"}
            request.answer(200, told, **google)
            return
        with self.changed:
            if name in self._values and query.get("wait_for_change") == "true":
                seen = query.get("last_etag", self._etags[name])
                self.changed.wait_for(
                    lambda: self._closed or self._etags[name] != seen, float(query.get("timeout_sec", 3600))
                )
            value, etag = self._values.get(name), self._etags.get(name, "")
        if value is None:
            request.answer(404, "", **google)
        else:
            request.answer(200, value, ETag=etag, **google)


_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class Aws(Cloud):
    """Amazon EC2's, version 2 of the protocol: nothing without a token.

    Args:
        token_s: Seconds after which a token is refused, whatever its owner asked for.
    """

    def __init__(self, *, token_s: float = 21600) -> None:
        self.token_s = token_s
        self._tokens: dict[str, float] = {}
        self._values: dict[str, dict[str, str]] = {}
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        """Where botocore and jobkit look for the server."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url}

    def preempt(self, in_s: float = 120.0, action: str = "terminate") -> None:
        """Say that the instance will be interrupted."""
        self._values["spot/instance-action"] = {"action": action, "time": _iso(time.time() + in_s)}

    def rebalance(self) -> None:
        """Say that an interruption has become likelier."""
        self._values["events/recommendations/rebalance"] = {"noticeTime": _iso(time.time())}

    def answer(self, method: str, request: _Handler) -> None:
        """Answer one request."""
        path = urlsplit(request.path).path
        if path == "/latest/api/token":
            asked = request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT" or not asked.isdigit():
                request.answer(400 if method == "PUT" else 405, "")
                return
            token = secrets.token_urlsafe(40)
            self._tokens[token] = time.monotonic() + min(float(asked), self.token_s)
            request.answer(200, token)
        elif self._tokens.get(request.headers.get("X-aws-ec2-metadata-token", ""), 0.0) < time.monotonic():
            request.answer(401, "")
        elif (value := self._values.get(path.removeprefix("/latest/meta-data/"))) is None:
            request.answer(404, "")
        else:
            request.answer(200, json.dumps(value))


class Azure(Cloud):
    """Microsoft Azure's scheduled events, of all machines of a scale set.

    Args:
        name: What this VM is called among them.
    """

    versions: ClassVar = ("2019-08-01", "2020-07-01", "2021-02-01")

    def __init__(self, *, name: str = "trainers_0") -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self._incarnation = 0
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        """Where jobkit looks for the server; the clouds's own tools have no such variable."""
        return {"JOBKIT_AZURE_METADATA": self.url}

    def preempt(self, in_s: float = 30.0, *, vm: str | None = None, kind: str = "Preempt") -> str:
        """Schedule an event, of this VM unless another one is named; return its id."""
        identity = secrets.token_hex(8).upper()
        event = {
            "EventId": identity,
            "EventStatus": "Scheduled",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": [vm or self.name],
            "NotBefore": email.utils.formatdate(time.time() + in_s, usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }
        self._change(lambda: self.events.append(event))
        return identity

    def begin(self, identity: str) -> None:
        """Have an event begin: it has no time then any more."""
        for event in self.events:
            if event["EventId"] == identity:
                self._change(lambda event=event: event.update(EventStatus="Started", NotBefore=""))

    def withdraw(self, identity: str) -> None:
        """Take an event back, as the platform does now and then."""
        self._change(lambda: setattr(self, "events", [one for one in self.events if one["EventId"] != identity]))

    def _change(self, change: Callable[[], Any]) -> None:
        with self.changed:
            change()
            self._incarnation += 1

    def answer(self, method: str, request: _Handler) -> None:
        """Answer one request."""
        url = urlsplit(request.path)
        version = parse_qs(url.query).get("api-version", [""])[-1]
        if request.headers.get("Metadata") != "true" or version not in self.versions:
            request.answer(400, {"error": "Bad request"})
        elif url.path == "/metadata/instance/compute/name":
            request.answer(200, self.name)
        elif url.path == "/metadata/scheduledevents":
            with self.changed:
                told = {"DocumentIncarnation": self._incarnation, "Events": list(self.events)}
            request.answer(200, told)
        else:
            request.answer(404, "")


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
