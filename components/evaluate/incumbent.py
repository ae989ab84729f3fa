"""The version that users meet now: found, none, or not known; three different answers."""

import dataclasses
from pathlib import Path
from typing import Literal

from nudge.components.common.clients.tls import tls_context
from nudge.components.common.core.errors import UserError

TIMEOUT_S = 10.0
ATTEMPTS = 4
"""How often an endpoint is asked before it is called silent."""


@dataclasses.dataclass(frozen=True)
class Incumbent:
    """``why`` says, of an ``unknown`` one, what could not be asked."""

    state: Literal["found", "none", "unknown"]
    version: str = ""
    uri: str = ""
    sha256: str = ""
    """Of its weights, as the registry has it from the run that made it; empty if it has none."""
    why: str = ""
    shares: dict[str, int] = dataclasses.field(default_factory=dict)
    """Percent of the traffic by version when this was asked."""


def find_incumbent(model_name: str, registry_url: str = "") -> Incumbent:
    """Ask the registry what is served of a model, and the endpoint whether it answers.

    A registry or an endpoint that does not answer gives ``unknown``, never ``none``: what users
    have might be better than any candidate.
    """
    from nudge.components.common.clients.registry.connection import registry_url as known_url
    from nudge.components.common.clients.registry.connection import with_registry
    from nudge.components.common.clients.registry.releases import find_standing
    from nudge.components.common.core.provenance import this_run

    try:
        found = with_registry(known_url(registry_url), find_standing(model_name, this_run("")))
    except UserError as error:
        return Incumbent("unknown", why=str(error))
    if found is None:
        return Incumbent("none")
    served, version = found
    if silent := _silent(served.endpoint):
        return Incumbent(
            "unknown",
            version=served.main,
            why=f"{model_name} {served.main} should be served at {served.endpoint}, which does "
            f"not answer ({silent}); bring it back "
            f"(`nudge promote {served.main} --model {model_name}`)",
        )
    if version is None:
        return Incumbent("none")
    sha256 = str(version.properties.get("model_sha256", ""))
    # Of a run that goes on after it was promoted: what it was compared with had all the traffic.
    shares = served.shares if version.name == served.main else {version.name: 100}
    return Incumbent(
        "found", version=version.name, uri=version.uri, sha256=sha256, shares=dict(shares)
    )


def bring(incumbent: Incumbent) -> tuple[Incumbent, Path | None]:
    """The incumbent with its folder here; an ``unknown`` one with none if it cannot be had whole.

    A folder of an upload is held against the upload's manifest, and its weights against the hash in
    the registry: what was changed since is not what users meet.
    """
    from nudge.components.common.models.base_model import local_model, model_sha256

    if incumbent.state != "found":
        return incumbent, None
    try:
        folder = local_model(incumbent.uri)
        actual = model_sha256(folder)
        if incumbent.sha256 not in ("", actual):
            raise UserError(
                f"the weights at {incumbent.uri} have the sha256 {actual}, the registry says "
                f"{incumbent.sha256}: they were changed since they were registered"
            )
    except UserError as error:
        why = f"{incumbent.version} cannot be compared with: {error}"
        return dataclasses.replace(incumbent, state="unknown", why=why), None
    return incumbent, folder


def _silent(endpoint: str) -> str:
    """What came in the place of an answer, or nothing if a server is there.

    Asking for a key is an answer; a gateway's 5xx or 404 is none, asked again for a while.
    """
    import httpx
    import tenacity

    def reached() -> str:
        try:
            answer = httpx.get(f"{endpoint}/health", timeout=TIMEOUT_S, verify=tls_context())
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        status = answer.status_code
        return f"status {status}" if status >= 500 or status == 404 else ""

    return str(
        tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(0.2, max=3),
            retry=tenacity.retry_if_result(bool),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )(reached)
    )
