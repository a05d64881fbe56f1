"""Envelope encryption: an artifact's files under a data key of its own, the data key wrapped by the master key.

Tink does the cryptography (https://developers.google.com/tink): files are streams of AES256-GCM-HKDF in segments of 1 MB, so that
they are as large as they like and no segment can be changed, moved or left out; a data key is a keyset, wrapped with the
artifact's digest as associated data. The master key is a file with a keyset, or lies in a KMS and never leaves it.

    python -m kernelm_artifacts.vault new FILE       a new master key
    python -m kernelm_artifacts.vault rotate FILE    a new key in front; the service wraps all data keys anew at its start
    python -m kernelm_artifacts.vault retire FILE    leave the new key alone in the file, once the service has started with it
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import tink
from tink import aead, secret_key_access, streaming_aead
from tink.proto import tink_pb2

from kernelm_artifacts.tree import sync, write_durably
from kernelm_sdk.errors import ClientFault, KernelFault

CHUNK = 1 << 20
CLOUDS = {"aws-kms": ("awskms", "AwsKmsClient"), "gcp-kms": ("gcpkms", "GcpKmsClient")}
aead.register()
streaming_aead.register()


class DataKey:
    """The key of one artifact."""

    def __init__(self, digest: str, keyset: Any) -> None:
        self._digest = digest
        self._primitive = keyset.primitive(streaming_aead.StreamingAead)

    @contextlib.contextmanager
    def writing(self, path: Path, name: str) -> Iterator[BinaryIO]:
        """A stream whose bytes land sealed in the new, read-only file `path`; they are good for the file `name` of this artifact
        only."""
        with path.open("xb") as file, self._primitive.new_encrypting_stream(file, self._context(name)) as stream:
            yield stream
        path.chmod(0o444)

    def restore(self, sealed: Path, name: str, target: Path) -> None:
        """Decrypt the file `sealed` into the new file `target`; tink.TinkError if a bit of it is not right."""
        with sealed.open("rb") as file, target.open("xb", buffering=0) as sink:
            with self._primitive.new_decrypting_stream(file, self._context(name)) as stream:
                while chunk := stream.read(CHUNK):
                    sink.write(chunk)
            os.fchmod(sink.fileno(), 0o444)

    def _context(self, name: str) -> bytes:
        return f"{self._digest}/{name}".encode()


class Vault:
    """Makes and opens data keys with the master key at `where`: a file, or a key's URI in a KMS ("aws-kms://...", "gcp-kms://...")
    whose client library of Tink is installed. ClientFault "invalid" with the remedy if there is none such."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._primary = 0  # id of the key that wraps; 0 where a KMS knows
        scheme, cloud, _ = where.partition("://")
        if cloud:
            self._master = _kms(scheme, where)
        else:
            keyset = _read(Path(where))
            self._primary = keyset["primaryKeyId"]
            self._master = _parse(json.dumps(keyset), where).primitive(aead.Aead)

    def new_key(self, digest: str) -> tuple[DataKey, bytes]:
        """A data key for the artifact `digest`, and its wrapped form."""
        keyset = tink.new_keyset_handle(streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB)
        return DataKey(digest, keyset), tink.proto_keyset_format.serialize_encrypted(keyset, self._master, digest.encode())

    def open_key(self, digest: str, wrapped: bytes) -> DataKey:
        """The data key of `digest`. KernelFault "wrong_master_key"."""
        return DataKey(digest, self._unwrap(digest, wrapped))

    def is_current(self, wrapped: bytes) -> bool:
        """Whether the newest key of the master file wrapped this one. A KMS sees to that itself."""
        return not self._primary or self._primary == _wrapping_key(wrapped)

    def rewrap(self, digest: str, wrapped: bytes) -> bytes:
        """The same data key under the newest master key."""
        return tink.proto_keyset_format.serialize_encrypted(self._unwrap(digest, wrapped), self._master, digest.encode())

    def _unwrap(self, digest: str, wrapped: bytes) -> Any:
        try:
            return tink.proto_keyset_format.parse_encrypted(wrapped, self._master, digest.encode())
        except tink.TinkError as error:
            raise KernelFault("wrong_master_key", f"the master key {self.where} does not open artifact {digest}: {error}",
                              "give the key with which it was stored (KERNELM_ARTIFACTS_MASTER); nothing is lost meanwhile",
                              digest=digest) from None  # fmt: skip


def new_master(path: Path) -> None:
    """Write a new master key to the file `path` (0600); one that is there is never overwritten."""
    text = _serialize(tink.new_keyset_handle(aead.aead_key_templates.AES256_GCM))
    try:
        _write_new(path, text)
    except FileExistsError:
        raise ClientFault("exists", f"{path} is there already", "`rotate` adds a new key to it; to lose the old one is to "
                          "lose all that it opens") from None  # fmt: skip


def rotate_master(path: Path) -> None:
    """Put a new key in front of those in `path`: it wraps from now on, the others still open."""
    old, new = _read(path), json.loads(_serialize(tink.new_keyset_handle(aead.aead_key_templates.AES256_GCM)))
    _rewrite(path, {"primaryKeyId": new["primaryKeyId"], "key": [*old["key"], *new["key"]]})


def retire_masters(path: Path) -> None:
    """Leave the newest key alone in `path`. What is still wrapped by another one can't be opened any more."""
    keyset = _read(path)
    _rewrite(path, {**keyset, "key": [key for key in keyset["key"] if key["keyId"] == keyset["primaryKeyId"]]})


def _wrapping_key(wrapped: bytes) -> int:
    """The id of the master key in a wrapped keyset: Tink's output prefix is 0x01 and the id in 4 bytes, big-endian."""
    message = tink_pb2.EncryptedKeyset.FromString(wrapped)
    return int.from_bytes(message.encrypted_keyset[1:5], "big")


def _kms(scheme: str, uri: str) -> Any:
    if scheme not in CLOUDS:
        raise ClientFault("invalid", f"KERNELM_ARTIFACTS_MASTER={uri}: no KMS has the scheme {scheme!r}",
                          f"give a file, or {', '.join(f'{name}://...' for name in CLOUDS)}")  # fmt: skip
    module, client = CLOUDS[scheme]
    try:
        return getattr(importlib.import_module(f"tink.integration.{module}"), client)(uri, "").get_aead(uri)
    except ImportError as error:
        raise ClientFault("invalid", f"KERNELM_ARTIFACTS_MASTER={uri}: {error}", f"pip install 'tink[{module}]'") from None


def _read(path: Path) -> Any:
    try:
        keyset = json.loads(path.read_text())
        _parse(json.dumps(keyset), str(path))
        return keyset
    except (OSError, ValueError) as error:
        remedy = "`python -m kernelm_artifacts.vault new FILE` makes one"
        raise ClientFault("invalid", f"master key {path}: {error}", remedy) from None


def _parse(text: str, where: str) -> Any:
    try:
        return tink.json_proto_keyset_format.parse(text, secret_key_access.TOKEN)
    except tink.TinkError as error:
        raise ClientFault("invalid", f"master key {where}: {error}", "it must be a keyset of Tink, as `new` writes it") from None


def _serialize(handle: Any) -> str:
    return str(tink.json_proto_keyset_format.serialize(handle, secret_key_access.TOKEN))


def _write_new(path: Path, text: str) -> None:
    """Write a new file for its owner alone, on disk for good; FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
    sync(path)
    sync(path.parent)


def _rewrite(path: Path, keyset: Any) -> None:
    write_durably(path, json.dumps(keyset).encode(), 0o600)


def main(arguments: list[str]) -> int:
    """The command line above; its exit code."""
    actions = {"new": new_master, "rotate": rotate_master, "retire": retire_masters}
    if len(arguments) != 2 or arguments[0] not in actions:
        print(f"usage: python -m kernelm_artifacts.vault {'|'.join(actions)} FILE", file=sys.stderr)
        return 2
    try:
        actions[arguments[0]](Path(arguments[1]))
    except ClientFault as fault:
        print(fault, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
