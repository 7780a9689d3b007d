"""The clouds' metadata servers: those of the tests, held against the clouds' clients; and what jobkit makes of them."""

import os
import subprocess
import sys

from tests.metadata_server import Aws, Gce


def test_google_auth_takes_the_server_for_a_vm() -> None:
    """google-auth finds project, account and token on it, as on a VM."""
    code = (
        "import google.auth, google.auth.transport.requests as transport\n"
        "credentials, project = google.auth.default(scopes=['https://www.googleapis.com/auth/cloud-platform'])\n"
        "credentials.refresh(transport.Request())\n"
        "print(type(credentials).__module__, project, credentials.token, credentials.service_account_email)"
    )
    with Gce(project="mine", token="secret") as cloud:
        printed = subprocess.check_output([sys.executable, "-c", code], env=os.environ | cloud.environment, text=True)
    assert printed.split() == [
        "google.auth.compute_engine.credentials",
        "mine",
        "secret",
        "job@test-project.iam.gserviceaccount.com",
    ]


def test_botocore_takes_the_server_for_an_instance() -> None:
    """Botocore fetches a token from it, and is then told that the instance has no role."""
    code = (
        "import os; from botocore.utils import InstanceMetadataFetcher\n"
        "config = {'ec2_metadata_service_endpoint': os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT']}\n"
        "assert InstanceMetadataFetcher(timeout=5, config=config).retrieve_iam_role_credentials() == {}"
    )
    with Aws() as cloud:
        subprocess.check_call([sys.executable, "-c", code], env=os.environ | cloud.environment)
        assert cloud.requests == ["PUT /latest/api/token", "GET /latest/meta-data/iam/security-credentials/"]
