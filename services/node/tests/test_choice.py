"""Which runtime may run what: refusals that name what is missing, before anything is started."""

from pathlib import Path

import pytest

from kernelm_node.runtimes import Runtimes
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Limits, Resources, StartInstance


def request(runtime: str, **more: object) -> StartInstance:
    return StartInstance("p-1", "p", "p", runtime, "", **more)  # type: ignore[arg-type]


@pytest.fixture
def runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtimes:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody-listens")
    return Runtimes(tmp_path)


@pytest.mark.parametrize(("more", "named"), [
    ({"limits": Limits(cpu=0.5)}, "cpu_limit (limits.cpu = 0.5)"),
    ({"limits": Limits(memory_mb=64)}, "memory_limit (limits.memory_mb = 64)"),
    ({"limits": Limits(pids=9)}, "pids_limit (limits.pids = 9)"),
    ({"needs": Resources(0.0, 1, 2)}, "gpu_limit (needs.gpus = 2)"),
    ({"isolated": True}, "isolation (isolated = true)"),
])  # fmt: skip
async def test_what_is_not_enforced_is_refused_by_its_name(runtimes: Runtimes, more: dict[str, object], named: str) -> None:
    await runtimes.probe()
    with pytest.raises(ClientFault) as caught:
        await runtimes.choose(request("inproc", **more))
    assert caught.value.code == "unsupported_runtime"
    assert named in caught.value.message
    able = [name for name, can in runtimes.usable().items() if named.partition(" ")[0] in can]
    assert all(name in caught.value.remedy for name in able)
    for name in able:
        assert (await runtimes.choose(request(name, **more))).name == name


async def test_without_a_docker_engine_a_container_is_refused_with_the_reason(runtimes: Runtimes) -> None:
    await runtimes.probe()
    assert "container" not in runtimes.usable()
    with pytest.raises(ClientFault) as caught:
        await runtimes.choose(request("container"))
    assert caught.value.code == "unsupported_runtime"
    assert "no Docker engine" in caught.value.message
    assert "nobody-listens" in caught.value.message
    assert "process" in caught.value.remedy
    await runtimes.close()
