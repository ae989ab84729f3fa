"""Whose certificates are believed when an endpoint is spoken to over TLS."""

import os
import ssl
from pathlib import Path

from nudge.components.common.errors import UserError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def trusted() -> ssl.SSLContext:
    """The authorities of this system, of the cluster that this runs in, and of NUDGE_SERVING_CA."""
    context = ssl.create_default_context()
    given = os.environ.get("NUDGE_SERVING_CA")
    if given and not Path(given).is_file():
        raise UserError(f"NUDGE_SERVING_CA names {given}, and there is no such file")
    for path in (*SERVICE_ACCOUNT.glob("*.crt"), *([Path(given)] if given else [])):
        context.load_verify_locations(path)
    return context
