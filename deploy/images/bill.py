"""The bill of materials of an image: CycloneDX 1.6, the wheels with their hashes and the packages of its base.

Source: cyclonedx.org/docs/1.6/json.
"""

import functools
import hashlib
import zipfile
from email.parser import BytesParser
from pathlib import Path
from typing import NamedTuple

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.bom_ref import BomRef
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


class Piece(NamedTuple):
    """One wheel."""

    name: str
    version: str
    license: str
    sha256: str
    content: str  # a hash of its files alone: two builds of the same sources have the same
    requires: tuple[str, ...]  # as it says

    @classmethod
    @functools.cache
    def of(cls, wheel: Path) -> "Piece":
        with zipfile.ZipFile(wheel) as archive:
            about = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
            told = BytesParser().parsebytes(archive.read(about))
            files = sorted((i.filename, i.CRC, i.file_size) for i in archive.infolist())
        said = str(told.get("License-Expression") or told.get("License") or "").partition("\n")[0]
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        content = hashlib.sha256(repr(files).encode()).hexdigest()
        return cls(str(told["Name"]), str(told["Version"]), said, digest, content, tuple(told.get_all("Requires-Dist") or ()))


def bill_of_materials(name: str, identifier: str, pieces: list[Piece], packages: str) -> bytes:
    """The document of the image `name`. `packages`: a line "name version" for each Debian package of its base."""
    root = Component(name=name, version=identifier, type=ComponentType.CONTAINER, bom_ref=f"{name}@{identifier}")
    parts = []
    for piece in pieces:
        url = PackageURL("pypi", None, piece.name.lower().replace("_", "-"), piece.version)
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=piece.sha256)]
        told = [Property(name="kernelm:license", value=piece.license)] if piece.license else []
        parts.append(Component(name=piece.name, version=piece.version, type=ComponentType.LIBRARY, purl=url, hashes=hashes,
                               bom_ref=BomRef(url.to_string()), properties=told))  # fmt: skip
    for line in packages.splitlines():
        package, _, version = line.partition(" ")
        url = PackageURL("deb", "debian", package, version)
        parts.append(Component(name=package, version=version, type=ComponentType.LIBRARY, purl=url,
                               bom_ref=BomRef(url.to_string())))  # fmt: skip
    bom = Bom(components=parts, metadata=BomMetaData(component=root))
    bom.register_dependency(root, parts)
    return JsonV1Dot6(bom).output_as_string(indent=1).encode()
