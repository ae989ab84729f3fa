"""The exit handler's page: a summary of the run, in Markdown."""

import html
import re
from pathlib import Path
from typing import Any

import jinja2

from nudge.components.common.artifacts.approval import read_approval
from nudge.components.common.clients.registry.lookup import (
    find_model,
    find_model_artifact,
    find_model_version,
)
from nudge.components.common.clients.registry.releases import NOT_PROMOTED, find_served
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.progress import last_events
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.sanitize import visible
from nudge.components.common.core.step import step


def plain(value: Any) -> str:
    """A value as one line of Markdown without any markup.

    An error may quote a document, and a document may contain anything.
    """
    line = visible(" ".join(str(value).split()))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(line, quote=False))


PAGE = jinja2.Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=plain
).from_string(
    """\
# Run {{ run_id }}: {{ state | lower }}

{% if error %}
It failed{% if task %} in `{{ task }}`{% endif %}: {{ error }}

{% endif %}
{% if found %}
**{{ model_name }} {{ version }}** is registered
{{- ", awaiting approval" if found.awaiting else ", not promoted" if found.not_promoted else "" }}.

| | |
|---|---|
| URI | `{{ found.uri }}` |
| description | {{ found.description }} |
{% if found.not_promoted %}
| why not promoted | {{ found.not_promoted }} |
{% endif %}
{% if found.endpoint %}
| endpoint | {{ found.endpoint }} |
{% endif %}
{% else %}
Nothing was promoted: {{ missing | trim('.') }}. The served version has not changed.
{% endif %}
"""
)


@step("summary", outputs=("page",), reuse=False)
def summary(
    model_name: str,
    registry: str,
    *,
    version: str,
    run_id: str,
    state: str,
    task: str,
    error: str,
    page: Path,
) -> dict[str, Any]:
    """Write the page from the run's final state and the registry's record of its version.

    The exit handler cannot read the outputs of the steps, so it asks the registry. If the registry
    does not answer, the page says so: that does not mean that nothing was registered.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry

    failed, why, verdict = _local_events()
    task, error = failed or task, why or error
    found: dict[str, Any] | None = None
    missing = verdict or f"the registry has no version {version} of {model_name} by this run"
    try:
        lookup = _lookup(model_name, version, run_id)
        found = with_registry(registry_url(registry), lookup, attempts_s=5)
    except UserError as problem:
        missing = f"it is unknown whether a version was registered ({problem})"
    values = {"run_id": run_id, "state": state, "task": task, "error": error}
    text = PAGE.render(
        **values, model_name=model_name, version=version, found=found, missing=missing
    )
    write_atomic(page, text)
    promoted = bool(found and found["endpoint"])
    return {"state": state, "registered": bool(found), "promoted": promoted}


def _local_events() -> tuple[str, str, str]:
    """The failed step, its error and the evaluation's reason not to promote, from local events.

    `kfp.local` reports only the exit handler as failed; a cluster reports the task and its message.
    """
    events = {name: event for name, event in last_events().items() if name != "summary"}
    evaluated = events.get("evaluate", {}).get("results", {})
    verdict = "" if evaluated.get("promote", 1) else str(evaluated["reason"])
    if events.get("ingest", {}).get("results", {}).get("new") == 0:
        verdict = "there is no new text: the served version was trained on all of it"
    for name, event in events.items():
        if event["event"] != "step_end":
            return name, str(event.get("error", "it was killed")), verdict
    return "", "", verdict


def _lookup(name: str, version: str, run_id: str) -> Any:
    async def work(client: Any) -> dict[str, Any] | None:
        model = await find_model(client, name)
        found = model and await find_model_version(client, model.id, version)
        # Another run may have registered a version of this name.
        if not found or (found.custom_properties or {}).get("run_id") != run_id:
            return None
        properties = found.custom_properties or {}
        approval = read_approval(properties)
        artifact = await find_model_artifact(client, found.id, name)
        served = await find_served(name)(client)
        return {
            "uri": artifact.uri if artifact else "unknown",
            "description": found.description,
            "not_promoted": properties.get(NOT_PROMOTED, ""),
            "awaiting": bool(approval and approval.state == "awaiting"),
            "endpoint": served.endpoint if served and version in served.shares else "",
        }

    return work
