"""The container runtime on a real engine: what the template grants, how a container lives and ends."""

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernelm_node.diagnosis import diagnose, last_lines
from kernelm_node.runtimes.container import ContainerRuntime
from kernelm_node.runtimes.runtime import Exit, Launch
from kernelm_node.runtimes.template import USER, pinned, sockets
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Empty, Lifecycle, Limits, Resources

pytestmark = pytest.mark.asyncio(loop_scope="module")
MB = 2**20


# ---- the template ----

async def test_the_engine_gets_the_template_and_nothing_else(house: Any, inside: Launch) -> None:
    attributes = house.inspect(inside)
    host, config = attributes["HostConfig"], attributes["Config"]
    assert config["User"] == f"{USER}:{USER}" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (512 * MB, 500_000_000, 40)
    assert host["NetworkMode"] == "none"
    assert (host["PidMode"], host["UTSMode"], host["UsernsMode"], host["IpcMode"]) == ("", "", "", "private")
    assert host["RestartPolicy"]["Name"] in ("", "no")
    assert not host["Devices"]
    assert not host["Binds"]
    assert list(host["Tmpfs"]) == ["/tmp"]
    mounted = {m["Destination"]: (m["Source"], m["RW"]) for m in attributes["Mounts"]}
    assert mounted == {
        "/run/kernelm": (str(sockets(house.system.home, inside.instance)), False),
        "/run/secrets/kernelm-token": (inside.environment["KERNELM_TOKEN_FILE"], False),
        str(house.source): (str(house.source), False), str(house.granted): (str(house.granted), False),
        str(inside.scratch): (str(inside.scratch), True),
    }  # fmt: skip
    assert "A_SECRET" not in str(config["Env"])


async def test_what_a_manifest_leaves_open_is_bounded(house: Any) -> None:
    launch = house.launch()
    await house.start(launch)
    host = house.inspect(launch)["HostConfig"]
    assert 0 < host["Memory"] < house.engine.info()["MemTotal"]
    assert host["PidsLimit"] == 512
    assert host["NanoCpus"] == house.engine.info()["NCPU"] * 10**9


@pytest.mark.parametrize("image", ["python", "python:3.11", "kernelm-runner:latest", "sha256:12", "a@sha256:" + "g" * 64])
async def test_a_tag_is_refused_with_the_remedy(house: Any, image: str) -> None:
    with pytest.raises(ClientFault, match="neither an id nor a digest") as caught:
        await house.runtime.start(house.launch(image=image))
    assert f"docker image inspect --format '{{{{.Id}}}}' {image}" in caught.value.remedy
    assert pinned("sha256:" + "0" * 64)


async def test_an_image_that_is_not_there_or_brings_volumes_is_refused(house: Any, tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="not on this node"):
        await house.runtime.start(house.launch(image="sha256:" + "0" * 64))
    archive = subprocess.run(["tar", "-c", "-C", tmp_path, "."], capture_output=True, check=True).stdout
    name = house.engine.api.import_image_from_data(archive, changes=["VOLUME /data"])
    image = msgspec.json.decode(name.strip().splitlines()[-1])["status"]
    try:
        with pytest.raises(ClientFault, match="declares volumes"):
            await house.runtime.start(house.launch(image=image))
    finally:
        house.engine.images.remove(image)


# ---- life and end ----

async def test_memory_beyond_the_limit_ends_it_and_the_diagnosis_says_so(house: Any) -> None:
    launch = house.launch(limits=Limits(memory_mb=128))
    task = await house.ready(launch)
    call = asyncio.create_task(house.do(launch, "x = [bytearray(2**20) for _ in range(1000)]", here=True))
    exit = await asyncio.wait_for(task.wait(), 60)
    call.cancel()
    assert exit.code == -9
    assert exit.note == "out of memory: the kernel killed it at the container's limit of 128 MB"
    assert "give it more memory_mb" in diagnose(exit, last_lines(launch.log))


async def test_it_stops_when_asked_and_ends_when_killed(house: Any) -> None:
    polite, stubborn = house.launch(), house.launch()
    tasks = [await house.ready(polite), await house.ready(stubborn)]
    assert (await house.system.admin.call(Lifecycle.probe, Empty(), instance=polite.instance)).instance == polite.instance
    tasks[0].ask()
    assert await asyncio.wait_for(tasks[0].wait(), 60) == Exit(0)
    await tasks[1].kill()
    assert await asyncio.wait_for(tasks[1].wait(), 60) == Exit(-9, "killed by the node")
    handle = house.handle(polite, tasks[0].state)
    await house.runtime.clear(handle)
    await house.runtime.clear(handle)
    assert not house.engine.containers.list(all=True, filters={"label": f"kernelm.instance={polite.instance}"})


async def test_a_module_that_the_image_lacks_is_named_with_the_remedy(house: Any) -> None:
    launch = house.launch(source=house.plugin("lacking", "import surely_not_there\n"))
    exit = await asyncio.wait_for((await house.start(launch)).wait(), 60)
    assert exit.code == 1
    assert "must be in its image" in exit.note
    assert "pip install surely-not-there" in diagnose(exit, last_lines(launch.log))


async def test_an_image_without_the_runner_is_named_with_the_remedy(house: Any, tmp_path: Path) -> None:
    archive = subprocess.run(["tar", "-c", "-C", tmp_path, "."], capture_output=True, check=True).stdout
    image = msgspec.json.decode(house.engine.api.import_image_from_data(archive).strip().splitlines()[-1])["status"]
    launch = house.launch(image=image)
    try:
        with pytest.raises(Fault, match="executable file not found") as caught:
            await house.runtime.start(launch)
        assert "kernelm-sdk" in caught.value.remedy
        assert not house.engine.containers.list(all=True, filters={"label": f"kernelm.instance={launch.instance}"})
    finally:
        house.engine.images.remove(image, force=True)


async def test_gpus_are_refused_where_the_engine_has_none(house: Any) -> None:
    if "gpu_limit" in house.runtime.can:
        assert "nvidia" in house.engine.info()["Runtimes"]
        return
    with pytest.raises(ClientFault, match="no NVIDIA runtime"):
        await house.runtime.start(house.launch(needs=Resources(gpus=1)))


async def test_without_an_engine_the_runtime_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    runtime = ContainerRuntime(tmp_path)
    await runtime.probe()
    assert runtime.can == ()
    assert "nothing.sock" in runtime.missing
    assert "start dockerd" in runtime.missing


async def test_the_engine_declares_what_it_enforces(house: Any) -> None:
    assert house.runtime.missing == ""
    assert {"kill", "cpu_limit", "memory_limit", "pids_limit", "isolation"} <= set(house.runtime.can)
