"""A folder as Hugging Face's libraries save one, without `model.json`: its card, by what the folder says of itself.

Read are config.json, tokenizer_config.json, and of a model for sentence-transformers modules.json, the pooling's config.json and
sentence_bert_config.json.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import invalid_model
from kernelm_sdk.errors import ClientFault

CLASSIFIER, TAGGER, EMBEDDER = "ForSequenceClassification", "ForTokenClassification", "Model"  # ends of architectures' names
BEHIND_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their first position is that behind the padding's id
MOST_TOKENS = 512  # where nothing says how many
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def card_of(folder: Path) -> ModelCard:
    """The card of a classifier, tagger or embedder in `folder`; ClientFault "invalid_model" that names file and field.

    `request["pooling"]` of an embedder is "mean", or "cls" for the first token's state.
    """
    config = _json(folder / "config.json")
    architecture = next(iter(config.get("architectures") or ()), "")
    if not (folder / "tokenizer.json").is_file():
        raise invalid_model(folder / "tokenizer.json", "the file is missing; a fast tokenizer's save_pretrained writes it")
    if config.get("model_type") not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise _unsupported(folder, f"`model_type` {config.get('model_type')!r} is no encoder that transformers knows")
    shared: dict[str, Any] = {"name": architecture, "max_tokens": _max_tokens(folder, config),
                              "parameters": _parameters(folder / "model.safetensors"),
                              "hidden": config.get("hidden_size", 0)}  # fmt: skip
    if architecture.endswith(CLASSIFIER):
        return ModelCard(task="text-classification", structure="encoder", labels=_labels(folder, config),
                         problem=_problem(folder, config), **shared)  # fmt: skip
    if architecture.endswith(TAGGER):
        return ModelCard(task="token-classification", structure="token-classification", labels=_labels(folder, config), **shared)
    if architecture.endswith(EMBEDDER):
        return ModelCard(task="sentence-similarity", structure="sentence-embedding", labels=(),
                         request={"pooling": _pooling(folder)}, **shared)  # fmt: skip
    raise _unsupported(folder, f"`architectures` has {architecture or 'nothing'}")


def _labels(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    names: dict[str, str] = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' own default
    if len(names) < 2:
        raise _unsupported(folder, f"`id2label` has {len(names)} label: a regression or a ranking")
    return tuple(names[key] for key in sorted(names, key=int))


def _problem(folder: Path, config: dict[str, Any]) -> Literal["multi-class", "multi-label"]:
    kind = config.get("problem_type") or "single_label_classification"
    if kind == "regression":
        raise _unsupported(folder, "`problem_type` is regression")
    return "multi-label" if kind == "multi_label_classification" else "multi-class"


def _pooling(folder: Path) -> str:
    """How the states of a text become one, after sentence-transformers; the mean where the folder is not of theirs."""
    if not (modules := folder / "modules.json").is_file():
        return "mean"
    for module in json.loads(modules.read_bytes()):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            path = folder / module["path"] / "config.json"
            modes = [name for name, on in _json(path).items() if name.startswith("pooling_mode_") and on]
            if len(modes) != 1 or modes[0] not in POOLINGS:
                raise invalid_model(path, f"pools by {', '.join(modes) or 'nothing'}; served are {', '.join(POOLINGS)}")
            return POOLINGS[modes[0]]
        if kind not in ("Transformer", "Normalize"):
            raise invalid_model(modules, f"a module {kind} is not served; Transformer, Pooling and Normalize are")
    return "mean"


def _max_tokens(folder: Path, config: dict[str, Any]) -> int:
    positions = int(config.get("max_position_embeddings") or 0)
    if config.get("model_type") in BEHIND_PADDING:
        positions -= int(config.get("pad_token_id", 1)) + 1
    said = [positions, _number(folder / "tokenizer_config.json", "model_max_length"),
            _number(folder / "sentence_bert_config.json", "max_seq_length")]  # fmt: skip
    return min([number for number in said if 0 < number < 1_000_000] or [MOST_TOKENS])  # "no limit" is written as 10**30


def _number(path: Path, field: str) -> int:
    return int(_json(path).get(field) or 0) if path.is_file() else 0


def _parameters(path: Path) -> int:
    try:
        with safe_open(path, "numpy") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise invalid_model(path, str(error)) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise invalid_model(path, str(error)) from None
    if not isinstance(found, dict):
        raise invalid_model(path, "it holds no JSON object")
    return found


def _unsupported(folder: Path, why: str) -> ClientFault:
    return invalid_model(folder / "config.json", f"{why}; without model.json, encoders of the architectures "
                         f"*{CLASSIFIER}, *{TAGGER} and *{EMBEDDER} are served (vLLM serves others: --plugin vllm)")  # fmt: skip
