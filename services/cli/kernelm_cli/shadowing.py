"""`kernelm model shadow`, and what `deploy --shadow` and `promote` do with shadows: another model answers copies of a deployment's
calls, and nobody sees its answers but for comparison."""

import asyncio
from typing import Annotated

import msgspec
from cyclopts import Parameter

from kernelm_cli.models import finish
from kernelm_cli.session import Output, connection, print_json, stdout
from kernelm_cli.tables import pairs
from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import JobName, JobRecord, Jobs
from kernelm_contracts.shadows import Shadow, ShadowRequest
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault

SUFFIX = "-shadow"  # of the deployment that `deploy --shadow` makes
IDLE_S = 60.0  # without copies for so long it has no instance


def shadow(name: Annotated[str, Parameter(name="NAME")], to: Annotated[str, Parameter(name="OTHER")] = "",
           share: Annotated[str, Parameter(name="SHARE")] = "", /, *, end: bool = False, why: str = "",
           output: Output = Output()) -> int:  # fmt: skip
    """Show what came of copies of a deployment's calls; with OTHER, have that deployment answer a share of them from now on.

    Only calls through gateways are copied. Their callers neither wait for a copy nor see its answer.

    Parameters
    ----------
    to
        The deployment that answers the copies.
    share
        Percent of the calls, as 10 or 10%; all of them otherwise.
    end
        Make no more copies.
    why
        The reason, for the record.
    """
    if end and to:
        raise ClientFault("invalid", f"--end and {to!r} are given", "give one of them")

    async def work() -> Shadow:
        async with connection(output.folder) as bus:
            if end or to:
                asked = ShadowRequest(name, to, 0 if end else percent("the share", share or "100"), why)
                stored: Shadow = await bus.call(Jobs.shadow, asked, timeout_s=20.0)
                return stored
            return await find(bus, name)

    found = asyncio.run(work())
    if output.json:
        print_json(found)
    else:
        _show(found)
    return 0


def percent(what: str, text: str, most: int = 100) -> int:
    """`text` ("10", "10%") as a whole percentage from 1 to `most`; ClientFault "invalid" that says `what` it is of otherwise."""
    digits = text.strip().removesuffix("%").strip()
    if not digits.isdecimal() or not 1 <= int(digits) <= most:
        raise ClientFault("invalid", f"{what} is {text!r}", f"give a whole percentage from 1% to {most}%, or none for all calls")
    return int(digits)


async def require(bus: Bus, name: str) -> None:
    """ClientFault "unknown_model" unless `name` is a deployment, which can have a shadow."""
    if (await bus.bucket("deployments", Deployment).get(f"model.{name}"))[0] is None:
        raise ClientFault("unknown_model", f"there is no deployment {name!r} whose calls could be copied", "kernelm model list")


async def find(bus: Bus, name: str) -> Shadow:
    """What is on record; ClientFault "not_found"."""
    found, _ = await bus.bucket("deployments", Shadow).get(f"shadow.{name}")
    if found is None:
        raise ClientFault("not_found", f"{name!r} has no shadow", f"kernelm model deploy {name} MODEL --shadow 10%")
    return found


def _show(found: Shadow) -> None:
    copies = found.copies
    answered = copies.same + copies.different
    rows = pairs()
    rows.add_row("shadow", f"{found.to} answers {found.percent}% of the calls of {found.name}" if found.percent
                 else f"{found.to} answered for {found.name}; it is over")  # fmt: skip
    rows.add_row("agrees", f"{copies.same} of {answered}" + (f" ({copies.same / answered:.1%})" if answered else ""))
    rows.add_row("failed", str(copies.failed))
    rows.add_row("dropped", str(copies.dropped))
    if answered:
        rows.add_row("took", f"{copies.took_ms / answered:.1f} ms, {found.name} {copies.beside_ms / answered:.1f} ms (means)")
    stdout().print(rows)


async def promote(bus: Bus, name: str, quiet: bool = False) -> JobRecord | None:
    """Deploy the model of the shadow of `name` in its place, and end the shadow; None if there is none."""
    found, _ = await bus.bucket("deployments", Shadow).get(f"shadow.{name}")
    if found is None or not found.percent:
        return None
    records = bus.bucket("deployments", Deployment)
    (other, _), (now, _) = await records.get(f"model.{found.to}"), await records.get(f"model.{name}")
    if other is None or now is None:
        raise ClientFault("unknown_model", f"{name!r} or its shadow {found.to!r} is no deployment any more", "kernelm model list")
    (old, new) = [await bus.call(Jobs.get, JobName(d.job)) for d in (now, other)]
    request = {**old.spec.request, "model": other.artifact, "plugin": other.plugin, "canary": 0, "watch_s": 0.0,
               "settings": new.spec.request.get("settings", {}), "why": f"its shadow {found.to} is promoted"}  # fmt: skip
    spec = msgspec.structs.replace(old.spec, name=f"deploy-{name}", request=request, resources=new.spec.resources, run="",
                                   parent="")  # fmt: skip
    job: JobRecord = await finish(bus, await bus.call(Jobs.submit, spec, timeout_s=20.0), quiet)
    await bus.call(Jobs.shadow, ShadowRequest(name, why="promoted"), timeout_s=20.0)
    return job
