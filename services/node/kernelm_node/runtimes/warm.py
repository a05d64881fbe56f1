"""The node's side of warm starts: finds or starts the fork server (kernelm_sdk/forkserver.py), and speaks to it.

The server's folder, and a parent's key, are hashes of all that an import depends on: interpreter, environment, the files of
SDK, contracts and plugin, what is installed. What has changed since is served by a new server or parent; the old one ends."""

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kernelm_node.runtimes.runtime import Launch
from kernelm_node.sources import installed_stamp
from kernelm_sdk.forkserver import FindInstance, ForkInstance, Hello, OpenParent, Reap, Request, Retire, at

log = logging.getLogger("kernelm.node")
SERVER_S = 10.0  # until the base listens
WARM_S = 10.0  # for an import that a start waits for; then it starts cold, and the next one finds the parent ready
KEPT_PARENTS = 2  # of one plugin; unused they end by themselves (forkserver.UNUSED_S)
CALL_S = 10.0  # for an answer of a process that has nothing else to do
# of the environment: what tells nothing about an import
PASSING = ("KERNELM_", "PYTEST_", "SSH_", "LISTEN_", "XDG_SESSION", "TERM", "WINDOWID")
PASSING_NAMES = ("PWD", "OLDPWD", "SHLVL", "_", "INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "COLUMNS", "LINES")


class NotWarm(Exception):
    """No warm start is to be had; the text says why. Then the instance starts cold."""


class Unfit(NotWarm):
    """The plugin must not be forked, for a reason that does not pass before its files change."""


class Link:
    """A connection to the base or a parent: one question at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer, self._lock = reader, writer, asyncio.Lock()
        self.open, self.used = True, False

    @classmethod
    async def to(cls, folder: Path, name: str) -> "Link":
        """OSError when nobody listens there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            at(folder, name, connection.connect)  # within one machine: at once or not at all
            return cls(*await asyncio.open_unix_connection(sock=connection))
        except BaseException:
            connection.close()
            raise

    async def ask(self, request: Request, timeout_s: float = CALL_S) -> dict[str, Any]:
        """The answer; NotWarm when there is none, or an error."""
        async with self._lock:
            try:
                self._writer.write(msgspec.json.encode(request) + b"\n")
                line = await asyncio.wait_for(self._reader.readline(), timeout_s)
            except ConnectionError:
                line = b""
            except (OSError, TimeoutError) as error:
                self.close()  # an answer that comes late must not be taken for the next one's
                raise NotWarm(f"the fork server does not answer: {type(error).__name__} {error}") from None
            except asyncio.CancelledError:
                self.close()
                raise
        if not line:
            self.close()
            raise NotWarm("the fork server has ended")
        answer: dict[str, Any] = json.loads(line)
        self.used = True
        if "error" in answer:
            raise NotWarm(str(answer["error"]))
        return answer

    def close(self) -> None:
        self.open = False
        self._writer.close()


class WarmStarts:
    """The fork server of this node, and its parents by key."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._root = home / "run" / "fork"
        self._folder: Path | None = None
        self._base: Link | None = None
        self._starting = asyncio.Lock()
        self._parents: dict[str, asyncio.Task[Link]] = {}
        self._plugins: dict[str, list[str]] = {}  # plugin -> keys of its parents, the last used one at the end
        self._others: dict[str, Link] = {}  # to parents of an earlier node's server: only to reap
        self._children: set[subprocess.Popen[bytes]] = set()

    async def fork(self, launch: Launch, groups: list[Path]) -> tuple[int, str]:
        """The pid of a new instance, and the parent that knows its exit code; NotWarm."""
        key = await asyncio.to_thread(parent_key, launch)
        request = ForkInstance(launch.environment, str(launch.scratch), str(launch.log), tuple(str(g) for g in groups))
        while True:
            link = await self._parent(key, launch)
            known = link.used
            try:
                answer = await link.ask(request)
            except NotWarm:
                self._parents.pop(key, None)
                if not known or link.open:
                    raise
                continue  # it had ended, unused for long: the next one is new
            assert self._folder is not None
            return int(answer["pid"]), f"{self._folder.name}/{key}"

    async def reap(self, parent: str, pid: int) -> int | None:
        """The exit code of a forked instance that has ended; None when its parent is gone or knows none."""
        try:
            link = await self._to(parent)
            code = (await link.ask(Reap(pid))).get("code")
        except (NotWarm, OSError) as reason:
            log.warning("the exit code of process %d is not to be had from its parent: %s", pid, reason)
            return None
        return None if code is None else int(code)

    async def find(self, instance: str) -> tuple[int, str]:
        """Pid and parent of a running instance that some parent here has forked; 0 for none."""
        for path in sorted(self._root.glob("*/*.sock")):
            if path.stem == "base":
                continue
            parent = f"{path.parent.name}/{path.stem}"
            with contextlib.suppress(NotWarm, OSError):  # a socket that nobody serves any more
                if pid := int((await (await self._to(parent)).ask(FindInstance(instance)))["pid"]):
                    return pid, parent
        return 0, ""

    async def close(self) -> None:
        """Let the server go, and all its parents: their instances have ended, or they wait for those that have not."""
        links = [t.result() for t in self._parents.values() if t.done() and not t.cancelled() and not t.exception()]
        for task in self._parents.values():
            task.cancel()
        for link in [*links, *self._others.values(), *([self._base] if self._base else [])]:
            if link.open:
                with contextlib.suppress(NotWarm):
                    await link.ask(Retire())
                link.close()
        self._parents.clear()
        self._others.clear()
        self._base = None

    async def _parent(self, key: str, launch: Launch) -> Link:
        """The link to the plugin's parent, opened if need be."""
        task = self._parents.get(key)
        if task is not None and task.done() and not task.cancelled() and not task.exception() and not task.result().open:
            task = None  # it has ended, unused for long
        if task is None:
            task = self._parents[key] = asyncio.create_task(self._open(key, launch), name=f"warm-{launch.plugin}")
        await asyncio.wait([task], timeout=WARM_S)
        if not task.done():
            raise NotWarm(f"its module is still being imported after {WARM_S:g} s")
        if error := task.exception():
            if not isinstance(error, Unfit):
                self._parents.pop(key, None)
            raise error if isinstance(error, NotWarm) else NotWarm(f"{type(error).__name__}: {error}")
        await self._replaced(launch.plugin, key)
        return task.result()

    async def _open(self, key: str, launch: Launch) -> Link:
        folder, base = await self._server()
        try:
            link = await Link.to(folder, f"{key}.sock")  # of the node before this one
        except OSError:
            source, pycache = (str(launch.source), str(self._home / "run" / "pycache")) if launch.source else ("", "")
            module = launch.manifest.entry.partition(":")[0]
            await base.ask(OpenParent(key, launch.plugin, module, source, pycache))
            try:
                link = await Link.to(folder, f"{key}.sock")
            except OSError as error:  # it listens from its beginning on: its import has ended it before we came
                raise NotWarm(f"the parent of {launch.plugin} has ended: {error}") from None
        answer = await link.ask(Hello(), 600.0)
        if not answer.get("fit"):
            link.close()
            raise Unfit(str(answer.get("reason")))
        link.used = False  # by an instance
        return link

    async def _replaced(self, plugin: str, key: str) -> None:
        """A plugin keeps two parents: of what runs, and of what ran before it, for the way back. An older one ends when its
        last instance has."""
        keys = self._plugins[plugin] = [k for k in self._plugins.get(plugin, ()) if k != key] + [key]
        for old in keys[:-KEPT_PARENTS]:
            keys.remove(old)
            if (task := self._parents.pop(old, None)) and task.done() and not task.exception():
                link = task.result()
                if link.open and self._folder is not None:
                    with contextlib.suppress(NotWarm):
                        await link.ask(Retire())
                        self._others[f"{self._folder.name}/{old}"] = link

    async def _to(self, parent: str) -> Link:
        folder, key = parent.split("/")
        task = self._parents.get(key)
        if self._folder is not None and self._folder.name == folder and task is not None and task.done() and \
                not task.cancelled() and not task.exception() and task.result().open:  # fmt: skip
            return task.result()
        link = self._others.get(parent)
        if link is None or not link.open:
            link = self._others[parent] = await Link.to(self._root / folder, f"{key}.sock")
        return link

    async def _server(self) -> tuple[Path, Link]:
        """The base, found or started."""
        async with self._starting:
            if self._base is not None and self._base.open and self._folder is not None:
                with contextlib.suppress(NotWarm):  # it was killed: another takes its place
                    await self._base.ask(Hello())
                    return self._folder, self._base
            self._root.mkdir(parents=True, exist_ok=True)
            self._root.chmod(0o700)
            self._folder = folder = self._root / await asyncio.to_thread(_fingerprint)
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                self._base = await Link.to(folder, "base.sock")
                await self._base.ask(Hello())
            except (OSError, NotWarm):
                self._base = await self._spawn(folder)
            return folder, self._base

    async def _spawn(self, folder: Path) -> Link:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_")} | {"PYTHONUNBUFFERED": "1"}
        try:
            with (self._home / "logs" / "forkserver.log").open("ab") as output:
                child = subprocess.Popen([sys.executable, "-P", "-m", "kernelm_sdk.forkserver", str(folder)], env=environment,
                                         stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                                         cwd=folder)  # fmt: skip
        except OSError as error:
            raise NotWarm(f"the fork server can't be started: {error}") from None
        self._children = {c for c in self._children if c.poll() is None} | {child}
        end = asyncio.get_running_loop().time() + SERVER_S
        while asyncio.get_running_loop().time() < end:
            try:
                link = await Link.to(folder, "base.sock")
                await link.ask(Hello())
                return link
            except (OSError, NotWarm):
                if child.poll() not in (None, 0):  # 0: another node's server was quicker
                    break
                await asyncio.sleep(0.01)
        raise NotWarm("the fork server does not come up: see logs/forkserver.log")


def _fingerprint() -> str:
    """Of what all imports depend on: interpreter, environment, SDK and contracts."""
    environment = sorted((k, v) for k, v in os.environ.items() if not k.startswith(PASSING) and k not in PASSING_NAMES)
    files = [*_files("kernelm_sdk"), *_files("kernelm_contracts")]
    return _digest([sys.executable, sys.version, environment, files])


def parent_key(launch: Launch) -> str:
    """Of what one plugin's import depends on: its own files (an artifact's path has its digest in it), and the folders
    that packages are installed in, which change when one is added or taken away."""
    module = launch.manifest.entry.partition(":")[0]
    files = [str(launch.source)] if launch.source else list(_files(module.partition(".")[0]))
    return _digest([launch.plugin, launch.manifest.version, launch.manifest.entry, files, installed_stamp()])


def _files(package: str) -> Iterator[Any]:
    """Name, size and time of change of the Python files of a top-level package or module; none where there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return
    places = [Path(p) for p in spec.submodule_search_locations or ()]
    found = [f for place in places for f in place.rglob("*.py")] if places else [Path(spec.origin)] if spec.origin else []
    for file in sorted(found):
        with contextlib.suppress(OSError):
            status = file.stat()
            yield str(file), status.st_size, status.st_mtime_ns


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
