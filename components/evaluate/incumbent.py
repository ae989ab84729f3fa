"""Find the version that users get now, which can be found, none or unknown."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from nudge.components.common.artifacts import model_files
from nudge.components.common.artifacts.evaluation import Incumbent
from nudge.components.common.clients.tls import tls_context
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.registered import CHECKED, expected

TIMEOUT_S = 10.0
ATTEMPTS = 4
"""Requests to an endpoint before it counts as not answering."""


def find_incumbent(model_name: str, registry_url: str = "") -> Incumbent:
    """Ask the registry which version of a model is served, and check that its endpoint answers.

    If the registry or the endpoint does not answer, the state is ``unknown``, never ``none``: the
    version that users have might be better than any candidate.
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
            f"not answer ({silent}); restore it with "
            f"`nudge promote {served.main} --model {model_name}`",
        )
    if version is None:
        return Incumbent("none")
    registered = expected(version)
    # A run that resumes after its promotion: the version it was compared with had all the traffic.
    shares = served.shares if version.name == served.main else {version.name: 100}
    return Incumbent(
        "found",
        version=version.name,
        uri=version.uri,
        sha256=registered["weights"],
        manifest_sha256=registered["manifest_sha256"],
        shares=dict(shares),
    )


def bring(
    incumbent: Incumbent, model_name: str = "", unverified: Sequence[str] = ()
) -> tuple[Incumbent, Path | None]:
    """The incumbent and its local folder; if it cannot be read completely, ``unknown`` and None.

    A model that was changed or exchanged since its registration is not the one that users get, and
    a worse one would let a worse candidate pass. So the folder is checked against its manifest, the
    manifest against the digest, model and version in the registry, and the weights against theirs.
    A URI without such a manifest is refused unless its scheme is in ``unverified``.
    """
    from nudge.components.common.models.base_model import local_model, model_sha256

    if incumbent.state != "found":
        return incumbent, None
    try:
        scheme = incumbent.uri.partition("://")[0]
        if scheme not in (*CHECKED, *unverified):
            raise UserError(
                f"it is registered as {incumbent.uri}, and nothing there can be compared with what "
                "was evaluated; expected s3:// or oci://, or the scheme in deploy.unverified"
            )
        folder = local_model(incumbent.uri, trained=False)
        if scheme in CHECKED:
            model_files.check(
                folder,
                manifest_sha256=incumbent.manifest_sha256,
                model=model_name,
                version=incumbent.version,
            )
        actual = model_sha256(folder)
        if incumbent.sha256 not in ("", actual):
            raise UserError(
                f"the weights at {incumbent.uri} have the sha256 {actual}, but the registry "
                f"says {incumbent.sha256}: they were changed after registration"
            )
    except (UserError, model_files.Tampered) as error:
        why = f"the candidate cannot be compared with {incumbent.version}: {error}"
        return dataclasses.replace(incumbent, state="unknown", why=why), None
    return incumbent, folder


def _silent(endpoint: str) -> str:
    """Why an endpoint does not answer, or an empty string if it does.

    A request for a key is an answer; a gateway's 5xx or 404 is not, and is retried for a while.
    """
    import httpx
    import tenacity

    from nudge.components.common.core.retries import BACKOFF

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
            wait=BACKOFF,
            retry=tenacity.retry_if_result(bool),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )(reached)
    )
