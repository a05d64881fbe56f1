"""Archives whose bytes depend on nothing but their content: a wheel, and the .zip of a plugin that is no distribution.

Sources: binary distribution format (packaging.python.org, "Wheel"); reproducible-builds.org, SOURCE_DATE_EPOCH.
"""

import base64
import csv
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pyproject_metadata import ConfigurationError, StandardMetadata

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import GROUP
from kernelm_sdk.system import Manifest

EARLIEST = 315532800  # 1980-01-01, where the times of zip files begin; Unix seconds


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Write `files` in the order of their names, all of one time and mode."""
    when = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST)), EARLIEST))[:6]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files, key=lambda n: (".dist-info/" in n, n)):  # a wheel's description comes last, as its format advises
            entry = zipfile.ZipInfo(name, when)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    temporary.replace(path)


def record(files: dict[str, bytes], info: str) -> bytes:
    """The file RECORD of a wheel whose description lies in the folder `info`."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        lines.writerow((name, f"sha256={digest}", len(files[name])))
    lines.writerow((f"{info}/RECORD", "", ""))
    return text.getvalue().encode()


class Distribution:
    """The description of a plugin as a Python distribution: of its pyproject.toml and its manifest. ClientFault, naming the field,
    where the one is not valid or contradicts the other."""

    def __init__(self, project: dict[str, Any], folder: Path, manifest: Manifest, package: str) -> None:
        table = dict(project.get("project") or {"name": manifest.name, "description": manifest.summary})
        if "version" in table.get("dynamic", ()):
            table["dynamic"] = [d for d in table["dynamic"] if d != "version"]
        table.setdefault("version", manifest.version)
        self._check_version(str(table["version"]), manifest)
        try:
            self._metadata = StandardMetadata.from_pyproject({"project": table}, folder)
            self.description = bytes(self._metadata.as_rfc822())
        except (ConfigurationError, OSError) as error:
            where = folder / "pyproject.toml"
            raise ClientFault("invalid", f"{where}: {error}", "see packaging.python.org, 'pyproject.toml'") from None
        self.stem = f"{canonicalize_name(self._metadata.name).replace('-', '_')}-{self._metadata.version}"
        self.info = f"{self.stem}.dist-info"
        self._points = {group: dict(points) for group, points in self._metadata.entrypoints.items()}
        self._points.setdefault(GROUP, {}).setdefault(manifest.name, package)

    @staticmethod
    def _check_version(version: str, manifest: Manifest) -> None:
        try:
            same = Version(version) == Version(manifest.version)
        except InvalidVersion as error:
            raise ClientFault("invalid", f"version: {error}", "a wheel's version is like 1.2.3 (PEP 440)") from None
        if not same:
            raise ClientFault("invalid", f"pyproject.toml says version {version}, and the manifest {manifest.version}",
                              "make them the same: the manifest's is the one that is signed")  # fmt: skip

    def files(self) -> dict[str, bytes]:
        """METADATA, WHEEL and entry_points.txt."""
        points = "\n\n".join(f"[{group}]\n" + "\n".join(f"{n} = {v}" for n, v in sorted(points.items()))
                             for group, points in sorted(self._points.items()))  # fmt: skip
        wheel = "Wheel-Version: 1.0\nGenerator: kernelm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        return {f"{self.info}/METADATA": self.description, f"{self.info}/WHEEL": wheel.encode(),
                f"{self.info}/entry_points.txt": f"{points}\n".encode()}  # fmt: skip
