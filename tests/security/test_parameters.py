"""Credentials in a recipe never become parameters of a run, which every reader of runs sees."""

import re
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.store import open_store
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe
from nudge.components.common.core.store import Store
from nudge.components.summary import summary
from nudge.pipelines.cluster import runs

SECRET = "hunter2"


def recipe(uri: str) -> str:
    return f"ingest:\n  data_uri:\n    - {uri}\n    - file:///x\n"


@pytest.mark.parametrize(
    "uri",
    [
        f"https://user:{SECRET}@host/x.csv",
        f"'https://user:{SECRET}@host/x.csv'",
        f"s3://key:{SECRET}@bucket/x",
        f"https://{SECRET}@host/x",
        f"https://b.s3.example.com/x?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
        f"https://b.blob.core.windows.net/x?sv=2024&sig={SECRET}",
        f"https://host/x?private_token={SECRET}",
        f"https://host/x?a=b&API_KEY={SECRET}",
    ],
)
@pytest.mark.parametrize("wrapped", [True, False], ids=["recipe", "parameter"])
def test_credentials_are_refused_before_they_are_sent(uri: str, wrapped: bool) -> None:
    parameters: dict[str, Any] = {"recipe": recipe(uri)} if wrapped else {"model_uri": uri}
    with pytest.raises(UserError, match="contain credentials.*data connection") as refused:
        runs.sendable(parameters)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/x.csv?raw=true",
        "hf://org/model@main",
        "s3://bucket/a@b",
        "incumbent://m?else=hf://org/model",
        "https://host/list?page=2&sort=asc",
        "me@example.com",
    ],
)
def test_other_uris_are_sent_unchanged(uri: str) -> None:
    assert runs.sendable({"recipe": recipe(uri)}) == {"recipe": recipe(uri)}


def test_a_recipe_that_was_changed_in_the_bucket_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer of the bucket lowers the gate of a run whose recipe is too long for a parameter."""

    def store(uri: str) -> Store:
        return open_store(str(tmp_path / uri.removeprefix("s3://")))

    monkeypatch.setattr(runs, "open_store", store)
    monkeypatch.setattr("nudge.components.common.core.recipe.open_store", store)
    uri = runs._stored("evaluate: {margin: 0}\n", "bucket")
    assert read_recipe(uri) == {"evaluate": {"margin": 0}}
    (tmp_path / uri.removeprefix("s3://")).write_text("evaluate: {margin: -9}\n")
    with pytest.raises(UserError, match="somebody changed it in the bucket"):
        read_recipe(uri)


def test_every_template_of_a_report_carries_the_policy() -> None:
    """What a page loads, runs or sends is limited even where escaping was forgotten."""
    components = Path(summary.__file__).parents[1]
    files = [path for path in components.rglob("*.*") if path.suffix in (".py", ".html", ".j2")]
    heads = {path: text for path in files if "<head>" in (text := path.read_text("utf-8"))}
    steps = {path.relative_to(components).parts[0] for path in heads}
    assert steps >= {"ingest", "train", "evaluate"}
    for path, text in heads.items():
        policies = re.findall(r'http-equiv="Content-Security-Policy" content="\{\{ csp \}\}"', text)
        assert len(policies) == text.count("<head>"), path
