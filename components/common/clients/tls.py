"""The certificate authorities to trust for TLS connections to endpoints."""

import os
import ssl
from pathlib import Path

from nudge.components.common.core.environment import SERVICE_ACCOUNT
from nudge.components.common.core.errors import UserError


def tls_context() -> ssl.SSLContext:
    """Trusts this system's authorities, the cluster's if this runs in one, and NUDGE_SERVING_CA's.

    Raises `UserError` if a file cannot be read, or if NUDGE_SERVING_CA has no certificate.
    """
    context = ssl.create_default_context()
    extra = os.environ.get("NUDGE_SERVING_CA")
    if extra and not Path(extra).is_file():
        raise UserError(f"NUDGE_SERVING_CA is {extra}, but there is no such file")
    for path in (*SERVICE_ACCOUNT.glob("*.crt"), *([Path(extra)] if extra else [])):
        text = path.read_bytes()
        # service-ca.crt is empty until OpenShift has injected the CA, and always empty elsewhere;
        # ssl raises for a file without a certificate.
        if b"-----BEGIN" in text:
            _load(context, path)
        elif extra and path == Path(extra):
            raise UserError(f"NUDGE_SERVING_CA is {extra}, which contains no PEM certificate")
    return context


def _load(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UserError(f"the certificates in {path} cannot be read: {error}") from None
