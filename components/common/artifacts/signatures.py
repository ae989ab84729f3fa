"""The signed evidence of a version: an OMS signature of its files, and an in-toto statement.

Both are custom properties of the version in the registry, so they follow it to another registry,
whatever store has its files. The statement says what the version was made from. It names the
digest of the upload's manifest, which lists the digest of every file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nudge.components.common.core.dsse import BadSignature, verify

SIGNATURE, PROVENANCE, BOM = "signature.oms", "signature.provenance", "signature.bom"
"""The properties with the OMS signature (a Sigstore bundle), the signed in-toto statement (a DSSE
envelope) and the CycloneDX ML-BOM, each as JSON."""
FILES = {SIGNATURE: "model.sig", PROVENANCE: "provenance.intoto.json", BOM: "bom.cdx.json"}
"""The file that each of them becomes for other tools."""
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
OMS_PREDICATE_TYPE = "https://model_signing/signature/v1.0"


def sha256_text(text: str) -> str:
    """Hex sha256 of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_signed(model: str, version: str, properties: Mapping[str, Any], key: Any) -> None:
    """Raise `BadSignature` unless ``key`` signed this version's files, evaluation and name.

    ``properties`` are the version's in the registry. The statement has to name the version, its
    manifest and its evaluation, and the OMS signature and the BOM that belong to it.
    """
    statement = verify(_json(properties, PROVENANCE), key)
    kinds = statement.get("_type"), statement.get("predicateType")
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise BadSignature(f"the signed statement is of another kind: {kinds}")
    subjects = {each.get("name"): each.get("digest", {}) for each in statement.get("subject", ())}
    name = f"{model}/{version}"
    if name not in subjects:
        raise BadSignature(f"the signature is of {', '.join(map(str, subjects))}, not of {name}")
    recorded = str(properties.get("manifest_sha256", ""))
    signed = str(subjects[name].get("sha256", ""))
    if not recorded or recorded != signed:
        raise BadSignature(
            f"the files' manifest has the sha256 {recorded or 'unknown'} in the registry, and "
            f"{signed or 'none'} was signed"
        )
    details = statement.get("predicate", {}).get("runDetails", {})
    products = {each["name"]: each["digest"]["sha256"] for each in details.get("byproducts", ())}
    present = {
        "evaluation": str(properties.get("evaluation_sha256", "")),
        "signature": sha256_text(str(properties.get(SIGNATURE, ""))),
        "bom": sha256_text(str(properties.get(BOM, ""))),
    }
    for what, digest in present.items():
        if products.get(what) != digest:
            raise BadSignature(f"the {what} in the registry is not the one that was signed")
    bundle = _json(properties, SIGNATURE)
    oms = verify(bundle.get("dsseEnvelope"), key)
    if oms.get("predicateType") != OMS_PREDICATE_TYPE:
        raise BadSignature("the OMS signature is of another kind")


def _json(properties: Mapping[str, Any], name: str) -> dict[str, Any]:
    text = properties.get(name)
    if not text:
        raise BadSignature("the version is not signed")
    try:
        found = json.loads(str(text))
    except ValueError:
        raise BadSignature(f"the property {name} is not JSON") from None
    if not isinstance(found, dict):
        raise BadSignature(f"the property {name} is not a JSON object")
    return found
