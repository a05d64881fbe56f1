"""`kernelm key create | list | rotate | revoke`: API keys for HTTP and gRPC, and credentials for NATS clients."""

import asyncio
import re
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from rich.panel import Panel
from rich.text import Text

from kernelm_authority.files import write_secret
from kernelm_authority.identity import read
from kernelm_cli.session import Common, Output, connection, print_json, stdout
from kernelm_cli.tables import columns
from kernelm_sdk.bus import Credentials
from kernelm_sdk.credentials import to_file
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Empty, Kernel, Key, KeyCreated, KeyList, KeyName, KeyRequest, RotateKey

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
app = App(name="key", help="Keys of clients: what each may call, and until when.", version_flags=[])


def seconds(text: str, option: str = "--expires") -> int:
    """A duration such as "90s", "12h", "30d", in seconds; 0 for "" and "never"."""
    if text in ("", "never"):
        return 0
    match = re.fullmatch(r"(\d+)([smhdw])", text)
    if match is None or int(match[1]) == 0:
        raise ClientFault("invalid", f"{option} {text!r} is no duration", "e.g. 90s, 15m, 12h, 30d, 4w, or never")
    return int(match[1]) * UNITS[match[2]]


@app.command
def create(name: Annotated[str, Parameter(name="NAME")], /, *, output: Output = Output(),
           models: Annotated[tuple[str, ...], Parameter(negative="")] = ("*",),
           methods: Annotated[tuple[str, ...], Parameter(negative="")] = ("*",), expires: str = "never",
           tenant: str = "default", nats: Path | None = None,
           admin: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Create a key. Its secret is shown this once.

    Parameters
    ----------
    models
        Deployments that it may call; all by default. Repeat the option for several.
    methods
        Methods that it may call, e.g. classify; all by default.
    expires
        After which time it ends: 90s, 12h, 30d.
    tenant
        Who pays.
    nats
        Also write credentials for a NATS client with the same rights to this file (0600).
    admin
        It may also manage plugins, pools and routes, over gRPC and HTTP: for programs that deploy.
    """
    seed = new_seed() if nats else ""
    try:
        request = KeyRequest(name, models, methods, tenant, seconds(expires), public_key(seed) if seed else "", admin)
    except ValueError as error:
        raise ClientFault("invalid", str(error), "`kernelm model list` has the names; repeat the option for several") from None
    _must_be_new(nats)

    async def work() -> KeyCreated:
        async with connection(output.folder) as bus:
            made: KeyCreated = await bus.call(Kernel.create_key, request)
            return made

    created = asyncio.run(work())
    return _show(created, seed, nats, output)


def _must_be_new(nats: Path | None) -> None:
    if nats is not None and nats.exists():
        raise ClientFault("already_exists", f"{nats} is there already", "choose another file, or delete it")


def _told(key: Key) -> dict[str, Any]:
    """A key's fields without the hashes of its secrets, which are nobody's business."""
    return {name: value for name, value in msgspec.structs.asdict(key).items() if name not in ("hash", "previous_hash")}


def _show(created: KeyCreated, seed: str, nats: Path | None, output: Output) -> int:
    key = created.key
    if nats is not None:
        credentials = Credentials(read(created.jwt)["name"], created.jwt, seed, key.expires)
        write_secret(nats.absolute(), to_file(credentials))
    if output.json:
        print_json(msgspec.structs.asdict(created) | {"key": _told(key)})
        return 0
    manages = ", manages plugins and routes" if key.admin else ""
    rights = f"models {', '.join(key.models)}, methods {', '.join(key.methods)}{manages}"
    overlap = f"\nThe old secret is accepted until {date(key.previous_until)}." if key.previous_hash else ""
    text = Text.assemble((created.secret, "bold"), f"\n\nid {key.id}, {rights}, expires {_when(key)}",
                         f"\nNATS credentials: {nats}" if nats else "", overlap,
                         ("\nIt is not shown again: keep it, e.g. as KERNELM_KEY.", "yellow"))  # fmt: skip
    stdout().print(Panel(text, title=f"[bold green]key {key.name}[/]", title_align="left", border_style="green", expand=False))
    return 0


@app.command
def rotate(id: Annotated[str, Parameter(name="ID")], /, *, output: Output = Output(), overlap: str = "1h",
           nats: Path | None = None) -> int:  # fmt: skip
    """Give a key a new secret. It is shown this once.

    Parameters
    ----------
    overlap
        For how long the old secret is still accepted, an hour at most; never: it is refused at once.
    nats
        Also write new credentials for its NATS client to this file (0600); the old ones end with the overlap.
    """
    seed = new_seed() if nats else ""
    request = RotateKey(id, seconds(overlap, "--overlap"), public_key(seed) if seed else "")
    _must_be_new(nats)

    async def work() -> KeyCreated:
        async with connection(output.folder) as bus:
            made: KeyCreated = await bus.call(Kernel.rotate_key, request)
            return made

    return _show(asyncio.run(work()), seed, nats, output)


@app.default
@app.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the keys, never their secrets."""

    async def work() -> KeyList:
        async with connection(output.folder) as bus:
            found: KeyList = await bus.call(Kernel.list_keys, Empty())
            return found

    keys = asyncio.run(work()).keys
    if output.json:
        print_json([_told(key) for key in keys])
        return 0
    table = columns("id", "name", "tenant", "models", "methods", "created", "expires", "state")
    for key in sorted(keys, key=lambda k: k.created):
        name = f"{key.name} (admin)" if key.admin else key.name
        table.add_row(key.id, name, key.tenant, ", ".join(key.models), ", ".join(key.methods),
                      date(key.created), _when(key), _state(key))  # fmt: skip
    stdout().print(table if keys else "no keys; `kernelm key create NAME` makes one")
    return 0


@app.command
def revoke(id: Annotated[str, Parameter(name="ID")], /, *, common: Common = Common()) -> int:
    """Revoke a key: it is refused from now on."""

    async def work() -> Key:
        async with connection(common.folder) as bus:
            key: Key = await bus.call(Kernel.revoke_key, KeyName(id))
            return key

    key = asyncio.run(work())
    stdout().print(f"key {key.id} ({key.name}) is revoked")
    return 0


def date(stamp: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp))


def _when(key: Key) -> str:
    return date(key.expires) if key.expires else "never"


def _state(key: Key) -> Text:
    if key.revoked:
        return Text("revoked", "red")
    return Text("expired", "yellow") if 0 < key.expires < time.time() else Text("valid", "green")
