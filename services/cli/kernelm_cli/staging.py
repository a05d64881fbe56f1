"""A plugin's files as they go into the artifact store: a folder or a wheel becomes a copy whose root holds the manifest,
`pyproject.toml` and what is imported. Nothing of the plugin is run.

    plugin/                          plugin/                         what is stored
      kernelm-plugin.toml              pyproject.toml                  kernelm-plugin.toml
      my_plugin.py          or         src/my_plugin/          ->      pyproject.toml
                                         __init__.py                   my_plugin/
                                         kernelm-plugin.toml

Sources: binary distribution format (packaging.python.org, "Wheel"); gitignore(5).
"""

import shutil
import stat
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from pathlib import Path, PurePosixPath

import msgspec
from pathspec import GitIgnoreSpec

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST, parse_manifest
from kernelm_sdk.system import Manifest
from kernelm_trust import SBOM, SIGNATURE

LEFT_OUT = (".git", ".hg/", "__pycache__/", ".venv/", "venv/", "/build/", "/dist/", "*.egg-info/", "*.pyc", ".mypy_cache/",
            ".ruff_cache/", ".pytest_cache/", ".tox/", ".nox/", "node_modules/", ".DS_Store", "*.swp", "*~", ".#*")  # fmt: skip
BUILT = frozenset({"/build/", "/dist/", "node_modules/"})  # of LEFT_OUT: what a plugin that is no Python runs
NOT_IMPORTED = frozenset({"tests", "test", "docs", "examples", "setup.py", "conftest.py", "noxfile.py"})
MOST_FILES, MOST_BYTES = 20_000, 1 << 30  # of a plugin; a model belongs into an artifact of its own
PYPROJECT = "pyproject.toml"
ARCHIVES = (".whl", ".zip")  # a wheel; the files of a plugin whose manifest lies at the root


class Source(msgspec.Struct, frozen=True):
    """A plugin in a folder, found but not copied yet."""

    folder: Path  # what was named
    manifest: Manifest
    text: str  # of the manifest
    where: Path  # its file
    root: Path  # the folder that would be on PYTHONPATH: `folder`, its src/, or its parent


def is_path(text: str) -> bool:
    """Whether PLUGIN|PATH means a path: it has a separator, begins with "." or "~", or is an archive's name."""
    return "/" in text or text.startswith((".", "~")) or text.endswith(ARCHIVES)


def find(path: Path, called: str = "") -> Source:
    """The plugin in a folder, which faults call `called`; ClientFault that names what is missing or ambiguous, and the file and
    field of a bad manifest."""
    folder, called = path.expanduser().absolute(), called or str(path)
    if not folder.exists():
        raise ClientFault("not_found", f"{called} does not exist", "name the plugin's folder or its wheel")
    if not folder.is_dir():
        raise ClientFault("invalid", f"{called} is neither a folder nor a wheel (.whl)", "name the plugin's folder or its wheel")
    if (folder / MANIFEST).is_file():
        found = [folder / MANIFEST]
    else:
        left_out = LeftOut(folder)
        found = sorted(p for top in (folder, folder / "src") for p in top.glob(f"*/{MANIFEST}") if p.is_file()
                       and p.parent.name not in NOT_IMPORTED and not left_out(p.parent.relative_to(folder), True))  # fmt: skip
    if len(found) != 1:
        places = ", ".join(str(p.relative_to(folder)) for p in found)
        what = f"{called} holds {len(found)} manifests: {places}" if found else f"{called} holds no {MANIFEST}"
        raise ClientFault("invalid_manifest", what, "name the folder of one plugin" if found else
                          f"put {MANIFEST} at its root or into its package; kernel/PROTOCOL.md, 'The manifest'")  # fmt: skip
    try:
        text = found[0].read_text()
    except (OSError, ValueError) as error:
        raise ClientFault("invalid_manifest", f"{found[0]}: {error}", "make it readable, as UTF-8") from None
    manifest = parse_manifest(text, str(found[0]))
    return Source(folder, manifest, text, found[0], _root(folder, manifest, found[0]))


def _root(folder: Path, manifest: Manifest, where: Path) -> Path:
    """Where the module of the manifest's `entry` lies; a `command` runs where its manifest is."""
    if manifest.command:
        if where.parent == folder:
            return folder
        raise ClientFault("invalid_manifest", f"{where}: a plugin with a `command` has its manifest at the root of its folder",
                          f"name {where.parent}")  # fmt: skip
    top = manifest.entry.partition(":")[0].partition(".")[0]
    for root in (folder, folder / "src", *([folder.parent] if folder.name == top else [])):
        if (root / top).is_dir() or (root / f"{top}.py").is_file():
            return root
    raise ClientFault("invalid_manifest", f"{where}: entry {manifest.entry!r}: {folder} has neither {top}/ nor {top}.py",
                      "correct `entry` (module:Class), or put the module beside the manifest")  # fmt: skip


def stage(source: Source, into: Path) -> int:
    """Copy what belongs to the plugin into the empty folder `into`; the number of files. ClientFault at a symbolic link that
    leaves the folder, at what is no file, and at too much."""
    files = dict(_chosen(source))
    size = sum(p.stat().st_size for p in files.values())
    if len(files) > MOST_FILES or size > MOST_BYTES:
        raise ClientFault("too_large", f"{source.folder} has {len(files):,} files of {size / 2**20:,.0f} MB in all; a plugin has "
                          f"at most {MOST_FILES:,} and {MOST_BYTES >> 20:,} MB",
                          "add what does not belong to it to .gitignore; models and data are artifacts of their own")  # fmt: skip
    for name, file in files.items():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return len(files)


def _chosen(source: Source) -> Iterator[tuple[str, Path]]:
    """(path in the artifact, file) of all that is stored. With the manifest at the root of the folder all of it is, since a
    plugin may read what lies beside it; else the packages and modules, for the rest of such a folder is the project's."""
    folder, root = source.folder, source.root
    left_out = LeftOut(folder, bool(source.manifest.command))
    yield MANIFEST, source.where
    if (project := folder / PYPROJECT).is_file():
        yield PYPROJECT, project
    if root == folder.parent:  # the package itself was named
        yield from _walk(folder, folder, left_out, f"{folder.name}/")
    elif root == folder and source.where.parent == folder:
        yield from ((name, file) for name, file in _walk(folder, folder, left_out) if name not in (MANIFEST, PYPROJECT))
    else:
        for path in sorted(root.iterdir()):
            named = path in (source.where.parent, root / source.manifest.entry.partition(":")[0].partition(".")[0])
            package = path.is_dir() and ((path / "__init__.py").is_file() or path.name.endswith(".dist-info"))
            if path.name in NOT_IMPORTED or not (named or package or path.suffix in (".py", ".so")):
                continue
            if path.name.endswith(".dist-info"):
                yield from _of_wheel(path, _walk(path, folder, left_out, f"{path.name}/"))
            elif not left_out(path.relative_to(folder), path.is_dir()):
                whole = path.is_dir()
                yield from _walk(path, folder, left_out, f"{path.name}/") if whole else [(path.name, _within(path, folder))]


def _of_wheel(info: Path, files: Iterator[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """What a wheel says of itself: its signature goes to the root; RECORD is of the wheel, and can't be signed by what it lists."""
    for name, file in files:
        if name != f"{info.name}/RECORD":
            yield (SIGNATURE if name == f"{info.name}/{SIGNATURE}" else name), file


def _walk(top: Path, folder: Path, left_out: "LeftOut", prefix: str = "",
          above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Path]]:  # fmt: skip
    for path in sorted(top.iterdir()):
        if left_out(path.relative_to(folder), path.is_dir()):
            continue
        real = _within(path, folder)
        if path.is_dir():
            if real in above or real == top.resolve():
                raise ClientFault("unsupported_file", f"{path} is a symbolic link to a folder that it lies in", "remove it")
            yield from _walk(path, folder, left_out, f"{prefix}{path.name}/", (*above, top.resolve()))
        else:
            yield prefix + path.name, real


def _within(path: Path, folder: Path) -> Path:
    """The file behind `path`, which must be a file or folder within `folder`."""
    real = path.resolve()
    if path.is_symlink() and not real.is_relative_to(folder.resolve()):
        raise ClientFault("unsupported_file", f"{path} is a symbolic link that leaves the folder, to {path.readlink()}",
                          "put the file itself in its place, or add the link to .gitignore")  # fmt: skip
    if not real.exists():
        raise ClientFault("unsupported_file", f"{path} is a symbolic link to nothing", "remove it")
    if not (real.is_file() or real.is_dir()):
        raise ClientFault("unsupported_file", f"{path} is neither a file nor a folder", "remove it, or add it to .gitignore")
    return real


class LeftOut:
    """What is left out of a folder: LEFT_OUT (with `built`, which is for plugins that have a `command`, not what was built or
    installed there), and what its .gitignore says."""

    def __init__(self, folder: Path, built: bool = False) -> None:
        file = folder / ".gitignore"
        self._own = GitIgnoreSpec.from_lines(file.read_text(errors="replace").splitlines() if file.is_file() else ())
        self._always = GitIgnoreSpec.from_lines(n for n in LEFT_OUT if not (built and n in BUILT))

    def __call__(self, path: Path, directory: bool) -> bool:
        """Whether `path` (relative) is left out by itself; what lies in a folder that is left out is never asked for."""
        text = path.as_posix() + "/" * directory
        return self._always.match_file(text) or (path.name not in (MANIFEST, SIGNATURE, SBOM) and self._own.match_file(text))


# ---- wheels ----


def unpack(wheel: Path, into: Path) -> Path:
    """Unpack a wheel or a .zip of `kernelm plugin pack` into the empty folder `into`, which is returned; a wheel's requirements
    become a pyproject.toml. ClientFault at a path that leads out, a link, and too much."""
    if not wheel.is_file():
        raise ClientFault("not_found", f"{wheel} does not exist", "name the plugin's folder or its wheel")
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            _check(wheel, entries)
            for entry in entries:
                target = into / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file)  # zipfile checks the CRC, and ends at the size that the entry claims
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ClientFault("invalid", f"{wheel} is no intact wheel: {error}", "build it again: python -m build --wheel") from None
    if wheel.suffix == ".whl":
        _write_project(wheel, into)
    return into


def _check(wheel: Path, entries: list[zipfile.ZipInfo]) -> None:
    size = sum(e.file_size for e in entries)
    if len(entries) > MOST_FILES or size > MOST_BYTES:
        raise ClientFault("too_large", f"{wheel} unpacks to {len(entries):,} files of {size / 2**20:,.0f} MB",
                          f"at most {MOST_FILES:,} files and {MOST_BYTES >> 20:,} MB")  # fmt: skip
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or stat.S_ISLNK(entry.external_attr >> 16):
            raise ClientFault("unsupported_file", f"{wheel}: {entry.filename!r} is a link or leads out of the wheel",
                              "such a wheel is malicious or broken: don't install it either")  # fmt: skip


def _write_project(wheel: Path, folder: Path) -> None:
    """`[project]` with the requirements of the wheel's METADATA: a runtime with an environment of its own reads them there."""
    found = sorted(folder.glob("*.dist-info/METADATA"))
    if len(found) != 1:
        raise ClientFault("invalid", f"{wheel} holds {len(found)} *.dist-info/METADATA, and not one", "build it again as a wheel")
    metadata = BytesHeaderParser().parsebytes(found[0].read_bytes())
    required = [str(r) for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in str(r)]
    lines = {"name": str(metadata["Name"]), "version": str(metadata["Version"]), "dependencies": required}
    text = "[project]\n" + "".join(f"{k} = {msgspec.json.encode(v).decode()}\n" for k, v in lines.items())
    tomllib.loads(text)
    (folder / PYPROJECT).write_text(text)
