"""GPTQ (Frantar et al. 2023) by llm-compressor: a causal model's folder in, the folder with integer weights out, in the format of
compressed-tensors, which vLLM serves. No kernelm I/O.

llm-compressor lags behind transformers (0.14 wants 5.17 at most, the trainer 5.24 at least), so it has an environment of its own:
runtime `venv`. Its AWQ is not offered: it pins memory for an accelerator, and fails without one.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from kernelm_contracts.trainer import ModelCard
from kernelm_optimizer.folder import KEPT, carry, need_floats, write_card
from kernelm_sdk.errors import ClientFault

if TYPE_CHECKING:
    import torch

SAMPLES = 256  # documents of the train split that show which errors matter; the paper took 128
GROUPS = (128, 64, 32)  # weights that share a scale: what kernels for 4 bits know, the largest one first
Scheme = Literal["W4A16", "W8A8"]


def missing() -> str:
    """What `gptq` needs and this environment has not; "" for nothing."""
    return "" if find_spec("llmcompressor") else "llm-compressor is not in this instance's environment"


def gptq(source: Path, target: Path, card: ModelCard, scheme: Scheme, rows: list["torch.Tensor"]) -> None:
    """Write the model in `source` to the new folder `target`, its linear layers but the last one as `scheme` says; `rows` are token
    ids of documents like those that it will read. ClientFault `invalid_model` if it is not in floating point, or no group size
    divides its layers."""
    need_floats(card)
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from loguru import logger

    from kernelm_optimizer.integers import load_causal

    logger.disable("llmcompressor")  # a line for each layer, each with its time
    model = load_causal(source)
    how: dict[str, Any] = {"scheme": scheme, "targets": ["Linear"]}
    if scheme == "W4A16":
        how = {"config_groups": {"group_0": _four_bits(model)}}
    documents = Dataset.from_dict({"input_ids": [ids.tolist() for ids in rows], "attention_mask": [[1] * len(ids) for ids in rows]})
    oneshot(model=model, dataset=documents, recipe=[GPTQModifier(ignore=["lm_head"], **how)], num_calibration_samples=len(rows),
            max_seq_length=max(map(len, rows)))  # fmt: skip
    model.save_pretrained(target, save_compressed=True)  # type: ignore[operator]
    (target / "recipe.yaml").unlink(missing_ok=True)  # config.json says it
    carry(source, target, KEPT)
    write_card(target, msgspec.structs.replace(card, precision="int4" if scheme == "W4A16" else "int8", scores={}))


def _four_bits(model: "torch.nn.Module") -> Any:
    """Weights of 4 bits, one scale for as many as divide the inputs of every layer."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from torch.nn import Linear

    inputs = {name: layer.in_features for name, layer in model.named_modules() if isinstance(layer, Linear) and name != "lm_head"}
    group = next((size for size in GROUPS if not any(n % size for n in inputs.values())), 0)
    if not group:
        name, n = next((name, n) for name, n in inputs.items() if n % GROUPS[-1])
        raise ClientFault("invalid_model", f"config.json: {name} has {n} inputs, which groups of {GROUPS[-1]} weights don't divide",
                          'take scheme "W8A8", which has one scale a column, or method "int4"')  # fmt: skip
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=weights)
