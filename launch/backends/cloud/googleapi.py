"""Requests to Google's REST APIs with the user's own credentials, retried, their errors in one sentence.

`google.auth` alone: the client library of Google Batch brings grpc, 80 MB of it, and no more than this (measured).
"""

import logging
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import tenacity

from jobkit.errors import ConfigError, JobkitError
from jobkit.rundir.remote import identity

_TIMEOUT_S = 30.0
_RETRY_S = 20.0
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class GoogleError(JobkitError):
    """An API has refused a request.

    Args:
        code: HTTP status; 0 if nothing answered.
        status: Google's word, such as PERMISSION_DENIED.
        said: What it said.
        reason: Of the error's details, such as SERVICE_DISABLED.
    """

    def __init__(self, code: int, status: str, said: str, reason: str = "") -> None:
        self.code, self.status, self.said, self.reason = code, status, said, reason
        super().__init__(f"Google answered {code} {status}: {said}" if code else said)

    @property
    def disabled(self) -> bool:
        """Whether the project has not enabled the API."""
        return self.reason == "SERVICE_DISABLED" or "has not been used in project" in self.said


class _TransientError(GoogleError):
    """Worth another try."""


class Session:
    """Talks to Google's APIs as whoever is signed in here; made on first use.

    Args:
        patience_s: How long one that does not answer is asked again.
    """

    def __init__(self, *, patience_s: float = _RETRY_S) -> None:
        self._patience_s = patience_s
        self._opened: Any = None
        self.project = ""
        """The project that the credentials belong to, once they are read; empty if they have none."""

    def open(self) -> Any:
        """Find credentials.

        Raises:
            ConfigError: If there are none.
        """
        if self._opened is None:
            try:
                import google.auth
                import google.auth.exceptions
                from google.auth.transport.requests import AuthorizedSession
            except ImportError:
                raise ConfigError(
                    "--on gcp needs a package that is not installed: pip install google-auth requests"
                ) from None
            logging.getLogger("google.auth").setLevel(logging.ERROR)  # what it warns of we say, if it matters
            try:
                credentials, project = google.auth.default(scopes=[SCOPE])
            except google.auth.exceptions.GoogleAuthError as error:
                raise _no_credentials(str(error)) from None
            self.project = project or ""
            self._opened = AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
        return self._opened

    def call(
        self, service: str, method: str, path: str, *, body: Any = None, query: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send one request, again while it is worth it, and return the answer.

        Args:
            service: Such as batch.
            method: Of HTTP.
            path: Such as v1/projects/p/locations/r/jobs; a slash inside a name is %2F.
            body: What is sent as JSON.
            query: Of the URL; a list is a name that is repeated.

        Raises:
            GoogleError: If it is refused, or nobody answers.
            ConfigError: Without credentials.
        """
        # gcloud's own variable, as for any of its services: CLOUDSDK_API_ENDPOINT_OVERRIDES_BATCH.
        base = os.environ.get(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}")
        if not base and service == "storage":
            base = os.environ.get("STORAGE_EMULATOR_HOST")
        base = base or f"https://{service}.googleapis.com"
        retrying = tenacity.Retrying(
            stop=self._enough,
            wait=tenacity.wait_exponential(0.3, 4.0) + tenacity.wait_random(0, 0.2),
            retry=tenacity.retry_if_exception_type(_TransientError),
            reraise=True,
        )
        url = f"{base.rstrip('/')}/{quote(path, safe='/:-._~@%')}"
        answer: dict[str, Any] = retrying(self._once, method, url, body, query or {})
        return answer

    def _once(self, method: str, url: str, body: Any, query: Mapping[str, Any]) -> dict[str, Any]:
        session = self.open()
        import google.auth.exceptions
        import requests

        try:
            reply = session.request(method, url, json=body, params=query, timeout=min(_TIMEOUT_S, self._patience_s + 2))
        except google.auth.exceptions.RefreshError as error:
            raise _no_credentials(str(error)) from None
        except (requests.RequestException, google.auth.exceptions.TransportError) as error:
            host = url.split("/")[2]
            raise _TransientError(0, "", f"{host} does not answer: {type(error).__name__}") from None
        if reply.ok:
            answer: dict[str, Any] = reply.json() if reply.content else {}
            return answer
        raise _refusal(reply)

    def _enough(self, state: tenacity.RetryCallState) -> bool:
        """Stop after a while; soon after 429s: a rate is worth a second or two, a quota no more."""
        error = state.outcome.exception() if state.outcome is not None else None
        refused = isinstance(error, GoogleError) and error.code == 429 and state.attempt_number >= 3
        return refused or (state.seconds_since_start or 0.0) >= self._patience_s


def _refusal(reply: Any) -> GoogleError:
    try:
        error = reply.json()["error"]
        said, status = str(error.get("message", "")), str(error.get("status", ""))
        reason = next((str(detail["reason"]) for detail in error.get("details", []) if "reason" in detail), "")
    except (ValueError, KeyError, TypeError, AttributeError):
        said, status, reason = reply.reason or "", "", ""
    kind = _TransientError if reply.status_code in (408, 429) or reply.status_code >= 500 else GoogleError
    return kind(reply.status_code, status, " ".join(said.split())[:400].rstrip("."), reason)


def _no_credentials(said: str) -> ConfigError:
    said = " ".join(said.split())[:200].rstrip(".")
    return ConfigError(
        f"no usable credentials for Google Cloud ({identity()}): sign in with 'gcloud auth application-default login', "
        f"or set GOOGLE_APPLICATION_CREDENTIALS: {said}"
    )
