"""The plugin: it ends its process before it is ready."""

import os
import signal

from chaosplugin.contract import Chaos

from kernelm_sdk.plugin import Plugin


class CrashPlugin(Plugin, Chaos):
    """Never comes up."""

    async def on_start(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)
