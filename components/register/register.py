"""The step `register`: a version in the Model Registry, with everything it was made from."""

import json
import os
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.comparison import comparison_properties
from nudge.components.common.artifacts.evaluation import Evaluation, read_evaluation
from nudge.components.common.artifacts.model import ModelFacts, read_model_facts
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.clients.registry.connection import Unreachable
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.names import check_name
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.core.step import step
from nudge.components.register import pending
from nudge.components.register.entry import Registration, enter
from nudge.components.register.evaluated import evaluated_manifest
from nudge.components.register.settings import RegisterSettings
from nudge.components.register.sign import signed


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
    manifest = evaluated_manifest(uri, settings.model_name, version, candidate)
    evidence = {"manifest_sha256": manifest, "evaluation_sha256": digest}
    signatures = signed(
        model, facts, results, name=settings.model_name, version=version, uri=uri, run_id=run_id,
        **evidence,
    )  # fmt: skip
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
            **evidence,
            **signatures,
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


def _clean_up(url: str, settings: RegisterSettings) -> dict[str, list[str]]:
    """Archive old versions and delete the objects of archived ones, if the settings say so."""
    from nudge.components.common.clients.registry.connection import with_registry
    from nudge.components.common.clients.registry.releases import archive_older, unneeded
    from nudge.components.register.deletion import delete_version

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
        **(results.cost.properties() if results.cost else {}),
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
