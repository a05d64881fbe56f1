"""A model's folder: its card, and what a smaller model takes over from it as it is. No kernelm I/O."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.errors import ClientFault

if TYPE_CHECKING:
    import torch

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
        "head.safetensors")  # fmt: skip


def read_card(folder: Path) -> ModelCard:
    """`model.json` of a model's folder; ClientFault `invalid_model` if it is missing or no card."""
    path = folder / "model.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelCard)
    except (OSError, msgspec.MsgspecError) as error:
        raise ClientFault("invalid_model", f"{path.name}: {error}", "give the digest of a model artifact") from None


def need_floats(card: ModelCard, change: str = "be quantized", remedy: str = "") -> None:
    """ClientFault `invalid_model` where the weights are integers already: they can't `change` once more."""
    if card.precision not in ("fp32", "bf16"):
        raise ClientFault("invalid_model", f"model {card.name!r} can't {change}: it is {card.precision} already", remedy)


def write_card(folder: Path, card: ModelCard) -> None:
    """`model.json`, and the card's scores as `evaluation.json`."""
    for name, content in (("model.json", card), ("evaluation.json", card.scores)):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))


def carry(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_smaller(source: Path, target: Path, tensors: Mapping[str, "torch.Tensor"], changes: Mapping[str, Any],
                  card: ModelCard) -> None:  # fmt: skip
    """Write the new folder `target`: `tensors`, the config of `source` with `changes`, and `card` without scores, which were those
    of other weights."""
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    save_file(dict(tensors), target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_bytes())
    (target / "config.json").write_text(json.dumps(config | changes, indent=2))
    carry(source, target, KEPT)
    write_card(target, msgspec.structs.replace(card, scores={}))
