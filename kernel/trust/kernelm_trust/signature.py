"""The signature of a plugin's files: `kernelm-plugin.sig` at the root of what is stored.

It is a Sigstore bundle (v0.3, a plain key in place of a certificate) around a DSSE envelope around an in-toto statement v1 with
the predicate of OpenSSF Model Signing 1.0: every file with its SHA-256. So `model_signing verify key` checks it as well. Beside
the files the predicate names the plugin, its version and, where there is one, the container image that belongs to it.

Sources: github.com/ossf/model-signing-spec, github.com/secure-systems-lab/dsse, in-toto.io/Statement/v1,
docs.sigstore.dev/about/bundle.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from kernelm_sdk.errors import ClientFault
from kernelm_trust import SIGNATURE
from kernelm_trust.keys import PluginSigner

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD, STATEMENT, PREDICATE = ("application/vnd.in-toto+json", "https://in-toto.io/Statement/v1",
                                 "https://model_signing/signature/v1.0")  # fmt: skip
MOST_BYTES = 8 << 20  # of a signature: 20,000 files of a plugin, with their names


class Resource(msgspec.Struct, frozen=True):
    """A file that is signed."""

    name: str
    algorithm: str
    digest: str  # hex


class Subject(msgspec.Struct, frozen=True):
    name: str
    digest: dict[str, str]


class Named(msgspec.Struct, frozen=True):
    """Which plugin was signed."""

    name: str
    version: str
    image: str = ""  # id of the container image that was made with it


class Predicate(msgspec.Struct, frozen=True):
    serialization: dict[str, Any]
    resources: tuple[Resource, ...]
    plugin: Named


class Statement(msgspec.Struct, frozen=True):
    """What is signed."""

    type: str = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: Predicate


class _Material(msgspec.Struct, frozen=True):
    public_key: dict[str, str] = msgspec.field(name="publicKey")


class _Bundle(msgspec.Struct, frozen=True):
    media_type: str = msgspec.field(name="mediaType")
    verification_material: _Material = msgspec.field(name="verificationMaterial")
    envelope: dict[str, Any] = msgspec.field(name="dsseEnvelope")


def untrusted(message: str, remedy: str) -> ClientFault:
    """The fault of a plugin that must not run here."""
    return ClientFault("untrusted", message, remedy)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of every file below `folder` by its path with "/", but for the signature itself. ClientFault "untrusted" at
    what is neither a file nor a folder: a link could lead to something else at another time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise untrusted(f"{name} is neither a file nor a folder", "pack the plugin again")
        if path.is_file() and name != SIGNATURE:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sign(folder: Path, plugin: Named, signer: PluginSigner) -> bytes:
    """The signature of all files in `folder`, for the file SIGNATURE at its root."""
    files = digests(folder)
    root = hashlib.sha256(b"".join(bytes.fromhex(d) for d in files.values())).hexdigest()
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
    resources = tuple(Resource(name, "sha256", digest) for name, digest in files.items())
    predicate = Predicate(serialization, resources, plugin)
    statement = Statement(STATEMENT, (Subject(plugin.name, {"sha256": root}),), PREDICATE, predicate)
    envelope = Envelope(msgspec.json.encode(statement, order="sorted"), PAYLOAD, {})
    envelope.sign(signer)
    material = {"publicKey": {"hint": signer.public_key.keyid}, "tlogEntries": []}
    bundle = {"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope.to_dict()}
    return msgspec.json.encode(bundle, order="sorted")


class Signed(NamedTuple):
    """A signature that was read, and not checked yet."""

    signer: str  # fingerprint of the key that it says it is by
    statement: Statement
    envelope: Envelope

    def check_files(self, folder: Path, name: str, version: str) -> None:
        """ClientFault "untrusted" if it is of another plugin than `name` `version`, or names the first file in `folder` that is not
        as it was signed."""
        plugin, called = self.statement.predicate.plugin, f"{name} {version}"
        if (plugin.name, plugin.version) != (name, version):
            raise untrusted(f"the signature is of {plugin.name} {plugin.version}, not of {called}",
                            "get the plugin again from its author, with its own signature")  # fmt: skip
        found = digests(folder)
        signed = {r.name: r.digest for r in self.statement.predicate.resources if r.algorithm == "sha256"}
        for file in sorted(found.keys() | signed.keys()):
            if found.get(file) != signed.get(file):
                what = ("was not signed" if file not in signed else "is missing" if file not in found else
                        f"is not the one that was signed: its SHA-256 is {found[file]} instead of {signed[file]}")  # fmt: skip
                raise untrusted(f"file {file} of {called} {what}", "it was changed after it was signed: get it again from its "
                                "author, or pack and sign it anew")  # fmt: skip

    def check_key(self, key: SSlibKey) -> None:
        """ClientFault "untrusted" unless `key` made it."""
        try:
            self.envelope.verify([key], 1)
        except VerificationError:
            plugin = self.statement.predicate.plugin
            what = f"the signature of {plugin.name} {plugin.version} is not by key {self.signer}, which it names"
            remedy = "it was changed after it was made: get the plugin again from its author"
            raise untrusted(what, remedy) from None


def read(path: Path) -> Signed:
    """The signature in the file `path`; ClientFault "untrusted" if it is none."""
    signer, envelope = _read(path)
    return Signed(signer, _statement(envelope), envelope)


def _read(path: Path) -> tuple[str, Envelope]:
    """(fingerprint of the key that it says it is by, envelope)."""
    remedy = "get the plugin again from its author, or pack and sign it anew"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise untrusted(f"{SIGNATURE} has {path.stat().st_size:,} bytes; a signature has at most {MOST_BYTES:,}", remedy)
        bundle = msgspec.json.decode(path.read_bytes(), type=_Bundle)
        envelope = Envelope.from_dict(bundle.envelope)
        signer = bundle.verification_material.public_key["hint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a stranger wrote there
        raise untrusted(f"{SIGNATURE} is no signature: {error}", remedy) from None
    if bundle.media_type != BUNDLE or envelope.payload_type != PAYLOAD or set(envelope.signatures) != {signer}:
        raise untrusted(f"{SIGNATURE} is no signature of a plugin: {bundle.media_type}, {envelope.payload_type}", remedy)
    return signer, envelope


def _statement(envelope: Envelope) -> Statement:
    try:
        statement = msgspec.json.decode(envelope.payload, type=Statement)
    except msgspec.MsgspecError as error:
        raise untrusted(f"{SIGNATURE}: {error}", "it was not made by `kernelm plugin pack`: have it signed by that") from None
    if (statement.type, statement.predicate_type) != (STATEMENT, PREDICATE):
        raise untrusted(f"{SIGNATURE} says {statement.predicate_type}, not what a plugin's signature says", "have it signed anew")
    return statement
