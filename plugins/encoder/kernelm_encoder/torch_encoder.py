"""An encoder in safetensors, with a linear head or for embeddings alone, by PyTorch and transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import Document, Output, invalid_model, read_tensors, size_of
from kernelm_encoder.tokenizing import Tokenizer, pad

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchEncoder:
    """logits = mean @ weight.T + bias; `mean` is that of the last hidden states where the attention mask is 1."""

    embeds, extracts = True, False

    def __init__(self, card: ModelCard, size: int, tokenizer: Tokenizer, encoder: Any, head: torch.nn.Linear | None) -> None:
        self.card, self.size, self.tokenize = card, size, tokenizer
        self._encoder, self._head = encoder, head

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        """See `Model.load`. `threads` holds for the whole process."""
        torch.set_num_threads(threads)
        encoder = load(transformers.AutoModel, folder, card)
        if card.structure == "sentence-embedding":
            return cls(card, size_of(folder), Tokenizer(folder, card.max_tokens), encoder, None)
        tensors = read_tensors(folder / "head.safetensors", {
            "weight": (len(card.labels), encoder.config.hidden_size), "bias": (len(card.labels),),
        })  # fmt: skip
        head = torch.nn.Linear(encoder.config.hidden_size, len(card.labels))
        head.load_state_dict({name: torch.from_numpy(tensors[name]).float() for name in ("weight", "bias")})
        return cls(card, size_of(folder), Tokenizer(folder, card.max_tokens), encoder, head.eval())

    def run(self, documents: Sequence[Document]) -> Output:
        """See `Model.run`. Pooling and head compute in float32 whatever the encoder's precision."""
        ids, mask = (torch.from_numpy(array) for array in pad([document.features for document in documents]))
        with torch.inference_mode():
            hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            if self.card.request.get("pooling") == "cls":  # of a folder of sentence-transformers'
                return Output(hidden[:, 0, :0].numpy(), hidden[:, 0].numpy())
            weights = mask.unsqueeze(-1).float()
            mean = (hidden * weights).sum(1) / weights.sum(1)
            logits = self._head(mean) if self._head else mean[:, :0]
            return Output(logits.numpy(), mean.numpy())


def load(kind: Any, folder: Path, card: ModelCard) -> Any:
    """The network of a folder, by one of transformers' Auto classes."""
    if card.precision not in DTYPES:
        raise invalid_model(folder / "model.json", f"`precision` {card.precision} is for `format` onnx, not safetensors")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path = folder / "model.safetensors"
    if not path.is_file():  # transformers would look for other formats, and for the name on a hub
        raise invalid_model(path, "the file is missing")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of as many kinds
        raise invalid_model(folder / "config.json", f"transformers can't read it: {error}") from error
    try:
        encoder, found = kind.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            dtype=DTYPES[card.precision], output_loading_info=True)  # fmt: skip
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, RuntimeError
        raise invalid_model(path, f"transformers can't load it: {error}") from error
    # The pooler (absent from our own files) is not used; any other missing tensor would be random numbers.
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise invalid_model(path, f"{len(missing)} tensors are missing, the first is `{missing[0]}`")
    limit = getattr(encoder.config, "max_position_embeddings", card.max_tokens)
    if card.max_tokens > limit:
        raise invalid_model(folder / "model.json", f"`max_tokens` is {card.max_tokens}, but the encoder reads {limit}")
    return encoder.eval()
