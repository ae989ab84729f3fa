"""Sign a version if NUDGE_SIGNING_KEY is set: OMS signature, in-toto statement and ML-BOM."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.evaluation import Evaluation
from nudge.components.common.artifacts.model import ModelFacts
from nudge.components.common.artifacts.model_files import model_files
from nudge.components.common.artifacts.signatures import (
    BOM,
    PREDICATE_TYPE,
    PROVENANCE,
    SIGNATURE,
    STATEMENT_TYPE,
    sha256_text,
)
from nudge.components.common.core import dsse
from nudge.components.common.core.errors import UserError
from nudge.components.register.bom import ml_bom

KEY_VARIABLE, PASSWORD_VARIABLE = "NUDGE_SIGNING_KEY", "NUDGE_SIGNING_PASSWORD"
BUILD_TYPE = "https://nudge-lm.dev/train-and-serve/v1"


def signed(
    model: Path,
    facts: ModelFacts,
    results: Evaluation,
    *,
    name: str,
    version: str,
    uri: str,
    manifest_sha256: str,
    evaluation_sha256: str,
    run_id: str,
) -> dict[str, str]:
    """The properties that sign a version; empty without a key.

    ``model`` is the folder whose files were uploaded with the manifest ``manifest_sha256``. Raises
    `UserError` if the key cannot be used.
    """
    path = os.environ.get(KEY_VARIABLE, "")
    if not path:
        return {}
    if not manifest_sha256:
        raise UserError(
            f"{KEY_VARIABLE} is set, but {uri} has no manifest with the digests of its files, so "
            "there is nothing to sign"
        )
    password = os.environ.get(PASSWORD_VARIABLE, "")
    key = dsse.read_private_key(path, password)
    signature = _oms_signature(model, path, password)
    bom = ml_bom(model, facts, results, name=name, version=version, uri=uri)
    statement = _statement(
        facts, results, name=name, version=version, uri=uri, run_id=run_id,
        manifest_sha256=manifest_sha256,
        products={
            "evaluation": evaluation_sha256,
            "signature": sha256_text(signature),
            "bom": sha256_text(bom),
        },
    )  # fmt: skip
    envelope = dsse.sign(json.dumps(statement, sort_keys=True).encode(), key)
    return {SIGNATURE: signature, PROVENANCE: json.dumps(envelope), BOM: bom}


def _oms_signature(model: Path, key: str, password: str) -> str:
    """The bundle that `model_signing verify key` accepts for a downloaded folder."""
    try:
        from model_signing import hashing, signing
    except ImportError:
        raise UserError(
            f"{KEY_VARIABLE} is set, and signing needs model-signing: pip install 'nudge-lm[sign]'"
        ) from None
    listed = set(model_files(model))
    here = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    # The upload adds its manifest; other files were not uploaded.
    left_out = [*sorted(here - listed), "manifest.json"]
    hashes = hashing.Config().set_ignored_paths(paths=left_out, ignore_git_paths=True)
    config = signing.Config().set_hashing_config(hashes)
    # model-signing 1.1.1 annotates the password as str, but needs bytes.
    secret: Any = password.encode() if password else None
    config.use_elliptic_key_signer(private_key=Path(key), password=secret)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.sig"
        config.sign(model, target)
        return target.read_text(encoding="utf-8")


def _statement(
    facts: ModelFacts,
    results: Evaluation,
    *,
    name: str,
    version: str,
    uri: str,
    run_id: str,
    manifest_sha256: str,
    products: dict[str, str],
) -> dict[str, Any]:
    """An in-toto statement with SLSA provenance: what the version was made from, and its gate."""
    assert results.verdict is not None
    base = facts.base_model
    materials: list[dict[str, Any]] = [
        {"name": "data", "digest": {"sha256": facts.data_fingerprint}},
        {"name": "tokenizer", "digest": {"sha256": facts.tokenizer_sha256}},
        # Its version ends in the sha256 of the sources.
        {"name": "code", "annotations": {"version": facts.code_version}},
    ]
    if base.uri:
        materials.append({"name": "base-model", "uri": base.uri, "digest": {"sha256": base.sha256}})
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": f"{name}/{version}", "uri": uri, "digest": {"sha256": manifest_sha256}}
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"train": facts.settings},
                "internalParameters": {
                    "gate": {
                        "promote": results.verdict.promote,
                        "reason": results.verdict.reason,
                        "reference": results.verdict.reference,
                        "difference_bits_per_byte": results.verdict.difference_bits_per_byte,
                    }
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {"id": f"nudge {facts.code_version}"},
                "metadata": {"invocationId": run_id, "finishedOn": results.created},
                "byproducts": [
                    {"name": what, "digest": {"sha256": digest}}
                    for what, digest in products.items()
                ],
            },
        },
    }
