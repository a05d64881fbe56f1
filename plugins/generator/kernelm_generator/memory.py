"""What a model needs, from its files' headers and its config alone, before anything of it is loaded."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from kernelm_contracts.loading import parameters
from kernelm_generator.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault

MB = 2**20
LIBRARIES_MB = 640  # resident set with torch and transformers imported, before a model (measured: 520)
LOGITS = 6  # float32 copies of a step's logits at a time, while tokens are drawn
SCORES = 4  # float32 tables of an encoder's layer at a time, with a number for each head and pair of tokens
CONTEXT = 2048  # tokens of a call at most, unless the settings say more
SLACK = 256  # columns beyond the context: only after so many steps the rows are moved (cache.py)


class Shape(NamedTuple):
    """Sizes of a model."""

    parameters: int
    bytes_per_parameter: int
    bytes_per_token: int  # of keys and values
    vocabulary: int
    positions: int  # that it was made for; 0 where it has no bound
    encoder_heads: int = 0  # of a layer; 0 where there is no encoder


class Plan(NamedTuple):
    """What is made of the memory that was granted."""

    context: int  # tokens of one call; of its prompt alone where there is an encoder
    max_tokens: int  # of one answer: at most half of the context
    slots: int
    prefix_tokens: int
    needed_mb: int


def shape_of(folder: Path, config: Any, bytes_per_parameter: int) -> Shape:
    """From the headers of the safetensors files and the config of transformers."""
    try:
        numbers = sum(parameters(path) for path in sorted(folder.glob("*.safetensors")))
    except ValueError as error:
        raise ClientFault("invalid_model", str(error), "store the model again") from None
    if config.is_encoder_decoder:
        return _encoder_decoder(config, numbers, bytes_per_parameter)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(numbers, bytes_per_parameter, 2 * config.num_hidden_layers * heads * size * bytes_per_parameter,
                 config.vocab_size, getattr(config, "max_position_embeddings", None) or 0)  # fmt: skip


def _encoder_decoder(config: Any, numbers: int, bytes_per_parameter: int) -> Shape:
    """T5 and BART name their sizes in two ways. A decoder's layer has as many keys of the text as of the answer."""
    layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
    heads = getattr(config, "decoder_attention_heads", None) or config.num_heads
    size = getattr(config, "d_kv", None) or config.d_model // heads
    return Shape(numbers, bytes_per_parameter, 2 * layers * heads * size * bytes_per_parameter, config.vocab_size,
                 getattr(config, "max_position_embeddings", None) or 0,
                 getattr(config, "encoder_attention_heads", None) or config.num_heads)  # fmt: skip


def needed_mb(shape: Shape, slots: int, context: int, prefix_tokens: int, answer: int) -> int:
    """Resident set at most, in MB (2**20 bytes), where an answer has `answer` tokens at most."""
    tokens = slots * (context + SLACK) + context + prefix_tokens
    if shape.encoder_heads:  # the answer's keys lie apart from the text's
        tokens += slots * (answer + 1)
    model = shape.parameters * shape.bytes_per_parameter + tokens * shape.bytes_per_token
    model += SCORES * 4 * shape.encoder_heads * context**2
    return LIBRARIES_MB + math.ceil((model + slots * shape.vocabulary * 4 * LOGITS) / MB)


def plan(shape: Shape, settings: Settings, granted_mb: int) -> Plan:
    """The most that the settings allow and that fits into `granted_mb` (0: not bounded): slots go before prefixes.

    PluginFault "out_of_memory" with what is needed at least (`needed_mb`) if not one slot fits.
    """
    context = settings.context or min(CONTEXT, shape.positions or CONTEXT)
    if shape.positions and context > shape.positions:
        raise ClientFault("invalid_settings", f"`context` is {context}, and the model reads {shape.positions} tokens", "set less")
    answer = min(settings.max_tokens, context // 2)
    wanted = 0 if shape.encoder_heads else settings.prefix_tokens
    for slots in range(settings.slots, 0, -1):
        bare = needed_mb(shape, slots, context, 0, answer)
        if granted_mb and bare > granted_mb:
            continue
        spare = (granted_mb - bare) * MB // max(shape.bytes_per_token, 1) if granted_mb else wanted
        prefixes = min(wanted, spare)
        return Plan(context, answer, slots, prefixes, needed_mb(shape, slots, context, prefixes, answer))
    least = needed_mb(shape, 1, context, 0, answer)
    raise PluginFault("out_of_memory", f"the model needs {least} MB for one answer of {context} tokens at a time, and {granted_mb} "
                      f"are granted", f"give the deployment memory_mb = {least} or more, or a shorter `context`",
                      needed_mb=least)  # fmt: skip
