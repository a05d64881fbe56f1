"""The service in a whole system: a real broker, a real kernel, `python -m kernelm_artifacts`."""

from pathlib import Path

import httpx
import psutil
import pytest

from kernelm.testing.harness import System, until
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.events import Received
from kernelm_sdk.system import ArtifactName, Artifacts, ArtifactStored, GrantArtifact, PutArtifact


@pytest.fixture
async def system():
    async with System() as system:
        await system.service("artifacts")
        yield system


async def test_put_open_read_from_afar_and_survive_kill_9(system: System, tmp_path: Path) -> None:
    events: list[Received] = []

    async def note(event: Received) -> None:
        events.append(event)

    await system.admin.follow(note, "evt.artifact.stored.*")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    artifact = await system.admin.call(Artifacts.put, PutArtifact(str(tmp_path / "in"), "dataset"), patience_s=10)
    await until(lambda: events, 5, "the event")
    assert events[0].event == ArtifactStored(digest=artifact.digest, kind="dataset", bytes=3)
    assert events[0].source == "artifacts"
    grant = await system.admin.call(Artifacts.grant, GrantArtifact(artifact.digest))
    async with httpx.AsyncClient(trust_env=False, headers={"authorization": f"Bearer {grant.token}"}) as client:
        assert (await client.get(grant.url + "/a.txt")).text == "one"
    rss = psutil.Process(system.processes["artifacts"].pid).memory_info().rss
    assert rss < 100 * 2**20

    system.processes["artifacts"].kill()
    system.processes["artifacts"].wait()
    await system.service("artifacts")
    opened = await system.admin.call(Artifacts.open, ArtifactName(artifact.digest), patience_s=10)
    assert (Path(opened.path) / "a.txt").read_text() == "one"

    (Path(opened.path) / "a.txt").chmod(0o644)
    (Path(opened.path) / "a.txt").write_text("onf")
    with pytest.raises(KernelFault) as caught:
        await system.admin.call(Artifacts.open, ArtifactName(artifact.digest))
    assert caught.value.code == "corrupt_artifact"
    assert "a.txt" in caught.value.message
