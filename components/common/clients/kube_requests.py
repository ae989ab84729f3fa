"""Requests to the Kubernetes API: retries, and a sentence for each refusal.

They go through `kubernetes.dynamic.DynamicClient`, without its discovery: that would ask for
``/version``, ``/apis`` and each API group before the first request (four requests instead of one),
without retries, and keep the answers in a file in the temporary folder that later runs trust.

Requests are repeated while the server is busy or unreachable. A refusal becomes a `UserError` that
says what to do. No message or log contains a token or a CA.
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import tenacity

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.retries import BACKOFF, BUSY

Object = dict[str, Any]

PATIENCE_S = 60.0
"""How long to retry a busy or unreachable server, with back-off."""

TIMEOUTS_S = (10.0, 60.0)
"""For connecting, and for waiting for an answer."""

NO_TLS = 0
"""The status that the package reports if a certificate is not trusted."""

VERBS = {"server_side_apply": "patch"}
"""The verbs, in permissions and messages, of methods that have another name."""


@dataclass(frozen=True)
class ResourceKind:
    """A kind of object: ``trainer.kubeflow.org/v1alpha1``, ``TrainJob``, ``trainjobs``.

    ``needs`` names the software that adds the kind to a cluster.
    """

    api_version: str
    name: str
    plural: str
    needs: str = ""
    namespaced: bool = True

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]


class ResourceConflict(Exception):
    """The object exists already (``reason`` AlreadyExists) or has changed since it was read."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NoSuchKind(UserError):
    """The cluster serves no such kind of object."""


class _Busy(Exception):
    """An answer after which the same request may be repeated."""

    def __init__(self, status: int, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.status, self.wait_s = status, wait_s


class Requests:
    """Requests to the API server of ``api`` (a `kubernetes.client.ApiClient`), in one namespace."""

    def __init__(self, api: Any, namespace: str, patience_s: float = PATIENCE_S) -> None:
        from kubernetes.dynamic import DynamicClient

        self._api, self._namespace, self.patience_s = api, namespace, patience_s
        self._client = DynamicClient(api, discoverer=lambda *_: None)

    def json(self, kind: ResourceKind, method: str, name: str = "", **how: Any) -> Any:
        """An answer parsed as JSON, or None if the object does not exist; as in `text`."""
        text = self.text(kind, method, name, **how)
        return None if text is None else json.loads(text)

    def text(
        self,
        kind: ResourceKind,
        method: str,
        name: str = "",
        *,
        verb: str = "",
        subresource: str = "",
        missing_is_none: bool = False,
        patience_s: float | None = None,
        **how: Any,
    ) -> str | None:
        """The text of an answer, or None if the object does not exist.

        ``method`` is one of DynamicClient (get, create, patch, server_side_apply, delete), and
        ``how`` are its arguments. ``verb`` is for messages. With ``missing_is_none``, any 404 means
        None, not only the API server's own. Raises `ResourceConflict` for a 409,
        `Transient` if the server stays busy or unreachable for ``patience_s``, `NoSuchKind` if it
        does not serve the kind, and `UserError` for other refusals.
        """
        verb = verb or VERBS.get(method, method)
        doing = f"{verb} {kind.name}{f' {name}' if name else ''} in namespace {self._namespace}"
        if name and method != "create":
            how["name"] = quote(name, safe="")
        call = partial(getattr(self._client, method), self._resource(kind, subresource), **how)
        status, text = self._with_retries(
            doing, partial(call, namespace=quote(self._namespace)), patience_s
        )
        if status < 300:
            return text
        refusal = _status(text)
        reason, message = refusal.get("reason", ""), refusal.get("message") or text.strip()[:500]
        if status == 404 and (missing_is_none or reason == "NotFound"):
            return None
        if status == 404:
            needs = f"; it comes with {kind.needs}" if kind.needs else ""
            raise NoSuchKind(
                f"{doing}: this cluster has no kind {kind.name} ({kind.api_version}){needs}"
            )
        if status == 409:
            raise ResourceConflict(reason, message)
        if status == 403 and " cannot " in message:
            raise UserError(_missing_permission(doing, kind, verb, subresource, message))
        raise self._refusal(doing, status, message)

    def document(self, path: str) -> Object | None:
        """A document of the API server about itself, such as ``/apis/batch``; None after a 404."""
        doing = f"get {path}"
        status, text = self._with_retries(doing, partial(self._client.request, "get", path))
        if status < 300:
            return dict(json.loads(text))
        if status == 404:
            return None
        raise self._refusal(doing, status, _status(text).get("message") or text.strip()[:500])

    def token(self) -> str:
        """The bearer token that requests carry; empty without one (client certificates)."""
        headers: dict[str, str] = {}
        self._api.update_params_for_auth(headers, [], ["BearerToken"])
        return headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def _host(self) -> str:
        return str(self._api.configuration.host)

    def _resource(self, kind: ResourceKind, subresource: str) -> Any:
        from kubernetes.dynamic import Resource

        name = f"{kind.plural}/{subresource}"
        below = {"kind": kind.name, "name": name, "namespaced": kind.namespaced}
        found = Resource(
            prefix="apis" if kind.group else "api",
            group=kind.group,
            api_version=kind.api_version.rpartition("/")[2],
            kind=kind.name,
            name=kind.plural,
            namespaced=kind.namespaced,
            client=self._client,
            subresources={subresource: below} if subresource else {},
        )
        return found.subresources[subresource] if subresource else found

    def _refusal(self, doing: str, status: int, message: str) -> UserError:
        if status == 401:
            return UserError(
                f"{doing}: {self._host} does not accept this token (401); log in again, or check "
                "the service account"
            )
        return UserError(f"{doing}: {self._host} answered {status}: {message}")

    def _with_retries(
        self, doing: str, send: partial[Any], patience_s: float | None = None
    ) -> tuple[int, str]:
        """The status and the text of an answer, also of a refusal."""
        import urllib3

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience_s if patience_s is None else patience_s),
            wait=_wait,
            retry=tenacity.retry_if_exception_type((_Busy, urllib3.exceptions.HTTPError)),
            reraise=True,
        )
        try:
            status, text = retrying(_once, send)
        except _Busy as busy:
            raise Transient(f"{doing}: {self._host} answered {busy.status}: {busy}") from None
        except urllib3.exceptions.HTTPError as error:
            raise Transient(f"{doing}: the cluster {self._host} does not answer: {error}") from None
        if status == NO_TLS:
            raise UserError(
                f"{doing}: the certificate of {self._host} is not trusted: {text}; set its CA in "
                "the kubeconfig"
            )
        return status, text


def _once(send: partial[Any]) -> tuple[int, str]:
    """The status and text of an answer."""
    from kubernetes.client import ApiException

    try:
        answer = send(serialize=False, _request_timeout=TIMEOUTS_S)
    except ApiException as error:
        text = error.body or b""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        if error.status not in BUSY:
            return error.status, text or str(error.reason)
        wait = (error.headers or {}).get("Retry-After", "")
        message = _status(text).get("message") or text.strip()[:500]
        raise _Busy(error.status, message, float(wait) if wait.isdigit() else 0) from None
    return answer.status, answer.data.decode(errors="replace")


def _wait(state: tenacity.RetryCallState) -> float:
    """Exponential with jitter, at least as long as the server asks for."""
    error = state.outcome.exception() if state.outcome else None
    retry_after_s = error.wait_s if isinstance(error, _Busy) else 0.0
    return max(retry_after_s, BACKOFF(state))


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
