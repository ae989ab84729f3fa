"""The step `register`: a version in the Model Registry, with all that it was made of."""

import json
import os
from pathlib import Path
from typing import Any

from nudge.components.common.errors import UserError
from nudge.components.common.publish import read_manifest
from nudge.components.common.step import step
from nudge.components.register.settings import RegisterSettings

FORMAT_NAME, FORMAT_VERSION = "vLLM", "1"
"""The model format that OpenShift AI's serving of language models asks for."""


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
    version belongs to another run, or if the registry does not answer.
    """
    from model_registry.types import ModelArtifact, ModelVersion, RegisteredModel
    from nudge.components.common.progress import progress
    from nudge.components.common.registry import registry_url, with_registry
    from nudge.components.common.releases import archive_older

    results = read_manifest(evaluation, "nudge.evaluation", 1)
    facts = read_manifest(model / "nudge.json", "nudge.model", 1)
    properties = _properties(results, facts, run_id)
    reason = results["verdict"]["reason"]
    description = settings.description or f"{settings.model_name} {version}: {reason}"

    async def complete(client: Any) -> tuple[str, str]:
        entry = await client.get_registered_model_by_params(settings.model_name)
        if entry is None:
            fresh = RegisteredModel(name=settings.model_name, owner=settings.author)
            entry = await client.upsert_registered_model(fresh)
        found = await client.get_model_version_by_params(entry.id, version)
        if found is None:
            fresh_version = ModelVersion(
                name=version,
                author=settings.author,
                description=description,
                custom_properties=properties,
            )
            found = await client.upsert_model_version(fresh_version, entry.id)
        elif (found.custom_properties or {}).get("run_id") != run_id:
            raise UserError(
                f"{settings.model_name} {version} is registered already, by run "
                f"{(found.custom_properties or {}).get('run_id')!r}; give another version"
            )
        if not await client.get_model_version_artifacts(found.id):
            artifact = ModelArtifact(
                name=settings.model_name,
                uri=uri,
                model_format_name=FORMAT_NAME,
                model_format_version=FORMAT_VERSION,
                model_source_kind="kfp",
                model_source_class="pipelinerun",
                model_source_group=os.environ.get("NUDGE_NAMESPACE", "local"),
                model_source_id=run_id,
                model_source_name=run_id,
            )
            await client.upsert_model_version_artifact(artifact, found.id)
        return str(entry.id), str(found.id)

    url = registry_url(settings.registry_url)
    with progress("register", unit="requests"):
        try:
            model_id, version_id = with_registry(url, complete)
        except UserError as error:
            raise UserError(f"{error}\nthe model itself is safe at {uri}") from None
    archived: list[str] = []
    if settings.keep_versions:
        archived = with_registry(url, archive_older(settings.model_name, settings.keep_versions))
    return {
        "registered_model": settings.model_name,
        "registered_model_id": model_id,
        "version": version,
        "version_id": version_id,
        "registry": settings.registry_name,
        "archived": archived,
    }


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
        flat |= {f"{name}.{key}": value for key, value in metrics.items()}
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
