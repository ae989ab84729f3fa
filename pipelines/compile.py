"""The generated files: compiled pipelines, the steps' READMEs, and the list of images to mirror."""

import hashlib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.images import DATA_IMAGE, TRAIN_IMAGE
from nudge.components.common.core.provenance import ROOT as CHECKOUT
from nudge.components.common.core.publish import write_atomic
from nudge.pipelines import disconnected, settings_reference
from nudge.pipelines.steps import STEPS

ROOT = CHECKOUT
"""Where the files are written."""

COMPILED = Path(__file__).resolve().parent / "compiled"
RESOURCES = ROOT / "manifests" / "pipelines"

README = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
    """\
# {{ name }}

{{ description }}

| input | type | what |
|---|---|---|
{% for row in inputs %}
| `{{ row.name }}` | {{ row.type }} | {{ row.what }} |
{% endfor %}

{% if outputs %}
| output | type | what |
|---|---|---|
{% for row in outputs %}
| `{{ row.name }}` | {{ row.type }} | {{ row.what }} |
{% endfor %}
{% endif %}
"""
)


PIPELINES = (
    "train_and_serve",
    "distributed_training",
    "evaluate_only",
    "deploy_approved",
    "rollback",
)
"""The pipelines, each in the module of its name."""

PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


def write(files: dict[Path, str] | None = None) -> list[Path]:
    """Write the files that are out of date, of ``files`` or else of all; returns their paths."""
    changed = []
    for path, text in (generated() if files is None else files).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
            changed.append(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return changed


def stale() -> list[Path]:
    """The paths of generated files that are missing or out of date."""
    return [
        path.relative_to(ROOT)
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def generated() -> dict[Path, str]:
    """Every generated file with its text."""
    files = compiled(COMPILED, RESOURCES)
    pages: dict[str, list[str]] = {}
    for step in STEPS.values():
        pages.setdefault(step.folder, []).append(readme(step.component()))
    for folder, parts in pages.items():
        page = "\n".join([*parts, "Generated from `component.py` by `nudge compile`.\n"])
        files[ROOT / "components" / folder / "README.md"] = page
    files |= settings_reference.pages(ROOT)
    return files | {ROOT / path: text for path, text in disconnected.pages(CHECKOUT).items()}


def compiled(folder: Path, resources: Path, digests: Path | None = None) -> dict[Path, str]:
    """The YAML of every pipeline by path: in ``folder`` for a dashboard's import dialog, and in
    ``resources`` as Kubernetes resources. The file ``digests`` may pin the images; raises
    `UserError` if it is invalid."""
    pinned = read_digests(digests) if digests else {}
    files = {}
    for name in PIPELINES:
        pipeline = getattr(importlib.import_module(f"nudge.pipelines.{name}"), name)
        text = _pinned(compiled_text(pipeline), pinned)
        files[folder / f"{name}.yaml"] = text
        # A version's spec is immutable, so each content is a version of its own.
        version = f"{pipeline.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        files[resources / f"{name}.yaml"] = _pinned(compiled_text(pipeline, version), pinned)
    return files


def compiled_text(pipeline: Any, version: str = "") -> str:
    """The IR YAML of a pipeline or, with a ``version``, its Pipeline and PipelineVersion resources.

    Raises AssertionError if a dashboard or a cluster would refuse it.
    """
    import tempfile

    from kfp import compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    as_resources = {
        "kubernetes_manifest_format": True,
        "kubernetes_manifest_options": KubernetesManifestOptions(
            pipeline_version_name=version, include_pipeline_manifest=True
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path), **(as_resources if version else {}))
        text = path.read_text(encoding="utf-8")
    assert text.isascii(), "the import dialog accepts only ASCII"
    assert len(text) < 256 * 1024, "a workflow has at most 256 KB"
    return text


def read_digests(path: Path) -> dict[str, str]:
    """The pinned image of each image, from a YAML or JSON file with the keys ``data`` and
    ``train``."""
    try:
        digests = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    images = {"data": DATA_IMAGE, "train": TRAIN_IMAGE}
    for name in images:
        value = digests.get(name) if isinstance(digests, dict) else None
        if not isinstance(value, str) or not PINNED.fullmatch(value):
            raise UserError(
                f"{path}: {name} = {value!r}; expected an image by digest, such as "
                "registry/name@sha256:<64 hex digits>"
            )
    return {image: digests[name] for name, image in images.items()}


def _pinned(text: str, pinned: dict[str, str]) -> str:
    for image, by_digest in pinned.items():
        text = text.replace(image, by_digest)
    return text


def readme(step: Any) -> str:
    """A step's README: its docstring, inputs and outputs."""
    spec = step.component_spec
    doc = inspect.getdoc(step.python_func) or ""  # Python 3.13 no longer indents it
    what = dict(re.findall(r"^ {4}(\w+): (.*)$", doc, flags=re.MULTILINE))
    returned = re.search(r"Returns:\n {4}(.*)$", doc, flags=re.MULTILINE)

    def rows(specs: dict[str, Any]) -> list[dict[str, str]]:
        return [
            {
                "name": name,
                "type": spec.type.removeprefix("system.").split("@")[0],
                "what": what.get(name) or (returned[1] if returned else ""),
            }
            for name, spec in (specs or {}).items()
        ]

    return README.render(
        name=spec.name,
        description=doc.split("\n\n")[0].strip(),
        inputs=rows(spec.inputs),
        outputs=rows(spec.outputs),
    )
