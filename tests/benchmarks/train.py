"""make bench-train: a Llama of 30 M parameters from scratch, batch 8 x 256 tokens, by three trainers in turns.

- the trainer plugin under the kernel: broker, kernel, artifact store, node, job table and scheduler as processes, `trainer/1.train`
  as a job (bf16 where the processor has it, torch.compile);
- the same loop without a kernel, in a process of its own, its progress going nowhere;
- Hugging Face's Trainer with its defaults (float32, eager), with the same model, data, batch, rate and schedule.

Text: BBC News, tokens of a byte-level BPE that is learned from it, packed (texts/packing.py). Tokens/s are those of the steps
after the first one, which compiles or warms up, with all that lies between them; the first ones' seconds are beside them. Each
round has a seed of its own, which draws the parameters and the order of the batches; `losses` are the means of each trainer's last
steps by round, to be compared with how they differ from round to round.

While one trainer works nothing else of the benchmark does: the system is up for its own trainer alone, and is listened to and not
asked, since whoever asks takes processor time of the two cores that it measures. `beside_percent` is the processor time that the
system's other processes took beside the training, in percent of one core.

Environment: ROUNDS, STEPS (6 at least). The defaults are for 8 minutes on two cores that do nothing else.
"""

import asyncio
import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.progress import Progress

from kernelm.testing.harness import System
from kernelm_contracts.jobs import JobChanged, JobName, JobProgress, JobRecord, Jobs, JobSpec
from kernelm_contracts.trainer import Keep, TrainRequest
from kernelm_sdk.events import Received
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Artifacts, PoolSpec, PutArtifact, Resources

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "texts"))
import packing
from reporting import conditions, finish, median

ROUNDS = int(os.environ.get("ROUNDS", "3"))
STEPS = int(os.environ.get("STEPS", "12"))
CORES = os.cpu_count() or 1
LENGTH, BATCH, VOCABULARY = 256, 8, 8192
LAST = 5  # steps whose mean loss is compared
END = STEPS // LAST * LAST  # the last one of them: Hugging Face's Trainer tells the mean of so many at a time
RATE = 1e-4
LLAMA = {"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376,
         "max_position_embeddings": LENGTH, "tie_word_embeddings": True}  # fmt: skip
console = Console(stderr=True, soft_wrap=True)


class Measured(msgspec.Struct):
    """Of one training."""

    tokens_per_s: float
    first_s: float  # of the first step
    loss: float  # mean of the last steps


def request(dataset: str, seed: int) -> TrainRequest:
    return TrainRequest(dataset, structure="causal-lm", architecture=LLAMA, epochs=100, max_steps=STEPS, batch_size=BATCH,
                        micro_batch=BATCH, learning_rate=RATE, warmup=0.0, weight_decay=0.0, compile="on", seed=seed,
                        checkpoint_every_s=86400.0, keep=Keep(best=False), report_test=False)  # fmt: skip


def prepare(folder: Path) -> None:
    """A corpus as `data/1` writes it; all sequences are whole."""
    texts = packing.articles()
    tokenizer = packing.learn(texts, VOCABULARY)
    ids = packing.stream(tokenizer, texts)
    ids = ids[: len(ids) // LENGTH * LENGTH]
    packing.write(folder, tokenizer, {"validation": ids[: 16 * LENGTH], "train": ids[16 * LENGTH :]}, LENGTH)


class Steps:
    """Observer of a loop: when each step was over, and its loss."""

    def __init__(self) -> None:
        self.began, self.times, self.losses = time.perf_counter(), [], []  # type: ignore[var-annotated]

    def progress(self, fraction: float, phase: str, message: str = "", **metrics: float) -> None:
        if not self.times and phase == "load":
            self.began = time.perf_counter()
        if "loss" in metrics:
            self.step(metrics["loss"])

    def save(self, folder: Path, lasting: bool = False) -> None: ...

    def begins_anew(self, why: str) -> None: ...

    def step(self, loss: float) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(loss)

    def measured(self) -> Measured:
        seconds = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        known = [loss for loss in self.losses[END - LAST : END] if math.isfinite(loss)]  # Hugging Face's is logged now and then
        return Measured(BATCH * LENGTH / seconds, self.times[0] - self.began, sum(known) / len(known))


def bare(folder: Path, seed: int) -> Measured:
    """The plugin's loop, here."""
    import torch

    from kernelm_trainer.training import Folders, train

    torch.set_num_threads(CORES)
    steps = Steps()
    with tempfile.TemporaryDirectory() as work:
        outcome = train(request("sha256:bench", seed), Folders(folder, Path(work)), steps)
    return msgspec.structs.replace(steps.measured(), tokens_per_s=outcome.tokens_per_s)


def hugging_face(folder: Path, seed: int) -> Measured:
    """Transformers' Trainer with its defaults; what is set is the task, and that nothing is saved or sent."""
    import pyarrow.parquet as pq
    import transformers

    table = pq.read_table(folder / "packed/train/00000.parquet")
    rows = [{"input_ids": row, "labels": row} for row in table["input_ids"].to_pylist()]
    transformers.set_seed(seed)
    config = transformers.AutoConfig.for_model(**LLAMA, vocab_size=VOCABULARY)
    steps = Steps()

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            steps.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.step(float("nan"))

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, float] | None = None, **____: Any) -> None:
            if logs and "loss" in logs:
                steps.losses[-LAST:] = [float(logs["loss"])] * LAST

    with tempfile.TemporaryDirectory() as work:
        arguments = transformers.TrainingArguments(work, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
                                                   seed=seed, report_to="none", save_strategy="no", disable_tqdm=True,
                                                   logging_steps=LAST)  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Watch()],
                             data_collator=transformers.default_data_collator).train()  # fmt: skip
    return steps.measured()


def elsewhere(what: str, folder: Path, seed: int) -> Measured:
    """The same in a process of its own, so that no trainer finds memory or threads of another one."""
    done = subprocess.run([sys.executable, __file__, what, str(folder), str(seed)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)


class Beside:
    """Processor time of this process, which is the kernel, and of its children, but for the one that works most: the trainer."""

    def __init__(self) -> None:
        self.looks: list[tuple[float, dict[int, float]]] = []  # two, as a look takes milliseconds itself

    def look(self) -> None:
        spent: dict[int, float] = {}
        for process in (own := psutil.Process(), *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                spent[process.pid] = sum(process.cpu_times()[:2])
        self.looks.append((time.monotonic(), spent))

    def percent(self) -> float:
        """Of one core, between the looks; NaN without two."""
        if len(self.looks) < 2:
            return math.nan
        (begun, before), (ended, after) = self.looks
        took = sorted(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
        return 100 * sum(took[:-1]) / (ended - begun)


class Followed:
    """A job, as its events tell of it."""

    def __init__(self) -> None:
        self.losses: dict[float, float] = {}  # by step
        self.beside = Beside()
        self.over = asyncio.Event()

    async def on_progress(self, received: Received) -> None:
        assert isinstance(received.event, JobProgress)
        if "loss" in (metrics := received.event.progress.metrics):
            self.losses[metrics["step"]] = metrics["loss"]
            if not self.beside.looks or (len(self.beside.looks) == 1 and metrics["step"] > STEPS - 3):
                self.beside.look()

    async def on_state(self, received: Received) -> None:
        assert isinstance(received.event, JobChanged)
        if received.event.state in ("done", "dead", "cancelled"):
            self.over.set()


async def under_kernel(home: Path, corpus: Path, seed: int) -> tuple[Measured, float]:
    """As a job of a system that is up for nothing else; with what the system took beside it, in percent of one core."""
    installed, _ = find_manifests()
    home.mkdir()
    async with System(home, manifests={name: msgspec.structs.replace(m, default=False) for name, m in installed.items()}) as system:
        await system.service("artifacts")
        await system.service("node", KERNELM_NODE_CPU=str(CORES), KERNELM_NODE_MEMORY_MB="16000")
        await system.service("jobs")
        await system.pool(PoolSpec("scheduler", "scheduler"))
        await system.pool(PoolSpec("trainer", "trainer"))
        dataset = (await system.admin.call(Artifacts.put, PutArtifact(str(corpus), "dataset"))).digest
        followed = Followed()
        await system.admin.follow(followed.on_progress, "evt.job.progress.*")
        await system.admin.follow(followed.on_state, "evt.job.state.*")
        spec = JobSpec("llama", "trainer/1.train", msgspec.to_builtins(request(dataset, seed)), Resources(float(CORES), 4000))
        job: JobRecord = await system.admin.call(Jobs.submit, spec)
        async with asyncio.timeout(1800.0):
            await followed.over.wait()
        job = await system.admin.call(Jobs.get, JobName(job.id))
    if job.state != "done":
        sys.exit(f"the job is {job.state}: {job.fault}")
    last = [loss for step, loss in followed.losses.items() if END - LAST < step <= END]
    return Measured(job.result["tokens_per_s"], 0.0, sum(last) / max(len(last), 1)), followed.beside.percent()


async def measure(folder: Path, corpus: Path) -> tuple[dict[str, list[Measured]], list[float]]:
    found: dict[str, list[Measured]] = {"kernel": [], "bare": [], "hugging face": []}
    beside: list[float] = []
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("trainings", total=3 * ROUNDS)
        for seed in range(ROUNDS):
            for name in found:
                progress.update(task, description=f"round {seed + 1}: {name}", refresh=True)
                if name == "kernel":
                    measured, percent = await under_kernel(folder / f"home{seed}", corpus, seed)
                    beside.append(percent)
                else:
                    measured = elsewhere(name, corpus, seed)
                found[name].append(measured)
                progress.advance(task)
    return found, beside


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        prepare(corpus)
        found, beside = uvloop.run(measure(Path(folder), corpus))
    rate = {name: median([m.tokens_per_s for m in all]) for name, all in found.items()}
    goals = {"vs_hf_trainer": rate["kernel"] / rate["hugging face"], "supervised_ratio": rate["bare"] / rate["kernel"]}
    finish("train", goals, conditions("torch", "transformers", "accelerate", rounds=ROUNDS, steps=STEPS), tokens_per_s=rate,
           beside_percent=round(median(beside), 2),
           first_step_s={name: round(median([m.first_s for m in all]), 1) for name, all in found.items() if name != "kernel"},
           losses={name: [round(m.loss, 3) for m in all] for name, all in found.items()})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:]:
        done = {"bare": bare, "hugging face": hugging_face}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
        print(msgspec.json.encode(done).decode())
    else:
        main()
