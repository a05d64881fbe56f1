"""The built-in search, and what it says of its winner."""

import msgspec
import pytest
from scipy.stats import binomtest

from kernelm_contracts.optimizer import Candidate, Dimension, OptimizeRequest, Search
from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_optimizer.auto import completed, verdict
from kernelm_optimizer.study import Study, decoded
from kernelm_sdk.errors import ClientFault

DATASET = "sha256:data"


def auto(**fields: object) -> OptimizeRequest:
    return completed(OptimizeRequest(DATASET, (), optimize="auto", **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "structures"), [
    ({}, {"tfidf-linear"}),
    ({"base": "sha256:base", "budget_s": 60.0}, {"tfidf-linear", "frozen-linear"}),
    ({"base": "sha256:base", "budget_s": 3600.0}, {"tfidf-linear", "frozen-linear", "encoder"}),
])
def test_it_searches_what_base_and_budget_allow_and_every_trial_makes_sense(fields, structures):
    from kernelm_trainer.demand import check_request

    request = auto(**fields)
    assert request.search is not None
    study = Study(request.search, DATASET)
    requests = [study.request(trial) for trial in study.ask(40)]
    assert {r.structure for r in requests} == structures
    for each in requests:
        check_request(each)
    again = Study(request.search, DATASET, decoded(msgspec.json.encode(study.trials)))
    assert again.ask(1)[0].parameters == study.ask(1)[0].parameters
    assert [c.name for c in request.candidates] == ["default"]
    assert request.candidates[0].train == TrainRequest("", base="sha256:base") if fields else TrainRequest(
        "", structure="tfidf-linear", algorithm="liblinear")


def test_what_is_asked_for_otherwise_stays_as_it_is():
    request = OptimizeRequest(DATASET, (Candidate("mine", model="sha256:m"),))
    assert completed(request) is request


@pytest.mark.parametrize(("fields", "words"), [
    ({"search": Search(TrainRequest(""), (Dimension("seed", values=(1,)),))}, "there is a `search`"),
    ({"candidates": (Candidate("default", model="sha256:m"),)}, 'a candidate is called "default"'),
])
def test_what_contradicts_it_is_refused(fields, words):
    with pytest.raises(ClientFault, match=words):
        completed(OptimizeRequest(**{"dataset": DATASET, "candidates": (), "optimize": "auto", **fields}))


def scores(right: str) -> Scores:
    share = right.count("1") / len(right)
    return Scores("test", len(right), share, share, share, right=f"{int(right, 2):x}")


@pytest.mark.parametrize(("ours", "theirs", "better", "words"), [
    ("1" * 20 + "0" * 4, "0" * 12 + "1" * 8 + "0" * 4, True, "better than the default: +50.00 points"),
    ("1110", "1101", False, "not better than the default: +0.00 points"),
    ("1111", "0111", False, "not better than the default: +25.00 points"),
    ("0" * 12 + "1", "1" * 13, False, "worse than the default"),
    ("1111", "1111", False, "p = 1.000"),
])
def test_the_verdict_is_that_of_pairs(ours, theirs, better, words):
    found = verdict("default", scores(ours), scores(theirs))
    assert found.better is better
    assert words in found.text
    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    assert found.p_value == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1.0)


async def test_a_whole_search_says_whether_it_found_better(world):
    found = await world.search(optimize="auto", quantize=False, budget_s=3600.0)
    assert found.verdict is not None
    assert found.verdict.default == "default"
    assert not found.verdict.better, "all trainings of this world give the same model"
    assert "not better than the default" in (world.artifacts[found.report][1] / "report.md").read_text()
