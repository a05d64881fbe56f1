"""What a request asks for, checked and completed before anything is started. Pure."""

import math
from collections import Counter

import msgspec

from kernelm_contracts.optimizer import Candidate, OptimizeRequest, Row
from kernelm_optimizer.choice import OBJECTIVES
from kernelm_sdk.errors import ClientFault, Fault, PluginFault


def checked(request: OptimizeRequest) -> tuple[Candidate, ...]:
    """The candidates, ready to be submitted: on the request's dataset, blind to the test split.

    ClientFault `invalid` names the field that makes no sense.
    """
    if not request.dataset:
        raise _invalid("dataset is empty", "give the digest of a dataset")
    if not request.candidates and request.search is None:
        raise _invalid("candidates is empty, and there is no search", "name at least one candidate, or give a search")
    if request.objective not in OBJECTIVES:
        raise _invalid(f"objective {request.objective!r} is not known", f"choose one of {', '.join(OBJECTIVES)}")
    if not request.budget_s >= 0:  # a NaN fails this too
        raise _invalid(f"budget_s is {request.budget_s}", "give the seconds that training may take, 0 or more")
    if not 0 <= request.max_drop <= 1:
        raise _invalid(f"max_drop is {request.max_drop}", "give a share of accuracy from 0 to 1, e.g. 0.005")
    for field in ("max_latency_ms", "max_bytes", "max_memory_mb"):
        if not 0 <= getattr(request, field) < math.inf:
            raise _invalid(f"{field} is {getattr(request, field)}", "give a limit above 0, or 0 for none")
    repeated = [name for name, count in Counter(c.name for c in request.candidates).items() if count > 1]
    if repeated:
        raise _invalid(f"candidates: the name {repeated[0]!r} is given twice", "give every candidate its own name")
    if request.search is not None and (taken := [c.name for c in request.candidates if c.name.startswith("trial-")]):
        raise _invalid(f"candidates: the name {taken[0]!r} is one of a trial's", "give the candidate another name")
    return tuple(_completed(i, c, request.dataset) for i, c in enumerate(request.candidates))


def first_row(candidate: Candidate) -> Row:
    """Its row before anything is known of it."""
    train = candidate.train
    if candidate.model or train is None:
        return Row(candidate.name, "", model=candidate.model)
    return Row(candidate.name, "", train.structure, train.algorithm)


def _completed(index: int, candidate: Candidate, dataset: str) -> Candidate:
    where = f"candidates[{index}]"
    if not candidate.name.strip():
        raise _invalid(f"{where}.name is empty", "give every candidate its own name")
    if candidate.model:
        return candidate
    if candidate.train is None:
        raise _invalid(f"{where} ({candidate.name!r}) has neither `model` nor `train`", "give one of them")
    if candidate.train.dataset not in ("", dataset):
        raise _invalid(f"{where}.train.dataset is {candidate.train.dataset}, the search's is {dataset}",
                       "train all candidates on the dataset they are compared on; leave train.dataset empty for that")
    return msgspec.structs.replace(
        candidate, train=msgspec.structs.replace(candidate.train, dataset=dataset, report_test=False))


def _invalid(message: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"optimize: {message}", remedy)


def variant_name(winner: str, taken: set[str]) -> str:
    """A name for the int8 variant of `winner` that no candidate has."""
    name, count = f"{winner}-int8", 1
    while name in taken:
        count += 1
        name = f"{winner}-int8-{count}"
    return name


def nothing_measured(reasons: dict[str, str], late: set[str], budget_s: float) -> Fault:
    """The fault of a search without a single figure. It is the caller's if all that was missing is time: if all who have
    a reason are `late`."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if late == set(reasons):
        return ClientFault("budget_too_small", f"no candidate was trained within budget_s = {budget_s:g}: {listed}",
                           "raise budget_s, or give candidates that are trained already (`model`)")
    return PluginFault("nothing_measured", f"no candidate could be measured: {listed}",
                       "see the log of each candidate's job, and correct its settings")
