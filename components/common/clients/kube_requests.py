"""HTTP requests to the Kubernetes API: retries, and a sentence for each refusal.

Requests are repeated while the server is busy or unreachable. A refusal becomes a `UserError` that
says what to do. No message or log contains a token or a CA.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import tenacity

from nudge.components.common.core.errors import Transient, UserError

Object = dict[str, Any]

PATIENCE_S = 60.0
"""How long to retry a busy or unreachable server, with back-off."""

TIMEOUTS_S = (10.0, 60.0)
"""For connecting, and for waiting for an answer."""

BUSY = (429, 500, 502, 503, 504)
VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class ResourceKind:
    """A kind of object: ``trainer.kubeflow.org/v1alpha1``, ``TrainJob``, ``trainjobs``.

    ``needs`` names the software that adds the kind to a cluster.
    """

    api_version: str
    name: str
    plural: str
    needs: str = ""

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        parts = ["apis" if self.group else "api", self.api_version, "namespaces", quote(namespace)]
        return "/" + "/".join([*parts, self.plural, *(quote(p) for p in (name, subresource) if p)])


class ResourceConflict(Exception):
    """The object exists already (``reason`` AlreadyExists) or has changed since it was read."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Busy(Exception):
    """An answer after which the same request may be repeated."""

    def __init__(self, status: int, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.status, self.wait_s = status, wait_s


class Requests:
    """Requests to the API server of ``api`` (a `kubernetes.client.ApiClient`), in one namespace."""

    def __init__(self, api: Any, namespace: str, patience_s: float = PATIENCE_S) -> None:
        self._api, self._namespace, self.patience_s = api, namespace, patience_s

    def json(self, kind: ResourceKind, method: str, path: str, name: str = "", **how: Any) -> Any:
        """An answer parsed as JSON, or None if the object does not exist; as in `text`."""
        text = self.text(kind, method, path, name, **how)
        return None if text is None else json.loads(text)

    def text(
        self,
        kind: ResourceKind,
        method: str,
        path: str,
        name: str = "",
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        media: str = "application/json",
        verb: str = "",
        subresource: str = "",
        missing_is_none: bool = False,
        patience_s: float | None = None,
    ) -> str | None:
        """The text of an answer, or None if the object does not exist.

        ``verb`` and ``subresource`` are for messages. With ``missing_is_none``, any 404 means None,
        not only the API server's own. Raises `ResourceConflict` for a 409, `Transient` if the
        server stays busy or unreachable for ``patience_s``, and `UserError` for other refusals.
        """
        verb = verb or VERBS[method]
        doing = f"{verb} {kind.name}{f' {name}' if name else ''} in namespace {self._namespace}"
        patience_s = self.patience_s if patience_s is None else patience_s
        status, text = self._with_retries(doing, patience_s, method, path, query, body, media)
        if status < 300:
            return text
        refusal = _status(text)
        reason, message = refusal.get("reason", ""), refusal.get("message") or text.strip()[:500]
        if status == 404 and (missing_is_none or reason == "NotFound"):
            return None
        if status == 404:
            needs = f"; it comes with {kind.needs}" if kind.needs else ""
            raise UserError(
                f"{doing}: this cluster has no kind {kind.name} ({kind.api_version}){needs}"
            )
        if status == 409:
            raise ResourceConflict(reason, message)
        if status == 401:
            raise UserError(
                f"{doing}: {self._host} does not accept this token (401); log in again, or check "
                "the service account"
            )
        if status == 403 and " cannot " in message:
            raise UserError(_missing_permission(doing, kind, verb, subresource, message))
        raise UserError(f"{doing}: {self._host} answered {status}: {message}")

    def token(self) -> str:
        """The bearer token that requests carry; empty without one (client certificates)."""
        headers: dict[str, str] = {}
        self._api.update_params_for_auth(headers, [], ["BearerToken"])
        return headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def _host(self) -> str:
        return str(self._api.configuration.host)

    def _with_retries(self, doing: str, patience_s: float, *request: Any) -> tuple[int, str]:
        import urllib3

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(patience_s),
            wait=_wait,
            retry=tenacity.retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            return retrying(self._once, *request)
        except _Busy as busy:
            raise Transient(f"{doing}: {self._host} answered {busy.status}: {busy}") from None
        except urllib3.exceptions.SSLError as error:
            raise UserError(
                f"{doing}: the certificate of {self._host} is not trusted: {error}; set its CA in "
                "the kubeconfig"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise Transient(f"{doing}: the cluster {self._host} does not answer: {error}") from None

    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        media: str,
    ) -> tuple[int, str]:
        import urllib3

        headers = {"Accept": "application/json, */*", "Content-Type": media}
        self._api.update_params_for_auth(headers, [], ["BearerToken"])
        pairs = "&".join(f"{key}={quote(value, safe='')}" for key, value in (query or {}).items())
        answer = self._api.rest_client.pool_manager.request(
            method,
            f"{self._host}{path}{f'?{pairs}' if pairs else ''}",
            headers=headers,
            body=None if body is None else json.dumps(body),
            timeout=urllib3.Timeout(connect=TIMEOUTS_S[0], read=TIMEOUTS_S[1]),
            retries=False,
        )
        text = answer.data.decode(errors="replace")
        if answer.status in BUSY:
            wait = answer.headers.get("Retry-After", "")
            message = _status(text).get("message") or text.strip()[:500]
            raise _Busy(answer.status, message, float(wait) if wait.isdigit() else 0)
        return answer.status, text


def _is_transient(error: BaseException) -> bool:
    import urllib3

    if isinstance(error, urllib3.exceptions.SSLError):
        return False
    return isinstance(error, _Busy | urllib3.exceptions.HTTPError)


def _wait(state: tenacity.RetryCallState) -> float:
    """Exponential with jitter, at least as long as the server asks for."""
    error = state.outcome.exception() if state.outcome else None
    retry_after_s = error.wait_s if isinstance(error, _Busy) else 0.0
    return max(retry_after_s, tenacity.wait_random_exponential(0.2, max=8)(state))


def _status(text: str) -> Object:
    """The Status object of a refusal, or an empty dict if the answer is anything else."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) and body.get("kind") == "Status" else {}


def _missing_permission(
    doing: str, kind: ResourceKind, verb: str, subresource: str, message: str
) -> str:
    resource = kind.plural + (f"/{subresource}" if subresource else "")
    rule = {"apiGroups": [kind.group], "resources": [resource], "verbs": [verb]}
    return (
        f"{doing}: not allowed (403): {message}. Bind a Role with this rule to that account: "
        f"{json.dumps(rule)}"
    )
