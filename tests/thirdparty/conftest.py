"""A system as a user has it, for plugins that come from outside: all through the `kernelm` command."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kernelm_cli.home import read_up
from kernelm_sdk.bus import Bus, Credentials

FIRST_PARTY = {"data/1": "data", "scheduler/1": "scheduler", "server/1": "encoder", "trainer/1": "trainer",
               "optimizer/1": "optimizer"}  # fmt: skip


class Desk:
    """One running system in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def start(self, *words: object) -> "subprocess.Popen[str]":
        """`kernelm WORDS`, which goes on beside the test."""
        return subprocess.Popen([sys.executable, "-m", "kernelm_cli", *map(str, words)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=os.environ | {"KERNELM_HOME": str(self.home)})  # fmt: skip

    def kernelm(self, *words: object, code: int = 0) -> str:
        """What `kernelm WORDS` prints; it must exit with `code`. With another than 0: what it prints of the fault."""
        child = self.start(*words)
        out, err = child.communicate(timeout=280)
        assert child.returncode == code, f"kernelm {words}: code {child.returncode}\n{out}{err}"
        return err if code else out

    def asked(self, *words: object) -> Any:
        """The answer as JSON."""
        return json.loads(self.kernelm(*words, "--json"))

    def serving(self) -> dict[str, str]:
        """Contract or deployment -> the plugin that serves it."""
        state = self.asked("plugin", "list")
        plugins = {p["pool"]: p["plugin"] for p in state["pools"]}
        return {r["name"]: plugins[r["to"][0]["pool"]] for r in state["routes"] if r["to"][0]["pool"] in plugins}

    def speak(self, work: Callable[[Bus], Awaitable[Any]], credentials: Credentials | None = None) -> Any:
        """What `work` gives with a connection of the administrator, or of whom `credentials` name."""

        async def with_bus() -> Any:
            bus = await Bus.connect(read_up(self.home).url, credentials or self.administrator())
            try:
                return await work(bus)
            finally:
                await bus.close()

        return asyncio.run(with_bus())

    def administrator(self) -> Credentials:
        """The credentials in the home."""
        from kernelm_authority.identity import admin

        return admin(self.home)

    def whole(self) -> bool:
        """Whether every contract is served by kernelm's own plugin, by instances that are ready, and nothing is out of order."""
        state = self.asked("ps")
        ready = {i["plugin"] for i in state["instances"] if i["state"] == "ready"}
        assert {k: v for k, v in self.serving().items() if k in FIRST_PARTY} == FIRST_PARTY
        assert ready >= set(FIRST_PARTY.values())
        assert state["health"] == {"audit": "intact", "journal": "intact", "routes": "in force"}
        return True


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A system that is up, is whole before and after, and goes down."""
    desk = Desk(tmp_path_factory.mktemp("outside") / "home")
    desk.kernelm("up", "--detach")
    try:
        assert desk.whole()
        yield desk
        assert desk.whole()
    finally:
        desk.kernelm("down")
