"""A project of Google Cloud, as its APIs tell of it: what is enabled, who may what, machines, quotas, images.

One address serves all of them; what a test sets here is what they answer. Errors are those of the real services.
"""

import json
import re
from typing import Any
from urllib.parse import unquote


class RefusedError(Exception):
    """An error of an API."""

    def __init__(self, code: int, status: str, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.code, self.status, self.reason = code, status, reason

    def body(self) -> dict[str, Any]:
        """Return the answer."""
        kind = "type.googleapis.com/google.rpc.ErrorInfo"
        details = [{"@type": kind, "reason": self.reason}] if self.reason else []
        return {"error": {"code": self.code, "status": self.status, "message": str(self), "details": details}}


NUMBER = "415104041262"
DEFAULT = f"{NUMBER}-compute@developer.gserviceaccount.com"
"""The account that VMs act as where none is named."""


class Project:
    """One project, in which a job can run until a test takes something away.

    Args:
        name: Its id.
        regions: Those there are.
    """

    def __init__(self, name: str, regions: tuple[str, ...]) -> None:
        self.name, self.regions = name, regions
        self.disabled: set[str] = set()
        """APIs that are not enabled: one that is itself asked refuses, others are told of."""
        self.withheld: set[str] = set()
        """Permissions that whoever asks has not."""
        self.bindings: list[dict[str, Any]] = [{"role": "roles/editor", "members": [f"serviceAccount:{DEFAULT}"]}]
        self.accounts: dict[str, dict[str, Any]] = {DEFAULT: {"email": DEFAULT}}
        self.images: set[str] = set()
        """Paths of tags and versions in Artifact Registry."""
        self.machines = {"e2-standard-4": ("a", "b", "c"), "g2-standard-8": ("a", "b")}
        """Types, and the zones of each region that have them."""
        self.quotas = {"CPUS": (96.0, 28.0), "PREEMPTIBLE_NVIDIA_L4_GPUS": (1.0, 0.0)}
        """Limits and usage."""

    def roles_of(self, account: str) -> set[str]:
        """Return the roles of an account on the project and on itself."""
        member = f"serviceAccount:{account}"
        bindings = [*self.bindings, *self.accounts[account].get("bindings", [])]
        return {str(one["role"]) for one in bindings if member in one["members"]}

    def answer(self, method: str, path: str, query: dict[str, list[str]], content: bytes) -> dict[str, Any] | None:
        """Answer one request; None to what none of these APIs serves."""
        project = re.escape(self.name)
        for api, pattern, answer in (
            ("serviceusage", f"/v1/projects/{project}/services:batchGet", self._services),
            ("cloudresourcemanager", f"/v3/projects/{project}", self._resource),
            ("cloudresourcemanager", f"/v3/projects/{project}:testIamPermissions", self._held),
            ("cloudresourcemanager", f"/v3/projects/{project}:getIamPolicy", self._policy),
            ("iam", "/v1/projects/-/serviceAccounts/([^/:]+)", self._account),
            ("iam", "/v1/projects/-/serviceAccounts/([^/:]+):testIamPermissions", self._held),
            ("iam", "/v1/projects/-/serviceAccounts/([^/:]+):getIamPolicy", self._account_policy),
            ("artifactregistry", "/v1/(projects/[^/]+/locations/[^/]+/repositories/.+)", self._image),
            ("compute", f"/compute/v1/projects/{project}/regions/([^/]+)", self._region),
            ("compute", f"/compute/v1/projects/{project}/aggregated/machineTypes", self._machines),
        ):
            found = re.fullmatch(pattern, path)
            if found is not None:
                if api in self.disabled:
                    raise RefusedError(
                        403, "PERMISSION_DENIED", f"The API has not been used in project {NUMBER} before or it is "
                        f"disabled. Enable it by visiting the console, then retry.", "SERVICE_DISABLED",
                    )  # fmt: skip
                return answer(found[1] if found.groups() else "", query, json.loads(content or b"{}"))
        return None

    def _may(self, permission: str) -> None:
        if permission in self.withheld:
            raise RefusedError(403, "PERMISSION_DENIED", f"Permission '{permission}' denied on resource.")

    def _services(self, _: str, query: dict[str, list[str]], body: Any) -> dict[str, Any]:
        self._may("serviceusage.services.get")
        names = [name.rpartition("/")[2] for name in query["names"]]
        states = ((name, "DISABLED" if name.partition(".")[0] in self.disabled else "ENABLED") for name in names)
        parent = f"projects/{NUMBER}"
        return {
            "services": [
                {"name": f"{parent}/services/{name}", "parent": parent, "state": state} for name, state in states
            ]
        }

    def _resource(self, _: str, query: Any, body: Any) -> dict[str, Any]:
        self._may("resourcemanager.projects.get")
        return {"name": f"projects/{NUMBER}", "projectId": self.name, "state": "ACTIVE"}

    def _held(self, account: str, query: Any, body: Any) -> dict[str, Any]:
        if account and unquote(account) not in self.accounts:
            raise RefusedError(404, "NOT_FOUND", f"Unknown service account {account}.")
        held = [permission for permission in body["permissions"] if permission not in self.withheld]
        return {"permissions": held} if held else {}

    def _policy(self, _: str, query: Any, body: Any) -> dict[str, Any]:
        self._may("resourcemanager.projects.getIamPolicy")
        return {"version": 1, "etag": "BwY=", "bindings": self.bindings}

    def _account(self, account: str, query: Any, body: Any) -> dict[str, Any]:
        self._may("iam.serviceAccounts.get")
        found = self.accounts.get(unquote(account))
        if found is None:
            raise RefusedError(404, "NOT_FOUND", f"Unknown service account {account}.")
        return found

    def _account_policy(self, account: str, query: Any, body: Any) -> dict[str, Any]:
        self._may("iam.serviceAccounts.getIamPolicy")
        return {"version": 1, "bindings": self.accounts[unquote(account)].get("bindings", [])}

    def _image(self, path: str, query: Any, body: Any) -> dict[str, Any]:
        self._may("artifactregistry.tags.get")
        if path not in self.images:
            raise RefusedError(404, "NOT_FOUND", "Requested entity was not found.")
        return {"name": path}

    def _region(self, region: str, query: Any, body: Any) -> dict[str, Any]:
        self._may("compute.regions.get")
        if region not in self.regions:
            path = f"projects/{self.name}/regions/{region}"
            raise RefusedError(404, "", f"The resource '{path}' was not found")
        quotas = [{"metric": name, "limit": limit, "usage": used} for name, (limit, used) in self.quotas.items()]
        where = f"compute/v1/projects/{self.name}/zones/{region}"
        return {"name": region, "status": "UP", "zones": [f"{where}-{zone}" for zone in "abc"], "quotas": quotas}

    def _machines(self, _: str, query: dict[str, list[str]], body: Any) -> dict[str, Any]:
        kind = query["filter"][0].partition("=")[2]
        items: dict[str, Any] = {}
        for region in self.regions:
            for zone in "abc":
                there = zone in self.machines.get(kind, ())
                warning = {"warning": {"code": "NO_RESULTS_ON_PAGE"}}
                items[f"zones/{region}-{zone}"] = {"machineTypes": [{"name": kind}]} if there else warning
        return {"items": items}
