"""The part of a home that the launcher owns: its lock, `run/up.json`, and processes left over from an earlier life."""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import msgspec
import psutil

from kernelm_authority.files import write_secret
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.ports import free_port

LOG_LIMIT = 10 * 2**20  # bytes; a larger log is set aside when its process starts


class ChildProcess(msgspec.Struct, frozen=True):
    """One process of the launcher. With the time of its creation a pid names one process for good."""

    pid: int
    created: float  # Unix seconds, as psutil gives it
    restarts: int = 0


class UpFile(msgspec.Struct, frozen=True):
    """`run/up.json`: what runs on this home, for everybody who wants to talk to it."""

    pid: int  # of the launcher; 0 where an engine runs containers in its place
    created: float
    url: str  # of the broker
    http: str
    grpc: str  # "host:port"
    started: float  # Unix seconds
    children: dict[str, int] = {}  # name -> pid
    processes: dict[str, ChildProcess] = {}

    def alive(self) -> bool:
        """Whether the launcher that wrote this still runs; an engine is asked by who connects."""
        return self.pid == 0 or find_process(self.pid, self.created) is not None


def find_process(pid: int, created: float) -> psutil.Process | None:
    """The process with this pid and creation time, if it is still there."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 0.05 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except psutil.Error:
        return None
    return None


def read_up(home: Path) -> UpFile | None:
    """The home's `up.json`, None if there is none. ClientFault if it is there and not readable."""
    path = home / "run" / "up.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpFile)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ClientFault("invalid", f"{path}: {error}", "end the launcher that wrote it, and delete the file") from None


def write_up(home: Path, up: UpFile) -> None:
    """Replace `up.json` as a whole."""
    write_secret(home / "run" / "up.json", msgspec.json.format(msgspec.json.encode(up), indent=2).decode() + "\n")


def private_folder(folder: Path) -> None:
    """Make a folder of a home, and the home, for its owner alone; `parents=True` would leave the home open to all."""
    for path in (folder.parent, folder):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


class HomeLock:
    """An exclusive lock on a home. The system drops it with the process, so a killed launcher leaves none behind."""

    def __init__(self, home: Path) -> None:
        self.home, self.path = home, home / "run" / "lock"
        self._file = -1

    def take(self) -> None:
        """Lock, and write our pid into the file; ClientFault "already_up" that names the holder if there is one."""
        private_folder(self.path.parent)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ClientFault("already_up", f"a launcher (pid {holder or 'unknown'}) already runs on {self.home}",
                              f"kernelm down --home {self.home}, or choose another --home") from None  # fmt: skip
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def drop(self) -> None:
        """Unlock. The file stays: deleting it would let two processes lock two files of one name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def leftovers(home: Path) -> list[psutil.Process]:
    """Processes of an earlier life of `home`: the children that its `up.json` names, and plugin instances, which say
    in their environment which home they belong to."""
    up = read_up(home)
    found = {c.pid: p for c in (up.processes.values() if up else ()) if (p := find_process(c.pid, c.created))}
    wanted = str(home)
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except psutil.Error:  # another user's, or gone
            continue
        if "KERNELM_INSTANCE" in variables and variables.get("KERNELM_HOME") == wanted and process.pid != os.getpid():
            found[process.pid] = process
    return list(found.values())


def end(processes: list[psutil.Process], grace_s: float = 5.0) -> None:
    """Ask the processes to stop, and kill those that have not after `grace_s`."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=grace_s)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def check_port(port: int, option: str, host: str = "127.0.0.1") -> int:
    """`port` if it can be bound (a free one for 0), else ClientFault "port_taken" that names who has it."""
    if not port:
        return free_port(host)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClientFault("port_taken", f"port {port} ({option}) can't be used: {error.strerror}{_user_of(port)}",
                              f"choose another with {option}, or leave it out for a free one") from None  # fmt: skip
    return port


def _user_of(port: int) -> str:
    try:
        holders = [c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        return f", held by {psutil.Process(holders[0]).name()} (pid {holders[0]})" if holders and holders[0] else ""
    except psutil.Error:  # only root sees other users' sockets
        return ""


def open_log(home: Path, name: str) -> int:
    """A descriptor that appends to `logs/<name>.log`; one over 10 MB is set aside first as `<name>.log.1`."""
    path = home / "logs" / f"{name}.log"
    private_folder(path.parent)
    if path.exists() and path.stat().st_size > LOG_LIMIT:
        path.replace(path.with_name(path.name + ".1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def last_lines(home: Path, name: str, since: int = 0, count: int = 12) -> str:
    """The last lines of `logs/<name>.log` behind byte `since`; "" if there are none."""
    path = home / "logs" / f"{name}.log"
    try:
        with path.open("rb") as file:
            file.seek(max(since, path.stat().st_size - 16384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except FileNotFoundError:
        return ""
