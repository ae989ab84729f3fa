"""Credentials for image registries, and the token servers that may get them.

They come from the files of podman and docker: ``auths``, as in a pull secret, and the credential
helpers that ``credHelpers`` and ``credsStore`` name (docker-credential-ecr-login and others).
"""

import base64
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nudge.components.common.clients.image_reference import Reference
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.images import POD_CREDENTIALS

LOOPBACK = ("localhost", "127.0.0.1")
"""The hosts of registries that are used over http."""
AUTH_HOSTS = {"registry-1.docker.io": "auth.docker.io", "registry.gitlab.com": "gitlab.com"}
"""The token servers of registries that have theirs on another host."""
AUTH_HOSTS_VARIABLE = "NUDGE_IMAGE_AUTH_HOSTS"
"""More of them, separated by commas: ``registry.example.com=login.example.com``."""


@dataclass(frozen=True)
class Credentials:
    """A user with a password, or a refresh token (``identity_token``)."""

    user: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)


def find_credentials(reference: Reference) -> Credentials | None:
    """The credentials for a repository; None if there are none.

    In each file a credential helper of the registry comes first, then the longest entry of
    ``auths`` that matches, as in podman, then the helper for all registries. Raises `UserError` if
    a file is damaged or a helper fails.
    """
    name = f"{reference.registry}/{reference.repository}"
    names = [name[: match.start()] for match in re.finditer("/", name)] + [name]
    if reference.registry == "docker.io":
        names.insert(0, "https://index.docker.io/v1/")
    for path in _files():
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            entries, helpers = file.get("auths") or {}, file.get("credHelpers") or {}
            of_all = file.get("credsStore", "")
            listed = [entries[each] for each in reversed(names) if each in entries]
            known = [each for each in map(_of_entry, listed) if each]
        except (OSError, ValueError, AttributeError, TypeError):
            raise UserError(f"{path} cannot be read as a pull secret (JSON with auths)") from None
        helper = helpers.get(reference.registry, "")
        found = _of_helper(helper, reference.registry, path) if helper else None
        if not found and known:
            found = known[0]
        if not found and of_all:
            found = _of_helper(of_all, reference.registry, path)
        if found:
            return found
    return None


def _of_entry(entry: dict[str, Any]) -> Credentials | None:
    user, password = entry.get("username", ""), entry.get("password", "")
    if not user and entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
    token = entry.get("identitytoken", "")
    return Credentials(user, password, token) if user or token else None


def _of_helper(helper: str, registry: str, path: Path) -> Credentials | None:
    """What the program ``docker-credential-<helper>`` returns for a registry."""
    from docker.auth import AuthConfig
    from docker.errors import DockerException

    try:
        # Without its auths: the library ignores their paths, so it could take another team's.
        found = AuthConfig({"credHelpers": {registry: helper}}).resolve_authconfig(registry)
    except (DockerException, ValueError, KeyError) as error:
        raise UserError(
            f"{path} names the credential helper docker-credential-{helper} for {registry}, which "
            f"failed: {error.__cause__ or error}"
        ) from None
    if found is None:
        return None
    token = found.get("IdentityToken", "")
    return Credentials(found.get("Username", ""), found.get("Password", ""), token)


def _files() -> list[Path]:
    docker = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    named = os.environ.get("REGISTRY_AUTH_FILE")
    podman = os.environ.get("XDG_RUNTIME_DIR")
    paths = [
        *([Path(named)] if named else []),
        POD_CREDENTIALS,
        *([Path(podman) / "containers" / "auth.json"] if podman else []),
        docker / "config.json",
    ]
    return [path for path in paths if path.is_file()]


def check_realm(registry: str, realm: str) -> None:
    """Raise `UserError` unless a token server may get the credentials for a registry's host.

    It must be on the same host, or on that of `AUTH_HOSTS` or NUDGE_IMAGE_AUTH_HOSTS, and must
    use https (http if both are on this machine).
    """
    more = os.environ.get(AUTH_HOSTS_VARIABLE, "").split(",")
    known = {**AUTH_HOSTS, **dict(each.strip().split("=", 1) for each in more if "=" in each)}
    try:
        parts = urlsplit(realm)
        host, scheme = parts.hostname or "", parts.scheme
    except ValueError:
        host, scheme = "", ""
    local = registry in LOOPBACK and host in LOOPBACK and scheme in ("http", "https")
    if local or (scheme == "https" and host in (registry, known.get(registry))):
        return
    raise UserError(
        f"the registry {registry} asks for credentials to be sent to {realm!r}: expected https on "
        f"{known.get(registry) or registry}; if that is its token server, set "
        f"{AUTH_HOSTS_VARIABLE}={registry}=HOST"
    )
