"""The system under test, run as a user runs it: `kernelm up --detach` in a temporary home, with two more plugins installed."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from chaosplugin.contract import Chaos, Effect
from chaosplugin.journal import FOLDER

from kernelm.testing.harness import until
from kernelm_authority.identity import admin
from kernelm_cli.home import read_up
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel, Node, PoolSpec, Running, SystemState

PLUGINS = Path(__file__).parents[1] / "plugin"
POOL = "chaosplugin"
INSTANCES = 2
SERVICES = ("kernel", "artifacts", "node-local", "jobs", "gateway")
RESTART_S = 60.0  # patience with what comes back; far more than it takes, for a machine that has other work


def install(site: Path) -> None:
    """Make the plugins of this folder installed for whoever has `site` on its PYTHONPATH: a distribution's metadata is all
    that an entry point needs."""
    for plugin in ("chaosplugin", "crashplugin"):
        info = site / f"{plugin}-1.0.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin}\nVersion: 1.0.0\n")
        (info / "entry_points.txt").write_text(f"[kernelm.plugins]\n{plugin} = {plugin}\n")
        (site / plugin).symlink_to(PLUGINS / plugin)


class Rig:
    """One system. `wrapper` stands before `kernelm up` on the command line, `environment` is added to its variables."""

    def __init__(self, work: Path | None = None, home: Path | None = None) -> None:
        self.work = work or Path(tempfile.mkdtemp(prefix="kernelm-chaos-"))
        self.home, self.folder = home or self.work / "home", self.work / "chaos"
        self.folder.mkdir(parents=True, exist_ok=True)
        install(self.work / "site")
        self.bus: Bus
        self.runs = 0
        self.first_event = 1  # in the stream, of the run that is under way
        self._buses: list[Bus] = []

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(self.work / "site"), os.environ.get("PYTHONPATH", ""))))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_") or k == "KERNELM_NATS_SERVER"}
        return kept | {"PYTHONPATH": path, "KERNELM_HOME": str(self.home), FOLDER: str(self.folder)}

    async def kernelm(self, *words: str) -> str:
        """Run the command line; its output. RuntimeError with all that it wrote if it fails."""
        def work() -> subprocess.CompletedProcess[str]:
            return subprocess.run([sys.executable, "-m", "kernelm_cli", *words], env=self.environment, capture_output=True,
                                  text=True, check=False, timeout=300)  # fmt: skip

        result = await asyncio.to_thread(work)
        if result.returncode:
            raise RuntimeError(f"kernelm {' '.join(words)} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
        return result.stdout

    async def up(self) -> None:
        """Start the system, with two warm instances of the plugin."""
        await self.kernelm("up", "--detach")
        self.bus = await self.connect()
        await self.bus.call(Kernel.start_pool, PoolSpec(POOL, POOL, INSTANCES), patience_s=RESTART_S)
        await self.whole()

    async def connect(self) -> Bus:
        """A connection as the administrator."""
        up = read_up(self.home)
        assert up is not None
        bus = await Bus.connect(up.url, admin(self.home))
        self._buses.append(bus)
        return bus

    async def down(self, keep: bool = False) -> None:
        """Stop it and, unless `keep`, remove all that it wrote."""
        for bus in self._buses:
            await bus.close()
        self._buses.clear()
        try:
            await self.kernelm("down")
        finally:
            if not keep:
                shutil.rmtree(self.work, ignore_errors=True)

    # ---- who is who ----

    def pid(self, name: str) -> int:
        """Of a child of the launcher: broker, kernel, artifacts, node, jobs, gateway."""
        up = read_up(self.home)
        assert up is not None
        return up.children[name]

    async def state(self, patience_s: float = RESTART_S) -> SystemState:
        state: SystemState = await self.bus.call(Kernel.state, Empty(), timeout_s=2.0, patience_s=patience_s)
        return state

    async def running(self, plugin: str) -> list[Running]:
        """The plugin's instances, by the node's own account."""
        report = await self.bus.call(Node.report, Empty(), instance="node-local", timeout_s=3.0, patience_s=RESTART_S)
        return [r for r in report.running if r.plugin == plugin]

    # ---- whether it is well ----

    async def whole(self) -> None:
        """Wait until everything is at its full strength: services, every pool, and every instance answers."""
        async def problems() -> str:
            state = await self.state()
            ready = {i.id for i in state.instances if i.state == "ready"}
            missing = [s for s in SERVICES if s not in ready]
            for pool in state.pools:
                mine = [i.id for i in state.instances if i.pool == pool.pool and i.state == "ready"]
                if len(mine) < (pool.instances or 1) and f"pool {pool.pool}" not in state.health and not pool.parked:
                    missing.append(pool.pool)
            answers = [await self.answers(i.id) for i in state.instances if i.pool == POOL and i.state == "ready"]
            return ", ".join(missing) or ("" if all(answers) and len(answers) >= INSTANCES else "an instance is silent")

        last = "nothing was asked"

        async def well() -> bool:
            nonlocal last
            try:
                last = await problems()
            except Fault as fault:
                last = str(fault)
            return not last

        try:
            await until(well, RESTART_S, "the whole system")
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}; see {self.home / 'logs'}") from None

    async def answers(self, instance: str) -> bool:
        """Whether one instance of the plugin handles a call."""
        try:
            await self.bus.call(Chaos.apply, Effect(f"warm-{instance}"), instance=instance, timeout_s=2.0)
        except Fault:
            return False
        return True


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        psutil.Process(pid).send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
