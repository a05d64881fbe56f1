"""`kernelm identity list | rotate`: the keys that this system signs its members' credentials with."""

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from kernelm_authority.identity import Authority
from kernelm_authority.rotation import rotate as rotate_key
from kernelm_authority.signing import SigningKey
from kernelm_cli.keys import date
from kernelm_cli.session import Output, connection, print_json, running, stdout
from kernelm_cli.tables import columns
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import KeyChanged

app = App(name="identity", help="The keys that members' credentials are signed with.", version_flags=[])


def _authority(output: Output) -> Authority:
    try:
        return Authority(output.folder)
    except OSError as error:
        raise ClientFault("no_home", f"{output.folder} is no kernelm home that you may read: {error.strerror}",
                          "run this where the kernel runs, as its user, or give --home") from None  # fmt: skip


@app.default
@app.command(name="list")
def list_(*, output: Output = Output()) -> int:
    """List the signing keys; never their secrets."""
    keys = _authority(output).signing.all()
    if output.json:
        print_json([{"public": k.public, "since": k.since, "until": k.until} for k in keys])
        return 0
    table = columns("signing key", "since", "state")
    for key in keys:
        table.add_row(key.public, date(key.since) if key.since else "-", _state(key))
    stdout().print(table if keys else "no signing key: the account's own key signs; `kernelm identity rotate` makes one")
    return 0


@app.command
def rotate(*, output: Output = Output(), now: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Sign with a new key from now on. Members change over at their next renewal; nobody is interrupted.

    Parameters
    ----------
    now
        The key before was stolen: nothing that it signed counts any more. Services and plugins are cut off and start again;
        jobs go on from their checkpoints.
    """
    authority = _authority(output)
    url = running(output.folder).url

    async def work() -> str:
        async with connection(output.folder) as bus:
            public = await rotate_key(authority, url, drop_others=now)
            await bus.publish(KeyChanged(id=public, name="signing key", change="rotated", by=bus.user))
            return public

    public = asyncio.run(work())
    if output.json:
        print_json({"public": public})
        return 0
    rest = "what was signed before is refused" if now else "the one before counts until the last that it signed has expired"
    stdout().print(f"[green]✓[/] signing key [bold]{public}[/] is in use; {rest}")
    return 0


def _state(key: SigningKey) -> str:
    if not key.since:
        return "next: `kernelm identity rotate` was interrupted"
    return f"accepted until {date(key.until)}" if key.until else "in use"
