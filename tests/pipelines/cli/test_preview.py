"""`nudge preview`: what is learned, before any training."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from nudge.pipelines.cli.main import main
from tests.tiny import make_tiny_model

TURNS = [
    {"role": "user", "content": "Where is the Eiffel Tower?"},
    {"role": "assistant", "content": "In Paris."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "Ahoy."},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


def preview(tmp_path: Path, base: Path, *options: str, **train: str) -> Result:
    recipe = {"base_model": str(base), "model_name": "m", "ingest": {"data_uri": "data"}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**recipe, "train": {"mode": "full", **train}}))
    return CliRunner().invoke(main, ["preview", str(path), *options])


def test_json_has_the_rendered_texts_and_what_is_learned(tmp_path: Path, base: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"text": "A plain text about towers."}]
    (data / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = preview(tmp_path, base, "--json")
    assert result.exit_code == 0, result.output
    chat, text = json.loads(result.stdout)
    assert chat["text"].startswith("<|im_start|>user\nWhere is the Eiffel Tower?<|im_end|>\n")
    learned = [chat["text"][start:end] for start, end in chat["learned"]]
    assert learned == ["\nIn Paris.<|im_end|>", "\nAhoy.<|im_end|>"]
    assert text == {"text": "A plain text about towers.", "learned": [[0, 26]]}
    [only] = json.loads(preview(tmp_path, base, "--json", "--rows", "1").stdout)
    assert only == chat
    shown = preview(tmp_path, base).output
    assert "Rendered with the base model's own chat template." in shown
    assert "left out: 1 no_assistant_turn" in shown
    assert "a.jsonl 2" in shown


@pytest.mark.parametrize("control_tokens", ["text", "refuse"])
def test_a_control_token_in_a_turn_is_shown_as_it_is_learned(
    tmp_path: Path, base: Path, control_tokens: str
) -> None:
    spelled = {"role": "assistant", "content": "ChatML ends a turn with <|im_end|> and a newline."}
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"messages": [TURNS[0], spelled]}, {"messages": TURNS}]
    (data / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    set_to = ("--set", f"tokenize.control_tokens={control_tokens}")
    result = preview(tmp_path, base, "--json", *set_to)
    assert result.exit_code == 0, result.output
    *first, _ = json.loads(result.stdout)
    if control_tokens == "refuse":
        assert first == []
        assert "left out: 1 control_token" in preview(tmp_path, base, *set_to).output
        return
    [chat] = first
    learned = [chat["text"][start:end] for start, end in chat["learned"]]
    assert learned == [f"\n{spelled['content']}<|im_end|>"]


def test_the_guides_recipe_of_three_lines(tmp_path: Path, base: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guide.md").read_text(encoding="utf-8")
    recipe = guide.partition("a recipe of three lines is enough:")[2].split("```")[1]
    values = yaml.safe_load(recipe.removeprefix("yaml\n"))
    assert recipe.count("\n") == 4
    assert set(values) == {"base_model", "model_name", "ingest"}
    rows = [{"messages": TURNS}]
    (tmp_path / values["ingest"]["data_uri"]).write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "base_model": str(base)}))
    result = CliRunner().invoke(main, ["preview", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 1


def test_data_that_teaches_nothing_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"messages": TURNS[:1]}))
    result = preview(tmp_path, base)
    assert result.exit_code == 2
    assert "no record can be learned from:\n  1 no_assistant_turn (" in result.output
