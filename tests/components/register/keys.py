"""Keys that sign versions in tests."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def make_key(folder: Path, name: str, password: str = "") -> tuple[Path, Path]:
    """A private key, with a password if one is given, and its public key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    locked: Any = serialization.NoEncryption()
    if password:
        locked = serialization.BestAvailableEncryption(password.encode())
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, kind, locked))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))
    return private, public
