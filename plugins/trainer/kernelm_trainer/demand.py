"""Which training requests make sense. Everything is checked before a byte is read."""

from typing import Any

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault

LINEAR = ("liblinear", "lbfgs")
GRADIENT = ("sgd", "momentum", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon")
ALGORITHMS = {"encoder": GRADIENT, "frozen-linear": LINEAR, "tfidf-linear": LINEAR}
LOOP = ("epochs", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "dropout")
# Fields that a structure has no use for: one that was changed is a misunderstanding, not a wish.
UNUSED = {
    "encoder": ("regularization", "ngrams"),
    "frozen-linear": (*LOOP, "ngrams", "precision"),
    "tfidf-linear": (*LOOP, "base", "layers", "batch_size", "precision"),
}
# field -> (lowest, highest) that is allowed, both included
RANGES = {
    "layers": (0, 1000), "epochs": (1, 1000), "batch_size": (1, 4096), "learning_rate": (0.0, 10.0), "warmup": (0.0, 1.0),
    "weight_decay": (0.0, 10.0), "max_grad_norm": (1e-6, 1e6), "dropout": (0.0, 0.9), "regularization": (1e-6, 1e6),
    "ngrams": (1, 5), "checkpoint_every_s": (0.0, 86400.0), "seed": (0, 2**31 - 1),
}  # fmt: skip
_DEFAULTS = TrainRequest(dataset="")


def check_request(request: TrainRequest) -> None:
    """ClientFault "invalid" that names the fields, if `request` is out of range or combines what does not go together."""
    if not request.dataset:
        raise _invalid("dataset is empty", "give the digest of a dataset made by data/1")
    for field, (low, high) in RANGES.items():
        if not low <= getattr(request, field) <= high:  # also false for NaN
            raise _invalid(f"{field} is {getattr(request, field)}", f"give a value from {low:g} to {high:g}")
    allowed = ALGORITHMS[request.structure]
    if request.algorithm not in allowed:
        raise _invalid(f'structure "{request.structure}" cannot be trained with algorithm "{request.algorithm}"',
                       f"set algorithm to one of {', '.join(allowed)}")  # fmt: skip
    if unused := [f for f in UNUSED[request.structure] if getattr(request, f) != getattr(_DEFAULTS, f)]:
        raise _invalid(f'structure "{request.structure}" has no use for {", ".join(unused)}', "leave these fields out")
    if request.structure != "tfidf-linear" and not request.base:
        raise _invalid(f'structure "{request.structure}" needs base, the digest of an encoder', "set base")


def settings_of(request: TrainRequest) -> dict[str, Any]:
    """The fields that shape the model, for `ModelCard.request`."""
    unused = {*UNUSED[request.structure], "dataset", "base", "checkpoint_every_s", "report_test", "require_private_clean"}
    return {field: getattr(request, field) for field in request.__struct_fields__ if field not in unused}


def _invalid(message: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"train request: {message}", remedy)
