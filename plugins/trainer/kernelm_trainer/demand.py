"""Which training requests make sense. Everything is checked before a byte is read."""

from typing import Any

import msgspec

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault

LINEAR = ("liblinear", "lbfgs", "ridge")
GRADIENT = ("sgd", "momentum", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon")
TUNED = ("encoder", "causal-lm", "seq2seq-lm", "token-classification", "sentence-embedding")
ALGORITHMS = {**dict.fromkeys(TUNED, GRADIENT), "frozen-linear": LINEAR, "tfidf-linear": LINEAR}
LOOP = ("epochs", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "dropout", "architecture", "adapter", "schedule",
        "micro_batch", "max_steps", "evaluate_every", "block", "gradient_checkpointing", "compile", "label_smoothing", "privacy",
        "keep", "processes", "sharding", "restarts", "teacher")  # fmt: skip
TERMS = ("ngrams", "views", "max_share")
# Fields that a structure has no use for: one that was changed is a misunderstanding, not a wish.
UNUSED = {
    "encoder": ("regularization", *TERMS, "architecture", "block"),
    "frozen-linear": (*LOOP, *TERMS, "precision"),
    "tfidf-linear": (*LOOP, "base", "layers", "batch_size", "precision"),
    "causal-lm": ("regularization", *TERMS, "problem", "dropout"),
    **{name: ("regularization", *TERMS, "problem", "dropout", "teacher") for name in TUNED[2:]},
}
# field -> (lowest, highest) that is allowed, both included
RANGES = {
    "layers": (0, 1000), "epochs": (1, 1000), "batch_size": (1, 4096), "learning_rate": (0.0, 10.0), "warmup": (0.0, 1.0),
    "weight_decay": (0.0, 10.0), "max_grad_norm": (1e-6, 1e6), "dropout": (0.0, 0.9), "regularization": (1e-6, 1e6),
    "ngrams": (1, 5), "max_share": (1e-3, 1.0), "checkpoint_every_s": (0.0, 86400.0), "seed": (0, 2**31 - 1),
    "micro_batch": (0, 4096),
    "max_steps": (0, 10**9), "evaluate_every": (0, 10**9), "block": (0, 2**20), "label_smoothing": (0.0, 0.9),
    "processes": (1, 256), "restarts": (0, 100),
    "adapter.rank": (1, 4096), "adapter.alpha": (1e-3, 1e6), "adapter.dropout": (0.0, 0.9),
    "teacher.weight": (1e-3, 1.0), "teacher.temperature": (0.1, 100.0),
    "privacy.epsilon": (1e-3, 1e3), "privacy.delta": (1e-15, 0.1), "privacy.max_grad_norm": (1e-6, 1e6), "keep.every": (0, 10**9),
}  # fmt: skip
HOW = ("dataset", "base", "checkpoint_every_s", "report_test", "require_private_clean", "keep", "restarts")  # not what
_DEFAULTS = TrainRequest(dataset="")


def check_request(request: TrainRequest) -> None:
    """ClientFault "invalid" that names the fields, if `request` is out of range or combines what does not go together."""
    if not request.dataset:
        raise _invalid("dataset is empty", "give the digest of a dataset made by data/1")
    for field, (low, high) in RANGES.items():
        value = _value(request, field)
        if value is not None and not low <= value <= high:  # also for NaN
            raise _invalid(f"{field} is {value}", f"give a value from {low:g} to {high:g}")
    allowed = ALGORITHMS[request.structure]
    if request.algorithm not in allowed:
        raise _invalid(f'structure "{request.structure}" cannot be trained with algorithm "{request.algorithm}"',
                       f"set algorithm to one of {', '.join(allowed)}")  # fmt: skip
    if unused := [f for f in UNUSED[request.structure] if getattr(request, f) != getattr(_DEFAULTS, f)]:
        raise _invalid(f'structure "{request.structure}" has no use for {", ".join(unused)}', "leave these fields out")
    _check_start(request)
    if not request.views or len(set(request.views)) < len(request.views):
        raise _invalid(f"views are {', '.join(request.views) or 'none'}", "give one or more different ones")
    _check_together(request)


def _check_start(request: TrainRequest) -> None:
    if request.base and request.architecture:
        raise _invalid("base and architecture are both given", "give base to go on with a model, or architecture to begin one")
    if request.structure == "causal-lm":
        if not (request.base or request.architecture):
            raise _invalid('structure "causal-lm" needs base or architecture', "set one of them")
    elif request.architecture:
        raise _invalid(f'structure "{request.structure}" has no use for architecture',
                       "only causal-lm begins from scratch: set base")  # fmt: skip
    elif request.structure != "tfidf-linear" and not request.base:
        raise _invalid(f'structure "{request.structure}" needs base, the digest of a model to start from', "set base")


def _check_together(request: TrainRequest) -> None:
    if request.adapter and not request.base:
        raise _invalid("adapter is given without base", "an adapter belongs to a model: set base")
    if request.structure == "encoder" and request.adapter and not request.adapter.merge:
        raise _invalid('structure "encoder" stores whole models', "set adapter.merge")
    if request.problem == "multi-label" and request.structure != "encoder":
        raise _invalid(f'structure "{request.structure}" cannot be trained for problem "multi-label"', 'set structure to "encoder"')
    if request.teacher and (request.privacy or request.problem == "multi-label"):
        raise _invalid("a teacher goes neither with privacy nor with multi-label", "leave one of them out")
    if request.privacy and (request.processes > 1 or request.algorithm == "muon" or request.structure == "sentence-embedding"):
        raise _invalid("privacy goes with one process, one optimizer and a loss of each example for itself",
                       "set processes to 1, another algorithm than muon, another structure than sentence-embedding")  # fmt: skip
    if request.sharding == "fsdp" and (request.compile != "off" or request.adapter):
        raise _invalid('sharding = "fsdp" goes neither with compile nor with adapter', 'leave them out, or set sharding to "ddp"')


def settings_of(request: TrainRequest) -> dict[str, Any]:
    """The fields that shape the model, for `ModelCard.request`: all that are used, those of the loop where they were set."""
    unused = {*UNUSED[request.structure], *HOW}
    newer = request.__struct_fields__[request.__struct_fields__.index("problem") :]
    fields = [f for f in request.__struct_fields__ if f not in unused]
    kept = [f for f in fields if f not in newer or getattr(request, f) != getattr(_DEFAULTS, f)]
    return {field: msgspec.to_builtins(getattr(request, field)) for field in kept}


def _value(request: TrainRequest, field: str) -> Any:
    first, _, inner = field.partition(".")
    value = getattr(request, first)
    return getattr(value, inner) if inner and value is not None else value


def _invalid(message: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"train request: {message}", remedy)
