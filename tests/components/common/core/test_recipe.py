"""A recipe survives every program that its text passes through as a parameter."""

import json
import re
from typing import Any

import pytest
import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import portable, read_recipe

TEXTS = [
    "{{workflow.name}} and {{inputs.parameters.recipe}} and {{=1+1}}",
    "{{$.pipeline_job_name}} {{$}} {{{{ .Values.x }}}}",
    "[[RunUUID]] [[ScheduledTime]] [[[[x]]]]",
    "$(AWS_SECRET_ACCESS_KEY) costs $$5",
    "type python3 in /kfp-workspace",
    "埃菲尔铁塔 🗼 é\x85\u2028",
    "a\tb\\n\"c\" 'd'\n\n  two lines \r\n",
    "\\{{ a backslash before \\$(X)",
    "",
    " ",
    "yes",
    "1e5",
    "null",
    "# no comment",
    "x" * 300 + " " + "y" * 300,
]


def on_its_way(text: str) -> str:
    """What the programs between a parameter and a step make of a text."""
    text = re.sub(r"\{\{[^}]*\}\}", "<argo or the launcher>", text)
    text = re.sub(r"\[\[\w+[^\]]*\]\]", "<the server>", text)
    text = re.sub(r"\$\(\w+\)", "<the kubelet>", text).replace("$$", "$")
    text = text.replace("/kfp-workspace", "<kfp.local>").replace("python3", "<kfp.local>")
    return text.encode("ascii", errors="replace").decode()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("wrap", [lambda t: {"a": t}, lambda t: {t: 1}, lambda t: {"a": [[t], {}]}])
def test_a_recipe_keeps_its_values_in_transit(text: str, wrap: Any) -> None:
    text_in = yaml.safe_dump(wrap(text), allow_unicode=True, width=60)
    values = read_recipe(text_in)
    sent = portable(text_in)
    assert on_its_way(sent) == sent
    assert read_recipe(sent) == values
    # Inside the JSON that KFP makes of it, too.
    nested = json.dumps(json.dumps({"recipe": sent}))
    assert on_its_way(nested) == nested


def test_numbers_and_dates_keep_their_types() -> None:
    values = {"a": [1, 1.5, 1e-5, True, None, "é"], "b": {}, "c": []}
    assert read_recipe(portable(yaml.safe_dump(values, allow_unicode=True))) == values
    text_in = "when: 2026-01-01\nanchors: [&x {p: é}, *x]\n"
    assert read_recipe(portable(text_in)) == read_recipe(text_in)


def test_a_recipe_that_is_safe_keeps_its_comments() -> None:
    text = "# why\nname: x\ningest: {data_uri: [a, b]}\n"
    assert portable(text) == text
    assert portable("s3://bucket/{{a}}.yaml") == "s3://bucket/{{a}}.yaml"


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused_with_its_key(number: str) -> None:
    text = f"name: x\ntrain: {{clip_norm: 1.0, more: [1, {{rate: {number}}}]}}"
    with pytest.raises(UserError, match=r"^train.more.1.rate = -?(inf|nan): expected a finite"):
        read_recipe(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prompt: a {{$.x}} b", "{{$.x}}"),
        ("prompt: a {{ .Values.x }} b", "{{ .Values.x }}"),
        ("prompt: a train-and-serve-7vk7x b", "{{workflow.name}} (now train-and-serve-7vk7x)"),
        ("prompt: a 3f72a01e-8f5e b", "[[RunUUID]] (now 3f72a01e-8f5e)"),
    ],
)
def test_text_that_the_dashboard_replaced_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, named: str
) -> None:
    read_recipe(text)  # not in a pod
    pod = "train-and-serve-7vk7x-retry-system-container-impl-195054952"
    monkeypatch.setenv("KFP_POD_NAME", pod)
    monkeypatch.setenv("NUDGE_RUN_ID", "3f72a01e-8f5e")
    with pytest.raises(UserError) as refused:
        read_recipe(text)
    assert named in str(refused.value)
    assert "nudge submit" in str(refused.value)
    assert read_recipe("prompt: {a: {b: 1}}") == {"prompt": {"a": {"b": 1}}}
    if "{{" in text:
        assert read_recipe(portable(text)) == yaml.safe_load(text)
