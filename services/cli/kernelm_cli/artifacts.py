"""`kernelm artifact list | show | export | verify | erase`: what is in the store."""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from rich.progress import track

from kernelm_cli.results import short
from kernelm_cli.session import Common, Output, connection, megabytes, print_json, stdout
from kernelm_cli.tables import columns
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Artifact, ArtifactList, ArtifactName, ArtifactQuery, Artifacts, OpenArtifact

DIGEST = "sha256:"
ALL = 1_000_000  # more than a store holds
app = App(name=("artifact", "artifacts"), help="The store: datasets, models and all other file trees.", version_flags=[])


async def find(bus: Bus, name: str) -> Artifact:
    """The artifact with that digest, or the one whose digest begins so. ClientFault "not_found" or "ambiguous"."""
    begin = name.removeprefix(DIGEST)
    if len(begin) == 64:
        artifact: Artifact = await bus.call(Artifacts.describe, ArtifactName(DIGEST + begin))
        return artifact
    stored: ArtifactList = await bus.call(Artifacts.find, ArtifactQuery(limit=ALL), timeout_s=30.0)
    found = {a.digest: a for a in stored.artifacts if begin and a.digest.removeprefix(DIGEST).startswith(begin)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ClientFault("ambiguous", f"{len(found)} artifacts begin with {name!r}", "give more of the digest")
    raise ClientFault("not_found", f"no artifact begins with {name!r}", "kernelm artifact list")


@app.default
@app.command(name="list")
def list_(*, output: Output = Output(), kind: str = "", limit: int = 50) -> int:
    """List the latest artifacts.

    Parameters
    ----------
    kind
        Only those of this kind: source, dataset, checkpoint, model, plugin, report, ...
    limit
        At most so many.
    """

    async def work() -> ArtifactList:
        async with connection(output.folder) as bus:
            found: ArtifactList = await bus.call(Artifacts.find, ArtifactQuery(kind, limit))
            return found

    artifacts = asyncio.run(work()).artifacts
    if output.json:
        print_json(artifacts)
        return 0
    table = columns("artifact", "kind", "name", "stored", "files", "MB", right=("files", "MB"))
    for a in artifacts:
        stored = time.strftime("%Y-%m-%d %H:%M", time.localtime(a.created))
        name = str(next((a.metadata[k] for k in ("name", "plugin", "package", "folder") if a.metadata.get(k)), ""))
        size = f"{megabytes(a.files):,.1f}"
        table.add_row(short(a.digest), a.kind, name, stored, f"{len(a.files):,}", size)
    stdout().print(table if artifacts else f"no artifacts{f' of kind {kind!r}' if kind else ''}")
    return 0


@app.command
def show(digest: Annotated[str, Parameter(name="DIGEST")], /, *, output: Output = Output()) -> int:
    """Show what an artifact is, and its files; the beginning of a digest will do."""

    async def work() -> Artifact:
        async with connection(output.folder) as bus:
            return await find(bus, digest)

    artifact = asyncio.run(work())
    if output.json:
        print_json(artifact)
        return 0
    console = stdout()
    console.print(f"{artifact.digest}\n{artifact.kind}, {megabytes(artifact.files):,.1f} MB in {len(artifact.files):,} files")
    for title, values in (("from", artifact.lineage), ("metadata", artifact.metadata)):
        for key, value in values.items():
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            console.print(f"{title} {key}: {text}", markup=False)
    table = columns("file", "bytes", right=("bytes",))
    for file in artifact.files:
        table.add_row(file.path, f"{file.bytes:,}")
    console.print(table)
    return 0


@app.command
def export(digest: Annotated[str, Parameter(name="DIGEST")], target: Annotated[Path, Parameter(name="FOLDER")], /, *,
           common: Common = Common()) -> int:  # fmt: skip
    """Copy an artifact's files, verified, to a new folder."""
    if target.exists():
        raise ClientFault("exists", f"{target} is there already", "name a new folder: nothing is overwritten")

    async def work() -> Artifact:
        async with connection(common.folder) as bus:
            opened: OpenArtifact = await bus.call(Artifacts.open, ArtifactName((await find(bus, digest)).digest), timeout_s=600.0)
            await asyncio.to_thread(_copy, Path(opened.path), target)
            return opened.artifact

    artifact = asyncio.run(work())
    stdout().print(f"{short(artifact.digest)}: {len(artifact.files):,} files, {megabytes(artifact.files):,.1f} MB, in {target}")
    return 0


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for folder in (target, *(p for p in target.rglob("*") if p.is_dir())):  # the store's are read-only
        folder.chmod(0o755)


@app.command
def verify(*digests: Annotated[str, Parameter(name="DIGEST")], common: Common = Common()) -> int:
    """Read every byte of some artifacts, or of all, and compare it with their digests; exit code 1 if one is not right."""

    async def work() -> tuple[int, int]:
        wrong = 0
        async with connection(common.folder) as bus:
            stored: ArtifactList = await bus.call(Artifacts.find, ArtifactQuery(limit=ALL), timeout_s=30.0)
            asked = [(await find(bus, digest)).digest for digest in digests] or list({a.digest: a for a in stored.artifacts})
            for digest in track(asked, "verifying", console=stdout(), transient=True, disable=not stdout().is_terminal):
                try:
                    await bus.call(Artifacts.open, ArtifactName(digest), timeout_s=600.0)
                except Fault as fault:
                    wrong += 1
                    stdout().print(fault.message, style="red", markup=False)
        return len(asked), wrong

    count, wrong = asyncio.run(work())
    stdout().print(f"{count - wrong} of {count} artifacts are as their digests say")
    return 1 if wrong else 0


@app.command
def erase(digest: Annotated[str, Parameter(name="DIGEST")], /, *, common: Common = Common(),
          yes: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Delete an artifact for good; where it is encrypted, its key first. What is made of it stays.

    Parameters
    ----------
    yes
        Do it; without, only say what would go.
    """

    async def work() -> Artifact:
        async with connection(common.folder) as bus:
            artifact = await find(bus, digest)
            if yes:
                await bus.call(Artifacts.erase, ArtifactName(artifact.digest), timeout_s=600.0)
            return artifact

    artifact = asyncio.run(work())
    what = f"{artifact.digest} ({artifact.kind}, {megabytes(artifact.files):,.1f} MB)"
    stdout().print(f"erased {what}" if yes else f"this would erase {what} for good: --yes does it")
    return 0
