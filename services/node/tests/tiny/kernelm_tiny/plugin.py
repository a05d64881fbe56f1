"""The plugin `tiny`: does what the runtime suite asks for."""

import asyncio
import os
import subprocess
import sys
import time

import msgspec

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin


class Ask(msgspec.Struct):
    what: str
    amount: float = 0
    text: str = ""


class Told(msgspec.Struct):
    text: str = ""
    number: float = 0


class Doing(Contract, name="tiny", major=1):
    @unary
    async def do(self, request: Ask, call) -> Told: ...


class Tiny(Plugin, Doing):
    held: list[bytes] = []

    async def do(self, request, call):
        return await getattr(self, request.what)(request)

    async def say(self, request):
        return Told(request.text)

    async def where(self, request):
        return Told(f"{sys.prefix}|{__file__}|{self.context.instance}", os.getpid())

    async def crash(self, request):
        print("about to crash", request.text, file=sys.stderr, flush=True)
        os._exit(int(request.amount))

    async def eat(self, request):  # megabytes
        for _ in range(int(request.amount)):
            self.held.append(b"x" * 2**20)
        return Told("", len(self.held))

    async def burn(self, request):  # the share of one core that it gets for some seconds
        def work():
            begun, used = time.monotonic(), time.process_time()
            while time.monotonic() - begun < request.amount:
                pass
            return (time.process_time() - used) / (time.monotonic() - begun)

        return Told("", await asyncio.to_thread(work))

    async def children(self, request):  # how many were to be had
        started = []
        try:
            for _ in range(int(request.amount)):
                command = [sys.executable, "-c", "import time; time.sleep(600)", request.text]
                started.append(subprocess.Popen(command, start_new_session=True))
        except OSError as error:
            for child in started:
                child.kill()
                child.wait()
            return Told(str(error), len(started))
        return Told("", len(started))

    async def on_stop(self):
        print("stopped politely", flush=True)
