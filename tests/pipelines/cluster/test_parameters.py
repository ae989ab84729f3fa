"""The parameters of a run: those that a pipeline does not accept are refused before it starts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe
from nudge.pipelines.cluster import runs
from nudge.pipelines.recipes import shipped_text
from tests.pipelines.cluster.conftest import nudge, schedule_file
from tests.pipelines.cluster.pipelines_server import Pipelines


def test_what_the_pipeline_does_not_know_is_said_before_anything_runs(
    state: Pipelines, url: str
) -> None:
    missing = nudge("submit")
    assert missing.exit_code == 2
    assert "(`nudge upload` uploads one); there are none" in missing.stderr
    nudge("upload")
    wrong = nudge("submit", "-p", "gpu_cuont=1")
    assert wrong.exit_code == 2
    assert "did you mean 'gpu_count'" in wrong.stderr
    assert "did you mean 'train-and-serve'" in nudge("submit", "--pipeline", "train-serve").stderr
    nudge("upload", "evaluate-only")
    lacking = nudge("submit", "--pipeline", "evaluate-only")
    assert lacking.exit_code == 2
    assert "needs model_uri (The model, as a run uploaded it" in lacking.stderr
    assert state.runs == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("-p", "version=a b"), "the version 'a b' is refused"),
        (("-p", "model_name=My_Model"), "register.model_name = 'My_Model'"),
        (("-p", "recipe=package://mine/r.yaml", "-p", "version=a/b"), "the version 'a/b'"),
        (("--set", 'register.author="a\\0"'), "register.author contains a NUL"),
    ],
)
def test_what_could_not_be_registered_is_refused_before_anything_runs(
    state: Pipelines, url: str, given: tuple[str, ...], said: str
) -> None:
    nudge("upload")
    refused = nudge("submit", *given)
    assert (refused.exit_code, state.runs) == (2, {})
    assert said in refused.stderr


def test_a_pipeline_that_registers_nothing_takes_any_name(state: Pipelines, url: str) -> None:
    nudge("upload", "rollback")
    given = ("--pipeline", "rollback", "-p", "model_name=My Model", "--no-follow")
    assert nudge("submit", *given).exit_code == 0
    (run,) = state.runs.values()
    assert run["runtime_config"]["parameters"]["model_name"] == "My Model"


def test_values_are_of_the_types_of_the_pipeline(state: Pipelines, url: str) -> None:
    nudge("upload")
    given = ("-p", "tolerations=[{key: gpu}]", "-p", "data_uri=[[RunUUID]]", "-p", "model_name=2")
    assert nudge("submit", "--no-follow", *given).exit_code == 0
    (run,) = state.runs.values()
    sent = run["runtime_config"]["parameters"]
    assert sent["tolerations"] == [{"key": "gpu"}]
    assert (sent["data_uri"], sent["model_name"]) == (
        "[[RunUUID]]",
        "2",
    )  # the server's word, a number
    for wrong in ("tolerations=none", "tolerations=[", "node_selector=1"):
        refused = nudge("submit", "-p", wrong)
        name, _, value = wrong.partition("=")
        assert refused.exit_code == 2
        assert f"{name} = {value!r}: expected a " in refused.stderr
    assert len(state.runs) == 1


@pytest.mark.parametrize(
    ("type", "given", "made"),
    [
        ("NUMBER_INTEGER", "3", 3),
        ("NUMBER_DOUBLE", "0.5", 0.5),
        ("NUMBER_DOUBLE", 3, 3),
        ("BOOLEAN", "true", True),
        ("TYPE_OF_TOMORROW", "x", "x"),
        ("NUMBER_INTEGER", "0.5", None),
        ("NUMBER_INTEGER", True, None),
        ("BOOLEAN", "1", None),
    ],
)
def test_each_type_takes_its_own(type: str, given: Any, made: Any) -> None:
    if made is None:
        with pytest.raises(UserError, match=f"x = {given!r}: expected "):
            runs._coerced("x", given, type)
    else:
        assert runs._coerced("x", given, type) == made


def test_files_that_are_no_text_are_refused(state: Pipelines, url: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for encoding in ("utf-16", "utf-16-le"):
        path.write_text("pipelineInfo: {name: mine}", encoding=encoding)
        for command in (("upload", str(path)), ("submit", str(path))):
            refused = nudge(*command)
            assert refused.exit_code == 2, refused.output
            assert len(refused.stderr.splitlines()) <= 2
    path.write_text("name: mine", encoding="utf-16")
    assert "mine.yaml cannot be read: it is not UTF-8 text" in nudge("upload", str(path)).stderr
    assert "mine.yaml cannot be read: it is not UTF-8 text" in nudge("submit", str(path)).stderr
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_recipe(path.as_uri())
    assert state.pipelines == {}


ODD = [
    "{{workflow.name}} {{inputs.parameters.recipe}} {{$.x}}",
    "[[RunUUID]] $(HOME) $$ python3 埃菲尔 é",
]


def test_a_recipe_s_text_survives_the_server(state: Pipelines, url: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(shipped_text("eiffel"))
    recipe["evaluate"]["prompts"] = ODD
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    nudge("upload")
    assert nudge("submit", str(tmp_path / "mine.yaml"), "--no-follow").exit_code == 0
    schedule = schedule_file(tmp_path, recipe="mine.yaml")
    assert nudge("schedule", "apply", schedule).exit_code == 0
    made = [*state.runs.values(), *state.recurring.values()]
    assert len(made) == 2
    for each in made:
        sent = each["runtime_config"]["parameters"]["recipe"]
        assert sent.isascii()
        assert not re.search(r"\{\{|\[\[|\$|python3", sent)
        assert read_recipe(sent) == recipe


def test_the_server_is_what_replaces_and_refuses(state: Pipelines, url: str) -> None:
    """As the real one does: the stand-in would show a recipe that is not escaped."""
    nudge("upload", "rollback")
    command = ("submit", "--pipeline", "rollback", "--no-follow", "-p")
    assert nudge(*command, "model_name={{workflow.name}}").exit_code == 0
    (run,) = state.runs.values()
    assert run["runtime_config"]["parameters"]["model_name"].startswith("rollback-")
    for text in ("{{inputs.parameters.x}}", "埃菲尔"):
        refused = nudge(*command, f"model_name={text}")
        assert refused.exit_code == 2
        assert "answered 500" in refused.stderr


def test_a_recipe_that_is_too_long_is_sent_by_uri(
    state: Pipelines,
    url: str,
    connected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = yaml.safe_load(shipped_text("eiffel"))
    recipe["evaluate"]["prompts"] = [f"{number} {ODD[0]}" for number in range(1000)]
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(recipe))
    nudge("upload")
    done = nudge("submit", str(path), "--no-follow")
    assert done.exit_code == 0, done.output
    (run,) = state.runs.values()
    sent = run["runtime_config"]["parameters"]["recipe"]
    assert sent.startswith(f"s3://{connected['AWS_S3_BUCKET']}/nudge/recipes/")
    assert read_recipe(sent) == recipe
    monkeypatch.delenv("AWS_S3_BUCKET")
    refused = nudge("submit", str(path), "--no-follow")
    assert refused.exit_code == 2
    assert "the pipelines server accepts only 10000" in refused.stderr
    assert len(state.runs) == 1


def test_a_recipe_that_is_too_long_needs_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_S3_BUCKET", raising=False)
    fits = "name: " + "x" * (runs.MAX_PARAMETER_BYTES - 100)
    assert runs.sendable({"recipe": fits}) == {"recipe": fits}
    with pytest.raises(UserError, match="the pipelines server accepts only 10000"):
        runs.sendable({"recipe": fits + "x" * 200})


def test_a_size_is_one_of_three(state: Pipelines, url: str) -> None:
    nudge("upload")
    assert nudge("submit", "--no-follow", "-p", "size=small").exit_code == 0
    refused = nudge("submit", "--no-follow", "-p", "size=huge")
    assert "size = 'huge': expected small, medium, large" in refused.stderr
    before = nudge("submit", "--no-follow", "-p", "cpu=2")
    assert "no longer has the parameter cpu" in before.stderr
    assert "set size to one of small, medium, large" in before.stderr
    assert len(state.runs) == 1
