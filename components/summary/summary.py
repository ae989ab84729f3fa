"""The exit handler's page: a summary of the run, in Markdown."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from nudge.components.common.artifacts.approval import read_approval
from nudge.components.common.artifacts.cost import step_cost
from nudge.components.common.artifacts.schema import plain as plain_values
from nudge.components.common.clients.registry.lookup import (
    find_model,
    find_model_artifact,
    find_model_version,
)
from nudge.components.common.clients.registry.releases import NOT_PROMOTED, find_served
from nudge.components.common.core.environment import (
    NODE_ANNOTATION,
    PIPELINE_RUN_LABEL,
    in_pipeline_step,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.figures import amounts
from nudge.components.common.core.nothing_new import NOTHING_NEW, nothing_new
from nudge.components.common.core.progress import RESULTS, last_events
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.sanitize import visible
from nudge.components.common.core.say import say
from nudge.components.common.core.step import step
from nudge.components.common.spending.budget import OVER_BUDGET
from nudge.components.common.spending.prices import Prices
from nudge.components.common.spending.usage import NOTHING, Usage, of_earlier_steps, usage_of
from nudge.components.summary.notify import Notice, notify, shortened
from nudge.components.summary.settings import NotifySettings

NO_NOTIFICATIONS, NO_PRICES = NotifySettings(), Prices()
PATIENCE_S = 10.0
READ_LINES, LOG_LINES = 100, 15
"""Of each step's log: how many of the last lines are searched for results, and how many are sent
about a failed step."""


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
{% if used %}

| step | used |
|---|---|
{% for name, amount in used.items() %}
| {{ name }} | {{ amount }} |
{% endfor %}
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
    notifications: NotifySettings = NO_NOTIFICATIONS,
    prices: Prices = NO_PRICES,
) -> dict[str, Any]:
    """Write the page from the run's final state and the registry's record of its version.

    The exit handler cannot read the outputs of the steps, so it asks the registry. If the registry
    does not answer, the page says so: that does not mean that nothing was registered.
    ``notifications`` says whom to tell how the run ended (see `nudge.components.summary.notify`).
    The page also lists what each step used, and what that costs by ``prices``.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry

    failed, why, verdict = _local_events()
    usages = of_earlier_steps(reused=False)
    if (notifications.channels or prices.known) and in_pipeline_step():
        results, failed, why = _cluster_logs(run_id)
        verdict = _verdict(results)
        found_usages = {name: usage_of(each.get("usage")) for name, each in results.items()}
        usages = {name: each for name, each in found_usages.items() if each}
    # The engine names a task (its exit handler) after a success too.
    succeeded = state == "SUCCEEDED" and not (failed or why)
    task, error = ("", "") if succeeded else (failed or task, why or error)
    found: dict[str, Any] | None = None
    missing = verdict or f"the registry has no version {version} of {model_name} by this run"
    try:
        lookup = _lookup(model_name, version, run_id)
        found = with_registry(registry_url(registry), lookup, attempts_s=5)
    except UserError as problem:
        missing = f"it is unknown whether a version was registered ({problem})"
    values = {"run_id": run_id, "state": state, "task": task, "error": error}
    text = PAGE.render(
        **values,
        model_name=model_name,
        version=version,
        found=found,
        missing=missing,
        used=_amounts(usages, prices),
    )
    write_atomic(page, text)
    promoted = bool(found and found["endpoint"])
    ended: dict[str, Any] = {"state": state, "registered": bool(found), "promoted": promoted}
    notice = _notice(Notice("", run_id, model_name, version, "", ""), task, error, missing, found)
    if sent := notify(notifications, notice) if notice else {}:
        for channel, outcome in sent.items():
            say(f"notify: {channel}: {outcome}", stdout=True)
        ended["notified"] = sent
    return ended


def _notice(
    blank: Notice, task: str, error: str, missing: str, found: dict[str, Any] | None
) -> Notice | None:
    """What to tell people about the run; None for a night without new text."""
    name = f"{blank.model} {blank.version}"
    if OVER_BUDGET in error:
        text = error[error.index(OVER_BUDGET) + len(OVER_BUDGET) :]
        title = f"{blank.model}: the run {blank.run_id} is over budget"
        return replace(blank, event="over budget", title=title, text=shortened(text))
    if error or task:
        title = f"{blank.model}: the run {blank.run_id} failed" + (f" in {task}" if task else "")
        return replace(blank, event="failed", title=title, text=shortened(error))
    if found is None:
        if missing.startswith(NOTHING_NEW):
            return None
        title = f"{blank.model}: the run {blank.run_id} promoted nothing"
        return replace(blank, event="refused", title=title, text=shortened(missing))
    about = shortened(found["description"])
    if found["endpoint"]:
        return replace(
            blank, event="promoted", title=f"{name} is served", text=about,
            endpoint=found["endpoint"],
        )  # fmt: skip
    if found["awaiting"]:
        about = f"{about}\n{shortened(found['not_promoted'])}"
        return replace(
            blank, event="awaiting approval", title=f"{name} awaits approval", text=about
        )
    return replace(
        blank, event="refused", title=f"{name} is registered, not promoted",
        text=shortened(found["not_promoted"] or about),
    )  # fmt: skip


def _amounts(usages: dict[str, Usage], prices: Prices) -> dict[str, str]:
    """What each step and the whole run used, in words; empty if nothing is known."""
    currency = prices.currency if prices.known else ""
    together = {**usages, "together": sum(usages.values(), NOTHING)} if usages else {}
    return {
        name: amounts(plain_values(step_cost(usage, prices)), currency) or "nothing"
        for name, usage in together.items()
    }


def _verdict(results: dict[str, dict[str, Any]]) -> str:
    """Why the run has nothing to promote, by the steps' results; empty if it has something."""
    if results.get("ingest", {}).get("new") == 0:
        return nothing_new(results["ingest"])
    evaluated = results.get("evaluate", {})
    return "" if evaluated.get("promote", 1) else str(evaluated.get("reason", ""))


def _cluster_logs(run_id: str) -> tuple[dict[str, dict[str, Any]], str, str]:
    """The results of each step of a run on a cluster, the failed step, and its error.

    The error is the end of its log. What cannot be read is left empty.
    """
    from nudge.components.common.clients.kube import POD, connect

    results: dict[str, dict[str, Any]] = {}
    failed = why = ""
    try:
        cluster = connect(patience_s=PATIENCE_S)
        pods = cluster.list(POD, {PIPELINE_RUN_LABEL: run_id})
        # The newest attempt of a step counts.
        for pod in sorted(pods, key=lambda each: str(each["metadata"].get("creationTimestamp"))):
            lines = _log_end(cluster, pod)
            for line in lines:
                step_name, separator, values = line.partition(RESULTS)
                if separator:
                    results[step_name.strip()] = _json(values)
                    if failed == step_name.strip():
                        failed = why = ""
            if pod.get("status", {}).get("phase") == "Failed" and lines:
                failed, why = _step_of(pod), "\n".join(lines[-LOG_LINES:])
    except UserError as error:
        say(f"the logs of the run's steps cannot be read: {error}", stdout=True)
    return results, failed, why


def _log_end(cluster: Any, pod: dict[str, Any]) -> list[str]:
    try:
        text = cluster.log(pod["metadata"]["name"], "main", tailLines=str(READ_LINES))
    except UserError:  # it never started, or its node is gone
        return []
    return [line for line in text.splitlines() if line.strip()]


def _step_of(pod: dict[str, Any]) -> str:
    """The step of a pod: the engine names its node ``<workflow>.root....<step>.executor(0)``."""
    node = pod["metadata"].get("annotations", {}).get(NODE_ANNOTATION, "")
    parts = [re.sub(r"\(\d+\)$", "", part) for part in node.split(".")]
    return next((part for part in reversed(parts) if part not in ("executor", "")), "")


def _json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _local_events() -> tuple[str, str, str]:
    """The failed step, its error and the evaluation's reason not to promote, from local events.

    `kfp.local` reports only the exit handler as failed; a cluster reports the task and its message.
    """
    events = {name: event for name, event in last_events().items() if name != "summary"}
    verdict = _verdict({name: event.get("results", {}) for name, event in events.items()})
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
