"""`kernelm deploy`: what `docker compose up` needs, made and renewed; further machines, taken in and shut out."""

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.panel import Panel
from rich.table import Table

from kernelm_cli import machine as machines
from kernelm_cli.deployment import IMAGES, PLUGINS, Deployment, read_settings
from kernelm_cli.home import check_port
from kernelm_cli.session import Common, connection, stdout
from kernelm_sdk import tls
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Kernel, MachineName

if TYPE_CHECKING:  # imported where an engine is asked: no other command waits for it
    from docker import DockerClient
    from docker.models.containers import Container

app = App(name="deploy", help="The system as containers: keys, certificates and settings for docker compose.", version_flags=[])
SOCKET = Path("/var/run/docker.sock")
Folder = Annotated[Path, Parameter(name="DIR")]
HERE = Path("deploy")
SOON_DAYS = 30


@app.command
def init(folder: Folder = HERE, /) -> int:
    """Make keys, certificates, join tokens and settings in DIR. Again: only what is missing is made, what follows from
    deploy.toml is derived anew, and no key is touched."""
    deployment = _deployment(folder)
    settings = deployment.settings
    engine = _engine()
    images = {name: _image(engine, name) for name in (*IMAGES, *PLUGINS)}
    if not engine.containers.list(filters={"label": f"com.docker.compose.project={settings.project}"}):  # else they are its own
        for port, name in ((settings.http_port, "http_port"), (settings.grpc_port, "grpc_port")):
            check_port(port, f"{name} in {deployment.folder / 'deploy.toml'}", settings.listen)
        for port, name in ((settings.broker_port, "broker_port"), (settings.artifacts_port, "artifacts_port")):
            if settings.machines:
                check_port(port, f"{name} in {deployment.folder / 'deploy.toml'}", settings.machines_listen)
    again = (deployment.home / "identity").exists()
    deployment.init(images, SOCKET.stat().st_gid if SOCKET.exists() else 0)
    rows = Table.grid(padding=(0, 2))
    option = "" if folder == HERE else f" --env-file {folder / '.env'}"
    more = " --file deploy/machines.yaml" if settings.machines else ""
    for name, value in (("settings", deployment.folder / "deploy.toml"), ("home", deployment.home),
                        ("certificates", f"good until {_date(min(deployment.expiries().values()))}"),
                        ("start", f"docker compose{option} --file deploy/compose.yaml{more} up --detach --wait"),
                        ("tokens", "to join with are good for 10 minutes, and renewed while it runs")):  # fmt: skip
        rows.add_row(f"[bold]{name}[/]", str(value))
    title = "the deployment is as its settings say" if again else "the deployment is made"
    stdout().print(Panel(rows, title=f"[bold green]{title}[/]", title_align="left", border_style="green", expand=False))
    return 0


@app.command
def rotate(folder: Folder = HERE, /, *, ca: Annotated[bool, Parameter(negative="")] = False,
           master: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Give every member a new certificate while they run. No connection is cut.

    Parameters
    ----------
    ca
        Under a new CA, too. Members believe the old one beside it until the next rotation.
    master
        Instead, a new master key of the artifacts; the old one still opens what it has wrapped.
    """
    deployment = _existing(folder)
    if master:
        deployment.rotate_master()
        stdout().print(f"{deployment.master} has a new key in front; the next start of the service artifacts wraps all with it:\n"
                       "docker compose restart artifacts")  # fmt: skip
        return 0
    deployment.rotate(ca)
    brokers = _engine().containers.list(filters={"label": [f"com.docker.compose.project={deployment.settings.project}",
                                                           "com.docker.compose.service=nats"]})  # fmt: skip
    for broker in brokers:
        _reload(broker)
    told = "the broker shows its new one" if brokers else "nothing runs that had to be told"
    stdout().print(f"new certificates, good until {_date(min(deployment.expiries().values()))}; {told}, the others take theirs "
                   "with their next connection")  # fmt: skip
    return 0


@app.command
def machine(name: str, folder: Folder = HERE, /, *, to: Path, address: str) -> int:
    """Lay out what a further machine of DIR needs to join: certificate and tokens, which are good for 10 minutes. Its first start
    takes them, and makes keys by which it comes back until it is forgotten. Again: a new certificate, and tokens for new keys.

    Parameters
    ----------
    to
        A folder that is then copied there.
    address
        Of this machine, as that one reaches it.
    """
    machines.hand_out(_existing(folder), name, address, to.expanduser().absolute())
    stdout().print(f"copy {to} to the machine {name}, and there: kernelm deploy join DIR")
    return 0


@app.command
def join(folder: Annotated[Path, Parameter(name="DIR")], /) -> int:
    """Make the rest of what a further machine needs in DIR, as `machine` has laid it out on the first one."""
    engine, absolute = _engine(), folder.expanduser().absolute()
    images = {name: _image(engine, name) for name in (*machines.IMAGES, *PLUGINS)}
    machines.join(absolute, images, SOCKET.stat().st_gid if SOCKET.exists() else 0)
    stdout().print(f"docker compose --env-file {folder / '.env'} --file deploy/machine.yaml up --detach --wait")
    return 0


@app.command
def forget(name: str, folder: Folder = HERE, /, *, common: Common = Common()) -> int:
    """Shut out a further machine of DIR with all that runs there, at once: until `machine` makes new tokens for it."""
    reaching = connection(common.folder) if tls.files() else machines.administrator(_existing(folder))

    async def work() -> None:
        async with reaching as bus:
            await bus.call(Kernel.forget_machine, MachineName(name), patience_s=10.0)

    asyncio.run(work())
    stdout().print(f"[green]✓[/] the machine {name} is forgotten: its keys open nothing any more")
    return 0


@app.command
def restore(path: Annotated[Path, Parameter(name="FILE")], folder: Folder = HERE, /, *, key: Path | None = None) -> int:
    """Make DIR's home again from a backup, every byte of it verified, and what `init` makes beside it.

    Parameters
    ----------
    key
        The file with the secret key, where the backup is encrypted.
    """
    from kernelm_cli.backup import restored, say

    deployment = _deployment(folder)
    _engine()  # before hours of work, perhaps
    deployment.make_cipher()
    say(restored(path, deployment.home, key, deployment.cipher), f"is restored to {deployment.home}")
    return init(folder)


@app.command
def show(folder: Folder = HERE, /) -> int:
    """Say until when each certificate is good; exit code 1 if one ends within 30 days."""
    expiries = _existing(folder).expiries()
    table = Table("certificate", "good until", "days")
    for member, expires in sorted(expiries.items(), key=lambda item: item[1]):
        days = (expires - time.time()) / 86400
        style = "red" if days < 0 else "yellow" if days < SOON_DAYS else "green"
        table.add_row(member, _date(expires), f"[{style}]{days:.0f}[/]")
    stdout().print(table)
    return 0 if min(expiries.values()) > time.time() + SOON_DAYS * 86400 else 1


def _reload(broker: "Container") -> None:
    """nats-server reads its certificates again at SIGHUP. From inside: the engine takes a container to which it has delivered a
    signal for one that was stopped by hand, and does not start it again when it dies."""
    code, said = broker.exec_run(["python", "-c", "import os, signal; os.kill(1, signal.SIGHUP)"])
    if code:
        raise KernelFault("not_reloaded", f"{broker.name} was not told of its new certificate: {said.decode(errors='replace')}",
                          "restart it: docker compose restart nats")  # fmt: skip


def _deployment(folder: Path) -> Deployment:
    absolute = folder.expanduser().absolute()
    return Deployment(absolute, read_settings(absolute, dict(os.environ)))


def _existing(folder: Path) -> Deployment:
    deployment = _deployment(folder)
    if not (deployment.home / "ca" / "ca.pem").exists():
        raise ClientFault("no_deployment", f"{deployment.folder} holds no deployment", f"kernelm deploy init {folder}")
    return deployment


def _engine() -> "DockerClient":
    import docker
    from docker.errors import DockerException

    try:
        engine = docker.from_env(timeout=60)
        engine.ping()
    except DockerException as error:
        remedy = "start it (`systemctl start docker`), see that you may use its socket, or set DOCKER_HOST"
        raise KernelFault("no_engine", f"no Docker engine answers: {error}", remedy) from None
    return engine


def _image(engine: "DockerClient", name: str) -> str:
    from docker.errors import ImageNotFound

    try:
        return str(engine.images.get(f"kernelm-{name}:latest").id)
    except ImageNotFound:
        raise ClientFault("no_image", f"there is no image kernelm-{name}:latest", "make images") from None


def _date(stamp: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(stamp))
