"""Whose certificates are believed when an endpoint is spoken to over TLS."""

import os
import ssl
from pathlib import Path

from nudge.components.common.core.environment import SERVICE_ACCOUNT
from nudge.components.common.core.errors import UserError


def tls_context() -> ssl.SSLContext:
    """The authorities of this system, of the cluster that this runs in, and of NUDGE_SERVING_CA."""
    context = ssl.create_default_context()
    given = os.environ.get("NUDGE_SERVING_CA")
    if given and not Path(given).is_file():
        raise UserError(f"NUDGE_SERVING_CA names {given}, and there is no such file")
    for path in (*SERVICE_ACCOUNT.glob("*.crt"), *([Path(given)] if given else [])):
        text = path.read_bytes()
        # service-ca.crt is an empty file until OpenShift has injected the CA, and elsewhere for
        # good; ssl raises for a file without a certificate.
        if b"-----BEGIN" in text:
            _load(context, path)
        elif given and path == Path(given):
            raise UserError(f"NUDGE_SERVING_CA names {given}, which holds no certificate in PEM")
    return context


def _load(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UserError(f"the certificates in {path} cannot be read: {error}") from None
