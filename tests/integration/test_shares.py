"""The processor is shared out as the account of resources says: an instance weighs what it and its jobs were granted. Real node,
scheduler and job table; a plugin of its own, in a process of its own."""

import os
from pathlib import Path

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm.testing.hooks import install_plugin
from kernelm_contracts.jobs import JobName, JobRecord, Jobs, JobSpec
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.shares import AUTOGROUP, niceness
from kernelm_sdk.system import Empty, Node, NodeReport, PoolSpec, Resources

pytestmark = pytest.mark.skipif(not AUTOGROUP.exists(), reason="this Linux does not weigh sessions: no /proc/self/autogroup")
MANIFEST = """
name = "holder"
version = "0.0.1"
summary = "for tests"
contracts = ["trainer/1"]
entry = "kernelm_holder.plugin:Holder"
default = false
max_jobs = 2
"""
PLUGIN = """
import asyncio
from pathlib import Path
from kernelm_contracts.trainer import Scores, Trained, Trainer
from kernelm_sdk.plugin import Plugin

class Holder(Plugin, Trainer):
    async def train(self, request, job):
        while not Path(request.dataset).exists():
            await asyncio.sleep(0.02)
        return Trained("m", "encoder", "adamw", 1, Scores("validation", 1, 1.0, 1.0, 1.0))
"""


async def test_an_instance_weighs_what_it_and_its_jobs_were_granted(tmp_path: Path) -> None:
    scheduler = msgspec.structs.replace(find_manifests()[0]["scheduler"], default=False)
    manifest = install_plugin(tmp_path / "site", "holder", MANIFEST, PLUGIN)
    async with System(manifests={"scheduler": scheduler, "holder": manifest}) as system:
        path = f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        await system.service("node", PYTHONPATH=path, KERNELM_NODE_CPU="2")
        await system.service("jobs")
        await system.pool(PoolSpec("scheduler", "scheduler"))
        await system.pool(PoolSpec("holder", "holder", needs=Resources(0.3, 50)))
        report: NodeReport = await system.admin.call(Node.report, Empty(), instance="node-local")
        pid = next(i.pid for i in report.running if i.plugin == "holder")

        async def weighs(cores: float) -> bool:
            return Path(f"/proc/{pid}/autogroup").read_text().split()[-1] == str(niceness(cores))

        async def submit(name: str, cores: float) -> tuple[str, Path]:
            file = tmp_path / name
            spec = JobSpec(name, "trainer/1.train", {"dataset": str(file)}, Resources(cores, 10))
            return (await system.admin.call(Jobs.submit, spec)).id, file

        await until(lambda: weighs(0.3), 20.0, "its own share")
        _, first = await submit("first", 0.2)
        await until(lambda: weighs(0.5), 20.0, "the share with one job")
        second_id, second = await submit("second", 0.3)
        await until(lambda: weighs(0.8), 20.0, "the share with two jobs")
        first.touch()
        await until(lambda: weighs(0.6), 20.0, "the share after the first job")
        second.touch()
        await until(lambda: weighs(0.3), 20.0, "the share without jobs")
        record: JobRecord = await system.admin.call(Jobs.get, JobName(second_id))
        assert record.state in ("running", "done")
        assert record.fault is None
