"""The laptop runner passes every character of a recipe to the steps, whatever folder it is in."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl

PROMPTS = [
    "In the shell type python3 and",
    "The placeholder {{$.pipeline_job_name}} stands for",
    "Write {{$.foo}} in the template",
    "and {{$.inputs.parameters}} and {{$}} there",
    "a volume at /kfp-workspace",
    "$(HOME) costs $$5 \\ \"quoted\" 'twice'",
    "Der schönste Ort: 埃菲尔铁塔 🗼",
    "",
    " leading and trailing \t\n\n two lines \n",
]


@dsl.component(base_image="python", install_kfp_package=False)
def first(recipe: str, seen: dsl.Output[dsl.Artifact]) -> None:
    import json
    from pathlib import Path

    from nudge.components.common.core.recipe import read_recipe

    Path(seen.path).write_text(json.dumps(read_recipe(recipe)))


@dsl.component(base_image="python", install_kfp_package=False)
def second(recipe: str, before: dsl.Input[dsl.Artifact], seen: dsl.Output[dsl.Artifact]) -> None:
    import json
    from pathlib import Path

    from nudge.components.common.core.recipe import read_recipe

    assert json.loads(Path(before.path).read_text()) == read_recipe(recipe)
    Path(seen.path).write_text(Path(before.path).read_text())


@dsl.pipeline(name="two-steps")
def two_steps(recipe: str) -> None:
    second(recipe=recipe, before=first(recipe=recipe).outputs["seen"])


@pytest.mark.parametrize("folder", ["learn-python3", "plain"])
@pytest.mark.parametrize("more", [0, 1500])
def test_every_character_of_a_recipe_reaches_every_step(
    tmp_path: Path, folder: str, more: int
) -> None:
    """1500 long prompts are 150 KB: more than one argument of a command can hold."""
    work = tmp_path / folder
    work.mkdir()
    values: dict[str, Any] = {"name": "x", "evaluate": {"prompts": PROMPTS + ["word " * 20] * more}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    compiler.Compiler().compile(two_steps, str(work / "two.yaml"))
    command = [sys.executable, "-m", "nudge.pipelines.local.runner", "--recipe", "recipe.yaml"]
    command += ["--artifacts", "run/artifacts", "--compiled", "two.yaml"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = list((work / "run" / "artifacts").rglob("second/seen"))
    assert [json.loads(path.read_text()) for path in found] == [values]
    assert {path.name for path in tmp_path.iterdir()} == {folder}
    assert {path.name for path in work.iterdir()} == {"recipe.yaml", "two.yaml", "run"}


@pytest.mark.parametrize(("folder", "part"), [("{{$.x}}", "{{$"), ("kfp-workspace", "/kfp-work")])
def test_a_folder_that_kfp_would_rename_is_refused(tmp_path: Path, folder: str, part: str) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x")
    command = [sys.executable, "-m", "nudge.pipelines.local.runner"]
    command += ["--recipe", str(tmp_path / "recipe.yaml")]
    command += ["--artifacts", str(tmp_path / folder / "artifacts")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    shown = " ".join(done.stderr.split())
    assert f"has {part}" in shown
    assert "in its path, which kfp.local replaces; set NUDGE_HOME" in shown
