"""Refuse versions that are not signed, if a public key says who may sign.

The key is in the recipe (`deploy.public_key`) or in NUDGE_PUBLIC_KEY, which an operator sets on a
machine for every run and which a recipe cannot remove. With both, both must have signed. The
pipelines do not pass NUDGE_PUBLIC_KEY to the steps on a cluster.
"""

import os

from nudge.components.common.artifacts.signatures import check_signed
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.dsse import BadSignature, read_public_key
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings

KEY_VARIABLE = "NUDGE_PUBLIC_KEY"


def check_signature(version: Version, settings: DeploySettings) -> None:
    """Raise `UserError` unless each key that is set has signed a version."""
    keys = {
        "deploy.public_key": settings.public_key,
        KEY_VARIABLE: os.environ.get(KEY_VARIABLE, "").strip(),
    }
    for where, value in keys.items():
        if not value:
            continue
        key = read_public_key(value)
        try:
            check_signed(version.model, version.name, version.properties, key)
        except BadSignature as error:
            raise UserError(
                f"{version.model} {version.name} does not verify with {where}: {error}. Nothing "
                "was moved. A run with NUDGE_SIGNING_KEY signs its version"
            ) from None
