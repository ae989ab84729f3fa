"""A model that brings Python of its own is loaded by known code, or refused; its own never runs."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path(__file__).with_name("ran").touch()


class Config(LlamaConfig):
    model_type = "hostile"


Model, Tokenizer = LlamaForCausalLM, PreTrainedTokenizerFast
"""
CLASSES = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def hostile(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model; what transformers runs of its code, it copies to a folder beside it first."""
    from transformers import dynamic_module_utils

    modules = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "hostile"))
    (folder / "hostile.py").write_text(CODE)
    change(folder / "config.json", auto_map=CLASSES)
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "hostile.Tokenizer"]}
    )
    return folder


def test_a_model_of_a_known_kind_is_loaded_by_known_code(hostile: Path) -> None:
    from nudge.components.common.models.language_model import load_model, load_tokenizer

    assert local_model(str(hostile)) == hostile
    assert type(load_model(hostile)).__module__.startswith("transformers.models.")
    assert load_tokenizer(hostile)("Paris")["input_ids"]
    assert not list(hostile.parent.rglob("ran"))


def test_a_model_of_another_kind_is_refused_at_once(hostile: Path) -> None:
    change(hostile / "config.json", model_type="hostile")
    with pytest.raises(UserError, match="its config.json cannot be read"):
        local_model(str(hostile))
    assert not list(hostile.parent.rglob("ran"))


def test_its_code_would_leave_a_trace(hostile: Path) -> None:
    from transformers import AutoConfig

    change(hostile / "config.json", model_type="hostile")
    AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert list(hostile.parent.rglob("ran"))


def test_every_load_refuses_code_of_the_folder() -> None:
    """Without the argument, transformers asks at a terminal whether it should run the code."""
    root = Path(__file__).parents[2]
    found = 0
    for path in [*(root / "components").rglob("*.py"), *(root / "pipelines").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if re.match(r"Auto\w+\.from_(pretrained|config)$", ast.unparse(node.func)):
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                found += 1
    assert found > 6
