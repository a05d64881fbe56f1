"""Classification of texts by an encoder: the task for the loop."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import distill, encoder, pretrained, scores
from kernelm_trainer.batches import padded
from kernelm_trainer.corpus import Corpus
from kernelm_trainer.distill import Lessons
from kernelm_trainer.task import Done, Rows, Task, Tensors

TOGETHER = 32  # rows in evaluation


class Objective(nn.Module):
    """The cross-entropy of a classifier, summed over the documents; of each label for itself where `many`; with a teacher's."""

    def __init__(self, model: encoder.Classifier, many: bool, smoothing: float, lessons: Lessons | None = None) -> None:
        super().__init__()
        self.model, self.many, self.smoothing, self.lessons = model, many, smoothing, lessons

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids, attention_mask)
        if not self.many:
            loss = cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing)
            if self.lessons is None:
                return loss
            with torch.no_grad():
                wanted = self.lessons.model(input_ids, attention_mask)
            return self.lessons.mixed(loss, logits, wanted)
        target = labels.float() * (1 - self.smoothing) + self.smoothing / 2
        return binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1).sum()


class Classification(Task):
    """An encoder under a head, and the documents of a corpus."""

    per_token = True, True, False  # a document has one label, or a column a label

    def __init__(self, request: TrainRequest, corpus: Corpus, base: Path, teacher: Path | None = None) -> None:
        self.request, self.corpus, self.base, self.notes = request, corpus, base, []
        self.many = request.problem == "multi-label"
        if request.problem == "binary" and len(corpus.labels) != 2:
            raise ClientFault("invalid", f'train request: problem is "binary", the dataset has {len(corpus.labels)} labels',
                              'set it to "multi-class", or prepare a dataset with two classes')  # fmt: skip
        lessons = distill.classifier(request, teacher, corpus)
        torch.manual_seed(request.seed)
        self.model: encoder.Classifier = encoder.load(base, corpus, request.layers, request.dropout)
        self.model.encoder = pretrained.prepared(self.model.encoder, request)
        self.objective: nn.Module = Objective(self.model, self.many, request.label_smoothing, lessons)
        self.train = corpus.splits["train"]
        self.lengths = [len(row) for row in self.train.input_ids]
        self.pad = self.model.encoder.config.pad_token_id or 0

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return *padded([self.train.input_ids[i] for i in rows], self.pad), torch.from_numpy(self.train.labels[rows])

    def units(self, rows: Rows) -> int:
        return len(rows)

    def tokens(self, split: str) -> int:
        return self.corpus.splits[split].tokens if split in self.corpus.splits else 0

    def evaluate(self, split: str, done: Done) -> Scores:
        documents = self.corpus.splits[split]
        logits = encoder.run(self.model, documents.input_ids, TOGETHER, self.pad, done)
        score = scores.multilabel if self.many else scores.classifier
        return score(split, self.corpus.labels, documents.labels, logits)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        return scores.accuracy, -scores.loss

    def write(self, folder: Path, tensors: Tensors = None) -> None:
        if self.request.adapter is not None:
            self.model.encoder = self.model.encoder.merge_and_unload()
        encoder.write(self.model, folder, self.corpus, self.base, tensors)
