"""What the server knows of a model: `Model`, and how one is opened from an artifact's folder.

The formats are specified in `kernelm_contracts.trainer`. Each implementation imports its own compute library, so that
a process holds only the library that its model needs.
"""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.server import Entity
from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.errors import ClientFault

Array = NDArray[np.float32]

PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
UNREADABLE = (OSError, ValueError, RecursionError, msgspec.DecodeError)  # what reading a file of JSON may end in
REMEDY = "serve an artifact of kind 'model' as kernelm_contracts.trainer describes it"


class Document(NamedTuple):
    """One text, ready for `run` of the model that tokenized it."""

    tokens: int  # read, after truncation
    features: Any  # of the implementation


class Output(NamedTuple):
    """What a model says of a batch, a document a row."""

    logits: Array  # [documents, labels]; no labels for "sentence-embedding" and "token-classification"
    embeddings: Array | None = None  # [documents, hidden], mean-pooled, not normalized; None where the model has none
    entities: Sequence[tuple[Entity, ...]] = ()  # of each document, where the model extracts


class Model(Protocol):
    """A loaded model. Used by one thread at a time."""

    card: ModelCard
    embeds: bool  # `run` gives embeddings
    extracts: bool  # `run` gives entities
    size: int  # bytes of the artifact on disk

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        """Load from an artifact's folder, to compute on `threads` threads; ClientFault "invalid_model"."""
        ...

    def tokenize(self, text: str) -> Document:
        """The text as the model reads it, cut at the card's `max_tokens` where the structure has such a limit."""
        ...

    def run(self, documents: Sequence[Document]) -> Output:
        """What the model says of at least one document."""
        ...


def open_model(folder: Path, threads: int = 0) -> Model:
    """The model in `folder`, loaded and warm; `threads` 0 takes all cores that this process may use.

    ClientFault "unsafe_file" or "invalid_model", naming the file, if it can't be served.
    """
    refuse_pickles(folder)
    card = read_card(folder)
    model = _implementation(folder, card).load(folder, card, threads or cores())
    # The longest text that can come: a fault of shape shows now and not in a caller's answer, and memory is touched.
    try:
        model.run([model.tokenize("word " * max(card.max_tokens, 1))])
    except Exception as error:  # whatever the compute library raises
        raise invalid_model(folder / "model.json", f"the model loads but can't run: {error}") from error
    return model


def _implementation(folder: Path, card: ModelCard) -> type[Model]:
    if card.structure == "tfidf-linear":
        from kernelm_encoder.tfidf_linear import TfidfLinear

        return TfidfLinear
    if card.format == "onnx":
        from kernelm_encoder.onnx_encoder import OnnxEncoder

        return OnnxEncoder
    if card.structure == "token-classification":
        from kernelm_encoder.torch_tagger import TorchTagger

        return TorchTagger
    if card.structure == "encoder" and not (folder / "model.json").exists():
        from kernelm_encoder.torch_classifier import TorchClassifier

        return TorchClassifier
    from kernelm_encoder.torch_encoder import TorchEncoder

    return TorchEncoder


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_card(folder: Path) -> ModelCard:
    """`model.json` of a model's folder, or what stands for it in one of Hugging Face's; ClientFault "invalid_model" that names
    the field."""
    path = folder / "model.json"
    if not path.exists() and (folder / "config.json").exists():
        from kernelm_encoder.huggingface import card_of

        return card_of(folder)
    try:
        card = msgspec.json.decode(path.read_bytes(), type=ModelCard)
    except UNREADABLE as error:
        raise invalid_model(path, str(error)) from None
    if (len(set(card.labels)) != len(card.labels) or len(card.labels) < 2) and card.structure != "sentence-embedding":
        raise invalid_model(path, f"`labels` must be at least two different names, not {list(card.labels)}")
    if card.structure != "tfidf-linear" and card.max_tokens < 3:
        raise invalid_model(path, f"`max_tokens` is {card.max_tokens}, but an encoder reads at least 3")
    return card


def refuse_pickles(folder: Path) -> None:
    """ClientFault "unsafe_file" if a file of the folder is a pickle by its name or by its first bytes.

    The store refuses them more thoroughly; this holds whatever store the folder came from.
    """
    for path in files(folder):
        if path.suffix.lower() in PICKLES or _looks_pickled(path):
            raise ClientFault("unsafe_file", f"{path.name}: pickles can run code when they are read, and are not",
                              "store the weights as safetensors")  # fmt: skip


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # PROTO of the pickle machine
        return head[8:] != b"{"  # or the length of a safetensors header, which begins there
    if head.startswith(b"PK") and zipfile.is_zipfile(path):  # torch.save
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


def files(folder: Path) -> Iterable[Path]:
    """All files of an artifact's folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def size_of(folder: Path) -> int:
    """Bytes of all files of an artifact's folder."""
    return sum(path.stat().st_size for path in files(folder))


def read_tensors(path: Path, shapes: dict[str, tuple[int | None, ...]]) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, checked against `shapes` (None for any length); ClientFault "invalid_model"."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise invalid_model(path, str(error)) from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise invalid_model(path, f"tensor `{name}` is missing; there are {sorted(tensors)}")
        found = tensors[name].shape
        if len(found) != len(shape) or any(n is not None and n != m for n, m in zip(shape, found, strict=True)):
            raise invalid_model(path, f"tensor `{name}` has shape {list(found)}, expected {list(shape)}")
    return tensors


def invalid_model(path: Path, why: str, remedy: str = REMEDY) -> ClientFault:
    """The fault of an artifact that can't be served; names the file, with its folder where `path` is relative."""
    return ClientFault("invalid_model", f"{path.name if path.is_absolute() else path}: {why}", remedy)
