"""The training loop, from top to bottom, for every task that learns by gradients."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_trainer import algorithms, checkpoint, compiling, memory
from kernelm_trainer.batches import poisson, shuffled
from kernelm_trainer.encoder import autocast, wants_bf16
from kernelm_trainer.observer import Meter, Observer
from kernelm_trainer.private import Private
from kernelm_trainer.processes import ALONE, Processes
from kernelm_trainer.saver import Saver
from kernelm_trainer.schedule import rate_at
from kernelm_trainer.task import Rows, Task
from kernelm_trainer.watch import check_loss

FIRST = np.zeros(1, np.int64)  # stands in, weighing nothing, for a batch that chance has left empty
SAVE_SHARE = 0.05  # of the time may go into checkpoints: where the disk is slow they are written less often


@dataclass(frozen=True)
class Tuned:
    """What came of it: the model holds the best parameters."""

    validation: Scores
    epoch: int  # the one that they are of, from 1
    tokens_per_s: float
    elapsed_s: float  # by all attempts
    notes: tuple[str, ...]
    epsilon: float  # of differential privacy, spent; 0 without


class Training:
    """One training, new or resumed from the checkpoint in the folder `resume`."""

    def __init__(self, request: TrainRequest, task: Task, work: Path, observer: Observer, resume: Path | None,
                 processes: Processes = ALONE, memory_mb: float = 0.0) -> None:  # fmt: skip
        self.request, self.task, self.model, self.processes = request, task, task.model, processes
        self.bf16 = wants_bf16(request.precision)
        self.epoch_steps = math.ceil(len(task.lengths) / request.batch_size)
        self.steps = min(request.epochs * self.epoch_steps, request.max_steps or request.epochs * self.epoch_steps)
        self.private = Private(request, task, self.steps) if request.privacy else None
        self.objective = self.private.objective if self.private else processes.spread(task.objective, task.model)
        self.optimizers = algorithms.build(request.algorithm, self.model, request.weight_decay)
        self.position = checkpoint.Position(checkpoint.fingerprint(request, self.model))
        self.best: checkpoint.Tensors = {}
        if not self._resumed(resume, observer):
            torch.manual_seed(request.seed + processes.rank)
            memory.choose(self, memory_mb)
            compiling.choose(self)
        if self.private:
            self.optimizers = self.private.attach(self.optimizers)
        if self.position.compiled:
            self.objective = torch.compile(self.objective)
        self.peak = request.learning_rate or algorithms.LEARNING_RATES[request.algorithm]
        self.warm, self.since = False, 0.0  # since when the step under way takes its time
        self.started = time.monotonic() - self.position.elapsed_s
        self.saver = Saver(work, observer, processes.leads)
        self.meter = self._meter(observer)

    def run(self) -> Tuned:
        """Train what is left, look at the validation split now and then, keep the best parameters."""
        here = self.position
        self.objective.train()
        self.since = time.monotonic()
        try:
            while here.steps < self.steps:
                for batch in self.batches()[here.step :]:
                    rate = self.peak * rate_at(here.steps, self.steps, self.request.warmup, self.request.schedule)
                    algorithms.set_rate(self.optimizers, rate)
                    loss, norm = self.gradients(batch)
                    check_loss(here, self.request, loss, norm, rate, self.bf16)
                    for optimizer in self.optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                    self.count(batch)
                    self.report(batch, loss, norm, rate)
                    ended = here.step == self.epoch_steps or here.steps == self.steps
                    if self.to_evaluate(ended):
                        self.look()
                    if ended:
                        here.epoch, here.step = here.epoch + 1, 0
                    if self.to_save(ended):
                        self.save()
                    if here.steps == self.steps:
                        break
            self.saver.wait()
        finally:
            self.saver.close()
        self.take_best()
        assert here.best is not None
        notes = (*self.task.notes, *here.notes, *self.saver.notes)
        rate = here.timed_tokens / max(here.train_s, 1e-9)
        return Tuned(here.best, here.best_epoch, rate, time.monotonic() - self.started, notes,
                     self.private.epsilon(here.steps) if self.private else 0.0)  # fmt: skip

    def batches(self) -> list[Rows]:
        """Of the present epoch; they follow from seed and epoch alone."""
        draw = poisson if self.private else shuffled
        return draw(self.task.lengths, self.request.batch_size, self.request.seed, self.position.epoch)

    def gradients(self, batch: Rows) -> tuple[float, float]:
        """Put the clipped gradient of the batch's mean loss into the parameters; the loss, and the norm before."""
        units, size = max(1, self.task.units(batch)), self.position.micro_batch
        mine, counts = self.processes.share(batch) if len(batch) else (FIRST, 0.0)
        rounds = max(1, self.processes.rounds(batch, size))
        total = 0.0
        for k in range(rounds):
            rows = mine[k * size : (k + 1) * size]
            weight = counts if len(rows) else 0.0
            with self.processes.exchange(self.objective, now=k == rounds - 1):
                with autocast(self.bf16):
                    loss = self.objective(*self.task.inputs(rows if len(rows) else mine[:1]))
                # the processes' gradients are averaged, and those of private examples are by the optimizer
                (loss * (weight if self.private else weight * self.processes.size / units)).backward()
            total += weight * loss.item()
            if self.private and k < rounds - 1:
                self.private.keep()
        loss_of_all = self.processes.sum(total)[0] / units
        if self.private:
            return loss_of_all, 0.0
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        found = self.processes.whole(norm).item()
        if not found <= self.request.max_grad_norm:  # scaling by 1 would still read and write them all
            clip_grads_with_norm_(parameters, self.request.max_grad_norm, norm)
        return loss_of_all, found

    def count(self, batch: Rows) -> None:
        here, now = self.position, time.monotonic()
        here.step, here.steps = here.step + 1, here.steps + 1
        here.tokens += self.tokens(batch)
        if self.warm:  # the first step of an attempt compiles, or makes room
            here.timed_tokens += self.tokens(batch)
            here.train_s += now - self.since  # with what was told of the step before
        self.warm, self.since = True, now

    def tokens(self, batch: Rows) -> int:
        return sum(int(self.task.lengths[i]) for i in batch)

    def report(self, batch: Rows, loss: float, norm: float, rate: float) -> None:
        here, epochs = self.position, math.ceil(self.steps / self.epoch_steps)
        self.meter.advance(self.tokens(batch), f"train epoch {here.epoch + 1}/{epochs}",
                           f"step {here.steps:,}/{self.steps:,}{self.saver.said}", loss=round(loss, 5),
                           learning_rate=rate, gradient_norm=round(norm, 5), step=here.steps,
                           tokens_per_s=round(here.timed_tokens / max(here.train_s, 1e-9), 1))  # fmt: skip

    def to_evaluate(self, ended: bool) -> bool:
        every = self.request.evaluate_every
        return self.position.steps == self.steps or (self.position.steps % every == 0 if every else ended)

    def look(self) -> None:
        """Evaluate the validation split, and keep the parameters if they are the best so far."""
        here, last = self.position, self.position.steps == self.steps
        scores = self.evaluate("validation")
        if here.best is None or self.task.rank(scores) >= self.task.rank(here.best):
            here.best, here.best_epoch = scores, here.epoch + 1
            self.best = {} if last else {name: p.detach().clone() for name, p in checkpoint.trained(self.model).items()}
        self.meter.advance(0.0, "evaluate", "validation split", epoch=here.epoch + 1, step=here.steps,
                           validation_accuracy=scores.accuracy, validation_loss=scores.loss)  # fmt: skip
        self.objective.train()
        self.since = time.monotonic()

    def evaluate(self, split: str) -> Scores:
        """Scores on a split, in float32 as the model will be served."""
        self.objective.eval()
        done = self.position.evaluated
        scores = self.task.evaluate(split, lambda tokens: self.meter.advance(
            Meter.EVALUATION * tokens, "evaluate", f"{split} split"))  # fmt: skip
        self.position.evaluated = done + self.task.tokens(split)
        return scores

    def to_save(self, ended: bool) -> bool:
        due = max(self.request.checkpoint_every_s, self.saver.cost_s / SAVE_SHARE)
        late = self.processes.agreed(time.monotonic() - self.saver.saved_at >= due)
        return ended or late or self.lasting()

    def lasting(self) -> bool:
        """Whether the checkpoint after this step stays in the store when there are later ones."""
        every = self.request.keep.every
        return bool(every and self.position.steps % every == 0)

    def save(self) -> None:
        """Hand a copy of the present state to the saver, which writes it beside the training."""
        self.saver.wait()
        self.position.elapsed_s = time.monotonic() - self.started
        best = self.best if self.request.keep.best else {}
        taken = checkpoint.take(self.position, self.model, self.optimizers, best, self.processes)
        self.saver.save(taken, self.position.steps, self.lasting())
        self.since = time.monotonic()

    def _resumed(self, resume: Path | None, observer: Observer) -> bool:
        """Whether the training goes on from a checkpoint: there is one, which fits."""
        if not self.processes.agreed(resume is not None):
            return False
        try:
            self.position, self.best = checkpoint.read(
                resume, self.position.fingerprint, self.model, self.optimizers, self.processes)  # fmt: skip
        except checkpoint.Misfit as error:
            observer.begins_anew(str(error))
            return False
        return True

    def take_best(self) -> None:
        parameters = checkpoint.trained(self.model)
        with torch.no_grad():
            for name, tensor in self.best.items():
                parameters[name].copy_(tensor)

    def _meter(self, observer: Observer) -> Meter:
        here, task = self.position, self.task
        looks = math.ceil(self.steps / (self.request.evaluate_every or self.epoch_steps))
        work = sum(map(int, task.lengths)) * self.steps / self.epoch_steps
        total = work + Meter.EVALUATION * (looks * task.tokens("validation") + task.tokens("test"))
        return Meter(observer, total, here.tokens + Meter.EVALUATION * here.evaluated)
