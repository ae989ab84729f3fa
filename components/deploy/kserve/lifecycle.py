"""Starting and draining one version on KServe: what to wait for, and what to report meanwhile."""

import time
from collections.abc import Callable
from typing import Any

from nudge.components.common.clients.kube import Cluster
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.say import say
from nudge.components.deploy.kserve import objects, readiness, routes
from nudge.components.deploy.measure import Counts
from nudge.components.deploy.smoke import ModelServer

QUIET_S = 15.0
"""A server is drained when it has had no request in flight for this long after the traffic moved.
OpenShift's router reads changes every 5 s, and /metrics may have missed a replica."""

SUSPECT_S = 9.0
"""How long KServe's own status must report a failure before it counts. After a change it may still
describe the previous pods: seen for 0.2 s after a restart; and a runtime may appear a moment late.
"""


class Start:
    """The wait for one version: what it reports meanwhile, and what ends it."""

    def __init__(
        self,
        cluster: Cluster,
        body: dict[str, Any],
        address: Callable[[dict[str, Any]], str],
        server: Callable[[str], ModelServer],
    ) -> None:
        self._cluster, self._address, self._server = cluster, address, server
        self._name = str(body["metadata"]["name"])
        self._digest = readiness.digest_of(body)
        self._title = body["metadata"]["annotations"]["openshift.io/display-name"]
        self._reported = ""
        self._suspected_since = self._ready_since = 0.0
        self._restarted = False
        self._unreachable = ""

    def judge(self, service: dict[str, Any] | None) -> str | None:
        """The version's address if it is ready, None if not yet; raises `UserError` if never."""
        if service is None:
            raise UserError(
                "someone deleted the InferenceService while it was starting; run this again"
            )
        self._start_if_stopped(service)
        finding = readiness.look(self._cluster, service, self._digest)
        if finding.failed:
            raise self._failure(service, finding.failed)
        now = time.monotonic()
        if not finding.suspect:
            self._suspected_since = 0.0
        elif not self._suspected_since:
            self._suspected_since = now
        elif now - self._suspected_since >= SUSPECT_S:
            raise self._failure(service, finding.suspect)
        if finding.waiting and finding.waiting != self._reported:
            self._reported = finding.waiting
            announce(f"{self._title} is waiting: {finding.waiting}")
        if not finding.ready:
            self._ready_since = 0.0
            return None
        self._ready_since = self._ready_since or now
        return self._answering(service)

    def late(self) -> str:
        """Everything that is known about a version that is not ready in time."""
        service = self._cluster.get(objects.INFERENCE_SERVICE, self._name)
        if service is None:
            return "it does not exist"
        return "\n".join(
            filter(None, [readiness.why(self._cluster, service, self._digest), self._unreachable])
        )

    def _start_if_stopped(self, service: dict[str, Any]) -> None:
        if (service["metadata"].get("annotations") or {}).get(objects.STOP) != "true":
            return
        if self._restarted:
            raise UserError(
                f"someone stopped {self._title} while it was starting (annotation {objects.STOP}); "
                "run this again when it may be served"
            )
        self._restarted = True
        announce(f"someone had stopped {self._title} (annotation {objects.STOP}); starting it")
        change = {"metadata": {"annotations": {objects.STOP: None}}}
        self._cluster.patch(objects.INFERENCE_SERVICE, self._name, change)

    def _answering(self, service: dict[str, Any]) -> str | None:
        """The address of a version whose pods are ready, once something answers there."""
        import httpx

        if not (service.get("status") or {}).get("url"):
            return None
        address = self._address(service)
        try:
            with self._server(address).client(timeout_s=10.0) as client:
                status = client.get("/health").status_code
            if status not in (502, 503, 504):
                return address
            self._unreachable = f"its pods are ready, but {address} answers {status}"
        except httpx.TransportError as error:
            self._unreachable = f"its pods are ready, but {address} does not answer: {error}"
        if time.monotonic() - self._ready_since > routes.ROUTER_S:
            raise UserError(f"{self._title}: {self._unreachable}")
        return None

    def _failure(self, service: dict[str, Any], why: str) -> UserError:
        hint = ""
        if readiness.some_ready(self._cluster, service):
            hint = (
                "\nThe pods with the previous settings are still serving; restore those settings "
                "and run this again"
            )
        return UserError(f"{self._title} does not start: {why}{hint}")


def wait_until_quiet(server: ModelServer, version: str, longest_s: int) -> None:
    """Wait until a server has had no request in flight for `QUIET_S`, at most ``longest_s``."""
    started = quiet_since = time.monotonic()
    announced = False
    with server.client(timeout_s=10.0) as client:
        while time.monotonic() < min(started + longest_s, quiet_since + QUIET_S):
            count = requests_in_flight(client)
            if count:  # None means that the server does not report it, which is not "busy"
                quiet_since = time.monotonic()
                if not announced:
                    announce(
                        f"{version} stops when its {count} requests finish, or in {longest_s} s"
                    )
                    announced = True
            time.sleep(1.0)


def announce(line: str) -> None:
    """Report what the step or command is waiting for."""
    say(f"deploy: {line}")


def requests_in_flight(client: Any) -> int | None:
    """The requests that vLLM is running or queueing; None if the server does not report them."""
    import httpx

    try:
        answer = client.get("/metrics").raise_for_status()
    except httpx.HTTPError:
        return None
    counts = [
        float(line.rpartition(" ")[2])
        for line in answer.text.splitlines()
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting"))
    ]
    return int(sum(counts)) if counts else None


def requests_answered(client: Any) -> Counts | None:
    """The requests below /v1 that vLLM's API server has answered since it started, and those that
    it answered with a server error; None if it does not report them.

    They include the requests of nudge itself. The metric is
    ``http_requests_total{handler="/v1/completions",status="2xx",...}``.
    """
    import httpx

    try:
        answer = client.get("/metrics").raise_for_status()
    except httpx.HTTPError:
        return None
    total = errors = 0.0
    found = False
    for line in answer.text.splitlines():
        if not (line.startswith("http_requests_total{") and 'handler="/v1/' in line):
            continue
        found, count = True, float(line.rpartition(" ")[2])
        total += count
        errors += count if 'status="5xx"' in line else 0
    return Counts(int(total), int(errors)) if found else None
