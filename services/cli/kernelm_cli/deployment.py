"""A deployment: a folder with the settings, keys and certificates of a system that an engine runs as containers.

    <folder>/deploy.toml    the settings, one file; a variable KERNELM_DEPLOY_<FIELD> goes before it
    <folder>/.env           what compose.yaml needs of them; derived, no secret in it
    <folder>/home/          KERNELM_HOME, at the same path inside the containers; each sees the part that is its own
    <folder>/secrets/       what data at rest is encrypted with; move it to another disk, with a link in its place
    <folder>/backups/       what the service `backup` writes
"""

import os
import secrets
import tomllib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from kernelm_authority.broker import Broker, new_cipher
from kernelm_authority.files import write_secret
from kernelm_authority.identity import init_home
from kernelm_authority.tokens import Tokens
from kernelm_cli.home import UpFile, write_up
from kernelm_sdk.contract import TOKEN
from kernelm_sdk.errors import ClientFault, invalid

if TYPE_CHECKING:  # cryptography is imported where a certificate is made or read: other commands need not wait for it
    from kernelm_cli.certificates import CertificateAuthority

USER = 64321  # of the containers where root deploys; else it is who deploys
SERVICES = ("artifacts", "node-local", "jobs", "gateway")
CLIENTS = ("kernel", "node", "jobs", "cli", "prometheus")  # they serve nobody over TLS
BROKER_PORT, MONITOR_PORT, HTTP_PORT, GRPC_PORT = 4222, 8222, 8443, 8444  # inside; compose.yaml knows them too
SERVICE_MB = 2048  # for the service of the artifacts itself, beside the readable copies
COLLECTOR = "https://collector:4318"
SECRETS = ("broker", "artifacts", "observability")  # folders, each for those alone who need it
# what is made by this command, and by whom the rest is written: no container may make a folder that the engine mounts
FOLDERS = ("artifacts", "broker", "grafana", "identity", "join", "logs", "prometheus", "run", "scratch", "tls", "trust")
IMAGES = ("nats", "kernel", "artifacts", "node", "jobs", "gateway", "cli", "bare")
PLUGINS = ("scheduler", "data", "trainer", "optimizer", "encoder", "generator", "retriever")
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
TEMPLATE = """# Settings of this deployment. After a change: kernelm deploy init, then docker compose up --detach.
# A variable of the environment goes before a line here: KERNELM_DEPLOY_HTTP_PORT=443.
"""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """deploy.toml."""

    project: str = "kernelm"  # of compose: the beginning of its containers' names
    listen: str = "127.0.0.1"  # address of this machine that the gateway is published on; "0.0.0.0": on all
    http_port: Port = 8443
    grpc_port: Port = 8444
    names: tuple[str, ...] = ()  # under which clients reach the gateway, beside localhost
    certificate_days: Annotated[int, msgspec.Meta(ge=1, le=398)] = 397
    broker_disk_mb: Annotated[int, msgspec.Meta(ge=64)] = 20480  # streams and records together, at most
    artifacts_memory_mb: Annotated[int, msgspec.Meta(ge=64)] = 4096  # for readable copies of encrypted artifacts, at most
    node_cpu: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # cores for plugins and jobs; 0: all
    node_memory_mb: Annotated[int, msgspec.Meta(ge=0)] = 0  # memory for them; 0: all
    node_gpus: Annotated[int, msgspec.Meta(ge=0)] = 0  # GPUs for them; needs the engine's NVIDIA runtime
    lease_s: Annotated[int, msgspec.Meta(ge=2, le=600)] = 5  # without a sign of life, and a member is taken for dead
    log_mb: Annotated[int, msgspec.Meta(ge=1)] = 50  # of output that is kept, for each container
    grafana_port: Port = 3000  # with the profile observability
    machines: tuple[str, ...] = ()  # further ones that join, by name: see `kernelm deploy machine`
    machines_listen: str = "0.0.0.0"  # address of this machine at which they reach broker and artifacts
    broker_port: Port = 4222  # there
    artifacts_port: Port = 8445  # there
    traces: bool = False  # members give their spans to the collector of the profile observability
    traces_to: str = ""  # URL to which it passes them on, OTLP over HTTP; "": it only counts them


def read_settings(folder: Path, environment: dict[str, str]) -> Settings:
    """The settings of a deployment; ClientFault that names file or variable, and field."""
    path, prefix = folder / "deploy.toml", "KERNELM_DEPLOY_"
    given = {k.removeprefix(prefix).lower(): v for k, v in environment.items() if k.startswith(prefix)}
    for several in given.keys() & {"names", "machines"}:
        given[several] = given[several].split(",")  # type: ignore[assignment]
    try:
        told = tomllib.loads(path.read_text()) if path.exists() else {}
        settings = msgspec.convert(told, Settings)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise invalid(str(path), error, f"known are {', '.join(Settings.__struct_fields__)}") from None
    try:
        settings = msgspec.convert(msgspec.structs.asdict(settings) | given, Settings, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(prefix + field.upper() for field in Settings.__struct_fields__)
        raise invalid(f"{prefix}*", error, f"known are {known}") from None
    if not TOKEN.match(settings.project):
        raise ClientFault("invalid", f"{path}: project {settings.project!r} is no name", "use a-z, 0-9 and '-'")
    if wrong := [name for name in settings.machines if not TOKEN.match(name) or name == "local"]:
        raise ClientFault("invalid", f"{path}: machines: {wrong[0]!r} is no name of a further machine", "use a-z, 0-9 and '-'; "
                          "'local' is this one")  # fmt: skip
    if settings.http_port == settings.grpc_port:
        raise ClientFault("invalid", f"{path}: http_port and grpc_port are both {settings.http_port}", "two ports are needed")
    if settings.traces_to and not settings.traces_to.startswith(("http://", "https://")):
        raise ClientFault("invalid", f"{path}: traces_to {settings.traces_to!r} is no URL", "e.g. https://tempo.example:4318")
    return settings


class Deployment:
    """The deployment in `folder`. Nothing that is a key or a certificate is ever overwritten but by `rotate`."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.home, self.settings = folder, folder / "home", settings
        self.user, self.group = owner()

    def init(self, images: dict[str, str], docker_group: int) -> None:
        """Make what is not there yet, and derive again what follows from the settings. `images`: name -> id."""
        authority = init_home(self.home)
        for name in (*FOLDERS, "artifacts/trees", *(f"join/{s}" for s in SERVICES)):
            (self.home / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.make_secrets()
        self.backups.mkdir(exist_ok=True, mode=0o700)
        ca = self._authority()
        for member, hosts in self.members().items():
            if not (self.tls(member) / "tls.pem").exists():
                ca.issue(member, hosts, self.tls(member), self.settings.certificate_days)
        broker = Broker(self.home, authority, BROKER_PORT, "0.0.0.0", self.settings.broker_disk_mb, self.tls("nats"), self.cipher,
                        MONITOR_PORT)  # fmt: skip
        broker.write_config()
        Tokens(self.home, SERVICES).lay_down()
        for name in ("jobs.toml", "gateway.toml"):
            (self.home / name).touch(0o600)
        self._write_containers(images)
        write_up(self.home, UpFile(0, 0.0, f"tls://nats:{BROKER_PORT}", f"https://gateway:{HTTP_PORT}",
                                   f"gateway:{GRPC_PORT}", 0.0))  # fmt: skip
        file = self.folder / "deploy.toml"
        if not file.exists():
            file.write_text(TEMPLATE + toml(msgspec.structs.asdict(self.settings)))
        (self.folder / ".env").write_text(environment(self._variables(images, docker_group)))
        self._give()

    def make_secrets(self) -> None:
        """The keys of what lies on disk, where there are none yet."""
        from kernelm_artifacts.vault import Vault, new_master

        for name in SECRETS:
            (self.secrets / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.make_cipher()
        wrapped = next((self.home / "artifacts" / "trees").glob("*/key"), None)
        if wrapped is not None and not self.master.exists():
            raise ClientFault("no_master_key", f"{self.home / 'artifacts'} is encrypted, and {self.master} is not there",
                              "put the key with which it was stored there, and `kernelm deploy init` again")  # fmt: skip
        if wrapped is None and not self.master.exists():
            new_master(self.master)
        if wrapped is not None:  # of many one is enough: all have the same
            Vault(str(self.master)).open_key(f"sha256:{wrapped.parent.name}", wrapped.read_bytes())
        if not (password := self.secrets / "observability" / "grafana-password").exists():
            write_secret(password, secrets.token_urlsafe(18))
        (self.secrets / "observability" / "metrics-key").touch(0o600)

    def make_cipher(self) -> None:
        """The key of the broker's files, where there is none yet."""
        if not self.cipher.exists():
            new_cipher(self.cipher)

    def rotate_master(self) -> None:
        """A new master key of the artifacts before those that there are; their service wraps all data keys anew at its start."""
        from kernelm_artifacts.vault import rotate_master

        rotate_master(self.master)
        self._give()

    def rotate(self, new_ca: bool) -> None:
        """New certificates for all; under a new CA if asked for, which is believed beside the old one until the next time."""
        ca, believed = self._authority(), ""
        if new_ca:
            believed = (self.home / "ca" / "ca.pem").read_text()
            for name in ("ca.pem", "ca.key"):
                (self.home / "ca" / name).rename(self.home / "ca" / f"{name}.before")
            ca = self._authority()
        for member, hosts in self.members().items():
            ca.issue(member, hosts, self.tls(member), self.settings.certificate_days, believed)
        self._give()

    def members(self) -> dict[str, tuple[str, ...]]:
        """Who has a certificate, and the names that it serves under."""
        here = ("localhost", "127.0.0.1", "::1")
        inside = {name: (name, *here) for name in ("nats", "artifacts", "collector")}
        doors = {name: (name, *here, *self.settings.names) for name in ("gateway", "grafana")}
        return inside | doors | dict.fromkeys((*CLIENTS, *(f"machine-{name}" for name in self.settings.machines)), ())

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    @property
    def backups(self) -> Path:
        return self.folder / "backups"

    @property
    def cipher(self) -> Path:
        """What the broker encrypts its files with."""
        return self.secrets / "broker" / "cipher.conf"

    @property
    def master(self) -> Path:
        """The key that wraps the keys of the artifacts."""
        return self.secrets / "artifacts" / "master.json"

    @property
    def plain(self) -> Path:
        """Where containers see readable copies of artifacts: a volume in memory, of the engine's."""
        return self.home / "plain"

    def tls(self, member: str) -> Path:
        """The folder with a member's certificates."""
        return self.home / "tls" / member

    def expiries(self) -> dict[str, float]:
        """Until when each certificate is good, Unix seconds."""
        from kernelm_cli.certificates import read_certificate

        found = {m: read_certificate(self.tls(m) / "tls.pem").not_valid_after_utc.timestamp() for m in self.members()}
        return found | {"CA": read_certificate(self.home / "ca" / "ca.pem").not_valid_after_utc.timestamp()}

    def _authority(self) -> "CertificateAuthority":
        from kernelm_cli.certificates import CertificateAuthority

        return CertificateAuthority(self.home / "ca")

    def _write_containers(self, images: dict[str, str]) -> None:
        text = containers(images, f"{self.settings.project}-plain", self.plain, self.home / "artifacts")
        (self.home / "containers.toml").write_text(text)

    def _variables(self, images: dict[str, str], docker_group: int) -> dict[str, object]:
        settings = self.settings
        return {
            "COMPOSE_PROJECT_NAME": settings.project, "KERNELM_HOME": self.home, "KERNELM_LISTEN": settings.listen,
            **{f"KERNELM_{name.upper()}_SECRETS": (self.secrets / name).resolve() for name in SECRETS},
            "KERNELM_BACKUPS": self.backups.resolve(), "KERNELM_PLAIN_MB": settings.artifacts_memory_mb,
            "KERNELM_ARTIFACTS_MB": settings.artifacts_memory_mb + SERVICE_MB,
            "KERNELM_GRAFANA_PORT": settings.grafana_port, "KERNELM_TRACES": COLLECTOR if settings.traces else "",
            "KERNELM_TRACES_TO": settings.traces_to, "KERNELM_TRACES_EXPORTER": "otlphttp" if settings.traces_to else "debug",
            "KERNELM_UID": self.user, "KERNELM_GID": self.group, "KERNELM_DOCKER_GID": docker_group,
            "KERNELM_HTTP_PORT": settings.http_port, "KERNELM_GRPC_PORT": settings.grpc_port, "KERNELM_LOG_MB": settings.log_mb,
            "KERNELM_LEASE_S": settings.lease_s,
            "KERNELM_MACHINES_LISTEN": settings.machines_listen, "KERNELM_PORT_BROKER": settings.broker_port,
            "KERNELM_PORT_ARTIFACTS": settings.artifacts_port,
            **to_give_away(settings.node_cpu, settings.node_memory_mb, settings.node_gpus),
            **{f"KERNELM_IMAGE_{name.upper()}": images[name] for name in IMAGES},
        }  # fmt: skip

    def _give(self) -> None:
        """All but the CA's key, which stays root's, since nobody who runs needs it."""
        mine = ((self.secrets / name, *(self.secrets / name).iterdir()) for name in SECRETS)
        paths = chain((self.home,), self.home.rglob("*"), chain.from_iterable(mine), (self.backups,))
        give(path for path in paths if not path.is_relative_to(self.home / "ca"))


def owner() -> tuple[int, int]:
    """User and group of the containers."""
    return (os.geteuid(), os.getegid()) if os.geteuid() else (USER, USER)


def give(paths: Iterable[Path]) -> None:
    """All to the user of the containers, where root deploys."""
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, *owner(), follow_symlinks=False)


def containers(images: dict[str, str], volume: str, plain: Path, *readable: Path) -> str:
    """What a node reads: which image holds which plugin, and what every instance may read."""
    lines = ["# Written by `kernelm deploy`.", "only = true", toml({"readable": [str(path) for path in readable]}), "",
             "[volumes]", f'{volume} = "{plain}"', "",
             "[images]", *(f'{name} = "{images[name]}"' for name in PLUGINS)]  # fmt: skip
    return "\n".join(lines) + "\n"


def to_give_away(cpu: float, memory_mb: int, gpus: int) -> dict[str, object]:
    """What a node of this machine has for plugins and jobs: all where nothing is said, but no GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return {"KERNELM_NODE_CPU": cpu or len(os.sched_getaffinity(0)), "KERNELM_NODE_MEMORY_MB": memory_mb or memory,
            "KERNELM_NODE_GPUS": gpus}  # fmt: skip


def toml(values: dict[str, object]) -> str:
    """Plain values only: strings, numbers, lists of strings; JSON's form of these is TOML's."""
    return "".join(f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in values.items())


def environment(variables: dict[str, object]) -> str:
    """A file for compose, which expands nothing between single quotes."""
    lines = [f"{name}='{value}'\n" for name, value in variables.items()]
    return "# Written by `kernelm deploy` from its settings, for compose.\n" + "".join(lines)
