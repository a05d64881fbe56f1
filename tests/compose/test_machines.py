"""A second machine, as another network and another folder on this engine: a node and a mirror join with tokens, over TLS, by the
ports that the first one publishes. They share no volume with it."""

import asyncio
import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from docker.models.containers import Container

from kernelm_authority.identity import admin
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_contracts.trainer import Adapter, TrainRequest
from kernelm_sdk.bus import Bus
from kernelm_sdk.ports import free_port
from kernelm_sdk.system import Artifact, ArtifactQuery, Artifacts, Empty, Kernel, Resources, SystemState

Stack = Any  # conftest's
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OVER = ("done", "dead", "cancelled")
pytestmark = pytest.mark.timeout(1800)


class Second:
    """The second machine in `folder`; `port` is where the first one's broker is reached."""

    def __init__(self, stack: Stack, folder: Path, port: int) -> None:
        self.stack, self.folder, self.port = stack, folder, port
        self.project = f"{stack.project}-two"

    def compose(self, *words: str) -> str:
        files = ("--env-file", str(self.folder / ".env"), "--file", str(DEPLOY / "machine.yaml"))
        return str(self.stack.compose(*words, files=files))

    def hand_tokens(self) -> None:
        """As an operator copies them there."""
        done = self.stack.deploy("machine", "two", "--to", str(self.folder), "--address", "host-gateway")
        assert done.returncode == 0, done.stderr

    def members(self) -> list[Container]:
        label = {"label": f"com.docker.compose.project={self.project}"}
        return list(self.stack.engine.containers.list(all=True, filters=label))

    def ask(self, method: Callable[..., Any], request: msgspec.Struct) -> Any:
        """The answer to a call of the administrator's, who comes in where the second machine does."""

        async def work() -> Any:
            mine = self.stack.home / "tls" / "cli"
            tls = ssl.create_default_context(cafile=str(mine / "ca.pem"))
            tls.load_cert_chain(mine / "tls.pem")
            bus = await Bus.connect(f"tls://localhost:{self.port}", admin(self.stack.home), tls=tls, timeout_s=60)
            try:
                return await bus.call(method, request, timeout_s=60)
            finally:
                await bus.close()

        return asyncio.run(work())

    def trainers(self) -> set[str]:
        """The nodes with a trainer that is ready."""
        state: SystemState = self.ask(Kernel.state, Empty())
        return {i.node for i in state.instances if i.plugin == "trainer" and i.state == "ready"}

    def job(self, id: str) -> JobRecord:
        record: JobRecord = self.ask(Jobs.get, JobName(id))
        return record

    def artifacts(self, kind: str) -> tuple[Artifact, ...]:
        found: tuple[Artifact, ...] = self.ask(Artifacts.find, ArtifactQuery(kind, 1000)).artifacts
        return found


@pytest.fixture(scope="module")
def second(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Second]:
    second = Second(stack, tmp_path_factory.mktemp("two"), free_port())
    stack.environment |= {"KERNELM_DEPLOY_MACHINES": "two", "KERNELM_DEPLOY_BROKER_PORT": str(second.port),
                          "KERNELM_DEPLOY_ARTIFACTS_PORT": str(free_port())}  # fmt: skip
    done = stack.deploy("init")
    assert done.returncode == 0, done.stderr
    assert "machines.yaml" in done.stdout
    stack.compose("--file", str(DEPLOY / "machines.yaml"), "up", "--detach", "--wait", "--wait-timeout", "240")
    second.hand_tokens()
    done = stack.deploy("join", folder=second.folder)
    assert done.returncode == 0, done.stderr
    try:
        yield second
    finally:
        second.compose("down", "--volumes", "--timeout", "30")
        for left in stack.engine.containers.list(all=True, filters={"label": f"kernelm.home={second.folder / 'home'}"}):
            left.remove(force=True)


def training(second: Second, name: str, seed: int) -> JobSpec:
    """A training that leaves checkpoints for half a minute or more, and takes more than half of a machine."""
    models = [a for a in second.artifacts("") if {"tokenizer.json", "model.safetensors"} <= {f.path for f in a.files}]
    base = max(models, key=lambda a: a.bytes)  # the run's encoder, not the language model of random weights
    request = TrainRequest(second.artifacts("dataset")[-1].digest, base.digest, layers=2, epochs=1000, max_steps=120, batch_size=8,
                           adapter=Adapter(4, merge=True), checkpoint_every_s=2.0, report_test=False, seed=seed)  # fmt: skip
    needs = Resources(0.6 * len(os.sched_getaffinity(0)), 1024)
    return JobSpec(name, "trainer/1.train", msgspec.to_builtins(request), needs, attempts=10)


def test_work_spreads_and_goes_on_elsewhere_when_a_machine_is_cut_off(stack: Stack, second: Second, table: list[str]) -> None:
    second.compose("up", "--detach", "--wait", "--wait-timeout", "240")
    stack.until(lambda: second.trainers() == {"local", "two"}, 300, "a trainer on each machine")
    ids = [second.ask(Jobs.submit, training(second, f"spread-{seed}", seed)).id for seed in (1, 2)]

    def afar() -> JobRecord | None:
        records = [second.job(id) for id in ids]
        spread = {record.node for record in records} == {"local", "two"}
        return next((r for r in records if spread and r.node == "two" and r.state == "running" and r.checkpoint), None)

    cut: JobRecord = stack.until(afar, 600, "a checkpoint from the second machine")
    assert not (second.folder / "home" / "artifacts").exists()
    network = stack.engine.networks.get(f"{second.project}_default")
    for member in second.members():
        network.disconnect(member)
    for other in set(ids) - {cut.id}:  # it takes the room
        second.ask(Jobs.cancel, JobName(other))

    def elsewhere() -> JobRecord | None:
        record = second.job(cut.id)
        return record if record.node == "local" and record.state in ("running", *OVER) else None

    moved: JobRecord = stack.until(elsewhere, 300, "the job on the first machine")
    assert moved.epoch > cut.epoch
    assert moved.checkpoint, "it goes on where it was"
    stack.until(lambda: second.trainers() == {"local"}, 180, "the end of the lease")
    done: JobRecord = stack.until(lambda: next((r for r in [second.job(cut.id)] if r.state in OVER), None), 900, "its end")
    assert done.state == "done", done.fault

    for member in second.members():  # with what was the work of who is shut out
        network.connect(member)

    stack.until(lambda: second.trainers() == {"local", "two"}, 300, "the second machine again, by itself")
    after = second.job(cut.id)
    assert (after.epoch, after.result) == (done.epoch, done.result)
    assert [a.digest for a in second.artifacts("model") if a.lineage.get("job") == cut.id] == [done.result["model"]], "not twice"
    table.append(f"cut off: a training went on from its checkpoint on the other machine, epoch {cut.epoch} to {done.epoch}")


def test_a_forgotten_machine_is_out_and_told_so(stack: Stack, second: Second) -> None:
    """Restarted it comes back; forgotten it does not, until there are tokens again."""
    for member in second.members():
        member.restart(timeout=30)
    stack.until(lambda: second.trainers() == {"local", "two"}, 300, "the second machine after a restart")
    done = stack.deploy("forget", "two")
    assert done.returncode == 0, done.stderr
    stack.until(lambda: second.trainers() == {"local"}, 60, "the end of what ran there")

    def told() -> bool:
        return all(b"this machine was forgotten" in member.logs() for member in second.members())

    stack.until(told, 180, "the reason in the logs of its members")
    second.hand_tokens()
    stack.until(lambda: second.trainers() == {"local", "two"}, 300, "the second machine, taken in again")
