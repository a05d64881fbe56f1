"""A transformer encoder with mean pooling and a linear head: loading, running and writing it.

The mean over all tokens is what the sentence encoders that we start from were trained with (Reimers and Gurevych,
"Sentence-BERT", 2019, section 3).
"""

import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_trainer.batches import longest_first, padded
from kernelm_trainer.corpus import Corpus
from kernelm_trainer.pretrained import check_base, own_memory
from kernelm_trainer.task import Tensors


class Classifier(nn.Module):
    """Encoder, mean over the tokens, dropout, linear head."""

    def __init__(self, encoder: nn.Module, labels: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, labels)

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The mean of the last hidden states over the tokens that are not padding, [batch, hidden] float32."""
        return mean(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits, [batch, labels] float32."""
        pooled = self.dropout(self.pool(input_ids, attention_mask))
        with torch.autocast("cpu", enabled=False):
            return self.head(pooled)


def mean(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Of `hidden` [batch, tokens, hidden] over the tokens that are not padding, [batch, hidden] float32."""
    weight = attention_mask.unsqueeze(-1).float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def load(folder: Path, corpus: Corpus, layers: int, dropout: float) -> Classifier:
    """The encoder in `folder` with its first `layers` layers (0: all) under a new head, in float32.

    Torch's generator must be seeded before: it draws the head. ClientFault if the encoder does not fit the dataset.
    """
    check_base(folder)
    config = _config(folder)
    _check_fit(folder, config, corpus, layers)
    options: dict[str, Any] = {"num_hidden_layers": layers or config.num_hidden_layers}
    if hasattr(config, "hidden_dropout_prob"):
        # Dropout on attention weights would rule out the fused attention kernel: twice the time, no better accuracy.
        options |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    if "add_pooling_layer" in inspect.signature(transformers.MODEL_MAPPING[type(config)].__init__).parameters:
        options["add_pooling_layer"] = False
    try:
        encoder, info = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False,
            attn_implementation="sdpa", output_loading_info=True, **options)  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ClientFault("invalid_base", f"base: model.safetensors does not load: {error}", "give an intact model") from None
    if info["missing_keys"]:
        raise ClientFault("invalid_base", f"base: model.safetensors lacks {sorted(info['missing_keys'])[0]}",
                          "give weights that belong to config.json")  # fmt: skip
    model = Classifier(encoder, len(corpus.labels), dropout)
    own_memory(model)
    return model


def _config(folder: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ClientFault("invalid_base", f"base: config.json: {error}", "give an encoder that transformers knows") from None
    if type(config) not in transformers.MODEL_MAPPING or getattr(config, "is_decoder", False):
        raise ClientFault("invalid_base", f"base: config.json: model_type {config.model_type!r} is no encoder",
                          "give a BERT-like encoder")  # fmt: skip
    return config


def _check_fit(folder: Path, config: Any, corpus: Corpus, layers: int) -> None:
    if layers > config.num_hidden_layers:
        raise ClientFault("invalid", f"train request: layers is {layers}, the base has {config.num_hidden_layers}",
                          "keep fewer layers, or 0 for all")  # fmt: skip
    positions = getattr(config, "max_position_embeddings", corpus.card.max_tokens)
    if corpus.card.max_tokens > positions:
        raise ClientFault("base_mismatch", f"dataset: max_tokens is {corpus.card.max_tokens}, the base has {positions} positions",
                          f"prepare the dataset with at most {positions} tokens")  # fmt: skip
    mine, theirs = (Tokenizer.from_file(str(f / "tokenizer.json")).get_vocab() for f in (folder, corpus.folder))
    if mine != theirs:
        raise ClientFault("base_mismatch", "dataset: tokenizer.json has another vocabulary than the base's tokenizer.json",
                          "prepare the dataset with the tokenizer of this base")  # fmt: skip
    highest = max(int(row.max()) for split in corpus.splits.values() for row in split.input_ids)
    if highest >= config.vocab_size:
        raise ClientFault("base_mismatch",
                          f"dataset: column input_ids has id {highest}, the base has {config.vocab_size} embeddings",
                          "prepare the dataset with the tokenizer of this base")  # fmt: skip


def wants_bf16(precision: str) -> bool:
    """Whether to compute in bfloat16: on request, or for "auto" where the processor multiplies it natively."""
    can = torch.cpu.get_capabilities()
    return precision == "bf16" or (precision == "auto" and bool(can.get("avx512_bf16") or can.get("amx_bf16")))


def autocast(bf16: bool) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16, sums and norms in float32; or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def run(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: Sequence[NDArray[np.int64]], size: int,
        pad: int, batch_done: Callable[[int], None]) -> NDArray[np.float32]:  # fmt: skip
    """`function(input_ids, attention_mask)` over all `rows`, in float32 as the model is served, in the order of `rows`.

    `batch_done` is told the tokens of each batch.
    """
    lengths = [len(row) for row in rows]
    result: NDArray[np.float32] | None = None
    for batch in longest_first(lengths, size):
        with torch.inference_mode():
            values = function(*padded([rows[i] for i in batch], pad)).numpy()
        if result is None:
            result = np.empty((len(rows), values.shape[1]), np.float32)
        result[batch] = values
        batch_done(sum(lengths[i] for i in batch))
    assert result is not None
    return finite(result)


def finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values; PluginFault "not_finite" if any is not."""
    if not np.isfinite(values).all():
        raise PluginFault("not_finite", "the encoder gives values that are not finite", "train with a lower learning_rate")
    return values


def write(model: Classifier, folder: Path, corpus: Corpus, base: Path, tensors: Tensors = None) -> None:
    """Write encoder, head (with the state `tensors`, if given) and tokenizer to `folder` as `trainer/1` says."""
    config = model.encoder.config
    config.id2label = dict(enumerate(corpus.labels))
    config.label2id = {label: i for i, label in enumerate(corpus.labels)}
    state = tensors or model.state_dict()
    inner = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    model.encoder.save_pretrained(folder, state_dict=inner)
    save_file({name: state[f"head.{name}"].contiguous() for name in ("weight", "bias")}, folder / "head.safetensors")
    tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    tokenizer.enable_truncation(corpus.card.max_tokens)
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if (base / "tokenizer_config.json").is_file():
        settings = json.loads((base / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": corpus.card.max_tokens}, indent=2))
