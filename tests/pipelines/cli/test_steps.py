"""`nudge step` and `nudge ingest` on real, small inputs, and the tables behind the command."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nudge.components.common.core.recipe import SECTIONS
from nudge.pipelines.cli.main import COMMANDS, main
from nudge.pipelines.steps import ALONE, PIPELINE, SETTINGS, STEPS
from tests.tiny import make_tiny_model

TEXTS = [f"Document {number} is about river {number * 7} and its bridge." for number in range(60)]


def nudge(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": text}) for text in [*TEXTS, TEXTS[0]]]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows) + "\n")
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\nbase_model: file://{tmp_path / 'model'}\nmodel_name: mine\n"
        "ingest:\n  data_uri: texts.jsonl\n  validation_share: 0.5\n  min_characters: 1\n"
        "  near_duplicates: false\n  workers: 1\n"
    )
    return path


@pytest.mark.parametrize("command", [("ingest",), ("run", "--until", "ingest")])
def test_ingest_prints_one_object_for_scripts(
    command: tuple[str, ...], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    values = json.loads(nudge(*command, recipe, "--json").stdout)
    documents = values["documents"]
    assert (documents["read"], documents["kept"]) == (61, 60)
    assert 0 < documents["held_out"] < 60
    assert values["dropped"] == {"duplicate": 1}
    assert not (tmp_path / "home").exists()


def test_ingest_shows_what_was_dropped_and_keeps_it_on_request(
    recipe: Path, tmp_path: Path
) -> None:
    shown = nudge("ingest", recipe, "--into", tmp_path / "made").stdout
    rows = [line.split("│")[1:3] for line in shown.splitlines() if line.startswith("│")]
    table = {what.strip(): count.strip() for count, what in rows}
    assert (table["read"], table["kept"], table["dropped: duplicate"]) == ("61", "60", "1")
    assert (tmp_path / "made" / "corpus" / "manifest.json").is_file()
    assert "<html" in (tmp_path / "made" / "report.html").read_text()


def test_refused_text_ends_with_status_2_and_the_reason(recipe: Path) -> None:
    refused = nudge("ingest", recipe, "--set", "ingest.data_uri=nowhere.txt", "--json", status=2)
    assert refused.stdout == ""
    assert "nowhere.txt" in refused.stderr


def test_too_few_held_out_documents_are_reported_right_after_ingest(recipe: Path) -> None:
    few = ("ingest", recipe, "--set", "ingest.validation_share=0.05")
    refused = nudge(*few, "--json", status=2)
    assert "documents are held out, and with fewer than 16 nothing can be" in refused.stderr
    assert "ingest.allow_no_verdict: true" in refused.stderr
    allowed = nudge(*few, "--set", "ingest.allow_no_verdict=true", "--json")
    assert 0 < json.loads(allowed.stdout)["documents"]["held_out"] < 16


def test_each_step_runs_on_the_artifact_of_the_one_before(recipe: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    into = tmp_path / "made"
    assert "ingest: read 61" in nudge("step", "ingest", "--recipe", recipe, "--into", into).stdout
    arguments = ("step", "tokenize", "--recipe", recipe, "--corpus", into / "corpus")
    results = json.loads(nudge(*arguments, "--into", into, "--json").stdout)
    assert results["train_tokens"] > 0
    assert (into / "tokens" / "manifest.json").is_file()
    refused = nudge(*arguments, "--into", into, status=2)
    assert f"{into / 'tokens'} exists" in refused.stderr


def test_a_step_refuses_a_folder_that_is_no_artifact(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    into = tmp_path / "made"
    arguments = ("--recipe", recipe, "--corpus", tmp_path / "empty", "--into", into)
    assert "empty" in nudge("step", "tokenize", *arguments, status=2).stderr


def test_the_table_of_steps_names_what_exists() -> None:
    """Its inputs, values and outputs are the parameters of each step's function."""
    import inspect

    assert tuple(SETTINGS) == SECTIONS
    assert (
        *("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "summary"),
    ) == PIPELINE
    for step in STEPS.values():
        parameters = list(inspect.signature(step.plain_function()).parameters)
        assert set(step.outputs) <= set(parameters), step.name
        assert step.component().component_spec.name.replace("-", "_") == step.face
    for step in ALONE.values():
        parameters = list(inspect.signature(step.plain_function()).parameters)
        own = parameters[1:] if step.settings else parameters
        assert set(own) == {*step.inputs, *step.values, *step.outputs}, step.name


def test_each_command_exists_and_its_help_has_an_example_or_a_sentence() -> None:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None, name
        assert command.help, name
    shown = nudge("--help").stdout
    for name, listed in COMMANDS.items():
        assert f"  {name} " in shown
        assert listed.help in shown
