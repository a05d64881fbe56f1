"""On which nodes a pool's instances are to run, and what the kernel starts and stops for that."""

import msgspec
import pytest

from kernelm.supervisor import _placed
from kernelm_sdk.system import Instance, PoolSpec

NODES = ["a", "b", "c"]


def at(*nodes: str) -> list[Instance]:
    return [Instance(f"i-{k}", "p", "1", "pool", node, "ready") for k, node in enumerate(nodes)]


@pytest.mark.parametrize(("spec", "nodes", "there", "surplus", "missing"), [
    (PoolSpec("pool", "p", 2), "", "", "", "ab"),
    (PoolSpec("pool", "p", 4), "c", "c", "", "abc"),
    (PoolSpec("pool", "p", 1), "bc", "bc", "c", ""),
    (PoolSpec("pool", "p", 2, node="b"), "ab", "b", "", "b"),  # that on a goes when both are ready
    (PoolSpec("pool", "p", 0, node="b"), "b", "b", "b", ""),
    (PoolSpec("pool", "p", 0, each_node=True), "b", "b", "", "ac"),
    (PoolSpec("pool", "p", 3, node="a", places={"a": 2, "c": 1}), "", "", "", "aac"),
    (PoolSpec("pool", "p", 3, node="a", places={"a": 2, "c": 1}), "abcc", "acc", "c", "a"),
    (PoolSpec("pool", "p", 2, node="a", places={"a": 1, "gone": 1}), "a", "a", "", ["gone"]),  # it waits for its node
])  # fmt: skip
def test_what_is_where_it_shall_be_what_is_too_much_and_what_is_missing(
        spec: PoolSpec, nodes: str, there: str, surplus: str, missing: str | list[str]) -> None:  # fmt: skip
    here, extra, targets = _placed(spec, at(*nodes), NODES)
    assert ([i.node for i in here], [i.node for i in extra], targets) == (list(there), list(surplus), list(missing))


@pytest.mark.parametrize("places", [{"a": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 0}])
def test_places_share_out_the_instances(places: dict[str, int]) -> None:
    with pytest.raises(msgspec.ValidationError, match="must share out `instances`, 2"):
        msgspec.convert({"pool": "news", "plugin": "p", "instances": 2, "places": places}, PoolSpec)
