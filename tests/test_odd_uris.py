"""URIs that no file, bucket or host can have: each reader of URIs refuses them with a sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_model, local_tokenizer
from nudge.components.common.preflight.base import check_base
from nudge.components.common.readers.curated import curated_texts
from nudge.components.ingest.finding import find_sources
from nudge.pipelines.recipes import load

ODD = [
    "x" * 5000, f"/{'x' * 300}/texts", "a\0b", "~nobody-of-this-name/texts", "https://[x/a.txt",
    "s3://", "s3://[x/y", "file://", "file://host/x", "package://", "package://no_such/x", "hf://",
    "~", "*", "[", "ftp://x/y", "memory://x",
]  # fmt: skip
READERS: dict[str, Callable[[str], object]] = {
    "data_uri": find_sources,
    "guard": lambda uri: not_empty(curated_texts(uri, "evaluate.guards x")),
    "base_model": local_model,
    "tokenizer": local_tokenizer,
    "preflight": lambda uri: not_empty(check_base(uri, [])),
}


def not_empty(found: object) -> None:
    """Nothing found is no error of these readers; whoever calls them reports it."""
    if not found:
        raise UserError("nothing is there")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("uri", ODD)
def test_an_odd_uri_is_refused_with_a_sentence(
    uri: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        READERS[reader](uri)
    assert str(caught.value)


@pytest.mark.parametrize("uri", ODD)
def test_a_recipe_with_an_odd_uri_is_read_or_refused(uri: str, tmp_path: Path) -> None:
    values = {
        "base_model": uri,
        "model_name": "x",
        "ingest": {"data_uri": uri, "keep_out": [uri], "task_folder": uri, "state_uri": uri},
        "tokenize": {},
        "evaluate": {"guards": [{"name": "x", "uri": uri}]},
    }
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(values))
    assert load(str(recipe)).values["base_model"] == uri
