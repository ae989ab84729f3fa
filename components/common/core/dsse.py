"""Signed statements: DSSE envelopes (https://github.com/secure-systems-lab/dsse) with ECDSA keys.

The keys are those of Sigstore's model signing: NIST curves of 256, 384 or 521 bits, in PEM.
"""

import base64
import json
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
CURVE_BITS = (256, 384, 521)
NEEDS = "signing needs the package cryptography: pip install 'nudge-lm[sign]'"


class BadSignature(Exception):
    """Something that is not an envelope, or that the key did not sign."""


def read_public_key(value: str) -> Any:
    """The public key in a PEM text, or in the file that ``value`` names."""
    text = _pem(value, "the public key")
    serialization, _ = _cryptography()
    try:
        return _checked(serialization.load_pem_public_key(text), "the public key")
    except ValueError as error:
        raise UserError(f"the public key is not a PEM public key: {error}") from None


def read_private_key(path: str, password: str = "") -> Any:
    """The private key in a PEM file; raises `UserError` without any part of its content."""
    text = _pem(path, "the signing key")
    serialization, _ = _cryptography()
    try:
        secret = password.encode() if password else None
        key = serialization.load_pem_private_key(text, secret)
    except (ValueError, TypeError):
        raise UserError(
            f"{path} is not a PEM private key, or NUDGE_SIGNING_PASSWORD is not its password"
        ) from None
    return _checked(key, "the signing key")


def sign(payload: bytes, key: Any) -> dict[str, Any]:
    """An envelope of a payload."""
    _, ec = _cryptography()
    signature = key.sign(_pae(payload), ec.ECDSA(_hash(key)))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }


def verify(envelope: Any, key: Any) -> dict[str, Any]:
    """The statement in an envelope that ``key`` signed; raises `BadSignature` for any other."""
    from cryptography.exceptions import InvalidSignature

    _, ec = _cryptography()
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        kind = envelope["payloadType"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadSignature(f"it is not a signed envelope ({error!r})") from None
    if kind != PAYLOAD_TYPE:
        raise BadSignature(f"its payload is {kind!r}, expected {PAYLOAD_TYPE}")
    try:
        key.verify(signature, _pae(payload), ec.ECDSA(_hash(key)))
    except InvalidSignature:
        raise BadSignature("the key did not sign it") from None
    try:
        return dict(json.loads(payload))
    except (ValueError, TypeError):
        raise BadSignature("its payload is not a JSON object") from None


def _pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _hash(key: Any) -> Any:
    from cryptography.hazmat.primitives import hashes

    return {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]


def _checked(key: Any, what: str) -> Any:
    _, ec = _cryptography()
    elliptic = isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey)
    if not elliptic or not key.curve.name.startswith("secp") or key.key_size not in CURVE_BITS:
        raise UserError(
            f"{what} must be an EC key on a NIST curve of {', '.join(map(str, CURVE_BITS))} bits, "
            "such as `openssl ecparam -name prime256v1 -genkey -noout` makes"
        )
    return key


def _pem(value: str, what: str) -> bytes:
    if "-----BEGIN" in value:
        return value.encode()
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise UserError(f"{what} {value} cannot be read: {error.strerror or error}") from None


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise UserError(NEEDS) from None
    return serialization, ec
