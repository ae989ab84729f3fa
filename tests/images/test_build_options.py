"""What `make images` gives to the program that builds."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_images", ROOT / "images" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words_given(build: ModuleType, folder: Path, **options: str) -> list[str]:
    program = folder / "podman"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder / "words"}\n')
    program.chmod(0o755)
    build.build(str(program), "data", **options)
    return (folder / "words").read_text().splitlines()


def test_pip_trusts_the_given_ca_without_a_pip_conf(build: ModuleType, tmp_path: Path) -> None:
    words = words_given(build, tmp_path, ca="/somewhere/ca.pem")
    assert "id=ca.pem,src=/somewhere/ca.pem" in words
    assert "--build-arg=PIP_OPTIONS=--cert /run/secrets/ca.pem" in words
    assert "PIP_OPTIONS" not in " ".join(words_given(build, tmp_path))
    offline = words_given(build, tmp_path, ca="/somewhere/ca.pem", offline="yes")
    assert "--build-arg=PIP_OPTIONS=--no-index --cert /run/secrets/ca.pem" in offline


def test_every_pip_that_asks_an_index_gets_the_options_and_the_secret() -> None:
    text = (ROOT / "images" / "Containerfile").read_text().replace("\\\n", " ")
    found = 0
    for line in (line for line in text.splitlines() if line.startswith("RUN ")):
        for command in re.findall(r"pip [^&|{}]*(?:install|wheel)(?: [^&|]*)", line):
            if "--no-index" not in command:
                found += 1
                assert "${PIP_OPTIONS}" in command, command
                assert "--mount=type=secret,id=ca.pem" in line, command
    assert found == 5
