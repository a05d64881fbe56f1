"""A classifier as Hugging Face's libraries save one: encoder and head in one file, by PyTorch and transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import Document, Output, size_of
from kernelm_encoder.tokenizing import Tokenizer, pad
from kernelm_encoder.torch_encoder import load


class TorchClassifier:
    """See `Model`. Its head takes what its architecture takes, mostly the first token's state."""

    embeds, extracts = False, False

    def __init__(self, card: ModelCard, size: int, tokenizer: Tokenizer, network: Any) -> None:
        self.card, self.size, self.tokenize, self._network = card, size, tokenizer, network

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        """See `Model.load`. `threads` holds for the whole process."""
        torch.set_num_threads(threads)
        network = load(transformers.AutoModelForSequenceClassification, folder, card)
        return cls(card, size_of(folder), Tokenizer(folder, card.max_tokens), network)

    def run(self, documents: Sequence[Document]) -> Output:
        """See `Model.run`."""
        ids, mask = (torch.from_numpy(array) for array in pad([document.features for document in documents]))
        with torch.inference_mode():
            return Output(self._network(input_ids=ids, attention_mask=mask).logits.float().numpy())
