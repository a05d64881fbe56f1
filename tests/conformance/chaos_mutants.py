"""What a kill, a pause, a restart of the broker, a flipped bit or a full disk bring to light, as in mutants.py. Each is checked
on a stand of its own."""

AROUND_THE_STORE = """
from kernelm_sdk.plugin import Context
async def artifact(self, digest):
    return self.scratch.parents[1] / "artifacts" / "trees" / digest[7:] / "files"
Context.artifact = artifact
"""
MUTANTS: tuple[tuple[str, str, str], ...] = (
    ("chaos.pause", "scheduler", "_c = [0.0]\nsignal.signal(signal.SIGCONT, lambda *_: _c.__setitem__(0, time.monotonic()))\n"
     "_m = Served.on_message\ndef on_message(self, msg):\n    if time.monotonic() - _c[0] > 0.3:\n        _m(self, msg)\n"
     "Served.on_message = on_message"),
    ("chaos.broker", "scheduler", "_b = []\n_m = Served.on_message\ndef on_message(self, msg):\n"
     "    if self._bus._client.stats['reconnects']:\n        _b.append(time.monotonic())\n        if _b[-1] - _b[0] < 34:\n"
     "            return\n    _m(self, msg)\nServed.on_message = on_message"),
    ("chaos.kill", "scheduler", "async def on_start(self):\n    (self.context.scratch / 'lock').open('x').close()\n"
     "InOrder.on_start = on_start"),
    ("chaos.given-up", "scheduler", "os._exit = lambda code, end=os._exit: end(0)"),
    ("chaos.corrupt-input", "data", AROUND_THE_STORE),
    ("chaos.corrupt-settings", "server", AROUND_THE_STORE),
    ("chaos.storage-full", "data", "_w = FolderData.write\ndef write(self, source, out, request):\n    try:\n"
     "        return _w(self, source, out, request)\n    except OSError:\n"
     "        raise ClientFault('invalid', 'the source is not readable') from None\nFolderData.write = write"),
)  # fmt: skip
