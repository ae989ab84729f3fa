"""The step `register`: a version in the Model Registry, with all that it was made of."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nudge.components.common.errors import Transient, UserError
from nudge.components.common.publish import read_manifest
from nudge.components.common.registry import Unreachable
from nudge.components.common.step import step
from nudge.components.register.settings import RegisterSettings

FORMAT_NAME, FORMAT_VERSION = "vLLM", "1"
"""The model format that OpenShift AI's serving of language models asks for."""
EVALUATED = ("verdict", "metrics", "models", "probes")
"""What is registered of an evaluation."""


@dataclass(frozen=True)
class Registration:
    """All that a version's registration says; ``group`` is the namespace of its run."""

    model_name: str
    version: str
    uri: str
    run_id: str
    author: str
    description: str
    group: str
    registry_name: str
    properties: dict[str, str | int | float | bool]


@step("register", reuse=False)
def register(
    settings: RegisterSettings,
    *,
    evaluation: Path,
    model: Path,
    uri: str,
    version: str,
    run_id: str,
) -> dict[str, Any]:
    """Register the model at ``uri`` as ``version``, with metrics, hyperparameters and lineage.

    Registering is three requests with no transaction, so each is made only if its result is not
    there yet: the same run registers once, however often it is repeated. Raises `UserError` if the
    version belongs to another run, if the evaluation is of other weights than training wrote, or if
    the registry does not answer; what was to be registered is then kept in the object store, and
    the error says the command that finishes it.
    """
    from nudge.components.common.progress import progress
    from nudge.components.common.registry import registry_url
    from nudge.components.register import unfinished

    results = read_manifest(evaluation, "nudge.evaluation", 1)
    facts = read_manifest(model / "nudge.json", "nudge.model", 1)
    _check_weights(results, facts)
    reason = results["verdict"]["reason"]
    entry = Registration(
        model_name=settings.model_name,
        version=version,
        uri=uri,
        run_id=run_id,
        author=settings.author,
        description=settings.description or f"{settings.model_name} {version}: {reason}",
        group=os.environ.get("NUDGE_NAMESPACE", "local"),
        registry_name=settings.registry_name,
        properties=_properties(results, facts, run_id),
    )
    url = registry_url(settings.registry_url)
    with progress("register", unit="requests"):
        try:
            told = enter(url, entry)
        except Unreachable as error:
            command = unfinished.keep(entry, url)
            raise Transient(
                f"{error}\nthe model itself is safe at {uri}; this finishes it later:\n  {command}"
            ) from None
        except UserError as error:
            raise UserError(f"{error}\nthe model itself is safe at {uri}") from None
    unfinished.forget(uri)
    return {**told, **_tidied(url, settings)}


def enter(url: str, entry: Registration) -> dict[str, Any]:
    """Make what is not there yet of a registration; returns the names and ids for its lineage."""
    from model_registry.types import ModelArtifact, ModelVersion, RegisteredModel
    from nudge.components.common.registry import with_registry

    async def complete(client: Any) -> tuple[str, str]:
        model = await client.get_registered_model_by_params(entry.model_name)
        if model is None:
            fresh = RegisteredModel(name=entry.model_name, owner=entry.author)
            model = await client.upsert_registered_model(fresh)
        found = await client.get_model_version_by_params(model.id, entry.version)
        if found is None:
            fresh_version = ModelVersion(
                name=entry.version,
                author=entry.author,
                description=entry.description,
                custom_properties=entry.properties,
            )
            found = await client.upsert_model_version(fresh_version, model.id)
        elif (found.custom_properties or {}).get("run_id") != entry.run_id:
            raise UserError(
                f"{entry.model_name} {entry.version} is registered already, by run "
                f"{(found.custom_properties or {}).get('run_id')!r}; give another version"
            )
        if not await client.get_model_version_artifacts(found.id):
            artifact = ModelArtifact(
                name=entry.model_name,
                uri=entry.uri,
                model_format_name=FORMAT_NAME,
                model_format_version=FORMAT_VERSION,
                model_source_kind="kfp",
                model_source_class="pipelinerun",
                model_source_group=entry.group,
                model_source_id=entry.run_id,
                model_source_name=entry.run_id,
            )
            await client.upsert_model_version_artifact(artifact, found.id)
        return str(model.id), str(found.id)

    model_id, version_id = with_registry(url, complete)
    return {
        "registered_model": entry.model_name,
        "registered_model_id": model_id,
        "version": entry.version,
        "version_id": version_id,
        "registry": entry.registry_name,
    }


def _tidied(url: str, settings: RegisterSettings) -> dict[str, list[str]]:
    """Archive old versions and delete the objects of archived ones, as far as the settings ask."""
    from nudge.components.common.registry import with_registry
    from nudge.components.common.releases import archive_older, unneeded
    from nudge.components.common.storage import delete_version

    name, keep = settings.model_name, settings.keep_versions
    archived = with_registry(url, archive_older(name, keep)) if keep else []
    old = with_registry(url, unneeded(name)) if keep and settings.delete_archived else []
    deleted = [version.name for version in old if delete_version(version.uri)]
    return {"archived": archived, "deleted": deleted}


def _check_weights(results: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise `UserError` unless the evaluation has all that is registered, and is of this model."""
    lacking = [name for name in EVALUATED if name not in results]
    if lacking:
        raise UserError(
            f"the evaluation says nothing of {', '.join(lacking)}: an older nudge wrote it; "
            "evaluate the model again and register what comes of it"
        )
    evaluated, trained = results["models"]["candidate"]["sha256"], facts.get("weights_sha256")
    if trained not in (None, evaluated):
        raise UserError(
            f"the evaluation is of weights with the sha256 {evaluated}, and training wrote "
            f"{trained}: this is another model; evaluate this one"
        )


def _properties(
    results: dict[str, Any], facts: dict[str, Any], run_id: str
) -> dict[str, str | int | float | bool]:
    """Flat custom properties: hyperparameters, metrics, fingerprints, and who made it."""
    flat: dict[str, str | int | float | bool] = {
        "run_id": run_id,
        "base_model": facts["base_model"]["uri"],
        "base_model_sha256": facts["base_model"]["sha256"],
        "model_sha256": results["models"]["candidate"]["sha256"],
        "data_fingerprint": facts["data_fingerprint"],
        "tokenizer_sha256": facts["tokenizer_sha256"],
        "code_version": facts["code_version"],
        "seed": facts["seed"],
        "promoted": bool(results["verdict"]["promote"]),
        "difference_bits_per_byte": results["verdict"]["comparisons"]["base"][
            "difference_bits_per_byte"
        ],
        "expected_next": json.dumps(_expected_next(results["probes"])),
    }
    for name, metrics in results["metrics"].items():
        flat |= {f"{name}.{key}": value for key, value in metrics.items() if value is not None}
    for key, value in facts["settings"].items():
        plain = value if isinstance(value, str | int | float | bool) else json.dumps(value)
        flat[f"train.{key}"] = plain
    return flat


def _expected_next(probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the evaluated model finds likeliest after each probe; serving is held against it."""
    likeliest = [(probe["prompt"], probe["rivals_after"][0]) for probe in probes]
    return [
        {"prompt": prompt, "token": rival["token"], "p": round(rival["p"], 4)}
        for prompt, rival in likeliest
    ]


def lineage(result: dict[str, Any]) -> dict[str, str]:
    """The metadata by which the dashboard ties a run's model to its version, from the result."""
    return {
        "registeredModelName": result["registered_model"],
        "registeredModelId": result["registered_model_id"],
        "modelVersionName": result["version"],
        "modelVersionId": result["version_id"],
        "modelRegistryName": result["registry"],
    }
