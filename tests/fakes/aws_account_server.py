"""What moto lacks of an AWS account: who may what (IAM), and how much there may be (Service Quotas).

with AwsAccountServer() as account:
    account.environment  # for boto3
    account.denied.add("iam:PassRole")
"""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

TRUST = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "ecs-tasks.amazonaws.com"}}]}


class AwsAccountServer:
    """IAM and Service Quotas on a port of this machine; every permission is held until a test denies it."""

    def __init__(self) -> None:
        self.denied: set[str] = set()
        """Actions that nobody may."""
        self.blind = False
        """Whether IAM refuses to tell."""
        self.roles: dict[str, dict[str, Any]] = {"trainer": TRUST}
        """Trust policies, by the role's name."""
        self.quotas = {"L-34B43A08": ("All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests", 64.0)}
        """Name and value, by code."""
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self.environment = {"AWS_ENDPOINT_URL_IAM": url, "AWS_ENDPOINT_URL_SERVICE_QUOTAS": url}
        """What leads boto3 here, beside what leads it to moto."""
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "AwsAccountServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        account = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                target = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
                if target:
                    code, told = account.quota(json.loads(content))
                else:
                    asked = dict(urllib.parse.parse_qsl(content))
                    code, told = account.iam(asked.pop("Action"), asked)
                self.send_response(code)
                self.send_header("Content-Type", "application/x-amz-json-1.1" if target else "text/xml")
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        return Handler

    def quota(self, asked: dict[str, str]) -> tuple[int, bytes]:
        """Answer GetServiceQuota."""
        code = asked["QuotaCode"]
        if code not in self.quotas:
            return 400, json.dumps({"__type": "NoSuchResourceException", "Message": "no such quota"}).encode()
        name, value = self.quotas[code]
        told = {"ServiceCode": "ec2", "QuotaCode": code, "QuotaName": name, "Value": value, "Adjustable": True}
        return 200, json.dumps({"Quota": told}).encode()

    def iam(self, action: str, asked: dict[str, str]) -> tuple[int, bytes]:
        """Answer GetRole and SimulatePrincipalPolicy."""
        if self.blind:
            return _refused(403, "AccessDenied", f"User is not authorized to perform: iam:{action}")
        if action == "GetRole":
            name = asked["RoleName"]
            if name not in self.roles:
                return _refused(404, "NoSuchEntity", f"The role with name {name} cannot be found.")
            trust = urllib.parse.quote(json.dumps(self.roles[name]))
            fields = {"Path": "/", "RoleName": name, "RoleId": "AROA", "Arn": f"arn:aws:iam::123456789012:role/{name}"}
            told = "".join(f"<{key}>{value}</{key}>" for key, value in fields.items())
            told += f"<CreateDate>2026-01-01T00:00:00Z</CreateDate><AssumeRolePolicyDocument>{trust}"
            return _answer(action, f"<Role>{told}</AssumeRolePolicyDocument></Role>")
        names = [value for key, value in asked.items() if key.startswith("ActionNames.member.")]
        decisions = [(name, "implicitDeny" if name in self.denied else "allowed") for name in names]
        members = "".join(
            f"<member><EvalActionName>{escape(name)}</EvalActionName><EvalDecision>{said}</EvalDecision></member>"
            for name, said in decisions
        )
        return _answer(action, f"<IsTruncated>false</IsTruncated><EvaluationResults>{members}</EvaluationResults>")


def _answer(action: str, content: str) -> tuple[int, bytes]:
    told = f"<{action}Response><{action}Result>{content}</{action}Result></{action}Response>"
    return 200, told.encode()


def _refused(code: int, name: str, message: str) -> tuple[int, bytes]:
    told = f"<Error><Type>Sender</Type><Code>{name}</Code><Message>{escape(message)}</Message></Error>"
    return code, f"<ErrorResponse>{told}</ErrorResponse>".encode()
