"""`kernelm plugin pack` and `keygen`: what is in an archive, that it is the same each time, and that a node would run it."""

import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from packaging.metadata import Metadata
from referencing import Registry, Resource

from kernelm_cli import staging
from kernelm_cli.app import execute
from kernelm_cli.sbom import node_parts
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST, read_manifest
from kernelm_sdk.system import TrustVerdict
from kernelm_trust import SBOM, SIGNATURE
from kernelm_trust.keys import generate
from kernelm_trust.policy import Policy

COMMAND = 'name = "talk"\nversion = "2"\nsummary = "in another language"\ncontracts = ["talk/1"]\ncommand = ["node", "main.js"]\n'


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate(tmp_path / "author.key")
    return tmp_path / "author.key"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    assert execute(["plugin", "new", "data", "my-data", "--folder", str(tmp_path / "my-data")]) == 0
    return tmp_path / "my-data"


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A plugin in JavaScript, whose manifest lies at the root."""
    folder = tmp_path / "talk"
    folder.mkdir()
    lock = {"lockfileVersion": 3, "packages": {"": {}, "node_modules/@nats-io/nkeys": {"version": "2.0.3"},
                                               "node_modules/tweetnacl": {"version": "1.0.3"}}}  # fmt: skip
    for name, text in {MANIFEST: COMMAND, "main.js": "start()", "package-lock.json": json.dumps(lock),
                       ".gitignore": "*.sig\n*.json\n!package-lock.json\n"}.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


def pack(path: Path, into: Path, *more: str) -> Path:
    assert execute(["plugin", "pack", str(path), "--output", str(into), *more]) == 0
    (made,) = into.iterdir()
    return made


def stored(archive: Path, work: Path) -> Path:
    """What `kernelm plugin load` would store."""
    for name in ("given", "tree"):
        (work / name).mkdir(parents=True)
    staging.stage(staging.find(staging.unpack(archive, work / "given")), work / "tree")
    return work / "tree"


def judged(tree: Path, key: Path) -> TrustVerdict:
    return Policy(key.with_name(key.name + ".pub"), "refuse").judge(tree, read_manifest(tree / MANIFEST))


def check_sbom(text: bytes) -> dict[str, object]:
    """The bill of materials, valid by the schema of CycloneDX 1.6."""
    folder = files("cyclonedx") / "schema" / "_res"
    schemas = {name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in ("bom-1.6", "spdx", "jsf-0.82")}
    registry = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in schemas.values())
    bill = json.loads(text)
    jsonschema.Draft7Validator(schemas["bom-1.6"], registry=registry).validate(bill)
    return bill


def test_a_distribution_becomes_a_wheel_that_a_node_runs(plugin: Path, key: Path, tmp_path: Path) -> None:
    wheel = pack(plugin, tmp_path / "dist", "--key", str(key))
    assert wheel.name == "my_data-0.1.0-py3-none-any.whl"
    assert judged(stored(wheel, tmp_path / "w"), key).allowed
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Metadata.from_email(archive.read("my_data-0.1.0.dist-info/METADATA"))
        assert (metadata.name, str(metadata.version)) == ("my-data", "0.1.0")
        required = {"kernelm-contracts", "kernelm-sdk", "msgspec>=0.22", "pyarrow>=20"}
        assert {str(r) for r in metadata.requires_dist or ()} == required
        bill = check_sbom(archive.read(f"my_data-0.1.0.dist-info/sboms/{SBOM}"))
        points = archive.read("my_data-0.1.0.dist-info/entry_points.txt").decode()
    assert "[kernelm.plugins]\nmy-data = my_data" in points
    assert not [n for n in names if n.startswith("tests/")]
    parts = {c["name"]: c["version"] for c in bill["components"]}  # type: ignore[attr-defined,index]
    assert {"msgspec", "pyarrow", "kernelm-sdk", "nats-py"} <= set(parts), "also what the requirements require"
    direct = next(d["dependsOn"] for d in bill["dependencies"] if d["ref"] == "kernelm/my-data@0.1.0")  # type: ignore[attr-defined,index]
    assert {re.split("[/@]", ref)[1] for ref in direct} == {"kernelm-contracts", "kernelm-sdk", "msgspec", "pyarrow"}


def test_packing_twice_gives_the_same_bytes(plugin: Path, key: Path, tmp_path: Path) -> None:
    first = pack(plugin, tmp_path / "one", "--key", str(key)).read_bytes()
    for file in plugin.rglob("*"):
        os.utime(file, (1, 1))
    (plugin / "tests" / "more.py").write_text("not part of it")
    assert pack(plugin, tmp_path / "two", "--key", str(key)).read_bytes() == first
    (plugin / "my_data" / "plugin.py").write_text("another")
    assert pack(plugin, tmp_path / "three", "--key", str(key)).read_bytes() != first


def test_pip_installs_the_wheel_and_finds_every_file_as_recorded(plugin: Path, key: Path, tmp_path: Path) -> None:
    wheel = pack(plugin, tmp_path / "dist", "--key", str(key))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "site" / "my_data" / MANIFEST).name == "my-data"
    with zipfile.ZipFile(wheel) as archive:
        rows = list(csv.reader(archive.read("my_data-0.1.0.dist-info/RECORD").decode().splitlines()))
        assert sorted(r[0] for r in rows) == sorted(archive.namelist())
        for name, digest, size in rows:
            if digest:
                found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={found}", len(archive.read(name)))


def test_a_plugin_in_another_language_becomes_a_zip_of_its_folder(spoken: Path, key: Path, tmp_path: Path) -> None:
    archive = pack(spoken, tmp_path / "dist", "--key", str(key))
    assert archive.name == "talk-2.zip"
    tree = stored(archive, tmp_path / "w")
    assert {p.name for p in tree.iterdir()} == {".gitignore", MANIFEST, "main.js", "package-lock.json", SBOM, SIGNATURE}
    assert judged(tree, key).allowed
    bill = check_sbom((tree / SBOM).read_bytes())
    assert [c["purl"] for c in bill["components"]] == ["pkg:npm/%40nats-io/nkeys@2.0.3", "pkg:npm/tweetnacl@1.0.3"]  # type: ignore[attr-defined,index]


def test_a_wheel_that_another_tool_built_is_signed_as_it_is(plugin: Path, key: Path, tmp_path: Path) -> None:
    given = pack(plugin, tmp_path / "given")  # stands for another tool's
    signed = pack(given, tmp_path / "dist", "--key", str(key))
    assert signed.name == given.name
    assert judged(stored(signed, tmp_path / "w"), key).allowed
    unsigned = judged(stored(given, tmp_path / "u"), key)
    assert "is not signed" in unsigned.reason


def test_a_wheel_that_was_changed_is_refused(plugin: Path, key: Path, tmp_path: Path) -> None:
    wheel = pack(plugin, tmp_path / "dist", "--key", str(key))
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, text.replace(b"pyarrow", b"pyarrov") if name.endswith("METADATA") else text)
    verdict = judged(stored(changed, tmp_path / "w"), key)
    assert not verdict.allowed
    assert "file my_data-0.1.0.dist-info/METADATA of my-data 0.1.0 is not the one that was signed" in verdict.reason


def test_what_is_stored_of_a_wheel_stays_the_same_between_releases(tmp_path: Path) -> None:
    """A signature covers the pyproject.toml that is derived from METADATA: another text would void every signature there is."""
    (tmp_path / "x-1.dist-info").mkdir()
    text = ("Metadata-Version: 2.1\nName: x\nVersion: 1\nRequires-Dist: msgspec>=0.22; python_version > '3'\n"
            "Requires-Dist: other; extra == 'y'\n")  # fmt: skip
    (tmp_path / "x-1.dist-info" / "METADATA").write_text(text)
    staging._write_project(tmp_path / "x.whl", tmp_path)
    assert (tmp_path / "pyproject.toml").read_bytes() == (
        b'[project]\nname = "x"\nversion = "1"\ndependencies = ["msgspec>=0.22; python_version > \'3\'"]\n')


@pytest.mark.parametrize(("change", "said"), [
    (lambda p: (p / "pyproject.toml").write_text((p / "pyproject.toml").read_text().replace("0.1.0", "0.2.0")),
     "pyproject.toml says version 0.2.0, and the manifest 0.1.0"),
    (lambda p: (p / "my_data" / "fast.so").write_bytes(b"ELF"), "fast.so is compiled for one kind of machine"),
    (lambda p: (p / "pyproject.toml").write_text((p / "pyproject.toml").read_text().replace('"msgspec>=0.22"', '"msgspec>>1"')),
     "requirement 'msgspec>>1'"),
    (lambda p: (p / "pyproject.toml").write_text("[project"), "pyproject.toml"),
])  # fmt: skip
def test_what_can_not_be_packed_is_refused_with_the_place(plugin: Path, tmp_path: Path, change: object, said: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    change(plugin)  # type: ignore[operator]
    assert execute(["plugin", "pack", str(plugin), "--output", str(tmp_path / "dist")]) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "dist").exists()


def test_the_command_says_what_it_did(plugin: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    pack(plugin, tmp_path / "one")
    assert "not signed: a node that lists keys (KERNELM_TRUST) refuses it" in capsys.readouterr().out
    pack(plugin, tmp_path / "two", "--key", str(key), "--json")
    told = json.loads(capsys.readouterr().out)
    assert len(told["signer"]) == len(told["sha256"]) == 64
    assert execute(["plugin", "keygen", str(tmp_path / "new.key"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert Path(made["key"]).stat().st_mode & 0o777 == 0o600
    assert execute(["plugin", "keygen", str(tmp_path / "new.key")]) == 2


def test_a_torn_lock_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "package-lock.json").write_text("{}")
    with pytest.raises(ClientFault, match=r"package-lock\.json"):
        node_parts(tmp_path)
