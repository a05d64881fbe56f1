import math

import pytest

from kernelm_contracts.data import DatasetCard, PrivateCard
from kernelm_contracts.texts import check_private
from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer.algorithms import LEARNING_RATES
from kernelm_trainer.demand import ALGORITHMS, GRADIENT, check_request, settings_of


@pytest.mark.parametrize(("fields", "named"), [
    ({"dataset": ""}, ["dataset"]),
    ({"base": ""}, ["base", "encoder"]),
    ({"algorithm": "lbfgs"}, ["algorithm", "lbfgs", "encoder"]),
    ({"structure": "tfidf-linear", "base": ""}, ["algorithm", "adamw", "tfidf-linear"]),
    ({"structure": "tfidf-linear", "algorithm": "lbfgs"}, ["base"]),
    ({"structure": "tfidf-linear", "algorithm": "lbfgs", "base": "", "layers": 2, "epochs": 3}, ["epochs, layers"]),
    ({"structure": "frozen-linear", "algorithm": "lbfgs", "learning_rate": 0.1}, ["learning_rate"]),
    ({"ngrams": 3}, ["ngrams"]),
    ({"epochs": 0}, ["epochs", "0"]),
    ({"learning_rate": math.nan}, ["learning_rate", "nan"]),
    ({"dropout": 1.0}, ["dropout"]),
])  # fmt: skip
def test_senseless_requests_are_refused_and_the_fields_named(fields: dict, named: list[str]) -> None:
    with pytest.raises(ClientFault) as caught:
        check_request(TrainRequest(**{"dataset": "sha256:d", "base": "sha256:b", **fields}))
    assert caught.value.code == "invalid"
    assert all(name in caught.value.message for name in named)
    assert caught.value.remedy


def test_every_sensible_combination_is_taken() -> None:
    for structure, algorithms in ALGORITHMS.items():
        base = "" if structure == "tfidf-linear" else "sha256:b"
        for algorithm in algorithms:
            check_request(TrainRequest("sha256:d", base=base, structure=structure, algorithm=algorithm))


def test_every_gradient_algorithm_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) == set(GRADIENT)


def test_settings_are_those_that_shape_the_model() -> None:
    request = TrainRequest("sha256:d", structure="tfidf-linear", algorithm="lbfgs", ngrams=3)
    assert settings_of(request) == {"structure": "tfidf-linear", "algorithm": "lbfgs", "regularization": 1.0,
                                    "ngrams": 3, "seed": 0}  # fmt: skip


CLEAN = PrivateCard("redact", ("email",), 10, 2, {"email": 3})
HELD = PrivateCard("report", ("email",), 10, 2, {"email": 3}, {"email": 3})


@pytest.mark.parametrize(("private", "problem"), [(None, "nobody looked"), (HELD, "3 email"), (CLEAN, "")])
def test_the_gate_for_private_data(private: PrivateCard | None, problem: str) -> None:
    dataset = DatasetCard("d", ("a", "b"), (), {}, 0, private=private)
    assert check_private(TrainRequest("sha256:d"), dataset) == ""
    said = check_private(TrainRequest("sha256:d", require_private_clean="warn"), dataset)
    assert problem in said
    assert bool(said) == bool(problem)
    refuse = TrainRequest("sha256:d", require_private_clean="refuse")
    if not problem:
        assert check_private(refuse, dataset) == ""
        return
    with pytest.raises(ClientFault, match=problem) as caught:
        check_private(refuse, dataset)
    assert caught.value.code == "private_data"
    assert "redact" in caught.value.remedy
