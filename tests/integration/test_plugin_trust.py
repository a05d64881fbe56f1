"""Whose plugins run: a real node that lists keys, and everybody who might talk it into something, by command and over NATS."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import pytest_asyncio

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant
from kernelm_cli import staging
from kernelm_cli.home import UpFile, write_up
from kernelm_cli.packed import Packed
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import (
    AllowUnsigned,
    Artifact,
    ArtifactName,
    Artifacts,
    Kernel,
    KeyCreated,
    KeyRequest,
    LoadRequest,
    Node,
    PutArtifact,
    Swap,
    TrustVerdict,
    UnloadRequest,
)
from kernelm_trust import SIGNATURE
from kernelm_trust.keys import generate, load_signer

pytestmark = pytest.mark.asyncio(loop_scope="module")
MANIFEST = """name = "greet"
version = "1"
summary = "says hello"
contracts = ["greet/1"]
entry = "greet_plugin:Greeter"
"""
CODE = """
import os, pathlib
import msgspec
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

pathlib.Path(os.environ["KERNELM_HOME"], "ran-NUMBER").touch()

class Word(msgspec.Struct):
    word: str = ""

class Greet(Contract, name="greet", major=1):
    @unary
    async def hello(self, request: Word, call: object) -> Word: ...

class Greeter(Plugin, Greet):
    async def hello(self, request: Word, call: object) -> Word:
        return Word("hello")
"""


class Desk:
    """A system whose node lists one key."""

    def __init__(self, system: System, work: Path) -> None:
        self.system, self.work = system, work
        self.fingerprint = generate(work / "listed.key")
        self.stranger = generate(work / "stranger.key")
        self.keys = work / "keys"
        self.keys.mkdir()
        (self.keys / "ours.pub").write_bytes((work / "listed.key.pub").read_bytes())
        self.made = 0

    def plugin(self) -> Path:
        """A folder with a plugin that leaves a trace once any of it is run; no two are the same artifact."""
        self.made += 1
        folder = self.work / f"greet-{self.made}"
        folder.mkdir()
        (folder / "kernelm-plugin.toml").write_text(MANIFEST)
        (folder / "greet_plugin.py").write_text(CODE.replace("NUMBER", str(self.made)))
        return folder

    def packed(self, key: str = "") -> Path:
        """The same as an archive, signed with `key`."""
        work = self.work / f"pack-{self.made + 1}"
        work.mkdir()
        packed = Packed(self.plugin(), work)
        packed.output = self.work / f"dist-{self.made}" / packed.name
        packed.write()
        if key:
            packed.sign(load_signer(self.work / key), "")
        return packed.output

    def ran(self, number: int = 0) -> bool:
        """Whether any code of the plugin with this number, by default the latest, was run."""
        return (self.system.home / f"ran-{number or self.made}").exists()

    async def store(self, path: Path) -> tuple[str, str]:
        """(digest, manifest) of a folder or an archive in the artifact store, as anybody could put it there."""
        here = self.system.home / "scratch" / f"t{time.monotonic_ns()}"
        for name in ("given", "tree"):
            (here / name).mkdir(parents=True)
        source = staging.find(staging.unpack(path, here / "given") if path.is_file() else path)
        staging.stage(source, here / "tree")
        stored: Artifact = await self.system.admin.call(Artifacts.put, PutArtifact(str(here / "tree"), "plugin"))
        return stored.digest, source.text

    async def load(self, path: Path, text: str = "", **more: Any) -> Swap:
        """`kernel/1.load` without any command in between; the swap at its end."""
        digest, manifest = await self.store(path)
        swap: Swap = await self.system.admin.call(Kernel.load, LoadRequest(manifest=text or manifest, source=digest, **more))
        return await self.over(swap.id)

    async def over(self, id: str) -> Swap:
        """A swap at its end."""

        async def ended() -> Swap | None:
            return next((s for s in (await self.system.state()).swaps if s.id == id and s.over), None)

        swap: Swap = await until(ended, 60, "the end of the swap")
        return swap

    async def unload(self, pool: str) -> None:
        await self.system.admin.call(Kernel.unload, UnloadRequest(pool, True), timeout_s=60.0)

        async def gone() -> bool:
            return not any(i.pool == pool and i.state in ("starting", "joined", "ready", "draining")
                           for i in (await self.system.state()).instances)  # fmt: skip

        await until(gone, 60, f"pool {pool} gone")

    async def kernelm(self, *arguments: object) -> tuple[int, str]:
        """The command; its exit code, and all that it said in one line."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kernelm_cli", "plugin", *map(str, arguments), "--home", str(self.system.home),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=os.environ | {"COLUMNS": "2000"})  # fmt: skip
        out, _ = await asyncio.wait_for(child.communicate(), 120)
        return child.returncode or 0, " ".join(out.decode().split())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    async with System() as system:
        made = Desk(system, tmp_path_factory.mktemp("trust"))
        await system.service("artifacts")
        await system.service("node", KERNELM_TRUST=str(made.keys))
        created = psutil.Process().create_time()
        write_up(system.home, UpFile(os.getpid(), created, system.broker.url, "", "", time.time()))
        yield made


async def test_what_a_listed_key_signed_runs_and_the_command_says_whose_it_is(desk: Desk) -> None:
    code, said = await desk.kernelm("load", desk.packed("listed.key"))
    assert code == 0, said
    assert f"trust: greet 1 is signed by listed key {desk.fingerprint}" in said
    assert "greet/1 is served by pool greet" in said
    assert desk.ran()
    await desk.unload("greet")


async def test_an_unsigned_plugin_is_refused_by_the_command_and_by_the_node(desk: Desk) -> None:
    folder = desk.plugin()
    code, said = await desk.kernelm("load", folder)
    assert code == 2, said
    assert "node-local: greet 1 is not signed" in said
    assert "--allow-unsigned" in said
    swap = await desk.load(folder)  # past the command: the refusal is the node's
    assert swap.phase == "failed"
    assert "node local could not start it: greet 1 is not signed (untrusted)" in swap.outcome
    assert time.time() - swap.begun < 30, "it fails at once, and is not tried again"
    assert not desk.ran(), "nothing of it was run to find out"


@pytest.mark.parametrize("how", ["changed after it was signed", "signed by a stranger", "another's signature"])
async def test_a_plugin_that_is_not_as_signed_is_refused_with_the_reason(desk: Desk, how: str) -> None:
    archive = desk.packed("stranger.key" if "stranger" in how else "listed.key")
    number = desk.made
    folder = desk.work / f"open-{number}"
    folder.mkdir()
    staging.unpack(archive, folder)
    if "changed" in how:
        (folder / "greet_plugin.py").write_text((folder / "greet_plugin.py").read_text() + "\n# and more")
        wanted = "file greet_plugin.py of greet 1 is not the one that was signed"
    elif "stranger" in how:
        wanted = f"greet 1 is signed with key {desk.stranger}, which is not listed"
    else:
        elsewhere = desk.work / f"other-{number}"
        elsewhere.mkdir()
        staging.unpack(desk.packed("listed.key"), elsewhere)
        (folder / SIGNATURE).write_bytes((elsewhere / SIGNATURE).read_bytes())
        wanted = "file greet_plugin.py of greet 1 is not the one that was signed"
    code, said = await desk.kernelm("load", folder)
    assert code == 2, said
    assert wanted in said
    swap = await desk.load(folder)
    assert swap.phase == "failed"
    assert wanted in swap.outcome
    assert not desk.ran(number)


async def test_an_administrators_api_key_gets_no_further(desk: Desk) -> None:
    """Over HTTP (gRPC has the same gate): the refusal is the node's, and allowing what is not signed is not open to API keys."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    await desk.system.service("gateway", KERNELM_HTTP_PORT=str(port), KERNELM_GRPC_PORT="0")
    made: KeyCreated = await desk.system.admin.call(Kernel.create_key, KeyRequest("ops", admin=True))
    digest, manifest = await desk.store(desk.plugin())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1/kernel", timeout=30.0,
                                 headers={"Authorization": f"Bearer {made.secret}"}) as client:  # fmt: skip
        asked = await client.post("/load", json={"manifest": manifest, "source": digest})
        assert asked.status_code == 200, asked.text
        swap = await desk.over(asked.json()["id"])
        assert swap.by == f"key-{made.key.id}"
        assert "greet 1 is not signed (untrusted)" in swap.outcome
        assert (await client.post("/allow-unsigned", json={"digest": digest})).status_code == 404
    assert not desk.ran()


async def test_an_administrator_may_allow_these_files_and_no_others(desk: Desk) -> None:
    folder = desk.plugin()
    code, said = await desk.kernelm("load", folder, "--allow-unsigned", "--why", "try it")
    assert code == 0, said
    assert "trust: greet 1 is not signed; admin allowed these files" in said
    assert desk.ran()
    await desk.unload("greet")
    noted = [msgspec.json.decode(p.read_bytes()) for p in (desk.system.home / "trust" / "allowed").iterdir()]
    assert [(n["by"], n["why"]) for n in noted] == [("admin", "try it")]
    (folder / "greet_plugin.py").write_text((folder / "greet_plugin.py").read_text() + "\n# another version")
    swap = await desk.load(folder)
    assert swap.phase == "failed"
    assert "greet 1 is not signed" in swap.outcome


async def test_nobody_but_the_administrator_can_allow_it(desk: Desk) -> None:
    digest, _ = await desk.store(desk.plugin())
    node = {"instance": "node-local", "timeout_s": 10.0}
    plotter = Grant("plugin", "plotter-1", "plotter", "plotter", calls=("node/1", "kernel/1"))
    for name, grant in {"jobs": None, "gateway": None, "plotter-1": plotter}.items():
        bus: Bus = await desk.system.connect(name, grant)
        with pytest.raises(Fault) as caught:
            await bus.call(Node.allow_unsigned, AllowUnsigned(digest, "please"), **node)
        assert caught.value.code == "permission_denied", name
        await bus.close()
    verdict: TrustVerdict = await desk.system.admin.call(Node.trust, ArtifactName(digest), **node)
    assert not verdict.allowed
    with pytest.raises(ClientFault, match="is none"):
        await desk.system.admin.call(Node.allow_unsigned, AllowUnsigned("sha256:../../../tmp/x"), **node)


async def test_the_kernel_is_asked_for_no_more_rights_than_were_signed(desk: Desk) -> None:
    """The manifest travels beside the files too: whoever loads could send another than the one that was signed."""
    archive = desk.packed("listed.key")
    swap = await desk.load(archive, MANIFEST + 'calls = ["kernel/1.load"]\n')
    assert swap.phase == "failed"
    assert "greet 1 would get the right to call kernel/1.load, which its signed manifest does not say" in swap.outcome
    swap = await desk.load(archive, MANIFEST + "network = true\n")
    assert "would get network = true" in swap.outcome
    assert not desk.ran()


async def test_a_key_that_is_taken_off_the_list_counts_at_the_next_start(desk: Desk) -> None:
    archive, listed = desk.packed("listed.key"), desk.keys / "ours.pub"
    kept = listed.read_bytes()
    listed.unlink()
    try:
        swap = await desk.load(archive)
        assert f"is signed with key {desk.fingerprint}, which is not listed" in swap.outcome
    finally:
        listed.write_bytes(kept)
    swap = await desk.load(archive)
    assert swap.phase == "done", swap.outcome
    await desk.unload(swap.pool)
