"""A plugin on its way into an archive.

A plugin whose manifest lies in its package becomes a wheel, which pip installs too; one whose manifest lies at the root of its
folder (a single file, or another language) becomes a .zip of the folder. A wheel that another tool built is signed as it is. What
is signed are the files as `kernelm plugin load` stores them and a node runs them: what they were wrapped in does not matter.
"""

import hashlib
import tomllib
from pathlib import Path

from kernelm_cli import staging
from kernelm_cli.archive import Distribution, record, write_zip
from kernelm_cli.sbom import Part, names_of, node_parts, python_parts, sbom
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST
from kernelm_sdk.system import Manifest
from kernelm_trust import SBOM, SIGNATURE
from kernelm_trust.keys import PluginSigner
from kernelm_trust.signature import Named, sign


class Packed:
    """A plugin on its way into an archive. `work`: an empty folder for what lies between."""

    def __init__(self, path: Path, work: Path) -> None:
        self._work, self.output = work, Path()
        foreign = path.suffix == ".whl"
        source = staging.find(staging.unpack(path.expanduser().absolute(), _new(work / "given")), str(path)) if foreign else \
            staging.find(path)  # fmt: skip
        self.manifest: Manifest = source.manifest
        tree = _new(work / "tree")
        staging.stage(source, tree)
        self.requirements = _requirements(tree)
        node = node_parts(tree)
        self.parts: dict[str, Part] = python_parts(self.requirements) | node
        bill = sbom(self.manifest, self.parts, [*names_of(self.requirements), *node])
        self._files = {p.relative_to(tree).as_posix(): p.read_bytes() for p in sorted(tree.rglob("*")) if p.is_file()}
        self._files.pop(SIGNATURE, None)  # of an earlier time
        self.left_out: list[str] = []
        if foreign:
            self.name, self._info = path.name, _info_of(self._files, path)
            self._as_wheel(bill, {})
        elif source.where.parent == source.folder and source.root != source.folder.parent:
            self.name, self._info = f"{self.manifest.name}-{self.manifest.version}.zip", ""
            self._files[SBOM] = bill
        else:
            distribution = self._distribution(source, tree)
            self.name, self._info = f"{distribution.stem}-py3-none-any.whl", distribution.info
            kept = (MANIFEST, "pyproject.toml")
            self.left_out = sorted(n for n in self._files if "/" not in n and not n.endswith(".py") and n not in kept)
            self._as_wheel(bill, distribution.files())

    def _distribution(self, source: staging.Source, tree: Path) -> Distribution:
        if built := [n for n in self._files if n.endswith((".so", ".pyd"))]:
            raise ClientFault("invalid", f"{built[0]} is compiled for one kind of machine",
                              "build the wheel with your own backend, then: kernelm plugin pack WHEEL --key FILE")  # fmt: skip
        file = source.folder / "pyproject.toml"
        project = tomllib.loads(file.read_text()) if file.is_file() else {}
        package = source.where.parent.relative_to(source.root).as_posix().replace("/", ".")
        return Distribution(project, source.folder, self.manifest, package)

    def _as_wheel(self, bill: bytes, description: dict[str, bytes]) -> None:
        for derived in (MANIFEST, "pyproject.toml"):  # at the root of what is stored; `staging` makes them again
            self._files.pop(derived, None)
        for name in self.left_out:
            del self._files[name]
        self._files |= description | {f"{self._info}/sboms/{SBOM}": bill}

    def write(self) -> None:
        """Write the archive."""
        files = self._files
        if self._info:
            files = files | {f"{self._info}/RECORD": record(files, self._info)}
        write_zip(self.output, files)

    def sign(self, signer: PluginSigner, image: str) -> None:
        """Sign what a node would get of the archive, and write it anew with the signature."""
        tree = _new(self._work / "stored")
        staging.stage(staging.find(staging.unpack(self.output.absolute(), _new(self._work / "unpacked"))), tree)
        name = f"{self._info}/{SIGNATURE}" if self._info else SIGNATURE
        self._files[name] = sign(tree, Named(self.manifest.name, self.manifest.version, image), signer)
        self.write()

    def digest(self) -> str:
        """SHA-256 of the archive, hex."""
        with self.output.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _info_of(files: dict[str, bytes], wheel: Path) -> str:
    found = {name.partition("/")[0] for name in files if name.partition("/")[0].endswith(".dist-info")}
    if len(found) != 1:
        raise ClientFault("invalid", f"{wheel} holds {len(found)} *.dist-info, and not one", "build it again as a wheel")
    return found.pop()


def _requirements(tree: Path) -> list[str]:
    file = tree / "pyproject.toml"
    if not file.is_file():
        return []
    try:
        listed = tomllib.loads(file.read_text()).get("project", {}).get("dependencies", [])
    except ValueError as error:
        raise ClientFault("invalid", f"pyproject.toml: {error}", "correct it") from None
    return [str(line) for line in listed]
