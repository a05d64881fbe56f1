"""Keys that sign plugins: ECDSA over P-256 with SHA-256 (FIPS 186-5), in PEM files (PKCS #8, SubjectPublicKeyInfo).

A key's fingerprint is the SHA-256 of its public PEM, in hex: what a Sigstore bundle calls the key's hint.
"""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import Key, Signature, Signer, SSlibKey

from kernelm_sdk.errors import ClientFault

PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\n?", re.DOTALL)
PUBLIC = (".pub", ".pem")  # files of a folder that are read as keys


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """The key as PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """64 hex digits."""
    return hashlib.sha256(public_pem(key)).hexdigest()


def listed(key: ec.EllipticCurvePublicKey) -> SSlibKey:
    """The key for verifying, named by its fingerprint."""
    return SSlibKey.from_crypto(key, keyid=fingerprint(key))


class PluginSigner(Signer):
    """Signs with a private key. Deterministic (RFC 6979), so that what is packed twice is the same twice."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = listed(key.public_key())

    @property
    def public_key(self) -> Key:
        return self._public

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Any = None) -> "PluginSigner":
        raise NotImplementedError("a plugin's key is read by load_signer")

    def sign(self, payload: bytes) -> Signature:
        signed = self._key.sign(payload, ec.ECDSA(SHA256(), deterministic_signing=True))
        return Signature(self._public.keyid, signed.hex())


def generate(path: Path) -> str:
    """Make a key pair: `path` (mode 0600) and `path`.pub; its fingerprint. ClientFault if one of the files is there."""
    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists():
            raise ClientFault("already_exists", f"{file} is there already", "name another file: a lost key can't be made again")
    key = ec.generate_private_key(ec.SECP256R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as secret:
        secret.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(public_pem(key.public_key()))
    return fingerprint(key.public_key())


def load_signer(path: Path) -> PluginSigner:
    """The private key in `path`, which nobody else may read; ClientFault that says what is wrong with it."""
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()
    except OSError as error:
        raise ClientFault("not_found", f"key {path}: {error.strerror}", f"kernelm plugin keygen {path} makes one") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ClientFault("invalid_key", f"key {path} can be read by others (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}")
    try:
        key = load_pem_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ClientFault("invalid_key", f"key {path} is no private key in PEM without a passphrase: {error}",
                          "kernelm plugin keygen FILE makes one") from None  # fmt: skip
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise ClientFault("invalid_key", f"key {path} is not of the curve P-256", "kernelm plugin keygen FILE makes one")
    return PluginSigner(key)


def load_public(path: Path) -> dict[str, SSlibKey]:
    """Public keys by fingerprint: of a file, which may hold several, or of all `.pub` and `.pem` files of a folder. ClientFault
    that names the file that is missing or holds anything else; a folder without a key is no key."""
    files = sorted(f for f in path.iterdir() if f.suffix in PUBLIC) if path.is_dir() else [path]
    found: dict[str, SSlibKey] = {}
    for file in files:
        try:
            text = file.read_bytes()
        except OSError as error:
            what = f"{file}: {error.strerror}"
            raise ClientFault("invalid_key", what, "KERNELM_TRUST is a file or folder of public keys") from None
        if b"PRIVATE KEY" in text:
            raise ClientFault("invalid_key", f"{file} holds a private key", "list public keys only: the .pub file beside it")
        blocks = PEM.findall(text)
        if not blocks:
            raise ClientFault("invalid_key", f"{file} holds no public key in PEM", "put a .pub file of kernelm plugin keygen there")
        for block in blocks:
            found.update([_parsed(block, file)])
    return found


def _parsed(block: bytes, file: Path) -> tuple[str, SSlibKey]:
    try:
        key = load_pem_public_key(block)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ClientFault("invalid_key", f"{file}: {error}", "put a .pub file of `kernelm plugin keygen` there") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ClientFault("invalid_key", f"{file}: a key that is not of the curve P-256", "only these sign plugins")
    return fingerprint(key), listed(key)
