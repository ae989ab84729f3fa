"""A signed version: other tools accept it, and whatever is changed afterwards is refused."""

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.evaluation import (
    EvaluatedModel,
    Evaluation,
    Metrics,
    Verdict,
)
from nudge.components.common.artifacts.model import BaseModel, ModelFacts
from nudge.components.common.artifacts.signatures import BOM, PROVENANCE, SIGNATURE
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.verify import check_version
from nudge.components.register.sign import signed
from tests.components.register.keys import make_key

pytest.importorskip("model_signing")
pytestmark = pytest.mark.long  # `make test-long` installs the extra `sign`

FACTS = ModelFacts(
    base_model=BaseModel(uri="hf://base/model", sha256="b" * 64),
    data_fingerprint="d" * 64,
    tokenizer_sha256="e" * 64,
    settings={"epochs": 1.0},
    seed=1,
    code_version="0.2.0+src.1",
)
RESULTS = Evaluation(
    verdict=Verdict(promote=True, reason="0.1 better", difference_bits_per_byte=-0.1),
    metrics={"candidate": Metrics(bits_per_byte=1.2), "base": Metrics(bits_per_byte=1.3)},
    models={"candidate": EvaluatedModel(uri="", sha256="a" * 64)},
    created="2026-01-01T00:00:00+00:00",
)
NAMED = {
    "name": "m", "version": "v1", "uri": "s3://nudge/models/m/v1", "run_id": "run-1",
    "manifest_sha256": "c" * 64, "evaluation_sha256": "f" * 64,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter_config.json"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    private, public = make_key(tmp_path, "own", "canary7Qe1Password")
    monkeypatch.setenv("NUDGE_SIGNING_KEY", str(private))
    monkeypatch.setenv("NUDGE_SIGNING_PASSWORD", "canary7Qe1Password")
    monkeypatch.setenv("AWS_S3_BUCKET", "nudge")
    return private, public


def version(properties: dict[str, str], **changes: Any) -> Version:
    evidence = {key: NAMED[key] for key in ("manifest_sha256", "evaluation_sha256")}
    found = Version("m", "v1", "1", "2", NAMED["uri"], False, 0, {**evidence, **properties})
    return replace(found, **changes)


def test_what_is_signed_is_served_and_what_is_not_is_refused(
    model: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = signed(model, FACTS, RESULTS, **NAMED)
    settings = DeploySettings(public_key=keys[1].read_text())
    check_version(version(made), settings)
    check_version(version(made), DeploySettings(public_key=str(keys[1])))
    check_version(version({}), DeploySettings())  # no key is set, so nothing is checked
    with pytest.raises(UserError, match="does not verify with deploy.public_key: the version is n"):
        check_version(version({}), settings)
    _, foreign = make_key(tmp_path, "foreign")
    monkeypatch.setenv("NUDGE_PUBLIC_KEY", str(foreign))
    for recipe in (settings, DeploySettings()):  # a recipe cannot remove the operator's key
        with pytest.raises(UserError, match="NUDGE_PUBLIC_KEY: the key did not sign it"):
            check_version(version(made), recipe)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"manifest_sha256": "0" * 64}, "the files' manifest has the sha256 0000"),
        ({"manifest_sha256": ""}, "the sha256 unknown in the registry"),
        ({"evaluation_sha256": "0" * 64}, "the evaluation in the registry is not the one"),
        ({BOM: "{}"}, "the bom in the registry is not the one"),
        ({SIGNATURE: "{}"}, "the signature in the registry is not the one"),
        ({PROVENANCE: "{"}, "is not JSON"),
        ({PROVENANCE: "{}"}, "not a signed envelope"),
        ({PROVENANCE: ""}, "the version is not signed"),
    ],
)
def test_a_change_in_the_registry_is_refused(
    model: Path, keys: tuple[Path, Path], change: dict[str, str], why: str
) -> None:
    settings = DeploySettings(public_key=str(keys[1]))
    made = {**signed(model, FACTS, RESULTS, **NAMED), **change}
    with pytest.raises(UserError, match=why):
        check_version(version(made), settings)


def test_the_evidence_of_another_version_does_not_do(model: Path, keys: tuple[Path, Path]) -> None:
    made = signed(model, FACTS, RESULTS, **{**NAMED, "version": "v0"})
    with pytest.raises(UserError, match="the signature is of m/v0, not of m/v1"):
        check_version(version(made), DeploySettings(public_key=str(keys[1])))


def test_a_statement_that_somebody_edited_is_refused(model: Path, keys: tuple[Path, Path]) -> None:
    made = signed(model, FACTS, RESULTS, **NAMED)
    envelope = json.loads(made[PROVENANCE])
    payload = base64.b64decode(envelope["payload"]).replace(b"0.1 better", b"9.9 better")
    envelope["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(UserError, match="the key did not sign it"):
        check_version(
            version({**made, PROVENANCE: json.dumps(envelope)}),
            DeploySettings(public_key=str(keys[1])),
        )


def test_the_tools_of_the_formats_accept_the_evidence(
    model: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """OMS: `model_signing` verifies a downloaded folder, with the upload's own manifest in it.
    CycloneDX: the bill follows the schema of 1.6. in-toto: the statement has every digest."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    made = signed(model, FACTS, RESULTS, **NAMED)
    signature = tmp_path / "model.sig"
    signature.write_text(made[SIGNATURE])
    (model / "manifest.json").write_text("{}")
    command = [
        *(sys.executable, "-m", "model_signing", "verify", "key", str(model)),
        *("--signature", str(signature), "--public_key", str(keys[1])),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    (model / "model.safetensors").write_text("other weights")
    assert subprocess.run(command, capture_output=True, timeout=120).returncode != 0
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made[BOM]) is None
    bill = json.loads(made[BOM])
    assert bill["metadata"]["component"]["type"] == "machine-learning-model"
    assert {each["bom-ref"] for each in bill["components"]} == {"data", "base-model"}
    statement = json.loads(base64.b64decode(json.loads(made[PROVENANCE])["payload"]))
    assert statement["subject"][0]["digest"] == {"sha256": "c" * 64}
    build = statement["predicate"]["buildDefinition"]
    materials = {each["name"]: each for each in build["resolvedDependencies"]}
    assert materials["base-model"]["digest"] == {"sha256": "b" * 64}
    assert materials["data"]["digest"] == {"sha256": "d" * 64}
    assert materials["code"]["annotations"] == {"version": "0.2.0+src.1"}
    assert build["internalParameters"]["gate"]["reason"] == "0.1 better"


def test_a_key_that_cannot_be_used_says_so_without_its_content(
    model: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_SIGNING_PASSWORD", "canary7Qe1Wrong")
    with pytest.raises(UserError, match="NUDGE_SIGNING_PASSWORD is not its password") as caught:
        signed(model, FACTS, RESULTS, **NAMED)
    assert "canary" not in str(caught.value)
    monkeypatch.setenv("NUDGE_SIGNING_KEY", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="missing cannot be read: No such file"):
        signed(model, FACTS, RESULTS, **NAMED)
    monkeypatch.delenv("NUDGE_SIGNING_KEY")
    assert signed(model, FACTS, RESULTS, **NAMED) == {}
    with pytest.raises(UserError, match="is not a PEM public key"):
        check_version(version({}), DeploySettings(public_key="-----BEGIN nothing"))


def test_only_steps_get_the_signing_key(keys: tuple[Path, Path]) -> None:
    from nudge.components.common.local.child_environment import (
        MODEL_CHILD,
        RANK_CHILD,
        STEP_CHILD,
        child_environment,
    )

    assert "NUDGE_SIGNING_PASSWORD" in child_environment(STEP_CHILD)
    for prefixes in (RANK_CHILD, MODEL_CHILD, ()):
        assert "NUDGE_SIGNING_PASSWORD" not in child_environment(prefixes)
