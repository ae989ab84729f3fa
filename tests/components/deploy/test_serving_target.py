"""Where `deploy` serves: on the cluster for a step that runs there, otherwise on this machine."""

import pytest

from nudge.components.common.clients.registry.releases import Served
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings, deploy_settings
from nudge.components.deploy.targets import target_name
from nudge.pipelines.recipes import load, shipped

HERE = Served("m", "http://127.0.0.1:8000", {"v1": 100})
THERE = Served("m", "https://m-nudge.apps.example.com", {"v1": 100})


@pytest.mark.parametrize("recipe", sorted(shipped()))
def test_every_shipped_recipe_serves_where_it_runs(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = deploy_settings(load(recipe).text)
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    assert target_name(settings, None) == target_name(settings, HERE) == "local"
    monkeypatch.setenv("KFP_POD_NAME", "train-and-serve-abcde-system-container-impl-1")
    assert target_name(settings, None) == target_name(settings, THERE) == "kserve"


def test_a_model_served_on_a_cluster_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    assert target_name(DeploySettings(), THERE) == "kserve"
    with pytest.raises(UserError, match=r"m is served at https://m-nudge.*not this machine"):
        target_name(DeploySettings(target="local"), THERE)


def test_a_step_on_a_cluster_does_not_serve_in_its_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "deploy")
    with pytest.raises(UserError, match="stops with the step's pod; set deploy.target to kserve"):
        target_name(DeploySettings(target="local"), None)


@pytest.mark.parametrize(
    ("recipe", "prompt"),
    [
        ("evaluate: {probes: [{prompt: a, target: b}], prompts: [c]}", "a"),
        ("evaluate: {probes: [], prompts: [c], window: 64}", "c"),
        ("evaluate: {prompts: [c]}\ndeploy: {smoke_prompt: d}", "d"),
        ("evaluate: {prompts: [c]}\ndeploy: {smoke_prompt: Once upon a time}", "Once upon a time"),
        ("evaluate:\ndeploy:", ""),
    ],
)
def test_the_smoke_prompt_comes_from_the_recipe(recipe: str, prompt: str) -> None:
    assert deploy_settings(recipe).smoke_prompt == prompt
