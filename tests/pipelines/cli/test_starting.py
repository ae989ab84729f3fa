"""The first minutes: `nudge init`, `nudge settings`, completion, and names that are cut short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.core.aliases import ALIASES, meant
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.pipelines.cli.connections import unique
from nudge.pipelines.cli.main import main
from nudge.pipelines.cli.settings import find
from nudge.pipelines.recipes import load
from nudge.pipelines.settings_reference import reference


def nudge(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


def test_init_writes_a_recipe_that_holds_out_enough(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "Meine Texte: alt"
    texts.mkdir()
    rows = [{"text": f"Document {n} is about river {n * 7} and its bridge."} for n in range(80)]
    (texts / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (texts / ".hidden.txt").write_text("no")
    monkeypatch.chdir(tmp_path)
    done = nudge("init", texts, "--base-model", tiny_model, "--into", "mine.yaml")
    written = Path("mine.yaml").read_text()
    assert "1 files (1 .jsonl)" in written
    assert "80 documents" in done.stdout
    assert "under a minute of training" in done.stdout
    assert "nudge run mine.yaml" in done.stdout
    recipe = load("mine.yaml")
    assert recipe.values["ingest"]["data_uri"] == str(texts)
    assert recipe.values["base_model"] == str(tiny_model)
    values = json.loads(nudge("ingest", "mine.yaml", "--json").stdout)
    assert values["documents"]["held_out"] >= MIN_DOCUMENTS
    again = nudge("init", texts, "--into", "mine.yaml", status=2)
    assert "--force replaces it" in again.stderr
    assert "is not a folder" in nudge("init", tmp_path / "nowhere", status=2).stderr


def test_init_quotes_what_yaml_would_read_as_something_else(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024").mkdir()
    for n in range(40):
        (Path("2024") / f"{n}.txt").write_text(f"yes: river {n * 7} has a bridge, #{n}.")
    (Path("2024") / "x.a\nseed: 99").write_text("")
    nudge("init", "2024", "--base-model", tiny_model)
    recipe = load("2024.yaml").values
    assert (recipe["name"], recipe["model_name"], recipe["seed"]) == ("2024", "2024", 1)
    assert recipe["evaluate"]["prompts"][0].startswith("yes: river ")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("lr", ["train.learning_rate"]),
        ("learning_rate", ["train.learning_rate"]),
        ("train.LearningRate", ["train.learning_rate"]),
        ("batchsize", ["train.batch_sequences"]),
        ("deploy.port", ["deploy.port"]),
        ("evaluate.guards", [f"evaluate.guards{e}" for e in (
            "", "[].name", "[].uri", "[].limit", "[].max_documents")]),
    ],
)  # fmt: skip
def test_settings_finds_a_key_by_name_and_by_meaning(name: str, keys: list[str]) -> None:
    assert [row.key for row in find(name)] == keys


def test_settings_explains_each_step_and_key() -> None:
    assert "train" in nudge("settings").stdout
    one = nudge("settings", "warmup_share").stdout
    assert "fraction from 0 to 1" in one
    assert "warmup_ratio" in one
    for section in reference():
        assert json.loads(nudge("settings", section, "--json").stdout)[0]["key"].startswith(section)
    assert "train.epochs" in nudge("settings", "train.epoch").stdout
    assert "did you mean 'train'" in nudge("settings", "trainn", status=2).stderr
    assert json.loads(nudge("settings", "--schema").stdout)["title"] == "nudge recipe"


def test_every_alias_belongs_to_a_setting_and_is_none_itself() -> None:
    keys = {row.key.rpartition(".")[2] for rows in reference().values() for row in rows}
    assert set(ALIASES) <= keys
    for section, rows in reference().items():
        own = {row.key.removeprefix(f"{section}.") for row in rows}
        for key in own & set(ALIASES):
            assert not set(ALIASES[key]) & own, (section, key)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=1e-4", "train.lr is not a setting; did you mean 'learning_rate'?"),
        ("train.per-device-train-batch-size=1", "did you mean 'micro_batch_sequences'?"),
        ("lr=1", "lr is not a section or shared value of a recipe; did you mean "
         "'train.learning_rate'?"),
        ("train.validation_share=0.2", "did you mean 'ingest.validation_share'?"),
        ("model=x", "did you mean 'base_model'?"),
        ("train.learnin_rate=1", "did you mean 'learning_rate'"),
    ],
)  # fmt: skip
def test_an_unknown_key_suggests_what_is_meant(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load("eiffel", [override])
    assert says in str(caught.value)


def test_short_words_suggest_nothing_by_chance() -> None:
    assert meant("xy", ["learning_rate", "lora_rank"]) == []
    assert meant("r", ["lora_rank", "seed"]) == ["lora_rank"]


VERSIONS = ["20261126-144205-ab12", "20261126-150000-ffc6", "20261127-000000-ff00"]


def test_the_beginning_or_the_end_of_a_name_is_enough() -> None:
    assert unique("ffc6", VERSIONS, "version") == VERSIONS[1]
    assert unique("20261127", VERSIONS, "version") == VERSIONS[2]
    assert unique(VERSIONS[0], [*VERSIONS, VERSIONS[0] + "-2"], "version") == VERSIONS[0]
    assert unique("nope", VERSIONS, "version") == "nope"
    with pytest.raises(UserError, match=r"'20261126' fits 2 versions .*ab12.*ffc6"):
        unique("20261126", VERSIONS, "version")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_settings_and_recipes(shell: str) -> None:
    assert "_NUDGE_COMPLETE" in nudge("completion", shell).stdout
    program = Path(sys.executable).parent / "nudge"
    words = {"run": ("nudge run eif", "2"), "settings": ("nudge settings train.learning_r", "2")}
    if shell != "bash":
        return
    for typed, position in words.values():
        environment = {
            **os.environ,
            "_NUDGE_COMPLETE": "bash_complete",
            "COMP_WORDS": typed,
            "COMP_CWORD": position,
        }
        done = subprocess.run([program], env=environment, capture_output=True, text=True)
        assert typed.split()[-1] in done.stdout, done.stderr
