"""`kernelm plugin` from a terminal's point of view, against a real broker, kernel, store and node, with a plugin in a folder."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest
from rich.console import Console

from kernelm.testing.harness import System, until
from kernelm_cli.app import execute
from kernelm_cli.home import UpFile, write_up
from kernelm_cli.swapping import PlainSwap, SwapDrawing, readable
from kernelm_sdk.errors import Fault, PluginFault
from kernelm_sdk.system import Bounds, PoolSpec, Swap

MANIFEST = """name = "greet"
version = "1"
summary = "says hello"
contracts = ["greet/1"]
entry = "greet_plugin:Greeter"
[probe]
call = "greet/1.hello"
"""
CODE = """
import msgspec
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

class Word(msgspec.Struct):
    word: str = ""

class Settings(msgspec.Struct, forbid_unknown_fields=True):
    word: str = "hello"
    fail: bool = False

class Greet(Contract, name="greet", major=1):
    @unary
    async def hello(self, request: Word, call: object) -> Word: ...

class Greeter(Plugin, Greet):
    Settings = Settings
    async def hello(self, request: Word, call: object) -> Word:
        if self.settings.fail and request.word:
            raise RuntimeError("as the settings want it")
        return Word(self.settings.word)
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def plugin_in(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "kernelm-plugin.toml").write_text(MANIFEST)
    (folder / "greet_plugin.py").write_text(CODE)
    return folder


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[SimpleNamespace]:
    async with System() as system:
        await system.service("artifacts")
        await system.service("node")
        created = psutil.Process().create_time()
        write_up(system.home, UpFile(os.getpid(), created, system.broker.url, "", "", time.time()))

        async def start(*arguments: object, group: str = "plugin") -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "kernelm_cli", group, *map(str, arguments), "--home", str(system.home),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it  # fmt: skip

        async def kernelm(*arguments: object, group: str = "plugin") -> Ended:
            child = await start(*arguments, group=group)
            out, err = await asyncio.wait_for(child.communicate(), 240)
            assert child.returncode is not None
            return Ended(child.returncode, out.decode(), err.decode())

        async def said(word: str = "") -> str:
            msg = await system.admin.request("svc.greet.v1.hello.admin", json.dumps({"word": word}).encode(), 10.0)
            return str(msgspec.json.decode(msg.data)["word"])

        yield SimpleNamespace(system=system, start=start, kernelm=kernelm, said=said, plugin=plugin_in(tmp_path / "greet"))


async def pools(desk: SimpleNamespace) -> dict[str, PoolSpec]:
    return {p.pool: p for p in (await desk.system.state()).pools}


async def test_load_replace_rollback_scale_and_unload(desk: SimpleNamespace) -> None:
    loaded = await desk.kernelm("load", desk.plugin, "--why", "try it")
    assert loaded.code == 0, loaded.err
    line = r"✓ greet/1 is served by pool greet \(greet 1, 1 instance\), generation 1; the routes changed in [\d.]+ ms"
    assert re.search(line, loaded.out)
    assert await desk.said() == "hello"

    replaced = await desk.kernelm("replace", "greet/1", "--settings", "word=hi", "--canary", "5%", "--watch", "500ms")
    assert replaced.code == 0, replaced.err
    assert "watching it with 5% of the calls" in replaced.out
    assert "retiring greet" in replaced.out
    assert "kernelm plugin rollback greet-g2 goes back to greet" in replaced.out
    assert await desk.said() == "hi"
    listed = await desk.kernelm("list")
    assert "parked; kernelm plugin rollback greet-g2" in listed.out

    back = await desk.kernelm("rollback", "greet/1", "--json")
    assert back.code == 0, back.err
    answer = json.loads(back.out)
    assert (answer["swap"]["phase"], answer["swap"]["before"], answer["fault"]) == ("done", "greet-g2", None)
    assert answer["routes"][0]["generation"] == 3
    assert await desk.said() == "hello"

    scaled = await desk.kernelm("scale", "greet", "2")
    assert scaled.code == 0, scaled.err
    assert "pool greet (greet) has 2 ready" in scaled.out
    state = await desk.system.state()
    assert sum(i.pool == "greet" and i.state == "ready" for i in state.instances) == 2
    again = await desk.kernelm("replace", "greet", desk.plugin, "--watch", "0")
    assert again.code == 0, again.err
    assert "2 instances" in again.out, "as many as before"

    kept = await desk.kernelm("unload", "greet")
    assert kept.code == 2, "somebody is served by it"
    gone = await desk.kernelm("unload", "greet", "--force")
    assert gone.code == 0, gone.err
    assert "nobody serves greet/1 now" in gone.out
    with pytest.raises(Fault, match="nobody answers"):
        await desk.said()
    assert {s.by for s in (await desk.system.state()).swaps} == {"admin"}


async def test_what_does_not_start_or_is_worse_leaves_the_old_one_and_says_why(desk: SimpleNamespace) -> None:
    assert (await desk.kernelm("load", desk.plugin, "--instances", "1")).code == 0
    refused = await desk.kernelm("replace", "greet", "--settings", "nonsense=1")
    assert refused.code == 1
    assert "nonsense" in refused.err
    assert "pool greet serves on" in refused.err
    assert "its settings" in refused.err
    assert await desk.said() == "hello"

    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            with contextlib.suppress(PluginFault):  # those of the new one; whatever else goes wrong ends the test
                await desk.said("fail if you like")
            await asyncio.sleep(0.001)

    calls = asyncio.create_task(load())
    worse = await desk.kernelm("replace", "greet", "--settings", "fail=true", "--canary", "50%", "--watch", "120s", "--json")
    stop.set()
    await calls
    assert worse.code == 1
    answer = json.loads(worse.out)
    assert answer["swap"]["phase"] == "rolled_back", answer
    assert answer["fault"]["code"] == "swap_rolled_back"
    assert "--max-errors" in worse.err
    assert await desk.said("now") == "hello"


async def test_a_rollback_while_it_is_watched_is_at_once_and_no_failure(desk: SimpleNamespace) -> None:
    assert (await desk.kernelm("load", desk.plugin)).code == 0
    started = await desk.kernelm("replace", "greet", "--settings", "word=hi", "--watch", "10m", "--no-wait", "--json")
    assert started.code == 0, started.err
    swap = json.loads(started.out)["swap"]["id"]

    async def watched() -> bool:
        return any(s.id == swap and s.phase == "watching" for s in (await desk.system.state()).swaps)

    await until(watched, 60.0, "the watch")
    assert await desk.said() == "hi"
    back = await desk.kernelm("rollback", "greet", "--why", "I do not like it")
    assert back.code == 0, back.err
    assert "greet/1 is served by pool greet (" in back.out
    assert "I do not like it" in back.out
    assert await desk.said() == "hello"


async def test_bad_input_is_told_with_the_thing_and_the_remedy(desk: SimpleNamespace, tmp_path: Path) -> None:
    assert (await desk.kernelm("load", desk.plugin)).code == 0
    made = json.loads((await desk.kernelm("create", "deployer", "--admin", "--json", group="key")).out)
    assert made["key"]["admin"]
    assert "deployer (admin)" in (await desk.kernelm("list", group="key")).out
    nobody = await asyncio.wait_for(desk.kernelm("nobody", "hello", group="chat"), 60)  # half of what a model is waited for
    assert (nobody.code, "no deployment 'nobody' answers" in nobody.err) == (2, True)
    (desk.plugin / "weights.pkl").write_bytes(b"\x80\x04N.")
    for arguments, says in (
        (("load", desk.plugin), "weights.pkl"), (("load", "nowhere-plugin"), "nowhere-plugin"), (("load", "greet"), "greet"),
        (("load", plugin_in(tmp_path / "again")), "kernelm plugin replace greet/1 PLUGIN|PATH"),
        (("replace", "nothing/9", desk.plugin), "nothing/9"), (("rollback", "greet"), "nothing before pool 'greet'"),
        (("unload", "nothing"), "nothing"), (("scale", "nothing", 2), "nothing"),
    ):  # fmt: skip
        ended = await desk.kernelm(*arguments)
        assert ended.code == 2, (arguments, ended)
        assert says in ended.err, (arguments, ended.err)
        assert "remedy" in ended.err
        assert "Traceback" not in ended.err
        assert "was installed" not in ended.out, "none of these is"
    assert await desk.said() == "hello"


async def test_ctrl_c_leaves_the_swap_to_the_kernel_and_says_so(desk: SimpleNamespace) -> None:
    assert (await desk.kernelm("load", desk.plugin)).code == 0
    child = await desk.start("replace", "greet", "--settings", "word=hi", "--watch", "10m")
    out = b""
    while b"watching" not in out:
        out += await asyncio.wait_for(child.stdout.readline(), 60)
    child.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode == 130
    assert b"goes on in the background" in err
    swap = (await desk.system.state()).swaps[-1]
    assert (swap.phase, swap.id.encode() in err) == ("watching", True)


class Dev:
    """`kernelm plugin dev` and what it has printed so far."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child, self.text = child, ""
        self._reading = [asyncio.create_task(self._read(pipe)) for pipe in (child.stdout, child.stderr)]

    async def _read(self, pipe: Any) -> None:
        while chunk := await pipe.readline():
            self.text += chunk.decode()

    async def says(self, what: str | Callable[[], bool]) -> None:
        await until(what if callable(what) else lambda: what in self.text, 60.0, f"{what} in {self.text}")

    async def end(self) -> None:
        self.child.send_signal(signal.SIGINT)
        await asyncio.wait_for(self.child.wait(), 120)
        await asyncio.gather(*self._reading)


async def test_dev_reloads_on_save_survives_a_broken_one_and_unloads_at_the_end(desk: SimpleNamespace) -> None:
    dev = Dev(await desk.start("dev", desk.plugin))
    await dev.says("watching")
    assert await desk.said() == "hello"
    code = desk.plugin / "greet_plugin.py"

    code.write_text(CODE.replace('"hello"', '"hi"'))
    await dev.says(lambda: dev.text.count("✓") == 2)
    assert await desk.said() == "hi"

    code.write_text("def (")
    await dev.says("✗ not taken up")
    await dev.says("SyntaxError")
    await dev.says(f"{code}")
    assert "site-packages" not in dev.text, "the frames of the runner are left out"
    assert await desk.said() == "hi", "what ran before runs on"

    code.write_text(CODE.replace('"hello"', '"hi"'))
    await dev.says("back to what runs in greet")

    (desk.plugin / "kernelm-plugin.toml").write_text("name = 3")
    await dev.says("kernelm-plugin.toml: ")
    assert await desk.said() == "hi"

    (desk.plugin / "kernelm-plugin.toml").write_text(MANIFEST)
    code.write_text(CODE.replace('"hello"', '"good day"'))
    await until(lambda: _says(desk, "good day"), 60.0, dev.text)

    await dev.end()
    assert dev.child.returncode == 0, dev.text
    assert "greet is unloaded" in dev.text
    with pytest.raises(Fault, match="nobody answers"):
        await desk.said()
    assert not [p for p in (await pools(desk)).values() if not p.parked]


async def _says(desk: SimpleNamespace, word: str) -> bool:
    return bool(await desk.said() == word)


async def test_dev_puts_back_what_it_took_the_place_of(desk: SimpleNamespace, tmp_path: Path) -> None:
    other = plugin_in(tmp_path / "mine")
    assert (await desk.kernelm("load", desk.plugin, "--settings", "word=before")).code == 0
    dev = Dev(await desk.start("dev", other, "--settings", "word=mine"))
    await dev.says("watching")
    assert await desk.said() == "mine"
    for number in (2, 3):  # more than the kernel keeps to go back to
        (other / "greet_plugin.py").write_text(f"{CODE}\n# {number}\n")
        await dev.says(lambda count=number: dev.text.count("✓") == count)  # type: ignore[misc]
    await dev.end()
    assert dev.child.returncode == 0, dev.text
    assert "(greet) again" in dev.text
    assert await desk.said() == "before"
    assert len([p for p in (await pools(desk)).values() if not p.parked]) == 1


# ---- without a system ----


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    plugin_in(tmp_path / "greet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    return tmp_path


@pytest.mark.parametrize(("line", "code", "says"), [
    ("load ./nowhere", 2, "nowhere does not exist"),
    ("load ./empty", 2, "holds no kernelm-plugin.toml"),
    ("load ./file.txt", 2, "neither a folder nor a wheel"),
    ("load nowhere.whl", 2, "nowhere.whl does not exist"),
    ("load Not_A_Name", 2, "Not_A_Name"),
    ("load greet --settings nothing", 2, "nothing"),
    ("load greet --instances -1", 2, "--instances -1"),
    ("replace greet --canary 150%", 2, "--canary '150%'"),
    ("replace greet --canary 5% --watch 0", 2, "it would see no calls"),
    ("replace greet --watch soon", 2, "--watch 'soon'"),
    ("replace greet --max-errors 2", 2, "--max-errors '2'"),
    ("replace greet --max-latency fast", 2, "--max-latency 'fast'"),
    ("scale greet 0", 2, "0 instances"),
    ("scale greet many", 2, "many"),
    ("dev ./empty", 2, "holds no kernelm-plugin.toml"),
    ("dev p.whl", 2, "is a wheel"),
    ("load ./greet", 1, "kernelm up"),
    ("rollback greet", 1, "kernelm up"),
    ("unload greet", 1, "kernelm up"),
])  # fmt: skip
def test_faults_without_a_system(line: str, code: int, says: str, alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plugin", *line.split()]) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "remedy" in captured.err
    assert "Traceback" not in captured.err


def test_the_list_needs_no_system(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plugin", "list", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pools"] == []
    assert "scheduler" in [p["name"] for p in answer["plugins"]]


def swap(phase: Any, **fields: Any) -> Swap:
    return Swap("s1", "b", "a", ("x/1",), phase, "admin", "", 100.0, bounds=Bounds(watch_s=30.0), **fields)


def test_a_swap_in_lines() -> None:
    plain = PlainSwap()
    assert plain.update(swap("starting", since=100.0)) == ["x/1: a -> b, swap s1", "starting b"]
    assert plain.update(swap("starting", since=100.0)) == []
    assert plain.update(swap("watching", since=101.0, canary=5)) == ["watching it with 5% of the calls (1.0 s)"]
    assert plain.update(swap("rolled_back", since=105.0, outcome="too slow\n  | a log")) == ["rolled back: too slow (5.0 s)"]


def test_a_drawing_holds_each_phase_and_the_time_that_is_left() -> None:
    drawing = SwapDrawing()

    def picture(now: float) -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(drawing.draw(now))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert "asking the kernel" in picture(99.0)
    drawing.update(swap("starting", since=100.0), None)
    assert "✓" not in picture(100.5)
    drawing.update(swap("watching", since=102.0, canary=5), None)
    text = picture(112.0)
    assert "watching it with 5% of the calls" in text
    assert "20 s left" in text
    drawing.update(swap("done", since=140.0, canary=5), None)
    assert picture(141.0).count("✓") == 5
    drawing.update(swap("rolled_back", since=140.0, outcome="too slow"), None)
    assert "✗" in picture(141.0)


def test_of_a_log_only_what_is_the_plugins_is_left() -> None:
    stored = "/home/x/artifacts/trees/" + "a" * 64 + "/files/"
    trace = f'Traceback (most recent call last):\n  File "runner.py", line 1\n  File "{stored}p.py", line 3\nSyntaxError: x'
    left = 'Traceback (most recent call last):\n  File "/mine/p.py", line 3\nSyntaxError: x'
    assert readable(f"import {stored}p.py\n{trace}", Path("/mine")) == f"import /mine/p.py\n{left}"
    assert readable("a plain line", None) == "a plain line"
