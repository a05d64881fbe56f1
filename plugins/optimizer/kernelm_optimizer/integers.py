"""A causal model's folder in, the folder with weights of 8 or 4 bits out (kernelm_contracts.quantized). No kernelm I/O."""

from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from torch import nn

from kernelm_contracts.quantized import METHOD, Int4Linear, Int8Embedding, Int8Linear, int4, int8, layers
from kernelm_contracts.trainer import ModelCard
from kernelm_optimizer.folder import need_floats, write_smaller
from kernelm_optimizer.gguf_export import FILE
from kernelm_sdk.errors import ClientFault


def load_causal(folder: Path) -> nn.Module:
    """The causal model in `folder` in the precision it is served with: bfloat16. ClientFault `invalid_model` if there is none."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    how: dict[str, Any] = {"use_safetensors": True}
    if (folder / FILE).is_file():
        how = {"gguf_file": FILE, "quantization_config": transformers.GgufConfig(dequantize=True)}  # type: ignore[attr-defined]
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa",
            output_loading_info=True, **how)  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ClientFault("invalid_model", f"model.safetensors: {error}", "give the digest of a causal language model") from None
    if missing := sorted(found["missing_keys"]):
        raise ClientFault("invalid_model", f"model.safetensors has no tensor {missing[0]!r}", "store the model again")
    return model.eval()  # type: ignore[no-any-return]


def integers(source: Path, target: Path, card: ModelCard, bits: int) -> None:
    """Write the model in `source` with weights of `bits` bits to the new folder `target`. ClientFault `invalid_model` if it is not
    in floating point."""
    need_floats(card)
    model = load_causal(source)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    tied = head.weight is embedding.weight  # type: ignore[union-attr]
    placed, kept = layers(model, bits, tied), model.state_dict()
    tensors = {}
    for name, module in placed.items():
        weight = kept.pop(f"{name}.weight")
        if isinstance(module, Int8Linear | Int8Embedding | Int4Linear):
            stored = int4(weight) if isinstance(module, Int4Linear) else int8(weight)
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    changes = {"quantization_config": {"quant_method": METHOD, "bits": bits, "tied": tied}, "tie_word_embeddings": False,
               "dtype": "bfloat16"}  # fmt: skip
    write_smaller(source, target, tensors | {name: tensor.contiguous() for name, tensor in kept.items()}, changes,
                  msgspec.structs.replace(card, precision="int8" if bits == 8 else "int4"))  # fmt: skip
