"""Runtime `venv`: a process like `process`, with a Python environment of its own made from the plugin's own requirements
(venvs.py), so that plugins whose dependencies contradict each other live side by side. It always starts cold: what it
imports is in no other process."""

import asyncio
import os
from pathlib import Path
from typing import ClassVar

import msgspec

from kernelm_node.runtimes.preparing import PreparedTask
from kernelm_node.runtimes.process import ProcessRuntime
from kernelm_node.runtimes.runtime import Launch, Task
from kernelm_node.runtimes.venvs import Venvs, copied, own_packages
from kernelm_sdk.plugin import MANIFEST

RUNNER = ("-m", "kernelm_sdk.runner")


class VenvRuntime(ProcessRuntime):
    """One process an instance, and one environment a set of requirements."""

    name: ClassVar[str] = "venv"

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self._venvs = Venvs(home / "venvs")

    async def start(self, launch: Launch) -> Task:
        return PreparedTask(self._begin(launch), launch.log, launch.instance)

    async def _begin(self, launch: Launch) -> Task:
        environments = launch.manifest.venv
        wanted = environments.gpu if launch.needs.gpus and environments.gpu else environments.cpu
        place = await self._venvs.of(launch.plugin, launch.source, wanted, launch.log)
        environment = {k: v for k, v in launch.environment.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        copies = self.home / "venvs" / "packages"
        path = [await asyncio.to_thread(copied, package, copies) for package in own_packages()]
        if launch.source is None:
            package = Path(environment["KERNELM_MANIFEST"]).parent
            folder = await asyncio.to_thread(copied, package, copies)
            environment["KERNELM_MANIFEST"] = str(folder / package.name / MANIFEST)
        path.append(launch.source or folder)
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "VIRTUAL_ENV": str(place),
                        "PATH": f"{place / 'bin'}:{environment.get('PATH', '/usr/bin:/bin')}"}  # fmt: skip
        launch = msgspec.structs.replace(launch, environment=environment)
        groups = self._groups.make(launch.instance, launch.limits)
        try:
            return self.popen(launch, (str(place / "bin" / "python"), *RUNNER), groups)
        except BaseException:
            await self._remove(groups)
            raise
