"""Settings: errors name the wrong key or value and the accepted ones."""

import dataclasses

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe, step_settings
from nudge.components.common.core.settings import parse
from nudge.components.train.settings import TrainSettings


def test_a_misspelled_key_names_its_neighbor() -> None:
    with pytest.raises(UserError, match=r"train\.learning_rat is not .* 'learning_rate'"):
        parse(TrainSettings, {"base_model": "x", "learning_rat": 1}, "train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model": "x", "epochs": "many"}, r"train\.epochs = 'many'"),
        ({"base_model": "x", "learning_rate": -1}, r"train\.learning_rate = -1: .* greater than 0"),
        (
            {"base_model": "x", "mode": "qlora"},
            r"train\.mode = 'qlora': .*'full', 'lora' or 'scratch'",
        ),
        ({"base_model": "x", "watch": {"prompt": "a"}}, r"train\.watch\.target is required"),
        ({}, r"train: mode full needs base_model"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(TrainSettings, values, "train")


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse(TrainSettings, {"base_model": "x", "epochs": 0, "seed": "one"}, "train")
    assert "train.epochs" in str(caught.value)
    assert "train.seed" in str(caught.value)


def test_settings_are_frozen() -> None:
    settings = parse(TrainSettings, {"base_model": "x"}, "train")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.epochs = 2  # type: ignore[misc]


def test_a_step_takes_its_section_shared_values_and_top_level_values() -> None:
    recipe = "base_model: a\nseed: 7\nmodel_name: m\ntrain: {epochs: 3}\n"
    settings = step_settings(TrainSettings, "train", recipe, base_model="b", mode="")
    assert (settings.base_model, settings.seed, settings.epochs) == ("b", 7, 3)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_a_recipe_that_is_not_a_mapping_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="recipe is"):
        read_recipe(text)
