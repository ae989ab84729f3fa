"""`nudge approve` and `nudge reject`: a person decides about a version that awaits approval."""

import functools
from typing import Any

import click

from nudge.components.common.core.environment import nudge_home
from nudge.pipelines.cli import connections, display
from nudge.pipelines.cli.connections import MODEL
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.release import RECIPE, TARGET, read_settings

REASON = click.option("--reason", default="", help="Why; the registry keeps it with the version.")


@click.command()
@click.argument("version", shell_complete=connections.complete_version)
@MODEL
@REASON
@RECIPE
@TARGET
@click.option(
    "--no-deploy",
    is_flag=True,
    help="Only record the approval. The pipeline `deploy-approved`, or this command without the "
    "option, serves the version.",
)
def approve(
    version: str, model: str, reason: str, recipe_name: str, target: str | None, no_deploy: bool
) -> None:
    """Approve VERSION, which awaits approval, and serve it.

    \b
    nudge models                       shows which versions await approval
    nudge approve v7                   approve it, start and test it, move the traffic
    nudge approve v7 --no-deploy       only record the approval, for the dashboard's pipeline

    The approval is for this evaluation of these files. It replaces no check: if another version has
    taken the traffic since the evaluation, the version is not served, and you need a new run.
    On a cluster the approval is an object of the namespace, and the API server attests who made it.
    """
    settings, name, version = _decide(version, model, "approved", reason, recipe_name, target)
    if no_deploy:
        echo(
            f"next: run the pipeline deploy-approved with model_name={name} and version={version}, "
            f"or `nudge approve {version} --model {name}`"
        )
        return
    from nudge.components.deploy.deploy import approved, serve_candidate

    note = functools.partial(display.stage, name)
    with approved(settings, name, version) as check:
        result = serve_candidate(settings, name, version, check, note)
    echo(f"{name}: {version} 100 % at {result['endpoint']}")


@click.command()
@click.argument("version", shell_complete=connections.complete_version)
@MODEL
@REASON
@RECIPE
@TARGET
def reject(version: str, model: str, reason: str, recipe_name: str, target: str | None) -> None:
    """Reject VERSION, which awaits approval: it is archived in the registry.

    \b
    nudge reject v7 --reason "it answers in the wrong language"
    """
    _decide(version, model, "rejected", reason, recipe_name, target)


def _decide(
    version: str, model: str, state: Any, reason: str, recipe_name: str, target: str | None
) -> tuple[Any, str, str]:
    """Record the decision and print it; returns the deploy settings, the model's name and the
    version's full name."""
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.components.deploy.deploy import decide
    from nudge.pipelines.local import history

    settings = read_settings(recipe_name, target)
    connections.use_registry_of(settings)
    with connections.registry() as ask:
        name = connections.model_name(ask, model)
        version = connections.version_name(ask, name, version)
        about = ask(find_version(name, version))
    connections.start()
    decision = decide(settings, name, version, state, reason)
    run = nudge_home() / "runs" / str(about.properties.get("run_id", "unknown"))
    if run.is_dir():
        history.note_decision(run, state, decision.by, decision.at)
    report = run / "report.html"
    lines = [
        f"{name} {version}: {state} by {decision.by} at {decision.at}",
        f"evidence: sha256 {decision.evidence}",
    ]
    lines += [f"report: {report}"] if report.is_file() else []
    echo("\n".join(lines))
    return settings, name, version
