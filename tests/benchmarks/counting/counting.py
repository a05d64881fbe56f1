"""A plugin that answers and remembers the number of every request; it writes them down when it is stopped."""

from array import array
from pathlib import Path
from typing import Any

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Call, Plugin

VERSION = "1.0.0"


class Numbered(Struct, frozen=True):
    id: int  # -1: asked by the kernel, which tries a new instance before it gets calls
    text: str


class Answer(Struct, frozen=True):
    id: int
    version: str


class Count(Contract, name="count", major=1):
    @unary
    async def say(self, request: Numbered, call: Any) -> Answer: ...


class CountingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    folder: str = ""  # for <instance>.ids


class Counting(Plugin, Count):
    Settings = CountingSettings

    async def on_start(self) -> None:
        self._seen = array("q")

    async def say(self, request: Numbered, call: Call) -> Answer:
        if request.id >= 0:
            self._seen.append(request.id)
        return Answer(request.id, VERSION)

    async def on_stop(self) -> None:
        if self.settings.folder:
            path = Path(self.settings.folder, f"{self.context.instance}.part")
            with path.open("wb") as file:
                self._seen.tofile(file)
            path.rename(path.with_suffix(".ids"))
