"""A model of the structure "token-classification", by PyTorch and transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.entities import entities
from kernelm_encoder.model import Document, Output, invalid_model, size_of
from kernelm_encoder.tokenizing import Tokenizer, pad, pieces
from kernelm_encoder.torch_encoder import load


class TorchTagger:
    """See `Model`."""

    embeds, extracts = False, True

    def __init__(self, card: ModelCard, size: int, tokenizer: Tokenizer, network: Any) -> None:
        self.card, self.size, self._tokenizer, self._network = card, size, tokenizer, network

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        """See `Model.load`. `threads` holds for the whole process."""
        torch.set_num_threads(threads)
        network = load(transformers.AutoModelForTokenClassification, folder, card)
        if network.config.num_labels != len(card.labels):
            raise invalid_model(folder / "config.json", f"there are {network.config.num_labels} labels in `id2label`, and "
                                f"{len(card.labels)} in model.json")  # fmt: skip
        return cls(card, size_of(folder), Tokenizer(folder, card.max_tokens), network)

    def tokenize(self, text: str) -> Document:
        """See `Model.tokenize`."""
        encoding = self._tokenizer.encode(text)
        return Document(len(encoding.ids), encoding)

    def run(self, documents: Sequence[Document]) -> Output:
        """See `Model.run`."""
        ids, mask = (torch.from_numpy(array) for array in pad([document.features.ids for document in documents]))
        with torch.inference_mode():
            logits = self._network(input_ids=ids, attention_mask=mask).logits.float().numpy()
        found = [entities(row[: document.tokens], pieces(document.features), self.card.labels)
                 for row, document in zip(logits, documents, strict=True)]  # fmt: skip
        return Output(logits[:, 0, :0], entities=found)
