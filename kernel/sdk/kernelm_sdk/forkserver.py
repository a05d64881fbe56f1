"""Warm starts: instances forked from a process that has imported already what they need (after Android's zygote).

    python -m kernelm_sdk.forkserver <folder>

The base imports what every instance needs. For each plugin it forks a parent, which imports that plugin's module and then
forks instances; so no plugin's code is in another's process. Base and parents are single-threaded, listen on Unix sockets
in <folder> (`base.sock`, `<key>.sock`), outlive the node that started them, and end when they are of no use: told to
retire and without children, unused for UNUSED_S, or for ORPHAN_S without a node and without a living instance.

One request a line, JSON with `op`, and one answer a line: its fields, or `error`.

    base    open {key, plugin, module, source}             forks the parent of a plugin, which listens on <key>.sock
    parent  hello {}                    -> fit, reason     after the import; `reason` says why it must not be forked from
            fork {environment, cwd, log, groups} -> pid    a new instance
            find {instance}             -> pid             0 for none
            reap {pid}                  -> code            null while it runs; its number is free after that
    both    retire {}                                      end when there are no children
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import os
import random
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from kernelm_sdk import runner

ORPHAN_S = 60.0
UNUSED_S = 900.0
TICK_S = 2.0
LINE_BYTES = 2**20
OWN_POOLS = ("numpy", "scipy", "torch")  # their native threads (OpenBLAS, OpenMP) know about fork (pthread_atfork)


class OpenParent(msgspec.Struct, tag="open", tag_field="op"):
    key: str  # names the socket: of the plugin and all that its import depends on
    plugin: str
    module: str
    source: str = ""  # a folder to import it from, first
    pycache: str = ""  # where bytecode of `source`, which is read-only, is written

class Hello(msgspec.Struct, tag="hello", tag_field="op"):
    pass

class ForkInstance(msgspec.Struct, tag="fork", tag_field="op"):
    environment: dict[str, str]
    cwd: str
    log: str  # a file that its output is appended to
    groups: tuple[str, ...] = ()  # control groups (folders) that it joins before anything else

class FindInstance(msgspec.Struct, tag="find", tag_field="op"):
    instance: str

class Reap(msgspec.Struct, tag="reap", tag_field="op"):
    pid: int

class Retire(msgspec.Struct, tag="retire", tag_field="op"):
    pass


Request = OpenParent | Hello | ForkInstance | FindInstance | Reap | Retire
_decoder = msgspec.json.Decoder(Request)


def at(folder: Path, name: str, use: Callable[[str], Any]) -> Any:
    """`use(path)` with a path to `folder`/`name` that is short enough for a Unix socket (108 bytes), however deep it lies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return use(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)


def listen(folder: Path, name: str) -> socket.socket:
    """A listening socket `name` in `folder`, in the place of one that nobody serves any more."""
    (folder / name).unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    at(folder, name, server.bind)
    server.listen(64)
    server.setblocking(False)
    return server


class Child(msgspec.Struct):
    pid: int
    instance: str = ""
    ended: bool = False


class Server:
    """What base and parents share. `serve` returns in a child process, with what that is to become; and None at the end."""

    def __init__(self, folder: Path, name: str, server: socket.socket) -> None:
        self._folder, self._name, self._server = folder, name, server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._connections: dict[socket.socket, bytes] = {}
        self.children: dict[int, Child] = {}
        self._retiring = False
        self._used = self._attended = time.monotonic()
        self._become: Any = None

    def serve(self) -> Any:
        while not self._useless():
            for key, _ in self._selector.select(TICK_S):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
                if self._become is not None:
                    return self._become
        (self._folder / self._name).unlink(missing_ok=True)
        return None

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it hung up already
            connection, _ = self._server.accept()
            connection.setblocking(True)
            self._connections[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            lines = (self._connections[connection] + data).split(b"\n")
            self._connections[connection] = lines.pop()
            for line in lines:
                answer = self._answer(line)
                if self._become is not None:
                    return
                connection.sendall(msgspec.json.encode(answer) + b"\n")
        except OSError:
            data = b""
        if not data or len(self._connections[connection]) > LINE_BYTES:
            self._selector.unregister(connection)
            del self._connections[connection]
            connection.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        self._used = time.monotonic()
        try:
            request = _decoder.decode(line)
            if isinstance(request, Retire):
                self._retiring = True
                return {}
            return self.answer(request)
        except (msgspec.DecodeError, OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def answer(self, request: Request) -> dict[str, Any]:
        raise NotImplementedError

    def _useless(self) -> bool:
        now = time.monotonic()
        for child in self.children.values():
            if not child.ended:  # seen, and left to be reaped by who asks for its code
                found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                child.ended = found is not None
        living = any(not child.ended for child in self.children.values())
        if self._connections or living:
            self._attended = now
        if living:
            return False
        if not (self._folder / self._name).exists():  # the home is gone, or another took our place
            return True
        return (self._retiring and not self.children) or now - self._attended > ORPHAN_S or (
            not self.children and now - self._used > UNUSED_S)  # fmt: skip

    def fork(self, become: Any, instance: str) -> int:
        """Fork. In the child 0 is returned, all that is the server's is closed, and `serve` returns `become`."""
        pid = os.fork()
        if pid:
            self.children[pid] = Child(pid, instance)
            return pid
        self._become = become
        self._selector.close()
        for connection in (*self._connections, self._server):
            connection.close()
        self.children.clear()
        return 0


class Base(Server):
    """Forks the parents. Their sockets are made here, so that they can be connected to at once."""

    def answer(self, request: Request) -> dict[str, Any]:
        if isinstance(request, Hello):
            return {"pid": os.getpid()}
        if not isinstance(request, OpenParent):
            raise ValueError("that is a question for a parent")
        server = listen(self._folder, f"{request.key}.sock")
        pid = self.fork((request, server), "")
        if pid:
            server.close()
        return {"pid": pid}

    def _useless(self) -> bool:
        for pid in list(self.children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.children[pid]
        return super()._useless()


class Parent(Server):
    """Imports one plugin's module, and forks its instances."""

    def __init__(self, folder: Path, request: OpenParent, server: socket.socket) -> None:
        super().__init__(folder, f"{request.key}.sock", server)
        _name_process(f"fork {request.plugin}")
        self._reason = self._load(request)
        gc.collect()
        gc.freeze()  # so that a collection in a child does not write to, and thereby copy, every page it shares

    def _load(self, request: OpenParent) -> str:
        """Import the module; why it must not be forked from, "" when it may."""
        if request.source:
            sys.path.insert(0, request.source)
            sys.pycache_prefix = request.pycache or None
        try:
            importlib.import_module(request.module)
        except BaseException:  # also SystemExit: a cold start shows what is wrong, where its log is
            traceback.print_exc()
            return "its module can't be imported"
        if threading.active_count() > 1:
            return f"its module starts threads: {', '.join(t.name for t in threading.enumerate()[1:])}"
        native = len(list(Path("/proc/self/task").iterdir()))
        if native > 1 and not any(name in sys.modules for name in OWN_POOLS):
            return f"its module starts {native - 1} native threads"
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "its module uses the GPU when it is imported"
        return ""

    def answer(self, request: Request) -> dict[str, Any]:
        if isinstance(request, Hello):
            if self._reason:
                self._retiring = True
            return {"pid": os.getpid(), "fit": not self._reason, "reason": self._reason}
        if isinstance(request, ForkInstance):
            if self._reason:
                raise ValueError(self._reason)
            return {"pid": self.fork(request, request.environment.get("KERNELM_INSTANCE", ""))}
        if isinstance(request, FindInstance):
            return {"pid": next((c.pid for c in self.children.values() if c.instance == request.instance), 0)}
        if isinstance(request, Reap):
            if request.pid not in self.children:
                raise ValueError(f"{request.pid} is no child of this process")
            pid, status = os.waitpid(request.pid, os.WNOHANG)
            if pid:
                del self.children[pid]
            return {"code": os.waitstatus_to_exitcode(status) if pid else None}
        raise ValueError("that is a question for the base")


def become(request: ForkInstance) -> None:
    """Turn this forked process into the instance: what it would find if it had been started by itself."""
    os.setsid()
    descriptor = os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for group in request.groups:
        tasks = Path(group, "tasks")  # version 1: moving oneself waits for no lock over all of the machine, as cgroup.procs does
        (tasks if tasks.exists() else Path(group, "cgroup.procs")).write_text("0")
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.cwd)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    time.tzset()
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # the state of its global generator was made at import: siblings would draw the same numbers
    sys.argv = [runner.__file__]
    _name_process(request.environment.get("KERNELM_INSTANCE", "instance"))
    gc.enable()


def _leave(code: int) -> NoReturn:
    """End as the interpreter does, but for tearing every object down: that would first copy all pages shared with the parent."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for what is no daemon
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _name_process(name: str) -> None:
    Path("/proc/self/comm").write_text(name[:15])  # as `ps -o comm` and `top` show it


def main() -> int:
    folder = Path(sys.argv[1])
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0  # another serves this folder
    for name in ("kernelm_contracts", "encodings.idna"):
        with contextlib.suppress(ModuleNotFoundError):  # a system without models has no such contracts
            importlib.import_module(name)
    _name_process("fork base")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the node, which then stops the instances
    gc.collect()
    gc.freeze()
    opened = Base(folder, "base.sock", listen(folder, "base.sock")).serve()
    if opened is None:
        return 0
    lock.close()
    forked = Parent(folder, *opened).serve()
    if forked is None:
        _leave(0)
    become(forked)
    _leave(runner.main())


if __name__ == "__main__":
    sys.exit(main())
