"""What is checked: a plugin's folder, its manifest, the schemas of its contracts, and what its author adds for the check.

`conformance.toml` at the root of the folder is optional:

    [artifacts]                       # folders, stored before the plugin starts; "@model" below is then its digest
    model = "tests/model"

    [settings.model]                  # as of the pool that it would run in
    artifact = "@model"

    [requests]                        # that are answered without a fault; of a job: that end with a result
    "server/1.classify" = { input = ["text"] }

    [golden]                          # with what the answer to such a request begins, where a contract's checks look for it
    "server/1.generate" = " 7, 8, 9"

`start_s = 300` at its top: seconds that an instance may take from its start to ready.
"""

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.conformance.generate import Shapes
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST, read_manifest
from kernelm_sdk.system import Manifest

SAMPLES = "conformance.toml"
RUNTIMES = ("process", "venv", "container", "inproc")


class Samples(msgspec.Struct, forbid_unknown_fields=True):
    """`conformance.toml`."""

    start_s: float = 0.0  # from an instance's start to ready, at most; 0 for the kit's own patience
    artifacts: dict[str, str] = {}  # name -> folder, relative to the plugin's
    settings: dict[str, Any] = {}
    requests: dict[str, dict[str, Any]] = {}  # "contract/major.method" -> request
    golden: dict[str, str] = {}  # "contract/major.method" -> the beginning of the answer to that request


class Subject(msgspec.Struct):
    """A plugin in a folder."""

    folder: Path
    manifest: Manifest
    file: Path  # of the manifest
    root: Path  # what is put on PYTHONPATH
    samples: Samples
    schemas: dict[str, Shapes]  # contract id -> shapes
    command: tuple[str, ...] = ()  # for another language than Python: starts an instance (the manifest's, or --command)


def read(path: Path, command: tuple[str, ...] = ()) -> Subject:
    """The plugin in the folder `path`; ClientFault that names what is missing, and where."""
    folder = path.expanduser().absolute()
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise ClientFault("not_found", f"{path} {what}", "name the plugin's folder")
    found = [p for p in (folder / MANIFEST, *sorted(folder.glob(f"*/{MANIFEST}")), *sorted(folder.glob(f"src/*/{MANIFEST}")))
             if p.is_file()]  # fmt: skip
    if len(found) != 1:
        raise ClientFault("invalid_manifest", f"{path} holds {len(found)} files {MANIFEST}, at its root or one level below",
                          "name the folder of one plugin")  # fmt: skip
    manifest = read_manifest(found[0])
    if unknown := [r for r in manifest.runtimes if r not in RUNTIMES]:
        raise ClientFault("invalid_manifest", f"{found[0]}: `runtimes` has {unknown[0]!r}, which no node has",
                          f"those of a node are {', '.join(RUNTIMES)}")  # fmt: skip
    command = command or manifest.command
    top = manifest.entry.partition(":")[0].partition(".")[0]
    roots = [r for r in (folder, folder / "src", folder.parent) if (r / top).is_dir() or (r / f"{top}.py").is_file()]
    if not roots and not command:
        raise ClientFault("invalid_manifest", f"{found[0]}: entry {manifest.entry!r}: {folder} has neither {top}/ nor {top}.py",
                          "correct `entry` (module:Class), or give `command` in its place for another language")  # fmt: skip
    schemas = {c: Shapes(schema_of(c, folder, found[0].parent)) for c in manifest.contracts}
    return Subject(folder, manifest, found[0], roots[0] if roots else folder, _samples(folder / SAMPLES), schemas, command)


def _samples(path: Path) -> Samples:
    if not path.exists():
        return Samples()
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Samples)
    except (ValueError, msgspec.ValidationError) as error:
        raise ClientFault("invalid", f"{path}: {error}", "see kernelm.testing.conformance.subject") from None


def schema_of(contract: str, *folders: Path) -> dict[str, Any]:
    """The schema of `name/major`: of an installed contract, or of `schemas/<name>.v<major>.json` below one of `folders`."""
    importlib.import_module("kernelm_contracts") if importlib.util.find_spec("kernelm_contracts") else None
    if contract in CONTRACTS:
        known = CONTRACTS[contract]
        return {**known.schema(), "schema_hash": known.schema_hash()}
    name = f"schemas/{contract.replace('/', '.v')}.json"
    for file in (folder / name for folder in folders):
        if file.is_file():
            schema: dict[str, Any] = json.loads(file.read_text())
            return schema
    raise ClientFault("invalid_manifest", f"contract {contract!r} is not known: known are {', '.join(sorted(CONTRACTS))}",
                      f"install what declares it, or put its schema into {name}")  # fmt: skip
