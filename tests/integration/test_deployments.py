"""Models of the real encoder plugin, deployed and replaced under load in processes of their own, and rolled back by the command."""

import asyncio
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from kernelm.testing.harness import System, until
from kernelm_cli.home import UpFile, write_up
from kernelm_contracts.jobs import Jobs, RunName, RunSpec, RunView
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_contracts.trainer import ModelCard
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Artifacts, PutArtifact

pytestmark = pytest.mark.slow
TERMS = ("goal", "match", "chip", "software")


def model(folder: Path, labels: tuple[str, str], whole: bool = True) -> Path:
    """A linear model of four words; with `whole` False without its weights."""
    folder.mkdir()
    weight = np.array([[4, 4, -4, -4], [-4, -4, 4, 4]], np.float32)
    tensors = {"idf": np.ones(4, np.float32), "weight": weight, "bias": np.zeros(2, np.float32)}
    if whole:
        save_file(tensors, folder / "linear.safetensors")
    (folder / "vocabulary.json").write_bytes(msgspec.json.encode({term: column for column, term in enumerate(TERMS)}))
    card = ModelCard(folder.name, "text-classification", "tfidf-linear", labels, 64, request={"ngrams": 1})
    (folder / "model.json").write_bytes(msgspec.json.encode(card))
    return folder


async def deployed(system: System, digest: str, timeout_s: float = 120.0, **more: Any) -> RunView:
    stage = {"name": "deploy", "uses": "deploy", "with": {"name": "news", "model": digest} | more,
             "resources": {"cpu": 0.1, "memory_mb": 64}, "attempts": 1}  # fmt: skip
    run = await system.admin.call(Jobs.submit_run, msgspec.convert({"name": "news", "stage": [stage]}, RunSpec), patience_s=30.0)

    async def over() -> RunView | None:
        view: RunView = await system.admin.call(Jobs.get_run, RunName(run.id), patience_s=30.0)
        return view if view.run.state != "running" else None

    view: RunView = await until(over, timeout_s, f"the end of {run.id}")
    return view


async def classify(system: System, at_least: int = 0, patience_s: float = 0.0) -> ClassifyReply:
    request = ClassifyRequest(("a goal in the last match",), at_least=at_least)
    reply: ClassifyReply = await system.admin.call(Server.classify, request, model="news", timeout_s=30.0, patience_s=patience_s)
    return reply


async def test_models_are_replaced_under_load_and_rolled_back(tmp_path: Path) -> None:
    async with System(kernel="process") as system:
        for service in ("artifacts", "node", "jobs"):
            await system.service(service)
        me = psutil.Process()
        write_up(system.home, UpFile(me.pid, me.create_time(), system.broker.url, "", "", time.time()))
        digests = [
            (await system.admin.call(Artifacts.put, PutArtifact(str(folder), "model"))).digest
            for folder in (model(tmp_path / "first", ("sports", "tech")), model(tmp_path / "second", ("ball games", "computers")),
                           model(tmp_path / "broken", ("x", "y"), whole=False))
        ]  # fmt: skip

        async def scheduling() -> bool:
            return any(i.pool == "scheduler" and i.state == "ready" for i in (await system.state()).instances)

        await until(scheduling, 60.0, "the scheduler")
        first = await deployed(system, digests[0])
        assert first.run.state == "done", first.run.fault
        assert (await classify(system)).results[0][0].label == "sports"

        answers, faults = Counter[int](), Counter[str]()

        async def load() -> None:
            while True:
                try:
                    answers[(await classify(system)).generation] += 1
                except Fault as fault:
                    faults[str(fault)] += 1
                await asyncio.sleep(0.005)

        loading = [asyncio.create_task(load()) for _ in range(3)]
        waiting = asyncio.create_task(classify(system, at_least=2, patience_s=120.0))
        second = await deployed(system, digests[1], canary=30, watch_s=2.0, latency_ms=5000.0)  # others may use the machine
        assert second.run.state == "done", second.run.fault
        assert (await waiting).generation == 2
        reply = await classify(system, at_least=2)
        assert (reply.generation, reply.artifact, reply.results[0][0].label) == (2, digests[1], "ball games")

        broken = await deployed(system, digests[2])
        assert broken.run.state == "failed"
        assert broken.run.fault is not None
        assert broken.run.fault.details["pool"].startswith("news-g3-")
        assert "linear.safetensors" in broken.run.fault.message
        assert (await classify(system)).generation == 2

        command = [sys.executable, "-m", "kernelm_cli", "model", "rollback", "news", "--home", str(system.home)]
        back = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = await back.communicate()
        assert back.returncode == 0, said.decode()
        assert b"as generation 4" in said
        assert (await classify(system, at_least=4)).results[0][0].label == "sports"
        with pytest.raises(ClientFault, match="generation 4") as caught:
            await classify(system, at_least=5)
        assert caught.value.code == "stale_generation"

        await until(lambda: answers[4] > 50, 30.0, "calls to the newest generation")
        for task in loading:
            task.cancel()
        assert not faults
        assert set(answers) == {1, 2, 4}
