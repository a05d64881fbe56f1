"""Samplers of third parties: what they add is searched like all else, and a broken one adds nothing."""

from pathlib import Path

import pytest

from kernelm.testing.hooks import install
from kernelm_contracts.optimizer import Candidate, OptimizeRequest
from kernelm_optimizer.hooks import GROUP, Samplers, extended
from kernelm_optimizer.plan import checked
from kernelm_sdk.hooks import Hooks

REQUEST = OptimizeRequest("sha256:d", (Candidate("given", model="sha256:m"),))
GOOD = """
from kernelm_contracts.optimizer import Candidate
from kernelm_contracts.trainer import TrainRequest
@hookimpl
def candidates(request):
    return [Candidate("small", train=TrainRequest(request.dataset)), Candidate("other", model="sha256:o")]
"""
BROKEN = {
    "raises": ("@hookimpl\ndef candidates(request): return 1 / 0\n", "candidates raised ZeroDivisionError"),
    "no-list": ("@hookimpl\ndef candidates(request): return 3\n", "'int' object is not iterable"),
    "no-candidate": ("@hookimpl\ndef candidates(request): return ['x']\n", "'x' is no Candidate"),
    "twice": (GOOD.replace("other", "small"), "the name 'opt-twice-small' is given twice"),
    "empty": (GOOD.replace('model="sha256:o"', ""), "has neither `model` nor `train`"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_a_good_one_adds_and_a_broken_one_is_named(place: Path, name: str) -> None:
    code, why = BROKEN[name]
    install(place, GROUP, f"opt-{name}", code)
    install(place, GROUP, f"opt-z-good-for-{name}", GOOD)
    hooks = Hooks(GROUP, Samplers)
    request = extended(REQUEST, hooks)
    good = f"opt-z-good-for-{name}"
    assert [c.name for c in request.candidates] == ["given", f"{good}-small", f"{good}-other"]
    assert why in hooks.quarantined[f"opt-{name}"]
    assert checked(request)[1].train is not None


def test_without_samplers_nothing_changes() -> None:
    assert extended(REQUEST, Hooks(GROUP, Samplers)) is REQUEST
