"""What servers do alike on their way to answer for a model: count its parameters, and say how far they are."""

import json
import math
import struct
from pathlib import Path

from kernelm_contracts.server import ModelLoading, ServedModel
from kernelm_sdk.plugin import Context


async def tell_loading(context: Context, served: ServedModel, fraction: float, phase: str) -> None:
    """Publish how far loading `served` got (`fraction`: 0 to 1), for who waits for it."""
    await context.publish(ModelLoading(model=served.name, generation=served.generation, pool=context.pool, fraction=fraction,
                                       phase=phase))  # fmt: skip


def parameters(file: Path) -> int:
    """Numbers in a safetensors file, of which only the header is read: 8 bytes with its length, then the header as JSON.

    ValueError that names the file if it has none. Source: https://huggingface.co/docs/safetensors, "Format".
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name}: no safetensors header: {error}") from None
