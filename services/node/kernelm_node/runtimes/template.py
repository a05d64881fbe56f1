"""The one way in which the node makes a container. Nothing of it can be chosen but: the image, limits, the network, folders
to read, one scratch folder, one secret. Pure: from a `Launch` to the arguments of the Docker engine's "create container"."""

import hashlib
import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount

from kernelm_node.runtimes.relay import SOCKET
from kernelm_node.runtimes.runtime import Launch
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import GROUP, MANIFEST, package_folder
from kernelm_sdk.system import Limits

HOME_LABEL, INSTANCE_LABEL = "kernelm.home", "kernelm.instance"
USER = 64321  # in containers of a node that is root: of no account, and root owns all but the instance's scratch folder
ENTRY = ("python", "-m", "kernelm_sdk.runner")
PASSED = tuple(f"KERNELM_{n}" for n in ("INSTANCE", "PLUGIN", "POOL", "SCRATCH", "LOG", "CPU", "MIRROR"))  # of the node's variables
SOCKETS, SECRET = "/run/kernelm", "/run/secrets/kernelm-token"  # where the container sees the broker's socket and its token
PIDS = 512  # processes and threads, where the manifest has no limit
TMP_MB = 256  # /tmp, which lies in memory and counts as such
LOG_SIZE = "1g"  # of the engine's own copy of the output, which an adopted instance's log goes on from
PINNED = re.compile(r"(?:[^@\s]+@)?sha256:[0-9a-f]{64}")


def user() -> int:
    """The uid of the containers' processes: the node's own, so that it can remove what they leave, but never root's."""
    return os.geteuid() or USER


def group() -> int:
    """Their gid."""
    return os.getegid() if os.geteuid() else USER


def container_name(home: Path, instance: str) -> str:
    """One name for an instance of one home, so that it can't be started twice on one engine."""
    return f"kernelm-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}-{instance}"


def pinned(image: str) -> str:
    """`image` if it is an id or a digest; ClientFault "invalid" for a tag, which may be another image tomorrow."""
    if not PINNED.fullmatch(image):
        raise ClientFault("invalid", f"image: {image!r} is neither an id nor a digest (sha256:... or name@sha256:...)",
                          f"docker image inspect --format '{{{{.Id}}}}' {image}")  # fmt: skip
    return image


def checked(image: dict[str, Any]) -> str:
    """The id of an image, as the engine describes it, that fits the template; ClientFault "invalid" if it doesn't."""
    config = image.get("Config") or {}
    if volumes := config.get("Volumes"):
        raise ClientFault("invalid", f"image {image['Id']} declares volumes ({', '.join(volumes)}), which would be writable",
                          "build it without VOLUME: an instance writes to its scratch folder only")  # fmt: skip
    return str(image["Id"])


def plugin_folder(launch: Launch) -> tuple[Path, Path]:
    """The folder with the plugin's files, and the one to import from."""
    if launch.source is not None:
        return launch.source.absolute(), launch.source.absolute()
    for point in entry_points(group=GROUP, name=launch.plugin):
        if package := package_folder(point.value.partition(".")[0]):
            return package.absolute(), package.absolute().parent
    raise PluginFault("not_installed", f"plugin {launch.plugin!r} is not a package that is installed on this node",
                      "install it, or load it as an artifact: kernelm plugin load PATH")  # fmt: skip


def container(launch: Launch, home: Path, image: str, engine: dict[str, Any], *, own: bool = False,
              readable: tuple[str, ...] = (), volumes: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:  # fmt: skip
    """Arguments for the Docker SDK's `containers.create`. `engine` is its `info()`: what is there bounds what has no limit.
    `own`: the image holds the plugin, and no files of it are mounted; `readable` and `volumes`, see `Containers`."""
    environment = {k: v for k, v in launch.environment.items() if k in PASSED} | {
        "KERNELM_URL": f"unix:{SOCKETS}/{SOCKET}", "KERNELM_TOKEN_FILE": SECRET,
        "PYTHONUNBUFFERED": "1", "HOME": "/tmp", "USER": "kernelm",  # getpwuid knows no such uid
    }  # fmt: skip
    folders = [*launch.artifacts, *map(Path, readable)]
    if not own:
        files, path = plugin_folder(launch)
        environment |= {"KERNELM_MANIFEST": str(files / MANIFEST), "PYTHONPATH": str(path)}
        folders.insert(0, files)
    mounts = _mounts(launch, home, folders, volumes)
    return {
        "image": image, "name": container_name(home, launch.instance), "entrypoint": list(ENTRY), "command": [],
        "labels": {HOME_LABEL: str(home), INSTANCE_LABEL: launch.instance},
        "environment": environment, "working_dir": str(launch.scratch.absolute()), "hostname": launch.instance[:63],
        "user": f"{user()}:{group()}", "privileged": False, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"],
        "read_only": True, "mounts": mounts, "tmpfs": _tmpfs(mounts),
        "network_mode": "bridge" if launch.network else "none", "ipc_mode": "private",
        "restart_policy": {"Name": "no"}, "healthcheck": {"test": ["NONE"]}, "stop_signal": "SIGTERM", "auto_remove": False,
        "log_config": LogConfig(type=LogConfig.types.JSON, config={"max-size": LOG_SIZE, "max-file": "1"}),
        "device_requests": [DeviceRequest(count=launch.needs.gpus, capabilities=[["gpu"]])] if launch.needs.gpus else [],
        **_limits(launch.limits, engine),
    }  # fmt: skip


def _limits(limits: Limits, engine: dict[str, Any]) -> dict[str, Any]:
    """A container never goes without: what the manifest leaves open is bounded by the machine, with a quarter of its memory
    left for the rest."""
    memory = limits.memory_mb * 2**20 or int(engine["MemTotal"]) * 3 // 4
    swap = {"memswap_limit": memory} if engine.get("SwapLimit") else {}  # memory and swap together: no swap
    cpu = min(limits.cpu, float(engine["NCPU"])) or float(engine["NCPU"])
    return {"mem_limit": memory, "nano_cpus": int(cpu * 1e9), "pids_limit": limits.pids or PIDS} | swap


def _mounts(launch: Launch, home: Path, folders: list[Path], volumes: Mapping[str, str]) -> list[Mount]:
    """Exactly what was granted, `folders` to read. They lie where they lie outside, so that a path in a message to another
    member of the system (`artifacts/1.put`) names the same files to both."""
    scratch = launch.scratch.absolute()
    absolute = dict.fromkeys(folder.absolute() for folder in folders)
    covered = {*absolute, *map(Path, volumes.values())}
    readable = [folder for folder in absolute if not any(other in folder.parents for other in covered)]
    secret = Path(launch.environment["KERNELM_TOKEN_FILE"]).absolute()
    return [_mount(sockets(home, launch.instance), SOCKETS), _mount(secret, SECRET),
            *(_mount(folder, str(folder)) for folder in readable), _mount(scratch, str(scratch), False),
            *(Mount(target, name, type="volume", read_only=True, no_copy=True) for name, target in volumes.items())]  # fmt: skip


def _mount(source: Path, target: str, read_only: bool = True) -> Mount:
    return Mount(target, str(source), type="bind", read_only=read_only, propagation="rprivate")


def _tmpfs(mounts: list[Mount]) -> dict[str, str]:
    """/tmp; and over root's home, which images close to others, if something granted lies below it: the engine gives it the
    image's mode, so it must be the user's own to be passed through, and it can't be written to."""
    below = any(m["Target"].startswith("/root/") for m in mounts)
    over = {"/root": f"ro,nosuid,nodev,uid={user()},gid={group()},size=64k"} if below else {}
    return {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={TMP_MB}m", **over}


def sockets(home: Path, instance: str) -> Path:
    """The folder of the relay's socket; it is mounted as a whole, since a new relay makes a new file."""
    return home / "run" / "broker" / instance
