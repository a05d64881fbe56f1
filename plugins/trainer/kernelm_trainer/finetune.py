"""Full fine-tuning of an encoder: the loop, from top to bottom."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from kernelm_contracts.texts import score
from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import PluginFault
from kernelm_trainer import algorithms, checkpoint, encoder
from kernelm_trainer.batches import padded, shuffled
from kernelm_trainer.corpus import Corpus, Documents
from kernelm_trainer.encoder import Classifier
from kernelm_trainer.observer import Meter, Observer

SAVE_SHARE = 0.05  # of the time may go into checkpoints: where the disk is slow they are written less often


@dataclass(frozen=True)
class Tuned:
    """What came of it: the model holds the parameters of the best epoch."""

    model: Classifier
    validation: Scores
    epoch: int  # the best one, from 1
    tokens_per_s: float
    elapsed_s: float  # by all attempts


class FineTuning:
    """One fine-tuning, new or resumed from the checkpoint in the folder `resume`."""

    def __init__(self, request: TrainRequest, corpus: Corpus, base: Path, work: Path, observer: Observer,
                 resume: Path | None) -> None:  # fmt: skip
        self.request, self.corpus, self.work, self.observer = request, corpus, work, observer
        torch.manual_seed(request.seed)
        self.model = encoder.load(base, corpus, request.layers, request.dropout)
        self.optimizers = algorithms.build(request.algorithm, self.model, request.weight_decay)
        self.pad = self.model.encoder.config.pad_token_id or 0
        self.bf16 = encoder.wants_bf16(request.precision)
        self.position = checkpoint.Position(checkpoint.fingerprint(request, self.model))
        self.best: checkpoint.Tensors = {}
        if resume is not None:
            self.position, self.best = checkpoint.read(resume, self.position.fingerprint, self.model, self.optimizers)
        self.train, self.validation = corpus.splits["train"], corpus.splits["validation"]
        self.epoch_steps = math.ceil(len(self.train.labels) / request.batch_size)
        self.started = time.monotonic() - self.position.elapsed_s
        self.saved_at, self.save_cost_s = time.monotonic(), 0.0
        epoch_work = self.train.tokens + Meter.EVALUATION * self.validation.tokens
        test = Meter.EVALUATION * corpus.splits["test"].tokens if "test" in corpus.splits else 0.0
        done = self.position.tokens + self.position.epoch * Meter.EVALUATION * self.validation.tokens
        self.meter = Meter(observer, request.epochs * epoch_work + test, done)

    def run(self) -> Tuned:
        """Train what is left of the epochs, evaluate after each, keep the best."""
        parameters = dict(self.model.named_parameters())
        while self.position.epoch < self.request.epochs:
            self.train_epoch()
            scores = self.evaluate(self.validation)
            if self.position.best is None or _rank(scores) >= _rank(self.position.best):
                self.position.best, self.position.best_epoch = scores, self.position.epoch + 1
                last = self.position.epoch + 1 == self.request.epochs
                self.best = {} if last else {name: p.detach().clone() for name, p in parameters.items()}
            self.position.epoch, self.position.step, self.position.loss_sum = self.position.epoch + 1, 0, 0.0
            self.save()
        with torch.no_grad():
            for name, tensor in self.best.items():
                parameters[name].copy_(tensor)
        assert self.position.best is not None
        rate = self.position.tokens / max(self.position.train_s, 1e-9)
        return Tuned(self.model, self.position.best, self.position.best_epoch, rate, time.monotonic() - self.started)

    def train_epoch(self) -> None:
        self.model.train()
        lengths = [len(row) for row in self.train.input_ids]
        batches = shuffled(lengths, self.request.batch_size, self.request.seed, self.position.epoch)
        for batch in batches[self.position.step :]:
            began = time.monotonic()
            tokens = sum(lengths[i] for i in batch)
            loss, rate = self.step(padded([self.train.input_ids[i] for i in batch], self.pad),
                                   torch.from_numpy(self.train.labels[batch]))  # fmt: skip
            self.position.step += 1
            self.position.loss_sum += loss
            self.position.tokens += tokens
            self.position.train_s += time.monotonic() - began
            self.report(tokens, loss, rate)
            if time.monotonic() - self.saved_at >= max(self.request.checkpoint_every_s, self.save_cost_s / SAVE_SHARE):
                self.save()

    def step(self, inputs: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> tuple[float, float]:
        """One step of the optimizers; its loss and learning rate. PluginFault "diverged" if the loss is not finite."""
        peak = self.request.learning_rate or algorithms.LEARNING_RATES[self.request.algorithm]
        at = self.position.epoch * self.epoch_steps + self.position.step
        rate = peak * algorithms.rate_at(at, self.request.epochs * self.epoch_steps, self.request.warmup)
        algorithms.set_rate(self.optimizers, rate)
        with encoder.autocast(self.bf16):
            loss = cross_entropy(self.model(*inputs), labels)
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.request.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise PluginFault("diverged", f"training diverged in epoch {self.position.epoch + 1}, step {self.position.step + 1}: "
                              f"loss {loss.item()}, gradient norm {norm.item()}, learning rate {rate:.3g}, "
                              f'algorithm "{self.request.algorithm}", {"bf16" if self.bf16 else "fp32"}',
                              "lower learning_rate, raise warmup, or set precision to fp32; then check the dataset",
                              epoch=self.position.epoch + 1, step=self.position.step + 1)  # fmt: skip
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), rate

    def report(self, tokens: int, loss: float, rate: float) -> None:
        here, mean = self.position, self.position.loss_sum / self.position.step
        self.meter.advance(tokens, f"train epoch {here.epoch + 1}/{self.request.epochs}",
                           f"step {here.step}/{self.epoch_steps}, mean loss {mean:.3f}", loss=round(loss, 5),
                           learning_rate=rate, tokens_per_s=round(here.tokens / here.train_s, 1))  # fmt: skip

    def evaluate(self, documents: Documents) -> Scores:
        """Scores on a split, in float32 as the model will be served."""
        self.model.eval()
        logits = encoder.run(self.model, documents.input_ids, 32, self.pad, lambda tokens: self.meter.advance(
            Meter.EVALUATION * tokens, "evaluate", f"{documents.split} split"))  # fmt: skip
        return score(documents.split, self.corpus.labels, documents.labels, logits)

    def save(self) -> None:
        began = time.monotonic()
        self.position.elapsed_s = began - self.started
        folder = self.work / "checkpoint"
        checkpoint.write(folder, self.position, self.model, self.optimizers, self.best)
        self.observer.save(folder)
        shutil.rmtree(folder)
        self.saved_at = time.monotonic()
        self.save_cost_s = self.saved_at - began


def _rank(scores: Scores) -> tuple[float, float]:
    return scores.accuracy, -scores.loss
