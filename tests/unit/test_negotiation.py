"""Which contracts a newcomer and the kernel agree on."""

import pytest

from kernelm.registry import negotiate
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import ContractVersion, Node

OURS = Node.schema_hash()


@pytest.mark.parametrize(("offered", "agreed"), [
    (("node/1", OURS), ("node/1",)),
    (("node/1", "0123456789abcdef"), ("node/1",)),  # built against the release before this one, or after it
    (("forecast/3", "0123456789abcdef"), ("forecast/3",)),  # a third party's: the kernel only routes it
])  # fmt: skip
def test_one_offer(offered: tuple[str, str], agreed: tuple[str, ...]) -> None:
    assert negotiate((ContractVersion(*offered),), "p") == agreed


def test_the_highest_common_major_is_taken() -> None:
    offered = tuple(ContractVersion(id, "x") for id in ("node/2", "node/1", "forecast/2", "forecast/10"))
    assert set(negotiate(offered, "p")) == {"node/1", "forecast/10"}


def test_without_a_common_one_both_lists_are_in_the_error() -> None:
    with pytest.raises(ClientFault, match=r"node/9 .abc.*node/1 .") as refused:
        negotiate((ContractVersion("node/9", "abc"),), "p")
    assert refused.value.code == "version_mismatch"
    assert OURS in refused.value.message
