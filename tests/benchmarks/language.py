"""make bench-language: a small Llama from scratch on real text against a Kneser-Ney 5-gram of the same tokens, and its answers.

Text: BBC News, 2,127 articles, each once, 5% of them for validation and 5% for test (texts/packing.py); tokens of a byte-level BPE
that is learned from the training split. The Llama is trained by `trainer/1.train` as a job of a real system: broker, kernel,
artifact store, node, job table and scheduler as processes. Then it is deployed, and the `generator` plugin goes on with the
beginnings of articles of the test split. The 5-gram is interpolated modified Kneser-Ney (texts/kneserney.py).

Both are judged on the same tokens: all of a split but the first of each sequence of LENGTH. The 5-gram has its four tokens before
each of them even there where the Llama's sequence has only begun. The Llama is the one with the best validation loss of several
looks, the 5-gram has seen the training split alone; the test split was not used for anything. `bits_per_byte` compares across
vocabularies; `bits_per_byte_of_8192` is the 5-gram's with a vocabulary that suits it better.

Environment: STEPS (of 8 x 256 tokens; 6,000 are six passes at the default vocabulary), VOCABULARY.
"""

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kernelm.testing.harness import System, until
from kernelm_contracts.deployments import DEPLOY, DeployRequest
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_contracts.server import GenerateRequest, Server
from kernelm_contracts.trainer import Trained, TrainRequest
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import ArtifactName, Artifacts, PoolSpec, PutArtifact, Resources

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "texts"))
import packing
from kneserney import KneserNey
from reporting import conditions, finish

STEPS = int(os.environ.get("STEPS", "6000"))
VOCABULARY = int(os.environ.get("VOCABULARY", "512"))
LENGTH, BATCH, ORDER = 256, 8, 5
CORES = os.cpu_count() or 1
NAME = "bench-writer"
LLAMA = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 704,
         "max_position_embeddings": LENGTH, "tie_word_embeddings": True}  # fmt: skip
BEGINNINGS = 3  # articles that are gone on with
RESAMPLES = 2000
FIGURES = ("llama", "kneser_ney", "quotient")
PATIENCE_S = 4 * 3600.0
Streams = dict[str, NDArray[Any]]  # split -> ids, or nats, of its tokens
console = Console(stderr=True, soft_wrap=True)


def divided(texts: list[str]) -> dict[str, list[str]]:
    """The articles of each split."""
    part = len(texts) // 20
    return {"validation": texts[:part], "test": texts[part : 2 * part], "train": texts[2 * part :]}


def rival(streams: Streams, split: str, vocabulary: int = VOCABULARY) -> NDArray[np.float64]:
    """Nats of each token of a split by the 5-gram."""
    costs: NDArray[np.float64] = -np.log(KneserNey(streams["train"], vocabulary, ORDER).probabilities(streams[split]))
    return costs


def read(model: Path, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nats of each token of a stream by the Llama in `model`, 0 for the first of each sequence."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    transformers.logging.disable_progress_bar()
    llama, costs = transformers.AutoModelForCausalLM.from_pretrained(model).eval(), np.zeros(len(ids))
    with torch.inference_mode():
        for begin in range(0, len(ids), LENGTH):
            row = torch.from_numpy(ids[begin : begin + LENGTH])
            if len(row) > 1:
                logits = llama(input_ids=row[None], use_cache=False).logits[0, :-1].float()
                costs[begin + 1 : begin + len(row)] = cross_entropy(logits, row[1:], reduction="none").numpy()
    return costs


def request(dataset: str) -> TrainRequest:
    return TrainRequest(dataset, structure="causal-lm", architecture=LLAMA, epochs=1000, max_steps=STEPS, batch_size=BATCH,
                        micro_batch=BATCH, algorithm="muon", learning_rate=3e-3, schedule="cosine", warmup=0.05, weight_decay=0.1,
                        evaluate_every=max(STEPS // 10, 50), compile="auto")  # fmt: skip


async def ended(system: System, job: JobRecord, progress: Progress) -> JobRecord:
    """The record of a job that has a result."""
    task = progress.add_task(job.spec.name, total=1.0, note="")

    async def over() -> JobRecord | None:
        now: JobRecord = await system.admin.call(Jobs.get, JobName(job.id), timeout_s=30.0, patience_s=60.0)
        if now.state in ("dead", "cancelled"):
            sys.exit(f"{now.spec.name} failed: {now.fault}")
        about = now.progress
        loss = f", loss {about.metrics['loss']:.3f}" if "loss" in about.metrics else ""
        progress.update(task, completed=1.0 if now.result else about.fraction, note=f"{about.phase} {about.message}{loss}")
        return now if now.result else None

    return await until(over, PATIENCE_S, job.spec.name)  # type: ignore[no-any-return]


async def answers(system: System, beginnings: list[str]) -> list[str]:
    """How the served model goes on with each of them."""
    found = []
    for number, prompt in enumerate(beginnings):
        asked = GenerateRequest(prompt=prompt, max_tokens=60, temperature=0.7, seed=number)
        frames = [f.text async for f in system.admin.stream(Server.generate, asked, model=NAME)]
        found.append("".join(frames))
    return found


async def measure(home: Path, corpus: Path, streams: Streams, beginnings: list[str]) -> tuple[Trained, Streams, list[str]]:
    """Train, read both splits, and serve: what the trainer says, the nats of each token by split, and how articles go on."""
    installed, _ = find_manifests()
    manifests = {name: msgspec.structs.replace(m, default=False) for name, m in installed.items()}
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    async with System(home, manifests=manifests) as system:
        await system.service("artifacts")
        await system.service("node", KERNELM_NODE_CPU=str(CORES + 1), KERNELM_NODE_MEMORY_MB="8000")
        await system.service("jobs")
        for name in ("scheduler", "trainer"):
            await system.pool(PoolSpec(name, name))
        dataset = (await system.admin.call(Artifacts.put, PutArtifact(str(corpus), "dataset"))).digest
        with Progress(*columns, console=console) as progress:
            train = JobSpec("llama", "trainer/1.train", msgspec.to_builtins(request(dataset)), Resources(float(CORES), 4000))
            done = await ended(system, await system.admin.call(Jobs.submit, train), progress)
            trained = msgspec.convert(done.result, Trained)
            folder = Path((await system.admin.call(Artifacts.open, ArtifactName(trained.model))).path)
            costs = {split: await asyncio.to_thread(read, folder, streams[split]) for split in ("validation", "test")}
            deploy = msgspec.to_builtins(DeployRequest(NAME, trained.model, "generator"))
            serve = JobSpec("deploy", DEPLOY, deploy, Resources(1.0, 1500))
            await ended(system, await system.admin.call(Jobs.submit, serve), progress)
        return trained, costs, await answers(system, beginnings)


def compared(split: str, costs: NDArray[np.float64], streams: Streams, texts: list[str]) -> dict[str, Any]:
    """Both on one split, with 95% intervals by bootstrap over the sequences; that of the quotient is of pairs."""
    theirs, size = rival(streams, split), sum(len(text.encode()) for text in texts)
    judged = np.arange(len(costs)) % LENGTH > 0
    begins = np.arange(0, len(costs), LENGTH)
    ours, kneser_ney, tokens = (np.add.reduceat(np.where(judged, each, 0.0), begins) for each in (costs, theirs, judged))
    drawn = np.random.default_rng(0).integers(0, len(begins), (RESAMPLES, len(begins)))

    def figure(nats: NDArray[np.float64]) -> list[float]:
        """[a perplexity, or a quotient of two; low, high]"""
        again = np.exp(nats[drawn].sum(1) / tokens[drawn].sum(1))
        return [round(float(x), 4) for x in (np.exp(nats.sum() / tokens.sum()), *np.percentile(again, [2.5, 97.5]))]

    found = {"llama": figure(ours), "kneser_ney": figure(kneser_ney), "quotient": figure(ours - kneser_ney)}
    bits = {"llama": ours.sum() / tokens.sum() * len(costs), "kneser_ney": theirs.sum()}
    return {**found, "tokens": int(tokens.sum()),
            "bits_per_byte": {name: round(float(nats / np.log(2) / size), 4) for name, nats in bits.items()}}  # fmt: skip


def main() -> None:
    began = time.monotonic()
    texts = divided(packing.articles())
    tokenizer = packing.learn(texts["train"], VOCABULARY)
    streams = {split: packing.stream(tokenizer, part) for split, part in texts.items()}
    beginnings = [" ".join(text.split()[:20]) for text in texts["test"][:BEGINNINGS]]
    with tempfile.TemporaryDirectory(prefix="kernelm-bench-") as name:
        home, corpus = Path(name) / "home", Path(name) / "corpus"
        home.mkdir()
        packing.write(corpus, tokenizer, streams, LENGTH)
        trained, costs, answered = uvloop.run(measure(home, corpus, streams, beginnings))
    splits = {split: compared(split, nats, streams, texts[split]) for split, nats in costs.items()}
    wider = packing.learn(texts["train"], 8192)
    wide = {split: packing.stream(wider, texts[split]) for split in ("train", "validation")}
    suited = rival(wide, "validation", 8192).sum() / np.log(2) / sum(len(text.encode()) for text in texts["validation"])
    goals = {"ppl_vs_kneser_ney": splits["validation"]["quotient"][0]}
    for split, found in splits.items():
        said = [f"{name} {found[name][0]:.3f} ({found[name][1]:.3f} to {found[name][2]:.3f})" for name in FIGURES]
        console.print(f"{split}: perplexity {', '.join(said)}")
    for beginning, answer in zip(beginnings, answered, strict=True):
        console.print(f"\n[bold]{beginning}[/bold]{answer}", highlight=False)
    finish("language", goals, conditions("torch", "transformers", steps=STEPS, vocabulary=VOCABULARY, order=ORDER),
           splits=splits, bits_per_byte_of_8192=round(float(suited), 4), parameters=trained.parameters,
           tokens_per_s=trained.tokens_per_s, train_tokens=len(streams["train"]), seconds=round(time.monotonic() - began),
           answers=answered)  # fmt: skip


if __name__ == "__main__":
    main()
