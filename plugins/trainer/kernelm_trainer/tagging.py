"""Token classification (entities): the task for the loop."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kernelm_contracts.tags import spans
from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_trainer import encoder, pretrained, scores
from kernelm_trainer.batches import longest_first, padded
from kernelm_trainer.chats import NO_LOSS, Encoded
from kernelm_trainer.lines import Tagged, read_lines, refuse
from kernelm_trainer.task import Done, Rows, Task, Tensors

TOGETHER = 32  # rows in evaluation


class Objective(nn.Module):
    """The cross-entropy of the labels, summed over the words."""

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LOSS, reduction="sum",
                             label_smoothing=self.smoothing)  # fmt: skip


class Tagging(Task):
    """A model that gives each word of a text a label."""

    per_token = True, True, True

    def __init__(self, request: TrainRequest, folder: Path, base: Path, splits: Sequence[str]) -> None:
        self.request, self.folder, self.base, self.notes = request, folder, base, []
        pretrained.check_base(base)
        tokenizer = pretrained.tokenizer(base)
        texts = {split: read_lines(folder, split, Tagged) for split in splits}
        self.labels = tuple(sorted({label for text in texts["train"] for label in text.labels}))
        if len(self.labels) < 2:
            raise refuse("train.jsonl", f"labels: {', '.join(self.labels) or 'none'}; a classifier needs two", "label more texts")
        torch.manual_seed(request.seed)
        names = dict(enumerate(self.labels))
        self.model: nn.Module = pretrained.load(request, base, max(tokenizer.get_vocab().values()) + 1, num_labels=len(names),
                                                id2label=names, label2id={label: k for k, label in names.items()})  # fmt: skip
        self.objective: nn.Module = Objective(self.model, request.label_smoothing)
        self.pad = self.model.config.pad_token_id or 0
        self.rows = {s: [self._row(text, tokenizer, f"{s}.jsonl:{n}") for n, text in enumerate(texts[s], 1)] for s in splits}
        self.lengths = [len(row.ids) for row in self.rows["train"]]

    def _row(self, text: Tagged, tokenizer: object, where: str) -> Encoded:
        if len(text.tokens) != len(text.labels) or not text.tokens:
            raise refuse(where, f"{len(text.tokens)} tokens, {len(text.labels)} labels", "give each token one label")
        if unknown := sorted(set(text.labels) - set(self.labels)):
            raise refuse(where, f"label {unknown[0]} does not occur in train.jsonl", "put such a text into the train split")
        encoding = tokenizer(list(text.tokens), is_split_into_words=True)  # type: ignore[operator]
        ids, words = np.asarray(encoding["input_ids"], np.int64), encoding.word_ids()
        block = self.request.block or len(ids)
        pretrained.check_length(self.model, min(block, len(ids)), where)
        labels = [NO_LOSS if word is None or (k and word == words[k - 1]) else self.labels.index(text.labels[word])
                  for k, word in enumerate(words)]  # fmt: skip
        return Encoded(ids[:block], np.asarray(labels, np.int64)[:block])

    def of(self, split: str, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        found = [self.rows[split][i] for i in rows]
        return *padded([row.ids for row in found], self.pad), padded([row.labels for row in found], NO_LOSS)[0]

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return self.of("train", rows.tolist())

    def units(self, rows: Rows) -> int:
        return sum(int((self.rows["train"][i].labels != NO_LOSS).sum()) for i in rows)

    def tokens(self, split: str) -> int:
        return sum(len(row.ids) for row in self.rows.get(split, ()))

    def evaluate(self, split: str, done: Done) -> Scores:
        """Of words; `per_label["entities"]` is of whole ones, by type and both ends (Tjong Kim Sang and De Meulder, 2003)."""
        rows = self.rows[split]
        found: list[np.ndarray] = [np.zeros((0, len(self.labels)), np.float32)] * len(rows)
        for batch in longest_first([len(row.ids) for row in rows], TOGETHER):
            ids, mask, labels = self.of(split, batch.tolist())
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
            for k, i in enumerate(batch):
                found[i] = logits[k][labels[k] != NO_LOSS].numpy()
            done(int(mask.sum()))
        truth = [row.labels[row.labels != NO_LOSS] for row in rows]
        made = scores.classifier(split, self.labels, np.concatenate(truth), encoder.finite(np.concatenate(found)))
        entities = self._entities(truth, [logits.argmax(1) for logits in found])
        return msgspec.structs.replace(made, documents=len(rows), per_label=made.per_label | {"entities": entities})

    def _entities(self, truth: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> dict[str, float]:
        true, said = ([{*spans([self.labels[k] for k in row])} for row in rows] for rows in (truth, predicted))
        hits, there, found = sum(len(a & b) for a, b in zip(true, said, strict=True)), sum(map(len, true)), sum(map(len, said))
        return {"precision": hits / max(found, 1), "recall": hits / max(there, 1), "f1": 2 * hits / max(there + found, 1),
                "support": float(there)}  # fmt: skip

    def rank(self, scores: Scores) -> tuple[float, ...]:
        return scores.per_label["entities"]["f1"], scores.accuracy, -scores.loss

    def write(self, folder: Path, tensors: Tensors = None) -> None:
        pretrained.write(self.model, tensors, folder, self.request, self.base)
