"""A further machine of a deployment: a node and a mirror of the artifacts, which share no disk with the first.

    <folder>/machine.toml     where the first machine is, and what this one gives
    <folder>/home/tls/        its certificate, made by the first machine
    <folder>/home/join/       tokens, likewise, each for one start: with it a member makes a key by which it comes back from then on
    <folder>/home/, .env      the rest, made here by `kernelm deploy join`
"""

import shutil
import ssl
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority, admin
from kernelm_authority.machines import machine_token
from kernelm_cli.deployment import SERVICE_MB, Deployment, containers, environment, give, owner, to_give_away, toml
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, KernelFault, invalid

FOLDERS = ("run", "scratch", "logs", "trust")
IMAGES = ("node", "artifacts", "bare")
MEMBERS = ("artifacts", "node")
TOKEN_S = 600
HEAD = """# Written by `kernelm deploy machine`. After a change here: kernelm deploy join, then docker compose up --detach.
"""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """machine.toml."""

    name: str
    project: str  # of the first machine
    address: str  # of the first machine, as this one reaches it; "host-gateway": the same, on another network
    broker_port: int
    artifacts_port: int
    artifacts_memory_mb: int  # for readable copies of artifacts, at most
    node_cpu: float = 0.0  # cores for plugins and jobs; 0: all
    node_memory_mb: int = 0  # memory for them; 0: all
    node_gpus: int = 0
    log_mb: int = 50  # of output that is kept, for each container


def hand_out(deployment: Deployment, name: str, address: str, folder: Path) -> None:
    """Lay out what the machine `name` needs in `folder`; again: its certificate as it is now, new tokens."""
    settings = deployment.settings
    if name not in settings.machines or not deployment.tls(f"machine-{name}").exists():
        raise ClientFault("not_found", f"{deployment.folder / 'deploy.toml'} has no machine {name!r}",
                          f"add it to `machines` there, and `kernelm deploy init {deployment.folder}`")  # fmt: skip
    authority = Authority(deployment.home)
    for member in MEMBERS:
        path = folder / "home" / "join" / member / "token"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_secret(path, machine_token(authority, f"{member}-{name}", TOKEN_S))
    shutil.copytree(deployment.tls(f"machine-{name}"), folder / "home" / "tls", dirs_exist_ok=True)
    if not (file := folder / "machine.toml").exists():
        made = Machine(name, settings.project, address, settings.broker_port, settings.artifacts_port, settings.artifacts_memory_mb)
        file.write_text(HEAD + toml(msgspec.structs.asdict(made)))
    give((folder / "home", *(folder / "home").rglob("*")))


def join(folder: Path, images: dict[str, str], docker_group: int) -> None:
    """Make the rest, on that machine. `images`: name -> id."""
    path, home = folder / "machine.toml", folder / "home"
    try:
        machine = msgspec.convert(tomllib.loads(path.read_text()), Machine)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise invalid(str(path), error, "`kernelm deploy machine` on the first machine makes it: copy its folder here") from None
    for name in FOLDERS:
        (home / name).mkdir(exist_ok=True, mode=0o700)
    project, (user, group) = f"{machine.project}-{machine.name}", owner()
    (home / "containers.toml").write_text(containers(images, f"{project}-plain", home / "plain"))
    (folder / ".env").write_text(environment({
        "COMPOSE_PROJECT_NAME": project, "KERNELM_HOME": home, "KERNELM_MACHINE": machine.name, "KERNELM_ADDRESS": machine.address,
        "KERNELM_PORT_BROKER": machine.broker_port, "KERNELM_UID": user,
        "KERNELM_GID": group, "KERNELM_DOCKER_GID": docker_group, "KERNELM_LOG_MB": machine.log_mb,
        "KERNELM_PLAIN_MB": machine.artifacts_memory_mb, "KERNELM_ARTIFACTS_MB": machine.artifacts_memory_mb + SERVICE_MB,
        **to_give_away(machine.node_cpu, machine.node_memory_mb, machine.node_gpus),
        **{f"KERNELM_IMAGE_{name.upper()}": images[name] for name in IMAGES},
    }))  # fmt: skip
    give((home, *home.rglob("*")))


@asynccontextmanager
async def administrator(deployment: Deployment) -> AsyncIterator[Bus]:
    """The bus as the administrator, by the port at which further machines come in; a KernelFault where that is not published."""
    mine = deployment.tls("cli")
    context = ssl.create_default_context(cafile=str(mine / "ca.pem"))
    context.load_cert_chain(mine / "tls.pem")
    try:
        bus = await Bus.connect(f"tls://localhost:{deployment.settings.broker_port}", admin(deployment.home), tls=context)
    except KernelFault as fault:
        inside = "`docker compose run --rm cli deploy forget NAME` asks from inside"
        raise KernelFault(fault.code, fault.message, f"does it run, with machines.yaml? {inside}", retriable=True) from None
    try:
        yield bus
    finally:
        await bus.close()
