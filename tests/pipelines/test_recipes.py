"""Recipes: what ships is right, and what is wrong is said all at once, with the nearest names."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe, step_settings
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.recipes import load, settings_classes, shipped

OF_0_1 = sorted((Path(__file__).parent / "recipes_of_0_1").glob("*.yaml"))


def test_every_shipped_recipe_is_named_as_its_file_and_valid() -> None:
    assert set(shipped()) == {
        "chat", "eiffel", "many-nodes", "nightly", "one-gpu", "one-gpu-8b", "one-node-70b",
        "python-docs",
    }  # fmt: skip
    for name, title in shipped().items():
        assert load(name).name == name
        assert title


@pytest.mark.parametrize("name", [*shipped()])
def test_a_shipped_recipe_holds_out_enough_for_a_verdict(name: str, tmp_path: Path) -> None:
    text = load(name, ["ingest.only_new=false", "ingest.workers=1"]).text
    settings = step_settings(IngestSettings, "ingest", text)
    result = ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report")
    assert result["validation_documents"] >= MIN_DOCUMENTS


def test_overrides_reach_the_step_and_stay_in_the_text() -> None:
    recipe = load("eiffel", ["train.learning_rate=1e-5", "train.mode=full", "seed=9"])
    settings = step_settings(TrainSettings, "train", recipe.text)
    assert (settings.learning_rate, settings.mode, settings.seed) == (1e-5, "full", 9)
    assert yaml.safe_load(recipe.text) == recipe.values


def test_without_overrides_the_text_is_the_file_as_it_is() -> None:
    text = Path(__file__).parents[2].joinpath("pipelines/recipes/eiffel.yaml").read_text()
    assert load("eiffel").text == text


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(load("eiffel").text.replace("name: eiffel\n", ""))
    assert load(str(path)).name == "mine"
    with pytest.raises(UserError, match=r"no recipe file .*other\.yaml"):
        load(str(tmp_path / "other.yaml"))


RELATIVE: list[tuple[Any, Any]] = [
    ("texts", "{}/texts"),
    ("my texts", "{}/my texts"),
    ("texts/*.txt", "{}/texts/*.txt"),
    (["texts", "s3://b/x", "my texts"], ["{}/texts", "s3://b/x", "{}/my texts"]),
    ("texts my", ["{}/texts", "{}/my"]),
    ("texts\nhttps://x.example/a.txt", ["{}/texts", "https://x.example/a.txt"]),
    ("here", "here"),  # only in the current directory, as older versions read it
    ("both", "{}/both"),
    ("nowhere", "{}/nowhere"),
    ("/texts", "/texts"),
    ("~/texts", "~/texts"),
    ("hf://datasets/o/n", "hf://datasets/o/n"),
    ("'my texts' texts", "'my texts' texts"),
]


@pytest.mark.parametrize(("given", "meant"), RELATIVE)
def test_a_relative_path_is_relative_to_the_recipe(
    given: Any, meant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, current = tmp_path / "project", tmp_path / "current"
    for folder in (project / "texts", project / "my texts", project / "both", current / "both"):
        folder.mkdir(parents=True)
    (current / "here").mkdir()
    monkeypatch.chdir(current)
    meant = [m.format(project) for m in meant] if isinstance(meant, list) else meant.format(project)
    path = project / "mine.yaml"
    values = dict(load("eiffel").values)
    values["evaluate"] = {**values["evaluate"], "guards": [{"name": "x", "uri": given}]}
    is_one = isinstance(given, str) and "\n" not in given and isinstance(meant, str)
    if not is_one:
        del values["evaluate"]["guards"]
    for ingested in ({"data_uri": given}, {"mix": [{"name": "x", "weight": 1, "data_uri": given}]}):
        path.write_text(yaml.safe_dump({**values, "ingest": ingested}))
        found = load(str(path)).values
        assert found["ingest"].get("mix", [found["ingest"]])[0]["data_uri"] == meant
        if is_one and "'" not in given:
            assert found["evaluate"]["guards"][0]["uri"] == meant


def test_an_unknown_recipe_names_its_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe 'eifel' .*did you mean 'eiffel'\?"):
        load("eifel")


def test_all_problems_of_all_sections_are_said_at_once() -> None:
    wrong = [
        "train.learnin_rate=1",
        "ingest.split_seed=abc",
        "upload.targett=x",
        "evalute.margin=1",
    ]
    with pytest.raises(UserError) as caught:
        load("eiffel", wrong)
    text = str(caught.value)
    assert "train.learnin_rate is not a setting; did you mean 'learning_rate'" in text
    assert "ingest.split_seed = 'abc': input should be a valid integer" in text
    assert "upload.targett is not a setting; did you mean 'target'?" in text
    assert "evalute is not a section" in text
    assert "'evaluate'" in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.epochs={", "the value is not YAML"),
        ("train.epochs=-1", "train.epochs = -1: input should be greater than 0"),
        ("train.mode=lorra", "train.mode = 'lorra': input should be 'full', 'lora' or 'scratch'"),
        ("seed.of=1", "seed has no settings below it"),
        ("ingest.pii=drop", "would have no effect; set filters: [unicode, length, pii]"),
        ("base_model=", "base_model"),
    ],
)
def test_a_wrong_override_says_what_is_accepted(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load("eiffel", [override])
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words", "train: 3", "train: [1]"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        load(str(path))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("deploy.kserve.stop_old_frist=true", "did you mean 'stop_old_first'"),
        ("train.watch.promt=x", "did you mean 'prompt'"),
        ("train.cluster.noodes=3", "did you mean 'nodes'"),
        ("evaluate.guards=[{name: a, uri: b, limt: 1}]", "did you mean 'limit'"),
        ("evaluate.tasks=[{nam: quiz}]", "did you mean 'name'"),
        ("train.2=3", "known: activation_checkpointing, "),
    ],
)
def test_a_key_that_does_not_exist_has_neighbours_at_any_depth(override: str, says: str) -> None:
    with pytest.raises(UserError, match="is not a setting; ") as caught:
        load("eiffel", [override])
    assert says in str(caught.value)


def test_a_key_of_a_section_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base_model: a\n1: 2\ntrain: {on: 1}\n")
    with pytest.raises(UserError, match=r"(?s)1 is not a section.*train\.True is not a setting"):
        load(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\ningest: {}\ntrain: {}\ningest: {}\n", "'ingest' .* line 2 and line 4"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "'epochs' .* line 2 and line 3"),
        ("train: {epochs: 1, epochs: 2}", "'epochs' .* line 1 and line 1"),
        ("", "the recipe is empty"),
        ("# to be written\n", "the recipe is empty"),
    ],
)
def test_a_doubled_key_and_an_empty_file_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        load(str(path))


def test_a_merge_of_mappings_is_no_doubled_key() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, x: 4}\n"
    assert read_recipe(text)["c"] == {"x": 4, "y": 3}


def test_a_number_in_quotes_stays_text() -> None:
    for given, meant in (('"1"', "1"), ("1", "1"), ("500m", "500m"), ("'2'", "2")):
        text = load("many-nodes", [f"train.cluster.cpu={given}"]).text
        assert step_settings(TrainSettings, "train", text).cluster.cpu == meant


def covers(found: Any, written: Any) -> bool:
    """Whether a setting has the value in a recipe; newer keys may have been added to a section."""
    if dataclasses.is_dataclass(found):
        return all(covers(getattr(found, key), value) for key, value in written.items())
    if isinstance(found, list | tuple):
        pairs = zip(found, written, strict=True)
        return all(covers(one, other) for one, other in pairs)
    return bool(found == written)


@pytest.mark.parametrize("path", OF_0_1, ids=lambda path: path.stem)
def test_recipes_of_version_0_1_load(path: Path) -> None:
    """`every-key` sets each key that version 0.1 had to its default at that time."""
    text, written = load(str(path)).text, yaml.safe_load(path.read_text())
    for section, kind in settings_classes().items():
        settings = step_settings(kind, section, text)
        for key, value in written.get(section, {}).items():
            assert covers(getattr(settings, key), value), f"{section}.{key}"
