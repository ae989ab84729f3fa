"""Trusted certificates: those in the service account's folder and NUDGE_SERVING_CA."""

import ssl
from pathlib import Path

import pytest

from nudge.components.common.clients import tls
from nudge.components.common.core.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tls, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("NUDGE_SERVING_CA", raising=False)
    return tmp_path


@pytest.mark.parametrize("text", ["", "\n", "# filled in later\n"])
def test_a_bundle_without_certificates_is_skipped(folder: Path, text: str) -> None:
    """OpenShift's service-ca.crt can be an empty file."""
    (folder / "service-ca.crt").write_text(text)
    assert tls.tls_context().verify_mode == ssl.CERT_REQUIRED


def test_nudge_serving_ca_must_contain_a_certificate(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = folder / "ca.pem"
    monkeypatch.setenv("NUDGE_SERVING_CA", str(bundle))
    with pytest.raises(UserError, match="there is no such file"):
        tls.tls_context()
    bundle.write_text("")
    with pytest.raises(UserError, match="contains no PEM certificate"):
        tls.tls_context()
    bundle.write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    with pytest.raises(UserError, match="cannot be read"):
        tls.tls_context()
