"""The plugin: idempotent calls, and jobs that count their steps, save checkpoints and go on from them."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from chaosplugin.contract import Applied, Chaos, Effect
from chaosplugin.journal import FOLDER, Journal
from kernelm_contracts.trainer import Scores, Trained, Trainer, TrainRequest
from kernelm_sdk.plugin import Job, Plugin

POISON = "poison"  # as `TrainRequest.base`: a job whose handler ends its process


class State(msgspec.Struct):
    """What a checkpoint holds."""

    step: int = 0
    total: int = 0  # sum of the squares of all steps so far: wrong if one is left out or done twice


class ChaosPlugin(Plugin, Chaos, Trainer):
    """Implements `trainer/1` too, since the job table takes only jobs of contracts that it knows. Of a `TrainRequest` it
    reads `epochs` (steps), `learning_rate` (seconds a step), `batch_size` (steps between checkpoints), `dataset` (a name)."""

    async def on_start(self) -> None:
        self._journal = Journal(Path(os.environ[FOLDER]), self.context.instance)
        self._journal.note("up", pid=os.getpid())

    async def apply(self, request: Effect, call: Any) -> Applied:
        self._journal.note("call", id=request.id, attempt=request.attempt)
        if request.crash:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.hold_s:
            await asyncio.sleep(request.hold_s)
        first = self._journal.effect(request.id, request.id)
        return Applied(request.id, self.context.instance, not first)

    async def train(self, request: TrainRequest, job: Job) -> Trained:
        state = State()
        if job.checkpoint:
            folder = await self.context.artifact(job.checkpoint)
            state = msgspec.json.decode((folder / "state.json").read_bytes(), type=State)
        note = {"job": job.id, "epoch": job.epoch}
        self._journal.note("start", **note, step=state.step, checkpoint=job.checkpoint)
        while state.step < request.epochs:
            await asyncio.sleep(request.learning_rate)
            job.raise_if_cancelled()
            state.step += 1
            state.total += state.step**2
            if request.base == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            self._journal.effect(f"{job.id}.{state.step}", str(state.total))
            self._journal.note("step", **note, step=state.step)
            job.progress(state.step / request.epochs, "steps", deadline_s=20.0)
            if state.step % request.batch_size == 0:
                digest = await self._save(job, state)
                self._journal.note("saved", **note, step=state.step, digest=digest)
        self._journal.note("end", **note, step=state.step)
        scores = Scores("validation", state.step, 1.0, 1.0, 1.0)
        return Trained(request.dataset, "tfidf-linear", "lbfgs", state.total, scores)

    async def _save(self, job: Job, state: State) -> str:
        folder = job.scratch / f"step-{state.step}"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"job": job.id, "step": state.step, "total": state.total}))
        return await job.save(folder, step=state.step)
