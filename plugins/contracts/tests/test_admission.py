"""What every server asks of a call, on its own: the servers' own tests show that they ask it."""

import pytest

from kernelm_contracts.admission import owner, require_served, require_texts
from kernelm_contracts.server import ClassifyRequest, ServedModel
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call

NEWS = ServedModel("news", "sha256:0", 3)


def test_the_right_model_that_is_young_enough_is_served() -> None:
    assert require_served(NEWS, ClassifyRequest(("a",), at_least=3), Call("c", "news"), "p") is NEWS
    assert require_served(NEWS, ClassifyRequest(("a",)), Call("c"), "p") is NEWS


@pytest.mark.parametrize(("served", "asked", "at_least", "code"), [
    (NEWS, "spam", 0, "unknown_model"), (None, "news", 0, "unknown_model"), (NEWS, "news", 4, "stale_generation"),
])  # fmt: skip
def test_what_is_not_served_is_named(served: ServedModel | None, asked: str, at_least: int, code: str) -> None:
    with pytest.raises(ClientFault) as caught:
        require_served(served, ClassifyRequest(("a",), at_least=at_least), Call("c", asked), "pool-3")
    assert caught.value.code == code
    assert (caught.value.retriable, caught.value.details.get("pool", "")) == (
        (True, "pool-3") if code == "stale_generation" else (False, ""))  # fmt: skip


def test_the_tenants_of_a_door_are_told_apart_and_nobody_takes_the_place_of_another() -> None:
    acme, initech = (owner(Call("gateway", "chat", {"Kernelm-Tenant": t})) for t in ("acme", "initech"))
    assert acme != initech
    assert owner(Call("key-1", "chat", {"Kernelm-Tenant": "acme"})) != acme


@pytest.mark.parametrize(("texts", "named"), [((), "`input` is empty"), (("a", " \n"), r"`input\[1\]` is blank")])
def test_a_text_without_anything_to_read_is_named(texts: tuple[str, ...], named: str) -> None:
    require_texts(("a", "b"))
    with pytest.raises(ClientFault, match=named) as caught:
        require_texts(texts)
    assert caught.value.code == "invalid"
