"""Credentials for image registries: from pull secrets, and from real credential helpers."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.image_credentials import Credentials, find_credentials
from nudge.components.common.clients.image_reference import parse_reference
from nudge.components.common.core.errors import UserError

REPOSITORY = parse_reference("oci://quay.io/team/models:v1")

HELPER = """#!/bin/sh
# As https://github.com/docker/docker-credential-helpers describes the protocol.
read server
case "$1 $server" in
    "get quay.io") echo '{"ServerURL": "", "Username": "robot", "Secret": "from-helper"}' ;;
    "get tokens.io") echo '{"ServerURL": "", "Username": "<token>", "Secret": "refresh"}' ;;
    "get broken.io") echo "the keychain is locked"; exit 1 ;;
    *) echo "credentials not found in native keychain"; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only file with credentials; a helper is on the PATH."""
    helper = tmp_path / "bin" / "docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(HELPER)
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def entry(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, None),
        ({"auths": {"quay.io": entry("u", "a:b")}}, ("u", "a:b")),
        # As podman, the longest entry that matches, and nobody else's.
        ({"auths": {"quay.io": entry("u", "p"), "quay.io/team": entry("t", "q")}}, ("t", "q")),
        ({"auths": {"quay.io/other": entry("o", "p")}}, None),
        ({"credHelpers": {"quay.io": "test"}}, ("robot", "from-helper")),
        (
            {"credHelpers": {"quay.io": "test"}, "auths": {"quay.io": entry("u", "p")}},
            ("robot", "from-helper"),
        ),
        ({"credHelpers": {"other.io": "missing"}}, None),
        # `docker login` with a credential store leaves an empty entry.
        ({"credsStore": "test", "auths": {"quay.io": {}}}, ("robot", "from-helper")),
        ({"credsStore": "test", "auths": {"quay.io/team": entry("t", "q")}}, ("t", "q")),
    ],
)
def test_which_credentials_are_used(
    file: Path, content: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    file.write_text(json.dumps(content))
    assert find_credentials(REPOSITORY) == (Credentials(*expected) if expected else None)


def test_a_helper_without_an_entry_is_no_error(file: Path) -> None:
    file.write_text(json.dumps({"credsStore": "test"}))
    assert find_credentials(parse_reference("oci://unknown.io/a/b")) is None


def test_an_identity_token(file: Path) -> None:
    file.write_text(json.dumps({"credHelpers": {"tokens.io": "test"}}))
    found = find_credentials(parse_reference("oci://tokens.io/a/b"))
    assert found == Credentials("", "", "refresh")
    assert "refresh" not in repr(found)


@pytest.mark.parametrize(
    ("helpers", "uri", "message"),
    [
        ({"quay.io": "gone"}, "oci://quay.io/a/b", "docker-credential-gone .*not installed"),
        ({"broken.io": "test"}, "oci://broken.io/a/b", "docker-credential-test .*locked"),
    ],
)
@pytest.mark.filterwarnings("ignore:docker-credential-gone")
def test_a_helper_that_fails_is_named(
    file: Path, helpers: dict[str, str], uri: str, message: str
) -> None:
    file.write_text(json.dumps({"credHelpers": helpers}))
    with pytest.raises(UserError, match=message):
        find_credentials(parse_reference(uri))


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": {"quay.io": 1}}'])
def test_a_damaged_file_is_named(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read as a pull secret"):
        find_credentials(REPOSITORY)
