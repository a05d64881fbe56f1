"""Whole searches among candidates, against the `world` of conftest.py."""

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import kernelm_optimizer
from kernelm.testing.harness import until
from kernelm.testing.hooks import install
from kernelm.testing.shapes import shape
from kernelm_contracts.optimizer import Candidate, Dimension, Search
from kernelm_contracts.server import Measured
from kernelm_contracts.trainer import TrainRequest
from kernelm_optimizer import compress, searching
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.hooks import GROUP
from kernelm_optimizer.plugin import OptimizerPlugin
from kernelm_optimizer.searching import FORMAT
from kernelm_optimizer.settings import Settings
from kernelm_optimizer.study import Trial
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import MANIFEST, JobCancelled, read_manifest

DATASET = "sha256:data"


def train(**fields: Any) -> TrainRequest:
    return TrainRequest("", **{"structure": "tfidf-linear", **fields})


SEARCH = Search(train(), (Dimension("epochs", values=(1, 2)),))
GOOD, BAD = Candidate("good", train=train()), Candidate("bad", train=train(epochs=1))
BROKEN, ENDLESS = Candidate("broken", train=train(seed=13)), Candidate("endless", train=train(structure="encoder"))


async def test_a_search_from_candidates_to_report(world):
    found = await world.search(BAD, GOOD, BROKEN)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["bad", "good", "broken", "good-int8"]
    assert rows["broken"].outcome == "not measured: the loss is nan"
    assert rows["broken"].measurement is None
    assert rows["bad"].outcome == rows["good"].outcome == "measured"
    assert rows["good"].measurement.scores.accuracy > rows["bad"].measurement.scores.accuracy
    assert (found.winner, rows["good-int8"].outcome, rows["good-int8"].precision) == ("good-int8", "winner", "int8")
    assert found.model == rows["good-int8"].model
    kind, folder, lineage = world.artifacts[found.model]
    assert (kind, lineage) == ("model", {"job": "j-search", "model": rows["good"].model, "dataset": DATASET})
    assert read_card(folder).precision == "int8"
    assert world.measured == [("validation", (rows["bad"].model, rows["good"].model)),
                              ("validation", (rows["good"].model, found.model)), ("test", (found.model,))]
    assert found.test.split == "test"
    assert [e.name for e in world.events] == ["bad", "good", "good-int8"]
    assert world.artifacts[found.report][0] == "report"
    assert {p.name for p in world.artifacts[found.report][1].iterdir()} == {"report.md", "report.json", "report.png"}


async def test_children_belong_to_the_search(world):
    await world.search(GOOD, quantize=False)
    first, *rest = [record.spec for record in world.jobs.values()]
    assert (first.name, first.uses, first.parent, first.run) == ("train-good", "trainer/1.train", "j-search", "run")
    assert first.resources == Settings().train
    assert [spec.uses for spec in rest] == ["server/1.measure"] * 2


async def test_one_given_model_is_a_search_too(world, tfidf):
    model = await world.store(tfidf, "model")
    found = await world.search(Candidate("given", model=model), quantize=False)
    assert (found.winner, found.model, len(found.rows)) == ("given", model, 1)
    assert (found.rows[0].structure, found.rows[0].algorithm, found.rows[0].precision) == ("tfidf-linear", "lbfgs", "fp32")


async def test_an_int8_variant_that_brings_nothing_is_not_kept(world, tfidf):
    model = await world.store(tfidf, "model")
    world.latency = lambda precision: {"fp32": 1.0, "int8": 3.0}[precision]
    found = await world.search(Candidate("given", model=model), objective="latency")
    assert found.model == model
    assert found.rows[1].outcome == "not kept: no faster: 3.00 ms against 1.00 ms"
    assert found.rows[1].measurement is not None


async def test_a_winner_that_is_int8_already_is_not_quantized_again(world, tfidf):
    first = await world.search(Candidate("given", model=await world.store(tfidf, "model")))
    again = await world.search(Candidate("small", model=first.model), job=world.job(2))
    assert again.winner == "small"
    assert again.rows[1].outcome == "not measured: it is int8 safetensors already"


async def test_the_budget_cancels_what_is_under_way(world, monkeypatch):
    clock = SimpleNamespace(late=0.0, monotonic=lambda: time.monotonic() + clock.late)
    monkeypatch.setattr("kernelm_optimizer.searching.time", clock)
    monkeypatch.setattr("kernelm_optimizer.children.time", clock)
    job = world.job()
    searching = asyncio.create_task(world.search(GOOD, ENDLESS, job=job, budget_s=3600.0, quantize=False))
    await until(lambda: job.checkpoint, 60.0)  # both are submitted, and the first is done
    clock.late = 3600.0
    found = await searching
    assert found.winner == "good"
    assert found.rows[1].outcome == "not measured: the budget of 3600 s was spent with 40 % of its training done"
    assert world.jobs["j1"].state == "cancelled"


@pytest.mark.parametrize(("candidates", "budget", "kind", "code"), [
    ((GOOD,), 0.0, ClientFault, "budget_too_small"),
    ((ENDLESS,), 0.1, ClientFault, "budget_too_small"),
    ((BROKEN,), 60.0, PluginFault, "nothing_measured"),
    ((BROKEN, ENDLESS), 0.1, PluginFault, "nothing_measured"),
])
async def test_a_search_without_figures_fails_and_says_why(world, candidates, budget, kind, code):
    with pytest.raises(kind) as raised:
        await world.search(*candidates, budget_s=budget)
    assert raised.value.code == code
    assert all(c.name in raised.value.message for c in candidates)
    assert world.measured == []


async def test_a_model_with_other_labels_or_none_at_all_is_not_measured(world, tfidf, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tfidf, other)
    (other / "model.json").write_bytes((tfidf / "model.json").read_bytes().replace(b'"tech"', b'"weather"'))
    found = await world.search(
        GOOD, Candidate("other", model=await world.store(other, "model")), Candidate("gone", model="sha256:gone"), quantize=False)
    assert found.rows[1].outcome.startswith("not measured: its labels are business, entertainment, politics, sports, weather")
    assert found.rows[2].outcome == "not measured: there is no artifact sha256:gone"


async def test_a_dataset_that_is_none_is_the_callers_fault(world, tfidf):
    world.artifacts[DATASET] = ("model", tfidf, {})
    with pytest.raises(ClientFault, match=r"dataset\.json"):
        await world.search(GOOD)


async def test_a_restart_goes_on_with_the_jobs_that_were_submitted(world):
    first = world.job(1)
    attempt = asyncio.create_task(world.search(GOOD, ENDLESS, job=first, budget_s=60))
    await until(lambda: len(world.jobs) == 2 and first.checkpoint)
    attempt.cancel()
    await asyncio.gather(attempt, return_exceptions=True)
    world.jobs["j1"] = msgspec.structs.replace(world.jobs["j1"], state="dead", why="killed")
    found = await world.search(GOOD, ENDLESS, job=world.job(2, first.checkpoint), budget_s=60, quantize=False)
    assert [r.spec.uses for r in world.jobs.values()].count("trainer/1.train") == 2
    assert found.rows[1].outcome == "not measured: killed"


async def test_a_search_begins_anew_where_the_checkpoint_is_of_another_version(world):
    checkpoint = await world.checkpoint(FORMAT + 1, search='{"spent_s": "all of it", "jobs": []}')
    found = await world.search(GOOD, job=(job := world.job(2, checkpoint)), budget_s=60, quantize=False)
    assert (found.winner, job.checkpoint != checkpoint) == ("good", True)
    for content in ('{"spent_s": ', '{"trials": [{"number": "one"}]}'):
        with pytest.raises(ClientFault, match=r"search\.json") as raised:
            await world.search(job=world.job(3, await world.checkpoint(FORMAT, search=content)), search=SEARCH)
        assert raised.value.code == "invalid_checkpoint"


def test_the_format_of_checkpoints_goes_with_what_they_hold():
    """If this fails, raise FORMAT in searching.py or compress.py, and put the new pair here."""
    assert (FORMAT, shape(searching._State, Trial)) == (2, "2f03bf4f358307e7")
    assert (compress.FORMAT, shape(compress._State)) == (1, "e269430013b476ad")


async def test_what_an_earlier_attempt_spent_counts_against_the_budget(world):
    checkpoint = await world.checkpoint(FORMAT, search='{"spent_s": 100.0, "children": {}}')
    with pytest.raises(ClientFault, match="budget of 60 s was spent before it could start"):
        await world.search(GOOD, job=world.job(2, checkpoint), budget_s=60)
    assert world.jobs == {}


async def test_a_job_table_that_is_away_for_a_moment_is_waited_for(world):
    world.away = 3
    assert (await world.search(GOOD, quantize=False)).winner == "good"
    assert world.away == 0


async def test_a_cancelled_search_stops_and_leaves_its_children_to_the_job_table(world):
    job = world.job()
    attempt = asyncio.create_task(world.search(ENDLESS, job=job, budget_s=60))
    await until(lambda: job.checkpoint)
    job.cancelled = "not wanted"
    with pytest.raises(JobCancelled, match="not wanted"):
        await attempt
    assert world.jobs["j0"].state == "running"


async def test_a_measurement_that_fails_fails_the_search_with_its_reason(world, monkeypatch):
    async def measure(request: dict[str, Any]) -> Measured:
        raise PluginFault("invalid_model", "the processor lacks VNNI")

    monkeypatch.setattr(world, "measure", measure)
    with pytest.raises(PluginFault, match="lacks VNNI"):
        await world.search(GOOD)


async def test_an_export_that_fails_costs_the_int8_variant_only(world, monkeypatch):
    def quantize(*_: Any) -> None:
        raise RuntimeError("unsupported operator")

    monkeypatch.setattr("kernelm_optimizer.searching.quantize", quantize)
    found = await world.search(GOOD)
    assert found.winner == "good"
    assert found.rows[1].outcome == "not measured: RuntimeError: unsupported operator"


def test_the_manifest_lists_what_the_plugin_calls():
    manifest = read_manifest(Path(kernelm_optimizer.__file__).parent / MANIFEST)
    assert manifest.contracts == ("optimizer/1",)
    assert set(manifest.calls) == {"jobs/1.submit", "jobs/1.get", "jobs/1.find", "jobs/1.cancel", "jobs/1.why"}
    assert manifest.entry == f"{OptimizerPlugin.__module__}:{OptimizerPlugin.__qualname__}"


async def test_a_samplers_candidates_are_searched_as_all_others(world, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, GROUP, "sampled", "from kernelm_contracts.optimizer import Candidate\n"
            "from kernelm_contracts.trainer import TrainRequest\n@hookimpl\ndef candidates(request):\n"
            "    return [Candidate('more', train=TrainRequest('', structure='tfidf-linear', epochs=2))]\n")  # fmt: skip
    found = await world.search(GOOD)
    rows = {row.name: row for row in found.rows}
    assert rows["sampled-more"].measurement is not None
    assert rows["sampled-more"].outcome in ("measured", "winner")


def test_an_idle_instance_has_imported_nothing_that_is_large():
    large = {"numpy", "scipy", "torch", "optuna", "onnx", "matplotlib"}
    code = f"import sys, kernelm_optimizer.plugin; print(*{large} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
