"""A registration that would fail is rejected before training."""

from pathlib import Path

import pytest

from nudge.components.common.clients.registry.preflight import check_registration
from nudge.components.common.core.errors import UserError
from nudge.components.register.entry import enter
from nudge.components.register.preflight import check_registry
from tests.components.register.test_names import entry
from tests.registry_server import registry_server


@pytest.mark.parametrize(
    ("recipe", "version", "said"),
    [
        ('model_name: "m "', "", "register.model_name = 'm '"),
        (f"model_name: {'n' * 300}", "", "register.model_name = 'nnn"),
        ("model_name: My_Model", "", "register.model_name = 'My_Model'"),
        ("name: none", "", "register.model_name is required"),
        ('{model_name: m, register: {description: "a\\0b"}}', "", "register.description contains"),
        ("model_name: m", "v\n1", r"the version 'v\\n1' is refused"),
        ("{model_name: m, register: {registry_url: registry}}", "", "is not the URL"),
    ],
)
def test_values_that_the_registry_cannot_store_are_rejected(
    recipe: str, version: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_registration(recipe, version)


def test_names_that_the_registry_would_confuse_are_rejected(tmp_path: Path) -> None:
    with registry_server(tmp_path) as url:
        enter(url, entry("t1-edge", "v1"))
        check_registry(url, "model_name: t1-edge")
        check_registry(url, "model_name: t1-edge", "v2")
        with pytest.raises(UserError, match="confuse the new model 't1_edge'"):
            check_registry(url, "model_name: t1_edge")
        with pytest.raises(UserError, match="t1-edge v1 is registered already"):
            check_registry(url, "model_name: t1-edge", "v1")
        with pytest.raises(UserError, match="is not a Model Registry"):
            check_registry(f"{url}/elsewhere", "model_name: m")


def test_a_registry_that_is_down_is_left_to_the_step() -> None:
    check_registry("http://127.0.0.1:9", "model_name: m")
