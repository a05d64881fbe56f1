"""What a model needs in vLLM, from its config and its files' headers alone, before anything of it is loaded.

Sizes of keys and values: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 3.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from kernelm_contracts.loading import parameters
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_vllm.settings import Settings

MB = 2**20
LIBRARIES_MB = 1300  # resident set of vLLM's two processes without weights and cache (measured on a CPU: 1,220)
MOST_CACHE_MB = 4096  # unless the settings say more
UNBOUNDED_CACHE_MB = 1024  # where nobody says how much memory there is
LEAST_CACHE_MB = 64
LOGITS = 3  # float32 copies of a step's logits at a time, while tokens are drawn
STRUCTURES = ("causal-lm",)  # of kernelm_contracts.trainer: heads and poolings of the others are not those of Hugging Face's
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


class Shape(NamedTuple):
    """Sizes of a model."""

    weights: int  # bytes, as they are served
    bytes_per_token: int  # of keys and values
    vocabulary: int
    hidden: int
    layers: int
    positions: int  # that it was made for


class Plan(NamedTuple):
    """What is made of the memory that was granted."""

    context: int  # tokens of one call
    max_tokens: int
    cache_mb: int
    needed_mb: int


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`; ClientFault that names the file if it is none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return {**config, **config.get("text_config", {})}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ClientFault("invalid_model", f"config.json: {error}", "deploy a folder of Hugging Face's form: config.json, "
                          "tokenizer.json, *.safetensors") from None  # fmt: skip


def read_card(folder: Path) -> dict[str, Any]:
    """`model.json` of a model or an adapter, {} where there is none."""
    file = folder / "model.json"
    try:
        card: dict[str, Any] = dict(json.loads(file.read_text())) if file.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ClientFault("invalid_model", f"model.json: {error}", "correct it, or leave it out") from None
    return card


def base_of(folder: Path) -> str:
    """Digest of the model that an adapter belongs to, "" where its card does not say."""
    return str(read_card(folder).get("base", ""))


def require_servable(folder: Path) -> None:
    """ClientFault where the model's card, if it has one, says that its answers are more than what vLLM computes."""
    structure = read_card(folder).get("structure", STRUCTURES[0])
    if structure not in STRUCTURES:
        raise ClientFault("invalid_model", f"model.json: `structure` is {structure!r}, and vLLM serves {', '.join(STRUCTURES)}",
                          "deploy it with the plugin `encoder`")  # fmt: skip


def shape_of(folder: Path, dtype: str) -> Shape:
    """From `config.json` and the headers of the safetensors files. Weights that are quantized are served as they lie there."""
    config = read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ClientFault("invalid_model", "the artifact holds no *.safetensors", "store the model's weights as safetensors")
    quantized = "quantization_config" in config
    try:
        weights = sum(file.stat().st_size if quantized else parameters(file) * BYTES[dtype] for file in files)
    except ValueError as error:
        raise ClientFault("invalid_model", str(error), "store the model again") from None
    try:
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        per_token = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * size * BYTES[dtype]
        return Shape(weights, per_token, config["vocab_size"], config["hidden_size"], config["num_hidden_layers"],
                     config.get("max_position_embeddings") or 2048)  # fmt: skip
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ClientFault("invalid_model", f"config.json: no usable {error}", "give the sizes of the model there") from None


def base_mb(shape: Shape, settings: Settings) -> int:
    """Resident set without the cache, in MB (2**20 bytes): libraries, weights, a step's work, room for adapters."""
    step = settings.batch_tokens * shape.hidden * 4 * 8 + settings.sequences * shape.vocabulary * 4 * LOGITS
    # an adapter: two matrices [rank, hidden] for each of some seven projections a layer, as wide as four hidden sizes at most
    adapter = settings.adapter_rank * shape.hidden * 5 * 7 * shape.layers * BYTES[settings.dtype]
    return LIBRARIES_MB + math.ceil((shape.weights + step + settings.adapters * adapter) / MB)


def plan(shape: Shape, settings: Settings, granted_mb: int, available_mb: int) -> Plan:
    """The context and cache that fit. `granted_mb`: of the deployment, 0 where nobody bounds it; `available_mb`: of the machine.

    PluginFault "out_of_memory" with `needed_mb` if the model, with the least cache or the one that is set, does not fit.
    """
    base, bound = base_mb(shape, settings), granted_mb or available_mb
    context = settings.context or shape.positions
    if context > shape.positions:
        raise ClientFault("invalid_settings", f"`context` is {context}, and the model reads {shape.positions} tokens", "set less")
    whole = math.ceil((context + 2 * settings.block_tokens) * shape.bytes_per_token / MB)  # one call that fills its context
    least = settings.kv_cache_mb or max(LEAST_CACHE_MB, whole if settings.context else 0)
    if base + least > bound:
        whose, weights = "are granted" if granted_mb else "are free on this machine", shape.weights // MB
        raise PluginFault("out_of_memory", f"vLLM needs {base + least:,} MB for this model ({weights:,} of weights, {least:,} of "
                          f"cache), and {bound:,} {whose}", f"give the deployment memory_mb = {base + least}, or set less "
                          "`kv_cache_mb`, `context` or `sequences`", needed_mb=base + least)  # fmt: skip
    most = min(bound - base, MOST_CACHE_MB if granted_mb else UNBOUNDED_CACHE_MB)
    cache = settings.kv_cache_mb or max(least, most)
    held = cache * MB // max(shape.bytes_per_token, 1) - 2 * settings.block_tokens
    if settings.context and context > held:
        raise ClientFault("invalid_settings", f"`context` is {context}, and {cache} MB of cache hold {held} tokens",
                          f"set `kv_cache_mb` to {whole} or more")  # fmt: skip
    context = min(context, held)
    return Plan(context, min(settings.max_tokens, context - 1), cache, base + cache)
