"""A folder as Hugging Face's libraries save one, without `model.json`: its card, by what the folder says of itself.

Read are config.json, tokenizer_config.json, and of a model for sentence-transformers modules.json, the pooling's config.json and
sentence_bert_config.json.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import UNREADABLE, invalid_model
from kernelm_sdk.errors import ClientFault

T = TypeVar("T")
MODULES, WEIGHTS = "modules.json", "model.safetensors"
CLASSIFIER, TAGGER, EMBEDDER = "ForSequenceClassification", "ForTokenClassification", "Model"  # ends of architectures' names
BEHIND_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their first position is that behind the padding's id
MOST_TOKENS = 512  # where nothing says how many
REMEDY = ("save the model again (save_pretrained; a SentenceTransformer: save), the tokenizer beside it, and store the folder with "
          "`kernelm model import`")  # fmt: skip
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class _Config(Struct):
    """What is read of config.json."""

    model_type: str = ""
    architectures: tuple[str, ...] | None = None
    id2label: dict[str, str | int | float] | None = None
    problem_type: str | None = None
    max_position_embeddings: int | None = None
    pad_token_id: int | None = None
    hidden_size: int | None = None


class _Limits(Struct):
    """What is read of tokenizer_config.json and sentence_bert_config.json."""

    model_max_length: float | None = None  # "no limit" is written as 10**30
    max_seq_length: int | None = None


class _Module(Struct):
    """An entry of modules.json."""

    type: str
    path: str = ""


def card_of(folder: Path) -> ModelCard:
    """The card of a classifier, tagger or embedder in `folder`; ClientFault "invalid_model" that names file and field.

    `request["pooling"]` of an embedder is "mean", or "cls" for the first token's state.
    """
    config = _read(folder, "config.json", _Config)
    architecture = next(iter(config.architectures or ()), "")
    if not (folder / "tokenizer.json").is_file():
        raise _invalid("tokenizer.json", "the file is missing; a fast tokenizer's save_pretrained writes it")
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise _unsupported(f"`model_type` {config.model_type!r} is no encoder that transformers knows")
    shared: dict[str, Any] = {"name": architecture, "max_tokens": _max_tokens(folder, config),
                              "parameters": _parameters(folder),
                              "hidden": config.hidden_size or 0}  # fmt: skip
    if architecture.endswith(CLASSIFIER):
        return ModelCard(task="text-classification", structure="encoder", labels=_labels(config),
                         problem=_problem(config), **shared)  # fmt: skip
    if architecture.endswith(TAGGER):
        return ModelCard(task="token-classification", structure="token-classification", labels=_labels(config), **shared)
    if architecture.endswith(EMBEDDER):
        return ModelCard(task="sentence-similarity", structure="sentence-embedding", labels=(),
                         request={"pooling": _pooling(folder)}, **shared)  # fmt: skip
    raise _unsupported(f"`architectures` has {architecture or 'nothing'}")


def _labels(config: _Config) -> tuple[str, ...]:
    names: dict[str, str | int | float] = config.id2label or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' own default
    if len(names) < 2:
        raise _unsupported(f"`id2label` has {len(names)} label: a regression or a ranking")
    if set(names) != set(map(str, range(len(names)))):
        raise _invalid("config.json", f"`id2label` must number the labels from 0 to {len(names) - 1}, not {', '.join(names)}")
    return tuple(str(names[str(k)]) for k in range(len(names)))


def _problem(config: _Config) -> Literal["multi-class", "multi-label"]:
    kind = config.problem_type or "single_label_classification"
    if kind == "regression":
        raise _unsupported("`problem_type` is regression")
    return "multi-label" if kind == "multi_label_classification" else "multi-class"


def _pooling(folder: Path) -> str:
    """How the states of a text become one, after sentence-transformers; the mean where the folder is not of theirs."""
    if not (folder / MODULES).is_file():
        return "mean"
    for module in _read(folder, MODULES, list[_Module]):
        kind = module.type.rpartition(".")[2]
        if kind == "Pooling":
            if not (folder / module.path).resolve().is_relative_to(folder.resolve()):
                raise _invalid(MODULES, f"`path` {module.path!r} leads out of the folder")
            name = f"{module.path}/config.json" if module.path else "config.json"
            modes = [mode for mode, on in _read(folder, name, dict[str, Any]).items() if mode.startswith("pooling_mode_") and on]
            if len(modes) != 1 or modes[0] not in POOLINGS:
                raise _invalid(name, f"pools by {', '.join(modes) or 'nothing'}; served are {', '.join(POOLINGS)}")
            return POOLINGS[modes[0]]
        if kind not in ("Transformer", "Normalize"):
            raise _invalid(MODULES, f"a module {kind} is not served; Transformer, Pooling and Normalize are")
    return "mean"


def _max_tokens(folder: Path, config: _Config) -> int:
    positions = config.max_position_embeddings or 0
    if config.model_type in BEHIND_PADDING:
        positions -= (1 if config.pad_token_id is None else config.pad_token_id) + 1
    said: list[float] = [positions]
    for name in ("tokenizer_config.json", "sentence_bert_config.json"):
        if (folder / name).is_file():
            limits = _read(folder, name, _Limits)
            said += [limits.model_max_length or 0, limits.max_seq_length or 0]
    return int(min([number for number in said if 1 <= number < 1_000_000] or [MOST_TOKENS]))


def _parameters(folder: Path) -> int:
    try:
        with safe_open(folder / WEIGHTS, "numpy") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise _invalid(WEIGHTS, str(error)) from None


def _read(folder: Path, name: str, kind: type[T]) -> T:
    """The file `name` as a `kind`, by Python's parser: transformers writes NaN, Infinity and numbers of any length."""
    try:
        return msgspec.convert(json.loads((folder / name).read_bytes()), kind)
    except UNREADABLE as error:
        raise _invalid(name, str(error)) from None


def _invalid(name: str, why: str) -> ClientFault:
    return invalid_model(Path(name), why, REMEDY)


def _unsupported(why: str) -> ClientFault:
    served = f"without model.json, encoders of the architectures *{CLASSIFIER}, *{TAGGER} and *{EMBEDDER} are served"
    return invalid_model(Path("config.json"), f"{why}; {served}", "deploy it with --plugin vllm, which serves others")
