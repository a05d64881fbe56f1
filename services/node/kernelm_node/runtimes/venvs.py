"""Environments of plugins, made from their requirements and cached by a hash of these and the Python version:
`<home>/venvs/<hash>/`. The SDK and the contracts are put on the path beside it, so that another version of them, which comes
with the node, does not cost another environment. One is built beside its place and renamed when it is complete, by one node at
a time (flock); a build that fails leaves nothing. `<hash>/.used` is touched at every use, so that old ones can be found and
removed."""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tomllib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import GROUP, package_folder
from kernelm_sdk.system import Environment

OWN = {"kernelm-sdk": "kernelm_sdk", "kernelm-contracts": "kernelm_contracts"}  # distribution -> package; the node's copies
NOT_FETCHED = {*OWN, "kernelm"}  # the kernel is no plugin's to import
LOCK_POLL_S = 0.1
TAIL = 12  # lines of pip's that a fault brings


def requirements_of(plugin: str, source: Path | None, extras: Sequence[str] = ()) -> list[str]:
    """What the plugin asks for, without the SDK and the contracts: from the artifact's pyproject.toml, or the installed
    distribution's metadata. ClientFault that names the line that is no requirement, or the extra that there is not."""
    if source is not None:
        file = source / "pyproject.toml"
        where, lines, known = str(file), *(_declared(file, extras) if file.exists() else ([], []))
    else:
        owners = [point.dist for point in importlib.metadata.entry_points(group=GROUP, name=plugin) if point.dist]
        where, lines = f"plugin {plugin}", [line for owner in owners for line in owner.requires or []]
        known = [extra for owner in owners for extra in owner.metadata.get_all("Provides-Extra") or []]
    if missing := [extra for extra in extras if extra not in known]:
        raise ClientFault("invalid", f"{where} has no extra {missing[0]!r}, for which its manifest asks in [venv]",
                          f"it has {', '.join(known) or 'none'}: correct one of them")  # fmt: skip
    return sorted({_bare(r) for r in _parsed(lines, where, extras) if _normal(r) not in NOT_FETCHED})


def _bare(requirement: Requirement) -> str:
    """Without its marker, which holds here; pip would ask again, and not know the extra."""
    requirement.marker = None
    return str(requirement)


def _declared(file: Path, extras: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the requirements with those of `extras`, all extras that there are)"""
    try:
        project = tomllib.loads(file.read_text()).get("project", {})
        optional = project.get("optional-dependencies", {})
        lines = [*project.get("dependencies", []), *(line for extra in extras for line in optional.get(extra, []))]
        return [str(line) for line in lines], list(optional)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ClientFault("invalid", f"{file}: {error}", "[project] dependencies must be a list of requirements") from None


def _parsed(lines: Iterable[str], where: str, extras: Sequence[str] = ()) -> Iterable[Requirement]:
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise ClientFault("invalid", f"{where}: dependency {line!r}: {error}", 'write it as in "packaging>=24,<26"') from None
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def _normal(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-")


def own_packages() -> list[Path]:
    """The folders of the packages in OWN, installed here, editable or not."""
    return [folder for package in OWN.values() if (folder := package_folder(package))]


def _contents(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Venvs:
    """The environments in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def of(self, plugin: str, source: Path | None, wanted: Environment, output: Path) -> Path:
        """The environment of a plugin, installed or in the artifact `source`; as `get`, and ClientFault as `requirements_of`."""
        requirements = await asyncio.to_thread(requirements_of, plugin, source, wanted.extras)
        return await self.get(requirements, output, wanted.without)

    async def get(self, requirements: list[str], output: Path, without: Sequence[str] = ()) -> Path:
        """The environment for `requirements`, built if there is none, from which the distributions `without` are taken out
        again; pip's output is appended to `output`. KernelFault "venv_failed" with pip's last lines."""
        needed = [str(r) for name in OWN for r in _parsed(importlib.metadata.requires(name) or [], name)
                  if _normal(r) not in NOT_FETCHED]  # fmt: skip
        requirements = sorted({*needed, *requirements})
        parts = [requirements, sorted(without), sys.version, sys.prefix]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        place = self._folder / key
        self._folder.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            async with _locked(self._folder / f"{key}.lock"):
                if not place.exists():
                    await self._build(place, requirements, output, without)
        (place / ".used").touch()
        return place

    async def _build(self, place: Path, requirements: list[str], output: Path, without: Sequence[str]) -> None:
        for left in self._folder.glob(f"{place.name}.building-*"):  # of a node that was killed; the lock is ours
            await asyncio.to_thread(shutil.rmtree, left, True)
        building = self._folder / f"{place.name}.building-{secrets.token_hex(4)}"
        try:
            python = building / "bin" / "python"
            for command in _commands(building, python, requirements, without):
                await _run(command, output, requirements)
            await asyncio.to_thread(_settle, building, place)
            (building / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements))
            building.rename(place)
        finally:
            if building.exists():
                await asyncio.to_thread(shutil.rmtree, building, True)


def _commands(building: Path, python: Path, requirements: list[str], without: Sequence[str]) -> list[list[str]]:
    """With uv where it is to be had; else with venv and the node's own pip, so that none is copied into every environment."""
    beside = Path(sys.executable).parent
    if uv := shutil.which("uv", path=os.pathsep.join([str(beside), os.environ.get("PATH", "")])):
        commands = [[uv, "venv", "--quiet", "--python", sys.executable, str(building)],
                    [uv, "pip", "install", "--python", str(python), *requirements]]  # fmt: skip
        return [*commands, [uv, "pip", "uninstall", "--python", str(python), *without]] if without else commands
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    commands = [[sys.executable, "-m", "venv", "--without-pip", str(building)],
                [*pip, "install", "--no-input", "--progress-bar", "off", *requirements]]  # fmt: skip
    return [*commands, [*pip, "uninstall", "--yes", *without]] if without else commands


def _settle(building: Path, place: Path) -> None:
    """Scripts name the place where the environment will be."""
    for script in (building / "bin").iterdir():
        if script.is_file() and not script.is_symlink() and building.name.encode() in (text := script.read_bytes()):
            script.write_bytes(text.replace(building.name.encode(), place.name.encode()))


async def _run(command: list[str], output: Path, requirements: list[str]) -> None:
    """Run to its end; when this is cancelled it is killed with all its children."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_") and k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                                                       stderr=asyncio.subprocess.STDOUT, env=environment,
                                                       start_new_session=True)  # fmt: skip
    except OSError as error:
        raise KernelFault("venv_failed", f"{command[0]}: {error}", "look at the path that the message names") from error
    try:
        text = (await process.communicate())[0].decode(errors="replace")
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    with output.open("a") as log:
        log.write(text)
    if process.returncode:
        last = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING")][-TAIL:]
        listed = ", ".join(requirements) or "those of the SDK"
        what = "the environment can't be made" if "venv" in command[1:3] else f"its requirements can't be installed: {listed}"
        raise KernelFault("venv_failed", "\n  ".join([f"{Path(command[0]).name} says:", *last]) + f"\n{what}", _remedy(text))


def _remedy(text: str) -> str:
    """What to do about what pip or uv wrote."""
    if re.search(r"ResolutionImpossible|conflicting dependencies|No solution found", text):
        return "they contradict each other: loosen one of them in the plugin's pyproject.toml, or leave it out"
    if found := re.search(r"No matching distribution found for (\S+)|(\S+) was not found in the package registry", text):
        return f"no package index of this node has {found[1] or found[2]}: correct the name or version, or give the node an " \
               "index that has it (pip config, PIP_INDEX_URL)"  # fmt: skip
    if re.search(r"No space left on device", text):
        return "the disk is full: free some space (df -h), for example in the node's venvs folder"
    if re.search(r"NewConnectionError|ConnectTimeout|Temporary failure in name resolution|ReadTimeout", text):
        return "the package index does not answer: look at the node's network and pip config"
    return "the lines above are pip's own"


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Held by one builder of one node; gone with its process."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # waited for here and not in a thread, so that a stop is heeded
                await asyncio.sleep(LOCK_POLL_S)
        yield


def copied(package: Path, folder: Path) -> Path:
    """A copy of the package of an installed plugin, in a folder of its own that can be on PYTHONPATH without the rest of
    what the node has installed: `<folder>/<hash>/<package>`; the `<hash>` folder."""
    place = folder / _contents(package)[:16]
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = folder / f"{place.name}.building-{secrets.token_hex(4)}"
        shutil.copytree(package, building / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            building.rename(place)
        except OSError:
            shutil.rmtree(building)
            if not place.exists():  # nobody was quicker
                raise
    return place
