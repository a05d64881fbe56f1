"""Folders that a run file names: `{folder = "..."}` and `{package = "...", path = "..."}`. Nothing is imported."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import msgspec

from kernelm_cli.session import running
from kernelm_sdk.errors import ClientFault


class FolderSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder; a relative path is relative to the run file."""

    folder: str


class PackageSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder that an installed distribution ships: `path` within one of its packages, or with the package's name."""

    package: str  # as pip names it
    path: str = ""


def is_source(value: Any) -> bool:
    """Whether a value of a run file names a folder."""
    return isinstance(value, dict)


def locate(value: dict[str, Any], base: Path) -> tuple[Path, dict[str, str]]:
    """(folder, where it came from) of a source; ClientFault if it is not there, no folder, or empty."""
    try:
        source: FolderSource | PackageSource = msgspec.convert(value, FolderSource if "folder" in value else PackageSource)
    except msgspec.ValidationError as error:
        raise ClientFault("invalid_run_file", str(error), '{folder = "..."} or {package = "...", path = "..."}') from None
    if isinstance(source, FolderSource):
        folder, origin = (base / Path(source.folder).expanduser()).absolute(), {"folder": Path(source.folder).name}
    else:
        folder, version = _in_package(source)
        origin = {"package": source.package, "version": version, "path": source.path}
    if not folder.exists():
        raise ClientFault("missing_source", f"{folder.resolve()} does not exist",
                          "correct the path, which is relative to the run file; if a script makes the folder, its head says so")
    if not folder.is_dir():
        raise ClientFault("missing_source", f"{folder} is no folder", "name the folder that holds the files")
    if not any(p.is_file() for p in folder.rglob("*")):
        raise ClientFault("empty_source", f"{folder} holds no file", "put the documents there, or name another folder")
    return folder, origin


@contextmanager
def visible(path: Path, home: Path) -> Iterator[Path]:
    """A folder with what is at `path`, a folder or a file, where the artifacts service sees it: of a home that an engine runs, a
    container has the scratch/ alone. A file is the only one in its folder, linked where that goes."""
    if running(home).pid and path.is_dir():
        yield path
        return
    (home / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="source-", dir=home / "scratch") as place:
        folder = Path(place) / "files"
        if path.is_dir():
            shutil.copytree(path, folder, symlinks=True)
        else:
            folder.mkdir()
            _link(path, folder / path.name)
        yield folder


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _in_package(source: PackageSource) -> tuple[Path, str]:
    """(folder, version) for a path in an installed distribution."""
    try:
        found = distribution(source.package)
    except PackageNotFoundError:
        message = f"package {source.package!r} is not installed"
        raise ClientFault("missing_package", message, f"pip install {source.package}") from None
    if Path(source.path).is_absolute() or ".." in Path(source.path).parts:
        raise ClientFault("invalid_run_file", f"path {source.path!r} leads out of the package", "a path within the package")
    packages = list(_packages(found))
    candidates = [p / source.path for p in packages] + [p.parent / source.path for p in packages if source.path.startswith(p.name)]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate, found.version
    raise ClientFault("missing_source", f"{source.package} {found.version} has no folder {source.path!r}",
                      f"looked at {', '.join(map(str, candidates)) or 'nothing: it ships no package'}")  # fmt: skip


def _packages(found: Distribution) -> list[Path]:
    """The folders of the top-level packages that a distribution installs, editable ones too."""
    text = found.read_text("top_level.txt")
    files = found.files or ()
    names = text.split() if text else sorted({f.parts[0] for f in files if f.name == "__init__.py" and len(f.parts) == 2})
    if not names:  # an editable install without top_level.txt records only its hook
        names = [found.name.replace("-", "_")]
    specs = [importlib.util.find_spec(name) for name in names]
    return [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
