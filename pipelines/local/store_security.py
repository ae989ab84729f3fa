"""Close the embedded object store's ports to other users: mutual TLS on all ports but S3.

SeaweedFS' master, volume, filer and admin servers ask for no keys: whoever connects to them reads,
overwrites and deletes objects. Here each port but S3's (which asks for the keys of the data
connection) takes only connections with a certificate of an authority that is made for one home,
HTTP and gRPC alike, and the tokens that SeaweedFS' servers give one another are signed.
See ``weed scaffold -config=security``.
"""

import datetime
import ipaddress
import json
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

GRPC = ("volume", "master", "filer", "s3", "msg_broker", "msg_agent", "admin", "worker", "mq")
HTTPS = ("volume", "master", "filer", "admin")
SIGNED = ("signing", "signing.read", "filer_signing", "filer_signing.read")
VALID = (datetime.datetime(2020, 1, 1), datetime.datetime(2120, 1, 1))
"""The certificates' validity; fixed, so that a clock change cannot close the store."""


def prepare(folder: Path, origin: str) -> Path:
    """Make the store's authority, certificate and security.toml below ``folder``; returns it.

    The keys are made anew at each start, and only this user can read them. ``origin`` is the one
    web origin that the store's answers name.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    authority, authority_key = _certificate("nudge object store authority")
    certificate, key = _certificate("nudge object store", authority, authority_key)
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _write(folder / "ca.pem", authority.public_bytes(pem))
    _write(folder / "cert.pem", certificate.public_bytes(pem))
    _write(folder / "key.pem", key.private_bytes(pem, pkcs8, plain))
    _write(folder / "security.toml", _security(folder, origin).encode())
    return folder


def _security(folder: Path, origin: str) -> str:
    authority, certificate, key = (
        f"{name} = {json.dumps(str(folder / f'{name}.pem'))}" for name in ("ca", "cert", "key")
    )
    sections = {"cors.allowed_origins": [f"values = {json.dumps(origin)}"]}
    for name in SIGNED:
        sections[f"jwt.{name}"] = [f'key = "{secrets.token_urlsafe(32)}"']
    sections["grpc"] = [authority]
    for name in (*GRPC, "client"):
        sections[f"grpc.{name}"] = [certificate, key]
    for name in HTTPS:
        sections[f"https.{name}"] = [certificate, key, authority]
    sections["https.client"] = ["enabled = true", certificate, key, authority]
    return "\n".join("\n".join([f"[{name}]", *lines]) for name, lines in sections.items()) + "\n"


def _certificate(
    name: str,
    issuer: x509.Certificate | None = None,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate and its key: of an authority, or with ``issuer`` one for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    building = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID[0])
        .not_valid_after(VALID[1])
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        building = building.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return building.sign(issuer_key or key, hashes.SHA256()), key


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
