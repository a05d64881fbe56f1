"""Whole searches of a space, against the `world` of conftest.py: trials are jobs, and the study outlives whoever leads it."""

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import until
from kernelm_contracts.optimizer import Candidate, Dimension, Search
from kernelm_contracts.trainer import TrainRequest
from kernelm_optimizer.searching import FORMAT
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Progress

TFIDF = TrainRequest("", structure="tfidf-linear")
EPOCHS = Dimension("epochs", values=(1, 2))  # one article a class, or all of them
SEEDS = Dimension("seed", values=(1, 2, 13))  # the last one diverges


def searched(*space: Dimension, **fields: Any) -> Search:
    return Search(TFIDF, space or (EPOCHS, SEEDS), **{"sampler": "grid", "parallel": 2, **fields})


def trials_of(world: Any, found: Any) -> list[dict[str, Any]]:
    return json.loads((world.artifacts[found.report][1] / "trials.json").read_text())  # type: ignore[no-any-return]


async def test_a_grid_is_trained_and_its_best_trials_are_measured_side_by_side(world):
    found = await world.search(search=searched(finalists=2), quantize=False)
    trials = trials_of(world, found)
    assert [(t["parameters"]["epochs"], t["parameters"]["seed"], t["state"]) for t in trials] == [
        (1, 1, "done"), (1, 2, "done"), (1, 13, "failed"), (2, 1, "done"), (2, 2, "done"), (2, 13, "failed")]
    assert [row.name for row in found.rows] == ["trial-3", "trial-4"]
    assert (found.trials.done, found.trials.failed, found.trials.pruned) == (4, 2, 0)
    assert trials[2]["why"] == "the loss is nan"
    assert world.measured[0] == ("validation", tuple(dict.fromkeys(row.model for row in found.rows)))
    assert found.winner in found.trials.front
    assert {p.name for p in world.artifacts[found.report][1].iterdir()} == {
        "report.md", "report.json", "report.png", "trials.json", "trials.png"}


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp"])
async def test_every_sampler_draws_from_the_space(world, sampler):
    space = (Dimension("learning_rate", low=1e-5, high=1e-2, log=True), Dimension("batch_size", low=2, high=8, step=2))
    found = await world.search(search=searched(*space, sampler=sampler, trials=3), quantize=False)
    drawn = [t["parameters"] for t in trials_of(world, found)]
    assert len(drawn) == 3
    assert all(1e-5 <= d["learning_rate"] <= 1e-2 and d["batch_size"] in (2, 4, 6, 8) for d in drawn)
    assert {r.spec.request["batch_size"] for r in world.jobs.values() if r.spec.uses == "trainer/1.train"} == {
        d["batch_size"] for d in drawn}


async def test_several_objectives_need_figures_of_every_trial_and_give_a_front(world):
    found = await world.search(search=searched(EPOCHS, objectives=("accuracy", "size"), finalists=9), quantize=False)
    assert [uses for uses in (r.spec.uses for r in world.jobs.values())].count("server/1.measure") == 2 + 2
    trials = trials_of(world, found)
    assert all(len(t["values"]) == 2 and t["values"][1] > 1000 for t in trials)
    assert set(found.trials.front) == {"trial-0", "trial-1"}, "the one is small, the other right"
    assert "Pareto front" in (world.artifacts[found.report][1] / "report.md").read_text()


async def test_what_is_above_a_limit_does_not_win(world):
    free = await world.search(job=world.job(9), search=searched(EPOCHS), quantize=False)
    sizes = {row.name: row.measurement.bytes for row in free.rows}
    assert free.winner == "trial-1"
    found = await world.search(search=searched(EPOCHS), quantize=False, max_bytes=(sizes["trial-0"] + sizes["trial-1"]) // 2)
    assert found.winner == "trial-0"
    assert [row.name for row in found.rows] == ["trial-0"], "a trial above a limit is no finalist"


async def test_a_hopeless_trial_is_given_up(world):
    """Of three that have ended two epochs, successive halving keeps the best third."""
    space = (Dimension("structure", values=("encoder",)), Dimension("seed", values=(1, 2, 3, 4)))
    job = world.job()
    searching = asyncio.create_task(world.search(
        job=job, search=searched(*space, sampler="grid", pruner="asha", parallel=4), budget_s=3600.0, quantize=False))
    await until(lambda: len(world.jobs) == 4, 30.0)

    def reached(name: str, epoch: int, accuracy: float) -> None:
        record = world.jobs[name]
        metrics = {"epoch": float(epoch), "validation_accuracy": accuracy}
        world.jobs[name] = msgspec.structs.replace(record, heard=record.heard + 1, progress=Progress(0.5, "train", metrics=metrics))

    for name, accuracy in (("j0", 0.9), ("j1", 0.8), ("j2", 0.7), ("j3", 0.2)):
        reached(name, 1, accuracy)
        await asyncio.sleep(0.1)
    await until(lambda: world.jobs["j3"].state == "cancelled", 30.0)
    assert world.jobs["j0"].state == "running"
    searching.cancel()
    await asyncio.gather(searching, return_exceptions=True)


async def test_a_search_that_is_taken_over_goes_on_with_the_same_trials(world):
    search = searched(Dimension("regularization", low=0.1, high=10.0, log=True), sampler="tpe", trials=16, parallel=1)
    whole = trials_of(world, await world.search(job=world.job(9), search=search, quantize=False, budget_s=3600.0))
    world.jobs.clear()
    job, submitted = world.job(), 0

    async def dies(request: dict[str, Any]) -> Any:
        nonlocal submitted
        submitted += 1
        if submitted == 13:
            raise RuntimeError("killed")
        return await train(request)

    train, world.train = world.train, dies
    with pytest.raises(RuntimeError, match="killed"):
        await world.search(job=job, search=search, quantize=False, budget_s=3600.0)
    assert world.passing == {d for d, (kind, *_) in world.artifacts.items() if kind == "checkpoint"} > {job.checkpoint}
    world.train = train
    found = await world.search(job=world.job(2, job.checkpoint), search=search, quantize=False, budget_s=3600.0)
    assert [t["parameters"] for t in trials_of(world, found)] == [t["parameters"] for t in whole]
    assert len([r for r in world.jobs.values() if r.spec.uses == "trainer/1.train"]) == 16, "none was trained twice"


async def test_trials_that_are_late_are_cancelled_and_do_not_count(world, monkeypatch):
    space = (Dimension("structure", values=("tfidf-linear", "encoder")),)  # the second never gets done
    job = world.job()
    with pytest.raises(ClientFault, match="no candidate was trained within budget_s = 0"):
        await world.search(job=world.job(3), search=searched(*space), budget_s=0.0)
    clock = SimpleNamespace(late=0.0, monotonic=lambda: time.monotonic() + clock.late)
    for module in ("searching", "children", "trials"):
        monkeypatch.setattr(f"kernelm_optimizer.{module}.time", clock)
    searching = asyncio.create_task(world.search(job=job, search=searched(*space), budget_s=3600.0, quantize=False))
    await until(lambda: len(world.jobs) == 2, 30.0)
    clock.late, world.away_from_news = 3600.0, True
    found = await searching
    assert (found.winner, found.trials.done, found.trials.late) == ("trial-0", 1, 1)
    assert world.jobs["j1"].state == "cancelled"


@pytest.mark.parametrize(("search", "words"), [
    (searched(Dimension("size", values=(1,))), "a training request has no field 'size'"),
    (searched(Dimension("epochs", values=(1,), only={"layer": (1,)})), "a training request has no field 'layer'"),
    (searched(Dimension("algorithm", values=("adamw", "magic"))), "algorithm can't be 'magic'"),
    (searched(Dimension("epochs", low=3, high=1)), "goes from 3 to 1"),
    (searched(Dimension("epochs", low=0.5, high=1)), "takes whole numbers"),
    (searched(Dimension("dropout", low=0.0, high=0.5, log=True)), "is `log` from 0"),
    (searched(Dimension("structure", low=0, high=1)), "structure is no number"),
    (searched(Dimension("dropout", low=0.0, high=0.5)), "no end of values"),
    (searched(Dimension("seed", low=0, high=20_000)), "more than 10000 points"),
    (Search(TFIDF, ()), "space is empty"),
    (searched(trials=0), "trials is 0"),
    (searched(objectives=()), "objectives are none"),
    (searched(objectives=("accuracy", "size"), pruner="asha"), "pruner 'asha' goes by accuracy alone"),
    (searched(objectives=("accuracy", "size"), sampler="cmaes"), "sampler 'cmaes' knows one objective"),
    (Search(TrainRequest("sha256:other"), (EPOCHS,)), "train.dataset is sha256:other"),
])
async def test_a_search_that_makes_no_sense_is_refused_before_anything_starts(world, search, words):
    with pytest.raises(ClientFault, match="optimize: search: ") as raised:
        await world.search(search=search)
    assert words in raised.value.message
    assert raised.value.code == "invalid"
    assert not world.jobs


async def test_fields_of_structs_and_of_architectures_are_varied_too(world):
    space = (Dimension("adapter.rank", values=(4, 8)), Dimension("architecture.num_hidden_layers", low=2, high=3))
    await world.search(search=searched(*space), quantize=False)
    requests = [r.spec.request for r in world.jobs.values() if r.spec.uses == "trainer/1.train"]
    assert [(r["adapter"]["rank"], r["architecture"]) for r in requests] == [
        (rank, {"num_hidden_layers": layers}) for rank in (4, 8) for layers in (2, 3)]


async def test_a_space_may_hold_what_only_one_structure_has(world):
    space = (Dimension("algorithm", values=("liblinear", "lbfgs")),
             Dimension("ngrams", values=(1, 2), only={"algorithm": ("liblinear",)}),
             Dimension("seed", values=(1, 2), only={"algorithm": ("lbfgs",), "structure": ("tfidf-linear",)}))  # fmt: skip
    found = await world.search(search=searched(*space), quantize=False)
    assert [t["parameters"] for t in trials_of(world, found)] == [
        {"algorithm": "liblinear", "ngrams": 1}, {"algorithm": "liblinear", "ngrams": 2},
        {"algorithm": "lbfgs", "seed": 1}, {"algorithm": "lbfgs", "seed": 2}]


async def test_a_search_that_is_taken_over_keeps_its_trials_while_it_submits_its_candidates(world, monkeypatch):
    """The first checkpoint of the second attempt comes before anything of the search: it holds what the first one left."""
    mine = Candidate("mine", train=TrainRequest("", structure="tfidf-linear", seed=5))
    before = [{"number": 0, "parameters": {"epochs": 1}, "state": "failed", "why": "the loss is nan"}]
    left = json.dumps({"spent_s": 1.0, "children": {}, "trials": before})
    job = world.job(2, await world.checkpoint(FORMAT, search=left))
    saved = []
    monkeypatch.setattr(job, "save", lambda folder, **_: _read(folder, saved))
    await world.search(mine, job=job, search=searched(EPOCHS), quantize=False)
    assert all(trials and trials[0]["why"] == "the loss is nan" for trials in saved)
    assert len(saved) >= 2


async def _read(folder: Any, saved: list[Any]) -> None:
    saved.append(json.loads((folder / "search.json").read_text())["trials"])
