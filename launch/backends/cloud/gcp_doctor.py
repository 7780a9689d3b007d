"""`jobkit doctor --on gcp`: what a first job on Google Batch needs, each thing asked of the API that knows it.

Nothing is created or changed. What the account may not read, or does not answer, is said as not checked, with the
command by which somebody else can look.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

from jobkit.errors import ConfigError
from jobkit.rundir.store import is_remote
from launch.backends.cloud import gcp_request
from launch.backends.cloud.googleapi import GoogleError, Session
from launch.spec.cloud_options import Cloud
from launch.spec.finding import UNCHECKED, Finding
from launch.spec.jobspec import JobSpec

PATIENCE_S = 2.0
"""How long an API may take to answer: without a network all of it is over in seconds."""
_OF_USER = {
    "batch.jobs.create": "roles/batch.jobsEditor",
    "batch.jobs.get": "roles/batch.jobsEditor",
    "batch.jobs.list": "roles/batch.jobsEditor",
    "batch.jobs.delete": "roles/batch.jobsEditor",
    "logging.logEntries.list": "roles/logging.viewer",
}
"""Permissions that submit, status, cancel and logs need, and a role that has each (IAM, "Roles and permissions")."""
_OBJECTS = tuple(f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list"))
_OBJECT_ROLES = ("roles/storage.objectUser", "roles/storage.objectAdmin", "roles/storage.admin")
_EVERYTHING = ("roles/owner", "roles/editor")
"""Basic roles, which have all that a job needs but secrets (Batch, "Control access for a job")."""
_ACT_AS = "roles/iam.serviceAccountUser"
_MULTI = {"US": "us-", "EU": "europe-", "ASIA": "asia-"}
"""Multi-regions of Cloud Storage, and how their regions begin."""


@dataclass(frozen=True)
class _Place:
    """What is examined.

    Args:
        session: Asks the APIs.
        cloud: What jobs ask for, with project, region and machine type filled in.
        bucket: Of the run's URL; '' for none.
        member: Who asks, as IAM names members.
        lanes: Whether points of a sweep wait for one another.
        nodes: VMs of a job.
    """

    session: Session
    cloud: Cloud
    bucket: str
    member: str
    lanes: bool = False
    nodes: int = 1

    def get(self, service: str, path: str, **query: str | list[str]) -> dict[str, Any]:
        return self.session.call(service, "GET", path, query=query)

    def post(self, service: str, path: str, body: Any) -> dict[str, Any]:
        return self.session.call(service, "POST", path, body=body)

    @cached_property
    def account(self) -> str:
        """The e-mail address of the service account that the VM acts as."""
        if self.cloud.service_account:
            return self.cloud.service_account
        project = self.get("cloudresourcemanager", f"v3/projects/{self.cloud.project}")
        return f"{str(project['name']).rpartition('/')[2]}-compute@developer.gserviceaccount.com"

    @cached_property
    def roles(self) -> set[str]:
        """Those of that account on the project itself."""
        asked = {"options": {"requestedPolicyVersion": 3}}
        policy = self.post("cloudresourcemanager", f"v3/projects/{self.cloud.project}:getIamPolicy", asked)
        return _roles(policy, f"serviceAccount:{self.account}")

    def grant(self, role: str, member: str) -> str:
        """Return the command that gives somebody a role on the project."""
        words = f"--member={shlex.quote(member) if '$' not in member else member} --role={role}"
        return f"gcloud projects add-iam-policy-binding {self.cloud.project} {words}"


def examine(spec: JobSpec, session: Session) -> list[Finding]:
    """Ask Google's APIs what a submit with this specification would come upon.

    Args:
        spec: With a cloud whose project, region and machine type are filled in; image and run may be empty.
        session: Its patience bounds each request.
    """
    assert spec.cloud is not None
    cloud = spec.cloud
    try:
        credentials = session.open().credentials
    except ConfigError as error:
        mend = "gcloud auth application-default login"
        rest = [_unchecked(topic, "nobody is signed in", mend) for topic, _, _ in _CHECKS]
        return [Finding("credentials", str(error), "fail", mend), *rest]
    email = str(getattr(credentials, "service_account_email", "") or "")
    person = "user:$(gcloud config get account)"
    member = f"serviceAccount:{email}" if "@" in email else person
    bucket = spec.run.partition("://")[2].partition("/")[0] if is_remote(spec.run) else ""
    place = _Place(session, cloud, bucket, member, lanes=spec.parallel is not None, nodes=gcp_request.nodes(spec))
    findings, silent = [], ""
    for topic, service, check in _CHECKS:
        if silent:
            findings.append(_unchecked(topic, silent))
            continue
        try:
            findings += check(place)
        except GoogleError as error:
            silent = error.said if error.code == 0 else ""
            findings.append(_refused(topic, service, error, place))
        except ConfigError as error:  # the credentials are there and refused
            silent = "the credentials were refused"
            findings.append(Finding("credentials", str(error), "fail", "gcloud auth application-default login"))
    if not silent:
        findings.insert(0, Finding("credentials", f"signed in{f' as {email}' if '@' in email else ''}"))
    return findings


def _unchecked(topic: str, why: str, mend: str = "") -> Finding:
    return Finding(topic, why, UNCHECKED, mend)


def _refused(topic: str, service: str, error: GoogleError, place: _Place) -> Finding:
    """Say why a check could not be made."""
    project = place.cloud.project
    if error.code == 401:
        return Finding("credentials", error.said, "fail", "gcloud auth application-default login")
    if error.disabled:
        mend = f"gcloud services enable {service}.googleapis.com --project {project}"
        return _unchecked(topic, f"the API that tells is not enabled: {service}.googleapis.com", mend)
    return _unchecked(topic, str(error), _LOOK.get(topic, "").format(project=project, bucket=place.bucket))


_LOOK = {
    "APIs": "gcloud services list --enabled --project {project}",
    "your roles": "gcloud projects get-iam-policy {project}",
    "job's account": "gcloud projects get-iam-policy {project}",
    "quota": "gcloud compute project-info describe --project {project}",
}
"""By which somebody who may can look."""


def _apis(place: _Place) -> Iterator[Finding]:
    project, image = place.cloud.project, place.cloud.image
    names = ["batch", "compute", "logging", "storage"]
    names += ["artifactregistry"] * ("-docker.pkg.dev/" in image) + ["secretmanager"] * bool(place.cloud.secrets)
    asked = [f"projects/{project}/services/{name}.googleapis.com" for name in names]
    reply = place.get("serviceusage", f"v1/projects/{project}/services:batchGet", names=asked)
    states = {str(one["name"]).rpartition("/")[2]: one.get("state") for one in reply.get("services", [])}
    missing = [f"{name}.googleapis.com" for name in names if states.get(f"{name}.googleapis.com") != "ENABLED"]
    if missing:
        mend = f"gcloud services enable {' '.join(missing)} --project {project}"
        yield Finding("APIs", f"not enabled in project {project}: {', '.join(missing)}", "fail", mend)
    else:
        yield Finding("APIs", f"enabled in project {project}: {', '.join(names)}")


def _user(place: _Place) -> Iterator[Finding]:
    project = place.cloud.project
    reply = place.post(
        "cloudresourcemanager", f"v3/projects/{project}:testIamPermissions", {"permissions": list(_OF_USER)}
    )
    held = set(reply.get("permissions", []))
    missing = [permission for permission in _OF_USER if permission not in held]
    for role in dict.fromkeys(_OF_USER[permission] for permission in missing):
        lacking = ", ".join(permission for permission in missing if _OF_USER[permission] == role)
        yield Finding("your roles", f"you lack {lacking}", "fail", place.grant(role, place.member))
    if not missing:
        yield Finding("your roles", "you may submit, list and end jobs, and read their logs")


def _account(place: _Place) -> Iterator[Finding]:
    """Examine the account that the VM acts as: that there is one, that you may use it, and what it may."""
    topic, project, account = "job's account", place.cloud.project, place.account
    path = f"v1/projects/-/serviceAccounts/{account}"
    try:
        if place.get("iam", path).get("disabled"):
            mend = f"gcloud iam service-accounts enable {account} --project {project}"
            yield Finding(topic, f"{account} is disabled", "fail", mend)
            return
    except GoogleError as error:
        if error.code == 404:
            name = account.partition("@")[0]
            mend = f"gcloud iam service-accounts create {name} --project {project}"
            if not place.cloud.service_account:
                mend = f"gcloud services enable compute.googleapis.com --project {project}"  # which makes it
            yield Finding(topic, f"there is no service account {account}", "fail", mend)
            return
        yield _refused(topic, "iam", error, place)
    try:
        reply = place.post("iam", f"{path}:testIamPermissions", {"permissions": ["iam.serviceAccounts.actAs"]})
        if not reply.get("permissions"):
            mend = (
                f"gcloud iam service-accounts add-iam-policy-binding {account} --project {project} "
                f"--member={place.member} --role={_ACT_AS}"
            )
            yield Finding(topic, f"you may not have jobs act as {account}", "fail", mend)
    except GoogleError as error:
        yield _refused(topic, "iam", error, place)
    roles, member = place.roles, f"serviceAccount:{account}"
    needed = ["roles/batch.agentReporter", "roles/logging.logWriter"]
    needed += ["roles/artifactregistry.reader"] * ("-docker.pkg.dev/" in place.cloud.image)
    missing = [role for role in needed if not roles & {role, *_EVERYTHING}]
    missing += ["roles/secretmanager.secretAccessor"] * bool(
        place.cloud.secrets and "roles/secretmanager.secretAccessor" not in roles
    )
    for role in missing:
        text = f"{account} has not {role} on the project itself (a group's, a folder's or a custom role is not seen)"
        yield Finding(topic, text, "warning", place.grant(role, member))
    if not missing:
        yield Finding(topic, f"{account} may report, log and pull images")
    yield from _successor(place)


def lacking(spec: JobSpec, session: Session) -> list[Finding]:
    """Say what a job of a completed specification lacks to submit its successor; raises JobkitError if nobody tells."""
    assert spec.cloud is not None
    return list(_successor(_Place(session, spec.cloud, "", "", lanes=spec.parallel is not None)))


def _successor(place: _Place) -> Iterator[Finding]:
    """Tell what a job's account lacks to submit another job: the next one of a run, or of the next point of a sweep."""
    ends = place.cloud.restarts(gcp_request.RESTARTS + 1) > gcp_request.RESTARTS
    if not ends and not place.lanes:
        return
    account, project = place.account, place.cloud.project
    roles, member = place.roles, f"serviceAccount:{account}"
    what = [f"a run ends after {gcp_request.RESTARTS} restarts"] * ends
    what += ["no point of a sweep has the next one begin"] * place.lanes
    without = f"without it {' and '.join(what)}, and 'jobkit resume' goes on"
    if not roles & {"roles/batch.jobsEditor", "roles/batch.jobsAdmin", *_EVERYTHING}:
        mend = place.grant("roles/batch.jobsEditor", member)
        yield Finding("job's account", f"{account} has not roles/batch.jobsEditor; {without}", "warning", mend)
    if not roles & {_ACT_AS, *_EVERYTHING}:
        policy = place.post("iam", f"v1/projects/-/serviceAccounts/{account}:getIamPolicy", {})
        if _ACT_AS not in _roles(policy, member):
            mend = (
                f"gcloud iam service-accounts add-iam-policy-binding {account} --project {project} "
                f"--member={member} --role={_ACT_AS}"
            )
            yield Finding("job's account", f"{account} has not {_ACT_AS} on itself; {without}", "warning", mend)


def _roles(policy: dict[str, Any], member: str) -> set[str]:
    """Return the roles that a policy gives a member, without a condition."""
    bindings = policy.get("bindings", [])
    return {str(one["role"]) for one in bindings if member in one.get("members", []) and not one.get("condition")}


def _bucket(place: _Place) -> Iterator[Finding]:
    """Examine the bucket: where it is, what you and the job may do there."""
    topic, bucket, region = "bucket", place.bucket, place.cloud.region
    if not bucket:
        yield _unchecked(topic, "no bucket was named: give --run gs://BUCKET/run")
        return
    path, url = f"storage/v1/b/{quote(bucket, safe='')}", f"gs://{bucket}"
    make = "gcloud storage buckets create {} " + f"--project {place.cloud.project} --location {region}"
    try:
        location = str(place.get("storage", path).get("location", "")).upper()
        same = location == region.upper() or region.startswith(_MULTI.get(location, "/"))
        where = f"{url} is in {location}"
        if same:
            yield Finding(topic, f"{where}, as region {region} is")
        elif re.fullmatch(r"[A-Z]+-[A-Z]+\d+|US|EU|ASIA", location):
            text = f"{where}, the jobs in {region}: every save and restore crosses regions, slowly, and is billed"
            yield Finding(topic, text, "warning", make.format(f"{url}-{region}"))
        else:
            look = f"gcloud storage buckets describe {url}"
            yield _unchecked(topic, f"{where}, which may or may not have {region} in it", look)
    except GoogleError as error:
        if error.code == 404:
            yield Finding(topic, f"there is no bucket {url}", "fail", make.format(url))
            return
        if error.code != 403:
            raise
        look = f"gcloud storage buckets describe {url} --format='value(location)'"
        yield _unchecked(topic, f"you may not see where {url} is: {error.said}", look)
    held = set(place.get("storage", f"{path}/iam/testPermissions", permissions=list(_OBJECTS)).get("permissions", []))
    give = f"gcloud storage buckets add-iam-policy-binding {url} --role=roles/storage.objectUser"
    if missing := [permission for permission in _OBJECTS if permission not in held]:
        yield Finding(topic, f"you lack {', '.join(missing)} on {url}", "fail", f"{give} --member={place.member}")
    else:
        yield Finding(topic, f"you may read and write {url}")
    account = place.account
    try:
        policy = place.get("storage", f"{path}/iam", optionsRequestedPolicyVersion="3")
    except GoogleError as error:
        if error.code != 403:
            raise
        yield _unchecked(topic, f"whether {account} may write there", f"gcloud storage buckets get-iam-policy {url}")
        return
    of_project: set[str] = set()
    with contextlib.suppress(GoogleError):
        of_project = place.roles
    if (_roles(policy, f"serviceAccount:{account}") | of_project) & {*_OBJECT_ROLES, *_EVERYTHING}:
        yield Finding(topic, f"{account} may read and write {url}")
    else:
        text = f"{account} has no role that reads and writes on {url} (a group's or a custom role is not seen)"
        yield Finding(topic, text, "warning", f"{give} --member=serviceAccount:{account}")


def _image(place: _Place) -> Iterator[Finding]:
    """Look an image up in Artifact Registry; other registries are not asked."""
    topic, image = "image", place.cloud.image
    if not image:
        yield _unchecked(topic, "no image was named: give --image")
        return
    known = re.fullmatch(r"([a-z0-9-]+)-docker\.pkg\.dev/([^/]+)/([^/]+)/([^:@]+)(?::([\w.-]+))?(?:@(.+))?", image)
    if known is None:
        yield _unchecked(topic, f"{image} is not in Artifact Registry", f"docker manifest inspect {shlex.quote(image)}")
        return
    location, project, repository, name, tag, digest = known.groups()
    kind = f"versions/{digest}" if digest else f"tags/{tag or 'latest'}"
    path = f"v1/projects/{project}/locations/{location}/repositories/{repository}/packages"
    try:
        place.get("artifactregistry", f"{path}/{quote(name, safe='')}/{kind}")
        yield Finding(topic, f"{image} is there")
    except GoogleError as error:
        if error.code != 404:
            raise
        yield Finding(topic, f"there is no {image}: {error.said}", "fail", f"docker push {shlex.quote(image)}")


def _machine(place: _Place) -> Iterator[Finding]:
    """Tell in which zones there are such machines, and whether the quota has room for them."""
    cloud = place.cloud
    path = f"compute/v1/projects/{cloud.project}"
    zones = cloud.zones or tuple(
        str(zone).rpartition("/")[2] for zone in place.get("compute", f"{path}/regions/{cloud.region}")["zones"]
    )
    reply = place.get("compute", f"{path}/aggregated/machineTypes", filter=f"name={cloud.machine_type}")
    here = [zone for zone in zones if reply.get("items", {}).get(f"zones/{zone}", {}).get("machineTypes")]
    if here:
        yield Finding("machine", f"{cloud.machine_type} is in {', '.join(here)}")
    else:
        mend = f"gcloud compute machine-types list --filter='name={cloud.machine_type}'"
        yield Finding("machine", f"no {cloud.machine_type} in {', '.join(zones)}", "fail", mend)


def _quota(place: _Place) -> Iterator[Finding]:
    cloud = place.cloud
    reply = place.get("compute", f"compute/v1/projects/{cloud.project}/regions/{cloud.region}")
    quotas = {str(one["metric"]): one for one in reply.get("quotas", [])}
    for metric, each in _needs(cloud, quotas):
        count = each * place.nodes
        if metric not in quotas:
            look = f"gcloud compute regions describe {cloud.region} --project {cloud.project}"
            yield _unchecked("quota", f"the region does not tell its {metric}", look)
            continue
        limit, usage = float(quotas[metric]["limit"]), float(quotas[metric].get("usage", 0))
        state = f"{metric} in {cloud.region}: {usage:g} of {limit:g} used, a job takes {count}"
        mend = (
            f"gcloud beta quotas preferences create --service=compute.googleapis.com --project={cloud.project} "
            f"--quota-id={metric.replace('_', '-')}-per-project-region --dimensions=region={cloud.region} "
            f"--preferred-value={usage + count:g}"
        )
        enough = limit < 0 or usage + count <= limit
        short = "fail" if limit < count else "warning"
        yield Finding("quota", state) if enough else Finding("quota", state, short, mend)


def _needs(cloud: Cloud, quotas: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the quotas that one VM counts towards, and how much of them it takes."""
    if cloud.gpu is not None:
        kind, count = cloud.gpu
        metric = f"NVIDIA_{kind.replace('-', '_')}_GPUS"
        yield f"PREEMPTIBLE_{metric}" if cloud.spot else metric, count
        return
    cpus = int(gcp_request.resources(cloud.machine_type).get("cpuMilli", "0")) // 1000
    if cpus:
        family = f"{cloud.machine_type.split('-')[0].upper()}_CPUS"
        # Without a quota of their own spot VMs use that of others (Compute Engine, "Preemptible quotas").
        own = family if family in quotas else "CPUS"
        yield own, cpus


_CHECKS: tuple[tuple[str, str, Callable[[_Place], Iterable[Finding]]], ...] = (
    ("APIs", "serviceusage", _apis),
    ("your roles", "cloudresourcemanager", _user),
    ("job's account", "cloudresourcemanager", _account),
    ("bucket", "storage", _bucket),
    ("image", "artifactregistry", _image),
    ("machine", "compute", _machine),
    ("quota", "compute", _quota),
)
"""What is checked, and the API that is asked first."""
