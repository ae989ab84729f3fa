"""The step `register`: a version in the Model Registry, with everything it was made from."""

import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.comparison import RECORD, comparison_properties
from nudge.components.common.artifacts.evaluation import Evaluation, read_evaluation
from nudge.components.common.artifacts.model import ModelFacts, read_model_facts
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.clients.registry.connection import Unreachable
from nudge.components.common.clients.registry.lookup import (
    find_model,
    find_model_artifact,
    find_model_version,
    list_model_versions,
    list_models,
)
from nudge.components.common.clients.registry.names import refuse_confusable
from nudge.components.common.clients.registry.values import read_properties, storable
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.names import check_name
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.core.step import step
from nudge.components.register.evaluated import evaluated_manifest
from nudge.components.register.settings import RegisterSettings

FORMAT_NAME, FORMAT_VERSION = "vLLM", "1"
"""The model format that OpenShift AI expects for serving language models."""


@dataclass(frozen=True)
class Registration:
    """Everything that is registered about a version; ``group`` is the namespace of its run."""

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
    evaluation_sha256: str = "",
) -> dict[str, Any]:
    """Register the model at ``uri`` as ``version``, with metrics, hyperparameters and lineage.

    A registration takes three requests and the registry has no transactions, so each request is
    sent only if its result is missing. A run therefore registers once, however often it is
    repeated. ``evaluation_sha256`` is the digest that `evaluate` returned; empty compares nothing.

    Raises `UserError` if the version belongs to another run, if the evaluation was changed, is of
    other weights than training wrote or of other files than were uploaded, or if the registry does
    not answer. In the last case the registration is kept in the object store, and the error has the
    command that finishes it.
    """
    from nudge.components.common.clients.registry.connection import registry_url
    from nudge.components.common.core.progress import progress
    from nudge.components.register import pending

    check_name("the model", settings.model_name)
    check_name("the version", version)
    digest = sha256_file(evaluation)
    if evaluation_sha256 not in ("", digest):
        raise UserError(
            f"the evaluation has the sha256 {digest}, but `evaluate` wrote one with "
            f"{evaluation_sha256}: somebody changed it in the pipeline's artifact store; run again"
        )
    results, facts = read_evaluation(evaluation), read_model_facts(model)
    _check_evaluated(results, facts)
    assert results.verdict is not None
    reason = results.verdict.reason
    candidate = results.models["candidate"]
    entry = Registration(
        model_name=settings.model_name,
        version=version,
        uri=uri,
        run_id=run_id,
        author=settings.author,
        description=settings.description or f"{settings.model_name} {version}: {reason}",
        group=os.environ.get("NUDGE_NAMESPACE", "local"),
        registry_name=settings.registry_name,
        properties={
            **_properties(results, facts, run_id),
            "manifest_sha256": evaluated_manifest(uri, settings.model_name, version, candidate),
            "evaluation_sha256": digest,
        },
    )
    url = registry_url(settings.registry_url)
    with progress("register", unit="requests"):
        try:
            registered = enter(url, entry)
        except Unreachable as error:
            command = pending.keep(entry, url)
            raise Transient(
                f"{error}\nthe model itself is safe at {uri}; to finish later, run:\n  {command}"
            ) from None
        except UserError as error:
            raise UserError(f"{error}\nthe model itself is safe at {uri}") from None
    pending.forget(uri)
    return {**registered, **_clean_up(url, settings)}


def enter(url: str, entry: Registration) -> dict[str, Any]:
    """Create the missing parts of a registration; returns the names and ids for its lineage."""
    from nudge.components.common.clients.registry.connection import with_registry
    from nudge.components.common.clients.registry.releases import note_properties

    async def complete(client: Any) -> tuple[str, str]:
        model = await _model(client, entry)
        found = await _version(client, model.id, entry)
        registered_by = read_properties(found.custom_properties).get("run_id")
        if registered_by != entry.run_id:
            raise UserError(
                f"{entry.model_name} {entry.version} is registered already, by run "
                f"{registered_by!r}; choose another version"
            )
        # A resumed run may have been compared with another incumbent this time.
        compared = {key: str(entry.properties[key]) for key in RECORD if key in entry.properties}
        known = found.custom_properties or {}
        if any(known.get(key) != value for key, value in compared.items()):
            await note_properties(str(found.id), compared)(client)
        await _artifact(client, found.id, entry)
        return str(model.id), str(found.id)

    model_id, version_id = with_registry(url, complete)
    return {
        "registered_model": entry.model_name,
        "registered_model_id": model_id,
        "version": entry.version,
        "version_id": version_id,
        "registry": entry.registry_name,
    }


async def _model(client: Any, entry: Registration) -> Any:
    from model_registry.types import RegisteredModel

    async def create() -> Any:
        existing = [model.name for model in await list_models(client)]
        refuse_confusable("model", entry.model_name, existing)
        return await client.upsert_registered_model(
            RegisteredModel(name=entry.model_name, owner=entry.author)
        )

    return await _find_or_create(
        f"model {entry.model_name!r}", lambda: find_model(client, entry.model_name), create
    )


async def _version(client: Any, model_id: str, entry: Registration) -> Any:
    from model_registry.types import ModelVersion

    async def create() -> Any:
        existing = [version.name for version in await list_model_versions(client, model_id)]
        refuse_confusable("version", entry.version, existing)
        fresh = ModelVersion(
            name=entry.version,
            author=entry.author,
            description=entry.description,
            custom_properties=storable(entry.properties),
        )
        return await client.upsert_model_version(fresh, model_id)

    return await _find_or_create(
        f"version {entry.version!r}",
        lambda: find_model_version(client, model_id, entry.version),
        create,
    )


async def _artifact(client: Any, version_id: str, entry: Registration) -> Any:
    from model_registry.types import ModelArtifact

    async def create() -> Any:
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
        return await client.upsert_model_version_artifact(artifact, version_id)

    return await _find_or_create(
        f"artifact {entry.model_name!r}",
        lambda: find_model_artifact(client, version_id, entry.model_name),
        create,
    )


async def _find_or_create(
    what: str, find: Callable[[], Awaitable[Any]], create: Callable[[], Awaitable[Any]]
) -> Any:
    """The result of ``find``, else of ``create``; another process may be creating the same."""
    from mr_openapi.exceptions import ConflictException

    found = await find()
    if found is None:
        try:
            return await create()
        except ConflictException as error:
            found = await find()
            if found is None:
                raise UserError(
                    f"the registry says that the {what} exists already ({error.body}), but lists "
                    "none with exactly this name; choose another name"
                ) from None
    return found


def _clean_up(url: str, settings: RegisterSettings) -> dict[str, list[str]]:
    """Archive old versions and delete the objects of archived ones, if the settings say so."""
    from nudge.components.common.clients.registry.connection import with_registry
    from nudge.components.common.clients.registry.releases import archive_older, unneeded
    from nudge.components.common.clients.storage import delete_version

    name, keep = settings.model_name, settings.keep_versions
    archived = with_registry(url, archive_older(name, keep)) if keep else []
    old = with_registry(url, unneeded(name)) if keep and settings.delete_archived else []
    deleted = [each.name for each in old if delete_version(each.uri, name, each.name)]
    return {"archived": archived, "deleted": deleted}


def _check_evaluated(results: Evaluation, facts: ModelFacts) -> None:
    """Raise `UserError` unless the evaluation has every registered part and is of this model."""
    missing = [name for name in ("verdict", "metrics") if not getattr(results, name)]
    missing += ["models"] * ("candidate" not in results.models)
    missing += ["probes"] * (results.probes is None)
    if missing:
        raise UserError(
            f"the evaluation has no {', '.join(missing)}: an older nudge wrote it; evaluate the "
            "model again and register that evaluation"
        )
    evaluated, trained = results.models["candidate"].sha256, facts.weights_sha256
    if trained not in (None, evaluated):
        raise UserError(
            f"the evaluation is of weights with the sha256 {evaluated}, but training wrote "
            f"{trained}: this is another model; evaluate this one"
        )


def _properties(
    results: Evaluation, facts: ModelFacts, run_id: str
) -> dict[str, str | int | float | bool]:
    """Flat custom properties: hyperparameters, metrics, fingerprints, and the run."""
    verdict = results.verdict
    assert verdict is not None
    flat: dict[str, str | int | float | bool | None] = {
        "run_id": run_id,
        "base_model": facts.base_model.uri,
        "base_model_sha256": facts.base_model.sha256,
        "model_sha256": results.models["candidate"].sha256,
        "data_fingerprint": facts.data_fingerprint,
        "tokenizer_sha256": facts.tokenizer_sha256,
        "code_version": facts.code_version,
        "seed": facts.seed,
        "promoted": verdict.promote,
        "difference_bits_per_byte": verdict.comparisons["base"].difference_bits_per_byte,
        "expected_next": json.dumps(_expected_next(results)),
        "chat": True if facts.chat else None,
        **comparison_properties(results.incumbent),
    }
    for name, metrics in results.metrics.items():
        flat |= {f"{name}.{key}": value for key, value in plain(metrics).items()}
    for key, value in facts.settings.items():
        scalar = isinstance(value, str | int | float | bool)
        flat[f"train.{key}"] = value if scalar else json.dumps(value)
    return {key: value for key, value in flat.items() if value is not None}


MAX_PROMPT = 300
"""Characters of a question that the registry stores."""


def _expected_next(results: Evaluation) -> list[dict[str, Any]]:
    """The evaluated model's likeliest token after each probe, which the served model must match; of
    a chat model without probes, the first token of each short question's answer."""
    expected: list[dict[str, Any]] = [
        {"prompt": probe.prompt, "messages": probe.messages, "token": rival.token, "p": rival.p}
        for probe in results.probes or ()
        for rival in probe.rivals_after[:1]
    ]
    if not expected:
        expected = [
            {"prompt": s.prompt, "messages": s.messages, "token": s.first_token, "p": s.p_first}
            for s in results.samples
            if s.messages and len(s.prompt) <= MAX_PROMPT
        ]
    return [
        {key: value for key, value in each.items() if value is not None}
        | {"p": round(each["p"], 4)}
        for each in expected
        if each["p"] is not None
    ]


def lineage(result: dict[str, Any]) -> dict[str, str]:
    """The metadata with which the dashboard links a run's model to its version."""
    return {
        "registeredModelName": result["registered_model"],
        "registeredModelId": result["registered_model_id"],
        "modelVersionName": result["version"],
        "modelVersionId": result["version_id"],
        "modelRegistryName": result["registry"],
    }
