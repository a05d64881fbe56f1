"""Sentence embeddings from pairs of texts that mean the same: the task for the loop."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_trainer import encoder, pretrained, scores
from kernelm_trainer.batches import padded
from kernelm_trainer.lines import Alike, read_lines
from kernelm_trainer.task import Done, Rows, Task, Tensors

SCALE = 20.0  # of the cosines: the inverse temperature
TOGETHER = 32  # texts in evaluation


class Objective(nn.Module):
    """InfoNCE: each anchor's own positive against those of the others that are computed with it (van den Oord et al.,
    "Representation Learning with Contrastive Predictive Coding", 2018, section 2.3), summed over the anchors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[texts, hidden], of unit length."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(encoder.mean(hidden, attention_mask))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        anchors, positives = self.embed(input_ids, attention_mask).chunk(2)
        with torch.autocast("cpu", enabled=False):
            return cross_entropy(SCALE * anchors @ positives.T, torch.arange(len(anchors)), reduction="sum")


class Sentences(Task):
    """An encoder whose means over the tokens are near each other where the texts mean the same."""

    per_token = True, True

    def __init__(self, request: TrainRequest, folder: Path, base: Path, splits: Sequence[str]) -> None:
        self.request, self.folder, self.base, self.notes = request, folder, base, []
        pretrained.check_base(base)
        tokenizer = pretrained.tokenizer(base)
        torch.manual_seed(request.seed)
        self.model: nn.Module = pretrained.load(request, base, max(tokenizer.get_vocab().values()) + 1)
        self.objective = Objective(self.model)
        self.pad = self.model.config.pad_token_id or 0
        self.rows = {split: self._pairs(split, tokenizer) for split in splits}
        self.lengths = [len(a) + len(b) for a, b in self.rows["train"]]

    def _pairs(self, split: str, tokenizer: object) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        found = []
        for number, pair in enumerate(read_lines(self.folder, split, Alike), 1):
            anchor, positive = (np.asarray(tokenizer(text)["input_ids"], np.int64)[: self.request.block or None]  # type: ignore[operator]
                                for text in (pair.anchor, pair.positive))  # fmt: skip
            pretrained.check_length(self.model, max(len(anchor), len(positive)), f"{split}.jsonl:{number}")
            found.append((anchor, positive))
        return found

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        chosen = [self.rows["train"][i] for i in rows]
        return padded([a for a, _ in chosen] + [b for _, b in chosen], self.pad)

    def units(self, rows: Rows) -> int:
        return len(rows)

    def tokens(self, split: str) -> int:
        return sum(len(a) + len(b) for a, b in self.rows.get(split, ()))

    def evaluate(self, split: str, done: Done) -> Scores:
        anchors, positives = (encoder.run(self.objective.embed, [pair[k] for pair in self.rows[split]], TOGETHER, self.pad, done)
                              for k in (0, 1))  # fmt: skip
        logits = SCALE * anchors @ positives.T
        right = logits.argmax(1) == np.arange(len(logits))
        loss = cross_entropy(torch.from_numpy(logits), torch.arange(len(logits))).item()
        bounds = {"accuracy": scores.interval(np.mean, right)}
        return Scores(split, len(logits), float(right.mean()), 0.0, 0.0, loss, intervals=bounds)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        return (-scores.loss,)

    def write(self, folder: Path, tensors: Tensors = None) -> None:
        pretrained.write(self.model, tensors, folder, self.request, self.base)
