"""Language models, causal and sequence-to-sequence: the tasks for the loop."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_trainer import distill, packed, pretrained, scores
from kernelm_trainer.batches import longest_first, padded
from kernelm_trainer.chats import CHATML, NO_LOSS, Encoded, encode
from kernelm_trainer.distill import Lessons
from kernelm_trainer.lines import Chat, Pair, read_lines, refuse
from kernelm_trainer.processes import ALONE, Processes
from kernelm_trainer.task import Done, Rows, Task, Tensors

TOGETHER = 8  # rows in evaluation


class Objective(nn.Module):
    """The cross-entropy of the next tokens, summed, with a teacher's; `labels` are those of the logits at the same place."""

    def __init__(self, model: nn.Module, smoothing: float, lessons: Lessons | None = None) -> None:
        super().__init__()
        self.model, self.smoothing, self.lessons = model, smoothing, lessons

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        *given, labels = inputs
        logits = logits_of(self.model, *given)
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LOSS, reduction="sum",
                             label_smoothing=self.smoothing)  # fmt: skip
        if self.lessons is None:
            return loss
        with torch.no_grad():
            wanted = logits_of(self.lessons.model, *given)
        counts = labels != NO_LOSS
        return self.lessons.mixed(loss, logits[counts], wanted[counts])


def logits_of(model: nn.Module, ids: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, vocabulary]. A causal model needs no mask for padding that stands behind all that counts."""
    if not more:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    else:
        mask, decoder_ids = more
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False).logits
    return logits


class Language(Task):
    """What causal and sequence-to-sequence models have in common: evaluation by loss, perplexity and next-token accuracy."""

    def __init__(self, request: TrainRequest, folder: Path, base: Path | None) -> None:
        self.request, self.folder, self.base, self.notes = request, folder, base, []

    def finish(self, model: nn.Module, lessons: Lessons | None = None) -> None:
        self.model = model
        self.objective: nn.Module = Objective(model, self.request.label_smoothing, lessons)
        self.pad = model.config.pad_token_id or 0

    def of(self, split: str, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The tensors of rows of a split; the last are the labels."""
        raise NotImplementedError

    def sizes(self, split: str) -> NDArray[np.int64]:
        """Tokens of each row of a split."""
        raise NotImplementedError

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return self.of("train", rows.tolist())

    def tokens(self, split: str) -> int:
        return int(self.sizes(split).sum())

    def evaluate(self, split: str, done: Done) -> Scores:
        sizes = self.sizes(split)
        losses, hits, counts = np.zeros(len(sizes)), np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
        for batch in longest_first(sizes.tolist(), TOGETHER):
            *given, labels = self.of(split, batch.tolist())
            with torch.inference_mode():
                logits = logits_of(self.model, *given)
                # flat: over a dimension that is not the last it takes 3.6 times as long (8 x 256 tokens of 8,192)
                loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS, reduction="none")
            losses[batch] = loss.view(labels.shape).double().sum(1).numpy()
            counts[batch] = (labels != NO_LOSS).sum(1).numpy()
            hits[batch] = ((logits.argmax(-1) == labels) & (labels != NO_LOSS)).sum(1).numpy()
            done(int(sizes[batch].sum()))
        if not np.isfinite(losses).all():
            raise PluginFault("not_finite", "the model gives a loss that is not finite", "train with a lower learning_rate")
        return scores.language(split, losses, hits, counts)

    def rank(self, scores: Scores) -> tuple[float, ...]:
        return (-scores.loss,)

    def write(self, folder: Path, tensors: Tensors = None) -> None:
        pretrained.write(self.model, tensors, folder, self.request, self.base, self.folder)


class Causal(Language):
    """A causal language model on a packed corpus, or on chats."""

    per_token = True, True

    def __init__(self, request: TrainRequest, folder: Path, base: Path | None, splits: Sequence[str], work: Path,
                 processes: Processes = ALONE, teacher: Path | None = None) -> None:  # fmt: skip
        super().__init__(request, folder, base)
        self.chats = not packed.has_packed(folder)
        if self.chats and base is None:
            raise ClientFault("invalid", "train request: chats need a base, a model that has read before", "set base")
        source = base if self.chats else folder
        if not (source / "tokenizer.json").is_file():  # type: ignore[operator]
            raise refuse("tokenizer.json", "is missing", "prepare the corpus with a tokenizer")
        tokenizer = pretrained.tokenizer(source)  # type: ignore[arg-type]
        if base is not None and not self.chats:
            pretrained.check_base(base)
            if pretrained.tokenizer(base).get_vocab() != tokenizer.get_vocab():
                raise ClientFault("base_mismatch", "dataset: tokenizer.json has another vocabulary than the base's",
                                  "prepare the dataset with the tokenizer of this base")  # fmt: skip
        lessons = distill.language(request, teacher, tokenizer.get_vocab())
        torch.manual_seed(request.seed)
        special = {} if base is not None else pretrained.special_ids(tokenizer)
        self.finish(pretrained.load(request, base, max(tokenizer.get_vocab().values()) + 1, **special), lessons)
        self.rows = {split: self._chats(split, tokenizer) if self.chats else self._packed(split, work, processes)
                     for split in splits}  # fmt: skip
        self.lengths = self.sizes("train")
        self.template = CHATML if self.chats and not tokenizer.chat_template else ""

    def write(self, folder: Path, tensors: Tensors = None) -> None:
        super().write(folder, tensors)
        if self.template:  # who asks it has to write chats as it has read them
            (folder / "chat_template.jinja").write_text(self.template)

    def _packed(self, split: str, work: Path, processes: Processes) -> packed.Sequences:
        found = packed.read_packed(self.folder, split, self.request.block, work, processes)
        packed.check_vocabulary(found, self.model.config.vocab_size)
        pretrained.check_length(self.model, packed.longest(found), f"packed/{split}: the longest sequence")
        return found

    def _chats(self, split: str, tokenizer: object) -> list[Encoded]:
        found, block = [], self.request.block
        for number, chat in enumerate(read_lines(self.folder, split, Chat), 1):
            ids, labels = encode(chat, tokenizer, f"{split}.jsonl:{number}")
            if block and len(ids) > block:
                ids, labels = ids[:block], labels[:block]
            pretrained.check_length(self.model, len(ids), f"{split}.jsonl:{number}")
            if (labels[1:] != NO_LOSS).any():
                found.append(Encoded(ids, labels))
        if not found:
            raise refuse(f"{split}.jsonl", f"no answer begins within {block} tokens", "set a larger block")
        return found

    def sizes(self, split: str) -> NDArray[np.int64]:
        rows = self.rows.get(split)
        if rows is None:
            return np.zeros(0, np.int64)
        return rows.ends - rows.starts if isinstance(rows, packed.Sequences) else np.array([len(row.ids) for row in rows])

    def of(self, split: str, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        whole = self.rows[split]
        if isinstance(whole, packed.Sequences):
            found = [Encoded(ids, ids) for ids in map(whole.row, rows)]
        else:
            found = [whole[i] for i in rows]
        labels = padded([row.labels for row in found], NO_LOSS)[0].roll(-1, 1)  # a place predicts the next token
        labels[:, -1] = NO_LOSS
        return padded([row.ids for row in found], self.pad)[0], labels

    def units(self, rows: Rows) -> int:
        whole = self.rows["train"]
        if isinstance(whole, packed.Sequences):
            return int((whole.ends[rows] - whole.starts[rows] - 1).sum())
        return sum(int((whole[i].labels[1:] != NO_LOSS).sum()) for i in rows)


class Translation(Language):
    """A sequence-to-sequence model on pairs of texts."""

    per_token = True, True, True, True  # of the source, and of the target

    def __init__(self, request: TrainRequest, folder: Path, base: Path, splits: Sequence[str]) -> None:
        super().__init__(request, folder, base)
        pretrained.check_base(base)
        tokenizer = pretrained.tokenizer(base)
        torch.manual_seed(request.seed)
        self.finish(pretrained.load(request, base, max(tokenizer.get_vocab().values()) + 1))
        inner = self.model.get_base_model() if request.adapter else self.model
        self.shift = inner.prepare_decoder_input_ids_from_labels
        self.rows = {split: self._pairs(split, tokenizer) for split in splits}
        self.lengths = self.sizes("train")

    def _pairs(self, split: str, tokenizer: object) -> list[Encoded]:
        found = []
        for number, pair in enumerate(read_lines(self.folder, split, Pair), 1):
            source, target = (np.asarray(tokenizer(text)["input_ids"], np.int64) for text in (pair.source, pair.target))  # type: ignore[operator]
            if block := self.request.block:
                source, target = source[:block], target[:block]
            pretrained.check_length(self.model, max(len(source), len(target)), f"{split}.jsonl:{number}")
            found.append(Encoded(source, target))
        return found

    def sizes(self, split: str) -> NDArray[np.int64]:
        return np.array([len(row.ids) + len(row.labels) for row in self.rows.get(split, ())], np.int64)

    def of(self, split: str, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        found = [self.rows[split][i] for i in rows]
        ids, mask = padded([row.ids for row in found], self.pad)
        labels, _ = padded([row.labels for row in found], NO_LOSS)
        return ids, mask, self.shift(labels=labels), labels

    def units(self, rows: Rows) -> int:
        return sum(len(self.rows["train"][i].labels) for i in rows)
