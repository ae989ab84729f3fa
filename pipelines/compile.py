"""The files that are made from code: compiled pipelines and the steps' READMEs."""

import re
from pathlib import Path
from typing import Any

import jinja2
from nudge.components.common.provenance import ROOT
from nudge.components.common.publish import write_atomic

COMPILED = Path(__file__).parent / "compiled"

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

Made from `component.py` by `nudge compile`.
"""
)


def write() -> list[Path]:
    """Write every file that is not current; returns those."""
    changed = []
    for path, text in made().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
            changed.append(path.relative_to(ROOT))
    return changed


def stale() -> list[Path]:
    """The files that are missing or differ from what the code makes."""
    return [
        path.relative_to(ROOT)
        for path, text in made().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def made() -> dict[Path, str]:
    """Every made file with its text."""
    from nudge.pipelines import train_and_serve as pipelines

    files = {COMPILED / "train_and_serve.yaml": compiled_text(pipelines.train_and_serve)}
    for name in (
        *("ingest", "tokenize", "train", "evaluate"),
        *("upload", "register", "deploy", "summary"),
    ):
        step = getattr(pipelines, name)
        files[ROOT / "components" / name / "README.md"] = readme(step)
    return files


def compiled_text(pipeline: Any) -> str:
    """The IR YAML of a pipeline; raises AssertionError if a dashboard would not take it."""
    import tempfile

    from kfp import compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        text = path.read_text(encoding="utf-8")
    assert text.isascii(), "the import box takes ASCII only"
    assert len(text) < 256 * 1024, "a workflow may hold 256 KB"
    return text


def readme(step: Any) -> str:
    """A step's README: its docstring, inputs and outputs."""
    spec = step.component_spec
    doc = step.python_func.__doc__ or ""
    what = dict(re.findall(r"^ {8}(\w+): (.*)$", doc, flags=re.MULTILINE))
    returned = re.search(r"Returns:\n {8}(.*)$", doc, flags=re.MULTILINE)

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
