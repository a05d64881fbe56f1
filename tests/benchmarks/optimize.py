"""make bench-optimize: what a search costs beside its trials, and what int8 gives.

Search: 1,000 trials of 1 s, of two parameters drawn at random, in 25 slots: 40 s are the minimum, what is above is overhead. Ours:
`optimizer/1` as a user calls it, with the real broker, kernel, job table and artifact store; each trial is a job, on record before
it begins, and the study is in the search's checkpoint. Optuna: 25 threads on SQLite. Ray Tune: 25 CPUs declared, actors reused, in
a network namespace of its own, since Ray listens on all interfaces.
int8: see optimize_int8.py.
One round of the three takes some three minutes, and both parts some six on two quiet cores; ROUNDS=3 gives medians, PARTS=search or
PARTS=int8 one part, TRIALS fewer trials.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.harness import System, until
from kernelm_contracts.data import DatasetCard
from kernelm_contracts.jobs import JobName, Jobs, JobSpec
from kernelm_contracts.optimizer import Dimension, OptimizeRequest, Search
from kernelm_contracts.server import Measured, Measurement, MeasureRequest, Server
from kernelm_contracts.trainer import ModelCard, Scores, Trained, Trainer, TrainRequest
from kernelm_optimizer.plugin import OptimizerPlugin
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.plugin import Job, Manifest, Plugin
from kernelm_sdk.system import Artifacts, PoolSpec, PutArtifact, Resources

sys.path.insert(0, str(Path(__file__).parent))
import optimize_int8
from reporting import conditions, finish, median, say

TRIALS, ROUNDS = int(os.environ.get("TRIALS", "1000")), int(os.environ.get("ROUNDS", "1"))
PARTS = os.environ.get("PARTS", "search,int8").split(",")
SLOTS, TRIAL_S = 25, 1.0
MINIMUM_S = TRIALS / SLOTS * TRIAL_S
SPACE = (Dimension("dropout", low=0.0, high=0.5), Dimension("warmup", low=0.0, high=0.5))
LABELS = ("a", "b")

RAY = """
import sys, time, logging, os, tempfile
os.environ["RAY_raylet_start_wait_time_s"] = "300"  # on a machine that is busy with other things
os.environ.update(RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS="0")
import ray
from ray import tune
ray.init("local", num_cpus=SLOTS, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
         _node_ip_address="127.0.0.1")
def trial(config):
    time.sleep(TRIAL_S)
    tune.report({"score": config["x"] + config["y"]})
def search(samples):
    space = {"x": tune.uniform(0, 1), "y": tune.uniform(0, 1)}
    settings = tune.TuneConfig(num_samples=samples, metric="score", mode="max", reuse_actors=True)
    run = tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0, callbacks=[])
    tune.Tuner(trial, param_space=space, tune_config=settings, run_config=run).fit()
search(SLOTS)
for line in sys.stdin:
    begun = time.perf_counter()
    search(int(line))
    print("took", time.perf_counter() - begun, flush=True)
""".replace("SLOTS", str(SLOTS)).replace("TRIAL_S", str(TRIAL_S))


class SleepingTrainer(Plugin, Trainer):
    """A training that is nothing but its time."""

    model = ""

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        await asyncio.sleep(TRIAL_S)
        accuracy = request.dropout + request.warmup
        return Trained(self.model, "tfidf-linear", "lbfgs", 1, Scores("validation", 1, accuracy, accuracy, accuracy))


class MeasuringServer(Plugin, Server):
    """Knows when the trials were over: it is asked then."""

    asked = asyncio.Event()

    async def measure(self, request: MeasureRequest, job: Job) -> Measured:
        self.asked.set()
        scores = Scores(request.split, 1, 1.0, 1.0, 1.0)
        return Measured(tuple(Measurement(model, scores, 1.0, 1.0, 1.0, 1, 1.0, 0.0) for model in request.models))


def _manifest(name: str, contract: str, max_jobs: int = 1) -> Manifest:
    return Manifest(name, "1", "benchmark", (contract,), "optimize:none", default=False, calls=("jobs/1", "artifacts/1"),
                    max_jobs=max_jobs, events=("candidate.measured",))  # fmt: skip


PLUGINS: dict[str, tuple[Manifest, type[Plugin]]] = {
    "scheduler": (_manifest("scheduler", "scheduler/1"), SchedulerPlugin),
    "trainer": (_manifest("trainer", "trainer/1", SLOTS), SleepingTrainer),
    "server": (_manifest("server", "server/1"), MeasuringServer),
    "optimizer": (_manifest("optimizer", "optimizer/1"), OptimizerPlugin),
}  # fmt: skip
FREE = {"cpu": 0.0, "memory_mb": 1, "gpus": 0}


async def stored(system: System, kind: str, name: str, card: msgspec.Struct) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(msgspec.json.encode(card))
        artifact = await system.admin.call(Artifacts.put, PutArtifact(folder, kind))
    return str(artifact.digest)


async def ours(system: System, dataset: str, seed: int) -> float:
    """Seconds from the search's submission until its last trial was told to the study."""
    MeasuringServer.asked.clear()
    train = TrainRequest(dataset, structure="tfidf-linear", algorithm="lbfgs", seed=seed)
    search = Search(train, SPACE, sampler="random", trials=TRIALS, parallel=2 * SLOTS, seed=seed)
    request = OptimizeRequest(dataset, (), budget_s=3600.0, quantize=False, search=search)
    begun = time.perf_counter()
    job = await system.admin.call(Jobs.submit, JobSpec("search", "optimizer/1.optimize", msgspec.to_builtins(request),
                                                       msgspec.convert(FREE, Resources)))  # fmt: skip
    await MeasuringServer.asked.wait()
    took = time.perf_counter() - begun

    async def over() -> Any:
        record = await system.admin.call(Jobs.get, JobName(job.id))
        return record if record.state in ("done", "dead", "cancelled") else None

    record = await until(over, 60.0, "the search's end")
    assert record.state == "done", record.fault
    assert record.result["trials"]["done"] == TRIALS
    return took


def optuna_sqlite(seed: int) -> float:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(storage=f"sqlite:///{folder}/study.db", sampler=optuna.samplers.RandomSampler(seed=seed))

        def trial(asked: Any) -> float:
            score = asked.suggest_float("x", 0, 1) + asked.suggest_float("y", 0, 1)
            time.sleep(TRIAL_S)
            return float(score)

        begun = time.perf_counter()
        study.optimize(trial, n_trials=TRIALS, n_jobs=SLOTS)
        return time.perf_counter() - begun


class RayTune:
    """Ray Tune in a process and a network namespace of its own."""

    def __init__(self) -> None:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', sys.executable, "-c", RAY]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self._said: list[str] = []
        threading.Thread(target=lambda: self._said.extend(self._process.stderr or ()), daemon=True).start()

    def search(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{TRIALS}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("took "):
                return float(line.removeprefix("took "))
        raise SystemExit("Ray Tune ended: " + "".join(self._said[-20:]))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


async def searches() -> dict[str, list[float]]:
    """Seconds of each round, by system."""
    took: dict[str, list[float]] = {"kernelm": [], "optuna sqlite": [], "ray tune": []}
    async with System(manifests={name: manifest for name, (manifest, _) in PLUGINS.items()}) as system:
        for service in ("artifacts", "jobs"):
            await system.service(service)
        await system.node(PLUGINS)
        for name in PLUGINS:
            settings = {"train": FREE, "measure": FREE} if name == "optimizer" else {}
            await system.pool(PoolSpec(name, name, settings=settings))
        dataset = await stored(system, "dataset", "dataset.json", DatasetCard("empty", LABELS, (), {}, 1))
        SleepingTrainer.model = await stored(system, "model", "model.json",
                                             ModelCard("empty", "text-classification", "tfidf-linear", LABELS, 1))  # fmt: skip
        tune = await asyncio.to_thread(RayTune)
        try:
            for turn in range(ROUNDS):
                took["ray tune"].append(await asyncio.to_thread(tune.search))
                took["kernelm"].append(await ours(system, dataset, turn))
                took["optuna sqlite"].append(await asyncio.to_thread(optuna_sqlite, turn))
                say(f"round {turn + 1}: " + ", ".join(f"{name} {laps[-1]:.1f} s" for name, laps in took.items()))
        finally:
            await asyncio.to_thread(tune.close)
    return took


def main() -> None:
    where = conditions("ray", "optuna", "torch", "onnxruntime", trials=TRIALS, slots=SLOTS)
    goals, details = {}, {}
    if "search" in PARTS:
        took = asyncio.run(searches())
        overhead = {name: median(laps) - MINIMUM_S for name, laps in took.items()}
        say(f"above the minimum of {MINIMUM_S:g} s: " + ", ".join(f"{name} {s:.1f} s" for name, s in overhead.items()))
        goals["overhead_vs_ray_tune"] = overhead["kernelm"] / overhead["ray tune"]
        details["overhead_s"] = {name: round(s, 2) for name, s in overhead.items()}
    if "int8" in PARTS:
        found = optimize_int8.measured()
        goals |= found.pop("goals")
        details |= found
    finish("optimize", goals, where, **details)


if __name__ == "__main__":
    main()
