import msgspec
import pytest

from kernelm_contracts.optimizer import Candidate, OptimizeRequest
from kernelm_contracts.trainer import TrainRequest
from kernelm_optimizer.plan import checked, nothing_measured, variant_name
from kernelm_optimizer.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault

DATASET = "sha256:d"
GIVEN = Candidate("given", model="sha256:m")


def request(*candidates: Candidate, **fields: object) -> OptimizeRequest:
    return msgspec.structs.replace(OptimizeRequest(DATASET, candidates or (GIVEN,)), **fields)


@pytest.mark.parametrize(("bad", "message"), [
    (OptimizeRequest(DATASET, ()), "candidates is empty"),
    (request(dataset=""), "dataset is empty"),
    (request(objective="beauty"), "objective 'beauty' is not known"),
    (request(budget_s=-1.0), "budget_s is -1.0"),
    (request(budget_s=float("nan")), "budget_s is nan"),
    (request(max_drop=-0.1), "max_drop is -0.1"),
    (request(max_drop=2.0), "max_drop is 2.0"),
    (request(GIVEN, GIVEN), "the name 'given' is given twice"),
    (request(GIVEN, Candidate(" ", model="sha256:m")), r"candidates\[1\].name is empty"),
    (request(GIVEN, Candidate("none")), r"candidates\[1\] \('none'\) has neither `model` nor `train`"),
    (request(Candidate("other", train=TrainRequest("sha256:x"))), r"candidates\[0\].train.dataset is sha256:x"),
])
def test_bad_input_names_the_field_and_a_remedy(bad, message):
    with pytest.raises(ClientFault, match=message) as raised:
        checked(bad)
    assert raised.value.code == "invalid"
    assert raised.value.remedy


def test_an_unknown_key_is_refused():
    with pytest.raises(msgspec.ValidationError, match="bugdet_s"):
        msgspec.convert({"dataset": DATASET, "candidates": [], "bugdet_s": 3}, OptimizeRequest)


def test_training_is_on_the_dataset_of_the_search_and_blind_to_the_test_split():
    same = Candidate("same", train=TrainRequest(DATASET, algorithm="lion"))
    empty = Candidate("empty", train=TrainRequest(""))
    given, first, second = checked(request(GIVEN, same, empty))
    assert given == GIVEN
    for candidate in (first, second):
        assert candidate.train.dataset == DATASET
        assert candidate.train.report_test is False
    assert first.train.algorithm == "lion"


def test_the_variant_gets_a_name_of_its_own():
    assert variant_name("a", {"a"}) == "a-int8"
    assert variant_name("a", {"a", "a-int8", "a-int8-2"}) == "a-int8-3"


def test_whose_fault_it_is_that_nothing_was_measured():
    late = nothing_measured({"a": "spent", "b": "spent"}, {"a", "b"}, 3.0)
    assert isinstance(late, ClientFault)
    assert late.code == "budget_too_small"
    assert "budget_s = 3" in late.message
    broken = nothing_measured({"a": "spent", "b": "loss is nan"}, {"a"}, 3.0)
    assert isinstance(broken, PluginFault)
    assert "b: loss is nan" in broken.message


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(msgspec.ValidationError, match="rounds must be at least 1"):
        msgspec.convert({"rounds": 0}, Settings)
