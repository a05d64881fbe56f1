"""Faults of the disk: no space left, a flipped bit."""

import asyncio
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from chaosplugin import journal

from faultmatrix.rig import Rig, send
from faultmatrix.stage import Stage, fault
from kernelm.testing.faults import flip
from kernelm.testing.harness import until
from kernelm_contracts.jobs import JobChanged
from kernelm_sdk.errors import Fault
from kernelm_sdk.events import received
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, InstanceName, Node, PutArtifact

DISK_MB = 96


class SmallDisk(Rig):
    """A home on a file system of its own, which can be filled up for real."""

    def __init__(self) -> None:
        work = Path(tempfile.mkdtemp(prefix="kernelm-chaos-"))
        self.disk = work / "disk"
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.disk)], check=True)
        super().__init__(work, self.disk / "home")

    def fill(self) -> None:
        """Take all that is left, to the last byte."""
        with (self.disk / "filler").open("ab", buffering=0) as file:
            for block in (2**20, 4096, 1):
                try:
                    while True:
                        file.write(b"\0" * block)
                except OSError:
                    continue

    async def down(self, keep: bool = False) -> None:
        (self.disk / "filler").unlink(missing_ok=True)
        try:
            await super().down(keep=True)
            if keep:
                shutil.copytree(self.home / "logs", self.work / "logs", dirs_exist_ok=True)
        finally:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)
            if not keep:
                shutil.rmtree(self.work, ignore_errors=True)


@fault("disk full", 3, fresh=True, rig=SmallDisk, needs=("root", "mount"))
async def disk_full(stage: Stage) -> str:
    """A real ENOSPC for some seconds, in all that the home holds: streams, records, artifacts, logs."""
    rig = stage.rig
    assert isinstance(rig, SmallDisk)
    for _ in range(8):  # somebody else goes on writing: what a log gives free is taken again
        rig.fill()
        await asyncio.sleep(0.5)
    free = shutil.disk_usage(rig.disk).free
    (rig.disk / "filler").unlink()
    stage.over()
    stage.check(free < 2**20, f"the disk was not full: {free} bytes were left")
    return f"{DISK_MB} MB"


@fault("bit flip: event log", 3, fresh=True)
async def flip_event(stage: Stage) -> str:
    """A bit of a stored event's body. The broker does not notice while it has it in memory; it is started again, so that it
    reads its files, and the kernel, so that it audits the log."""
    rig, bus = stage.rig, stage.rig.bus
    await until(lambda: len(stage.load.acknowledged) > 10, 20.0, "events on disk")
    n = stage.rng.choice(sorted(stage.load.acknowledged)[:-5])
    stage.damaged = True
    needle = b'"run":"%s","n":%d,' % (stage.load.run.encode(), n)
    blocks = [p for p in (rig.home / "broker" / "jetstream").rglob("streams/EVT/msgs/*.blk") if needle in p.read_bytes()]
    stage.check(blocks, f"event {n} is in no block")
    at = blocks[0].read_bytes().index(needle) + len(needle) + 20  # in the padding: still JSON, still UTF-8
    flip(blocks[0], at)
    send(rig.pid("broker"), signal.SIGKILL)
    await _returns(stage)
    send(rig.pid("kernel"), signal.SIGKILL)
    stage.over()

    async def verdict() -> str:
        text = (await rig.state()).health.get("journal", "")
        return text if text not in ("", "intact") else ""

    try:
        text = await until(verdict, 20.0, "the audit's verdict")
    except AssertionError:
        stage.complain(f"event {n} was damaged, and the audit says {(await rig.state()).health.get('journal')!r}")
        return "not found"
    stored = [received(s, b, h, q) async for q, s, b, h in bus.read("EVT")]
    silent = [e for e in stored if e.body[:60].find(needle) >= 0 and e.intact]
    stage.check(not silent, f"event {n} was damaged, and is handed out as intact")
    return text


async def _returns(stage: Stage) -> None:
    async def answers() -> bool:
        try:
            await stage.rig.state(0.0)
        except Fault:
            return False
        return True

    await until(answers, 30.0, "the broker's return")


@fault("bit flip: artifact", 3)
async def flip_artifact(stage: Stage) -> str:
    """A bit of a stored artifact: opening it names the file, and putting it again mends it."""
    rig, bus = stage.rig, stage.rig.bus
    folder = rig.work / f"artifact-{stage.load.run}"
    folder.mkdir()
    (folder / "weights.bin.txt").write_bytes(stage.rng.randbytes(5000))
    put = PutArtifact(str(folder), "source")
    artifact: Artifact = await bus.call(Artifacts.put, put, timeout_s=10.0, patience_s=20.0)
    flip(_tree(rig, artifact.digest) / "weights.bin.txt", stage.rng.randrange(5000))
    try:
        await bus.call(Artifacts.open, ArtifactName(artifact.digest), timeout_s=10.0)
        stage.complain("an artifact with a flipped bit was opened")
    except Fault as refusal:
        stage.check(refusal.code == "corrupt_artifact" and "weights.bin.txt" in refusal.message, f"not named: {refusal}")
    await bus.call(Artifacts.put, put, timeout_s=10.0)
    await bus.call(Artifacts.open, ArtifactName(artifact.digest), timeout_s=10.0)
    return "named, and mended by a new put"


def _tree(rig: Rig, digest: str) -> Path:
    return rig.home / "artifacts" / "trees" / digest.removeprefix("sha256:") / "files"


@fault("bit flip: checkpoint", 3, short=True)
async def flip_checkpoint(stage: Stage) -> str:
    """A bit of the checkpoint that a job will resume from: its next attempt must not use it. It starts anew instead, and
    the loss is on record."""
    rig, load = stage.rig, stage.load
    task = load.spawn(load.job(60, checkpoint_every=20))
    note = load.jobs[-1] if load.jobs[-1].steps == 60 else None
    while note is None:
        await asyncio.sleep(0)
        note = next((j for j in load.jobs if j.steps == 60), None)
    note.may_restart = True

    def saved() -> dict[str, str] | None:
        mine = [line for line in journal.read(rig.folder) if line["what"] in ("start", "saved", "step")]
        jobs = {line["job"] for line in mine if line["job"].startswith(note.name)}
        return next((line for line in reversed(mine) if line["what"] == "saved" and line["job"] in jobs), None)

    found = await until(saved, 20.0, "a checkpoint")
    path = _tree(rig, found["digest"]) / "state.json"
    flip(path, path.read_bytes().index(b'"total": ') + 9)  # a digit becomes another digit: only a digest can tell
    await rig.bus.call(Node.stop, InstanceName(found["by"], 0.1), instance="node-local", timeout_s=20.0)
    stage.over()
    await task
    told = []
    async for _, subject, body, headers in rig.bus.read("EVT", "evt.job.state.*", rig.first_event):
        event = received(subject, body, headers).event
        if isinstance(event, JobChanged) and note.record and event.job == note.record.id:
            told.append(event.why)
    named = [why for why in told if "corrupt" in why and "state.json" in why]
    stage.check(named, f"no event of the job names the damaged checkpoint: {told}")
    return "named; begun anew"
