"""The connection to a pipelines server: address, token, CA, and one sentence for each error.

What no variable names is looked up where OpenShift AI provides it: in a pod the service account's
token and the service CA; on a workstation `oc whoami -t` and the route in the status of the
project's DSPA.
"""

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tenacity

from nudge.components.common.core.environment import (
    DASHBOARD_URL,
    NAMESPACE,
    PIPELINES_CA,
    PIPELINES_TOKEN,
    PIPELINES_URL,
    SERVICE_ACCOUNT,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.retries import BACKOFF, BUSY

TIMEOUTS_S = (10.0, 60.0)
"""For connecting, and for waiting for an answer."""

PATIENCE_S = 30.0
"""How long a request that changes nothing is repeated."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PAGE = 100


@dataclass(frozen=True)
class PipelinesServer:
    """A pipelines server; ``ca`` is a file of PEM certificates, empty for the system's CAs.

    ``patience_s`` is for how long `read` repeats a request while the server is busy or unreachable.
    """

    url: str
    token: str = field(default="", repr=False)
    ca: str = ""
    namespace: str = ""
    patience_s: float = field(default_factory=lambda: PATIENCE_S)

    def api(self, name: str) -> Any:
        """A generated API of `kfp_server_api`, such as ``RunServiceApi``."""
        import kfp_server_api

        configuration = kfp_server_api.Configuration(host=self.url)
        configuration.ssl_ca_cert = self.ca or None
        configuration.retries = False  # `read` knows what may be repeated
        if self.token:
            configuration.api_key["authorization"] = self.token
            configuration.api_key_prefix["authorization"] = "Bearer"
        return getattr(kfp_server_api, name)(kfp_server_api.ApiClient(configuration))

    def change(self, doing: str, call: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        """Send one request once; raises `UserError` about ``doing``."""
        import kfp_server_api
        import urllib3

        try:
            return call(*positional, _request_timeout=TIMEOUTS_S, **named)
        except kfp_server_api.ApiException as error:
            raise UserError(self._message(doing, error)) from None
        except AttributeError as error:
            # The generated client decodes the body of every failure; a TLS failure has no body.
            failed = error.__context__
            if not isinstance(failed, kfp_server_api.ApiException) or failed.status:
                raise
            raise UserError(f"{doing}: {_unreachable(self.url, failed)}") from None
        except urllib3.exceptions.HTTPError as error:
            raise UserError(f"{doing}: {_unreachable(self.url, error)}") from None

    def read(self, doing: str, call: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        """Send a request that changes nothing; repeat it with back-off while the server is busy."""
        import kfp_server_api
        import urllib3

        def worth_repeating(error: BaseException) -> bool:
            if isinstance(error, kfp_server_api.ApiException):
                return error.status in BUSY
            broken = isinstance(getattr(error, "reason", None), ssl.SSLError)
            return isinstance(error, urllib3.exceptions.HTTPError) and not broken

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience_s),
            wait=BACKOFF,
            retry=tenacity.retry_if_exception(worth_repeating),
            reraise=True,
        )
        return self.change(doing, lambda *a, **k: retrying(call, *a, **k), *positional, **named)

    def every(self, doing: str, call: Callable[..., Any], key: str, **named: Any) -> list[Any]:
        """Every item of a paged list."""
        items: list[Any] = []
        token = ""
        while True:
            page = self.read(doing, call, page_size=PAGE, page_token=token, **named)
            items += getattr(page, key) or []
            token = page.next_page_token or ""
            if not token:
                return items

    def _message(self, doing: str, error: Any) -> str:
        try:
            body = json.loads(error.body or "{}")
            text = str(body.get("error_message") or body.get("message") or body.get("error") or "")
        except (ValueError, AttributeError):
            text = ""
        failed = "the server failed; its log is in the pod ds-pipeline-<dspa>"
        hint = {
            401: "the token is missing or expired; run `oc login`, or set NUDGE_PIPELINES_TOKEN",
            403: "this account may not do that; ask the project's administrator for the role "
            "nudge-author (manifests/base)",
            404: "it does not exist",
            409: "it exists already, or someone is changing it right now; check, then retry",
            429: "the server is busy; retry in a minute",
        }.get(error.status, failed if error.status >= 500 else "it does not accept the request")
        # When it wraps one error in another, the cause comes last.
        reason = f" ({' '.join(text.split())[:1000]})" if text else ""
        return f"{doing}: {self.url} answered {error.status}: {hint}{reason}"


def connect(url: str = "") -> PipelinesServer:
    """The server at ``url``, at NUDGE_PIPELINES_URL, or of the project that `oc` is logged in to.

    Token: NUDGE_PIPELINES_TOKEN, the service account's, `oc whoami -t`. CA: NUDGE_PIPELINES_CA, the
    service CA of a pod. Raises `UserError` if no server is known or the CA file is missing.
    """
    found = url or os.environ.get(PIPELINES_URL, "") or _from_dspa()
    if not found:
        raise UserError(
            "no pipelines server is known: set NUDGE_PIPELINES_URL, or log in with `oc login` and "
            "choose a project that has a pipelines server"
        )
    if not found.startswith(("http://", "https://")):
        found = f"https://{found}"
    token_file, service_ca = SERVICE_ACCOUNT / "token", SERVICE_ACCOUNT / "service-ca.crt"
    token = os.environ.get(PIPELINES_TOKEN, "")
    if not token and token_file.is_file():
        token = token_file.read_text(encoding="utf-8").strip()
    ca = os.environ.get(PIPELINES_CA, "")
    if ca and not Path(ca).is_file():
        raise UserError(f"NUDGE_PIPELINES_CA = {ca}: there is no such file")
    if ca:
        _check_ca(ca)
    if not ca and ".svc" in found and service_ca.is_file():
        ca = str(service_ca)
    namespace_file = SERVICE_ACCOUNT / "namespace"
    namespace = os.environ.get(NAMESPACE, "")
    if not namespace and namespace_file.is_file():
        namespace = namespace_file.read_text(encoding="utf-8").strip()
    token = token or _oc("whoami", "-t")
    parts = urlsplit(found)
    if token and parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise UserError(
            f"{found} would receive the token unencrypted, and it is sent over https only; use "
            "https://, or log out (`oc logout`) and unset NUDGE_PIPELINES_TOKEN if the server "
            "needs no token"
        )
    return PipelinesServer(found.rstrip("/"), token, ca, namespace)


def _check_ca(path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"NUDGE_PIPELINES_CA = {path} cannot be read as PEM certificates: {error}"
        ) from None


def _from_dspa() -> str:
    path = "{.items[0].status.components.apiServer.externalUrl}"
    return _oc("get", "datasciencepipelinesapplications", "-o", f"jsonpath={path}")


def _oc(*arguments: str) -> str:
    """The output of `oc`; empty if it is not installed, not logged in or does not answer."""
    if shutil.which("oc") is None:
        return ""
    try:
        done = subprocess.run(
            ["oc", "--request-timeout=10s", *arguments], capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _unreachable(url: str, error: Exception) -> str:
    text = f"{getattr(error, 'reason', None) or ''} {error}"
    if "not valid for" in text or "mismatch" in text.lower():
        return f"the certificate of {url} is for a different name; check the address"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            f"the certificate of {url} is not signed by a known CA; set NUDGE_PIPELINES_CA to "
            "the file of the cluster's CA"
        )
    if "SSLError" in text:
        return f"{url} does not speak TLS; should it be http:// instead of https://?"
    if "timed out" in text.lower():
        return f"{url} did not answer in time; check the address, and that the cluster is reachable"
    return f"{url} cannot be reached; check the address, and that the cluster is reachable"


def run_link(server: PipelinesServer, run_id: str) -> str:
    """The page of a run: on the dashboard that NUDGE_DASHBOARD_URL or the cluster's ConsoleLink
    names, or on the pipelines server itself.

    Newer dashboards redirect this path (opendatahub-io/odh-dashboard, routes/pipelines).
    """
    dashboard = os.environ.get(DASHBOARD_URL, "") or _oc(
        "get", "consolelink", "rhodslink", "-o", "jsonpath={.spec.href}"
    )
    namespace = server.namespace or (_oc("project", "-q") if dashboard else "")
    if dashboard and namespace:
        return f"{dashboard.rstrip('/')}/pipelineRuns/{namespace}/runs/{run_id}"
    return f"{server.url}/#/runs/details/{run_id}"
