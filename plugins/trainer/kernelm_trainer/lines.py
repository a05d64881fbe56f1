"""Datasets of `<split>.jsonl`: chats, pairs and tagged texts, as `trainer/1` describes them."""

from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from kernelm_sdk.errors import ClientFault

T = TypeVar("T", bound=Struct)


class Turn(Struct, frozen=True):
    role: str
    content: str


class Chat(Struct, frozen=True):
    messages: tuple[Turn, ...]


class Pair(Struct, frozen=True):
    source: str
    target: str


class Tagged(Struct, frozen=True):
    tokens: tuple[str, ...]
    labels: tuple[str, ...]


class Alike(Struct, frozen=True):
    anchor: str
    positive: str


def read_lines(folder: Path, split: str, kind: type[T]) -> list[T]:
    """The lines of a split; ClientFault "invalid_dataset" that names file and line for one that is no `kind`, or none at all."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise refuse(path.name, "is missing", f"give the folder a {path.name} with lines as trainer/1 describes them")
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found.append(msgspec.json.decode(line, type=kind))
            except msgspec.DecodeError as error:
                raise refuse(f"{path.name}:{number}", str(error), "see trainer/1 for what a line holds") from None
    if not found:
        raise refuse(path.name, "has no lines", "every split that is used needs some")
    return found


def refuse(where: str, what: str, remedy: str) -> ClientFault:
    return ClientFault("invalid_dataset", f"dataset: {where}: {what}", remedy)
