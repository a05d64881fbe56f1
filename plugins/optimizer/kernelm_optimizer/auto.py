"""`optimize = "auto"`: the candidates and the space that are searched when nobody says which, and whether that was better. Pure."""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from kernelm_contracts.optimizer import Candidate, Dimension, OptimizeRequest, Search, Value, Verdict
from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import ClientFault

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT = "default"  # the row that the winner is compared with
TRIALS, FINALISTS = 60, 4  # the budget ends it before
PATIENT_S = 600.0  # with less, no encoder is fine-tuned beside the default one
VIEWS = (("words",), ("words", "names"), ("words", "lead", "names"), ("words", "stems", "lead", "names"))
FROZEN, TFIDF, ENCODER = ("frozen-linear",), ("tfidf-linear",), ("encoder",)


def completed(request: OptimizeRequest) -> OptimizeRequest:
    """The request with candidates and search filled in, where it is "auto". ClientFault `invalid` if it gives its own search."""
    if request.optimize != "auto":
        return request
    if request.search is not None:
        raise ClientFault("invalid", 'optimize: it is "auto" and there is a `search`', "leave one of them out")
    if any(candidate.name == DEFAULT for candidate in request.candidates):
        raise ClientFault("invalid", f'optimize: a candidate is called "{DEFAULT}"', "give it another name")
    linear = TrainRequest("", structure="tfidf-linear", algorithm="liblinear")
    default = TrainRequest("", base=request.base) if request.base else linear
    candidates = (Candidate(DEFAULT, train=default), *request.candidates)
    search = Search(linear, tuple(_space(request)), trials=TRIALS, finalists=FINALISTS)
    return replace(request, candidates=candidates, search=search)


def _space(request: OptimizeRequest) -> "list[Dimension]":
    """Linear classifiers on terms; with a base also on its vectors, and, where there is time, the base itself fine-tuned."""
    structures = [*TFIDF, *(FROZEN if request.base else ()), *(ENCODER if request.base and request.budget_s >= PATIENT_S else ())]
    linear: dict[str, tuple[Value, ...]] = {"structure": ("tfidf-linear", "frozen-linear")}
    space = [Dimension("structure", values=tuple(structures)),
             Dimension("algorithm", values=("ridge", "liblinear", "lbfgs"), only=linear),
             Dimension("regularization", low=0.3, high=10.0, log=True, only=linear),
             Dimension("views", values=VIEWS, only={"structure": TFIDF}),
             Dimension("max_share", values=(0.1, 0.2, 1.0), only={"structure": TFIDF}),
             Dimension("ngrams", low=1, high=2, only={"structure": TFIDF})]  # fmt: skip
    if request.base:
        space.append(Dimension("base", values=(request.base,), only={"structure": FROZEN + ENCODER}))
    if "encoder" in structures:
        encoder: dict[str, tuple[Value, ...]] = {"structure": ENCODER}
        space += [Dimension("algorithm", values=("adamw", "lion", "muon"), only=encoder),
                  Dimension("learning_rate", low=2e-5, high=3e-4, log=True, only=encoder),
                  Dimension("epochs", low=1, high=4, only=encoder)]  # fmt: skip
    return space


def verdict(default: str, ours: Scores, theirs: Scores) -> Verdict:
    """Whether the winner (`ours`) is better than the row `default` (`theirs`) on the same documents, by McNemar's exact test: of
    those that only one of the two has right, half would be each one's if they were equally good."""
    from kernelm_contracts.comparison import compare  # numpy, which an idle instance has no use for

    found = compare(right_of(ours), right_of(theirs))
    difference = ours.accuracy - theirs.accuracy
    better = found.significant and difference > 0
    words = "better than" if better else "worse than" if found.significant else "not better than"
    text = (f"{words} the default: {100 * difference:+.2f} points on the {ours.documents} documents of the {ours.split} split, "
            f"{found.first_alone} right that it has wrong and {found.second_alone} the other way, p = {found.p:.3f}")  # fmt: skip
    return Verdict(default, better, difference, found.p, text)


def right_of(scores: Scores) -> "NDArray[np.bool_]":
    """Whether each document of the split was right, out of `Scores.right`."""
    import numpy as np

    bits = int(scores.right or "0", 16)
    return np.array([bool(bits >> k & 1) for k in range(scores.documents)])
