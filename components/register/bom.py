"""A version's bill of materials: CycloneDX 1.6 with a model card (ML-BOM)."""

import json
import math
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.evaluation import Evaluation
from nudge.components.common.artifacts.model import ModelFacts
from nudge.components.common.artifacts.model_files import model_files
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file


def ml_bom(
    model: Path, facts: ModelFacts, results: Evaluation, *, name: str, version: str, uri: str
) -> str:
    """The bill as JSON: the model with its files, its base model and its data.

    Raises `UserError` if the library is missing.
    """
    try:
        from cyclonedx.model import ExternalReference, ExternalReferenceType, HashType, XsUri
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError:
        raise UserError(
            "the bill of materials needs cyclonedx-python-lib: pip install 'nudge-lm[sign]'"
        ) from None

    def digest(sha256: str) -> list[Any]:
        return [HashType.from_composite_str(f"sha256:{sha256}")] if len(sha256) == 64 else []

    trained = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        version=version,
        bom_ref=f"model/{name}/{version}",
        hashes=digest(results.models["candidate"].sha256),
        external_references=[
            ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(uri))
        ],
        components=[
            Component(
                type=ComponentType.FILE,
                name=file,
                bom_ref=f"file/{file}",
                hashes=digest(sha256_file(path)),
            )
            for file, path in sorted(model_files(model).items())
        ],
    )
    data = Component(
        type=ComponentType.DATA,
        name="training data",
        bom_ref="data",
        hashes=digest(facts.data_fingerprint),
    )
    bill = Bom()
    bill.metadata.component = trained
    bill.components.add(data)
    needs = [data]
    if facts.base_model.uri:
        base = Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=facts.base_model.uri,
            bom_ref="base-model",
            hashes=digest(facts.base_model.sha256),
        )
        bill.components.add(base)
        needs.append(base)
    bill.register_dependency(trained, needs)
    body = json.loads(JsonV1Dot6(bill).output_as_string())
    body["metadata"]["component"]["modelCard"] = _card(facts, results)
    return json.dumps(body, sort_keys=True)


def _card(facts: ModelFacts, results: Evaluation) -> dict[str, Any]:
    """The model card of CycloneDX, which its Python library does not support yet."""
    figures = [
        {"type": f"{which} {key}", "value": f"{value:.6g}", "slice": "held-out text"}
        for which, metrics in results.metrics.items()
        for key in ("bits_per_byte", "token_perplexity")
        if (value := getattr(metrics, key)) is not None and math.isfinite(value)
    ]
    return {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-generation",
            "datasets": [{"ref": "data"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": figures},
        "properties": [
            {"name": "nudge:code_version", "value": facts.code_version},
            {"name": "nudge:mode", "value": str(facts.training.mode or "")},
            {"name": "nudge:verdict", "value": results.verdict.reason if results.verdict else ""},
        ],
    }
