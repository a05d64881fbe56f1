"""Reads and checks a run file before anything is submitted. Pure but for reading the file and looking at folders.

Three kinds of values in `with` are no data of the request itself: `{folder = "..."}` and `{package = "...", path = "..."}`
name content that becomes an artifact, and `"${stage.field}"` stands for a field of an earlier stage's result.
"""

import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kernelm_cli import references, sources
from kernelm_contracts.deployments import DEPLOY, Deployed, DeployRequest
from kernelm_contracts.jobs import RunSpec, StageSpec
from kernelm_sdk.contract import Method, find_contract
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.nearest import field_hint

ANY_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`$")


class Source(NamedTuple):
    """A folder that has to be in the artifact store before the run is submitted."""

    stage: int
    path: tuple[str | int, ...]  # where it stands in the stage's `with`
    folder: Path
    origin: dict[str, str]  # what the artifact's metadata says about where it came from


class RunFile(NamedTuple):
    """A run file that passed every check that can be made without the system."""

    path: Path
    spec: RunSpec
    sources: tuple[Source, ...]

    def resolved(self, digests: dict[Path, str]) -> RunSpec:
        """The spec with the digest of each source's folder in its place."""
        stages = [msgspec.structs.replace(s, with_=msgspec.json.decode(msgspec.json.encode(s.with_))) for s in self.spec.stage]
        for source in self.sources:
            references.put(stages[source.stage].with_, source.path, digests[source.folder])
        return msgspec.structs.replace(self.spec, stage=tuple(stages))


def read(path: Path) -> RunFile:
    """The run file at `path`; ClientFault that names file, stage and field for whatever is wrong with it."""
    spec = _parse(path)
    found: list[Source] = []
    earlier: dict[str, Any] = {}  # stage -> type of its result
    for index, stage in enumerate(spec.stage):
        if stage.name in earlier:
            raise _fault(path, stage, "name", "another stage has the same name", "give each stage its own")
        request, reply = _types(path, stage)
        found.extend(_check_stage(path, index, stage, request, earlier))
        earlier[stage.name] = reply
    return RunFile(path, spec, tuple(found))


def _parse(path: Path) -> RunSpec:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClientFault("no_run_file", f"{path} does not exist", "give a run file, e.g. deploy/runs/news.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClientFault("invalid_run_file", f"{path} can't be read: {error}", "a run file is TOML in UTF-8") from None
    except tomllib.TOMLDecodeError as error:  # its text ends in "(at line 3, column 5)"
        raise ClientFault("invalid_run_file", f"{path}: {error}", "correct the TOML at that place") from None
    try:
        spec = msgspec.convert(data, RunSpec)
    except msgspec.ValidationError as error:
        what, field = _split(error)
        stage = _stage_of(data, field)
        raise ClientFault("invalid_run_file", f"{path}: {what}", _suggest(error, RunSpec), file=str(path), stage=stage,
                          field=field or "top level") from None  # fmt: skip
    if not spec.stage:
        raise ClientFault("invalid_run_file", f"{path} has no [[stage]]", "a run has at least one stage")
    return spec


def _types(path: Path, stage: StageSpec) -> tuple[type[msgspec.Struct], Any]:
    """(request struct, result struct) of what the stage uses."""
    if stage.uses == DEPLOY:
        return DeployRequest, Deployed
    identifier, _, name = stage.uses.partition(".")
    remedy = f'"{DEPLOY}", or a job method such as "trainer/1.train"'
    try:
        methods = find_contract(identifier).methods
    except LookupError as error:
        raise _fault(path, stage, "uses", str(error), remedy) from None
    method: Method | None = methods.get(name.replace("_", "-"))
    if method is None or method.kind != "job":
        jobs = [f"{identifier}.{m.attribute}" for m in methods.values() if m.kind == "job"]
        what = "is no job" if method else "does not exist"
        raise _fault(path, stage, "uses", f"{stage.uses!r} {what}", f"use {' or '.join(jobs)}" if jobs else remedy)
    return method.request, method.reply


def _check_stage(path: Path, index: int, stage: StageSpec, request: type[msgspec.Struct], earlier: dict[str, Any]) -> list[Source]:
    found: list[Source] = []
    stand_in: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(stage.with_))
    for where, value in references.leaves(stage.with_):
        try:
            if sources.is_source(value):
                folder, origin = sources.locate(value, path.parent)
                found.append(Source(index, where, folder, origin))
                references.put(stand_in, where, references.DIGEST)
            elif isinstance(value, str) and "${" in value:
                references.put(stand_in, where, references.stand_in(value, earlier))
        except ClientFault as fault:
            raise _fault(path, stage, references.dotted(where), fault.message, fault.remedy, fault.code) from None
    try:
        msgspec.convert(stand_in, request)
    except msgspec.ValidationError as error:
        what, field = _split(error)
        value = references.get(stage.with_, field)
        shown = f"{value} is no value for it: {what}" if isinstance(value, str) and "${" in value else what
        raise _fault(path, stage, field or "with", shown, _suggest(error, request)) from None
    return found


# ---- messages ----


def _fault(path: Path, stage: StageSpec, field: str, what: str, remedy: str, code: str = "invalid_run_file") -> ClientFault:
    message = f"{path}: stage {stage.name!r}, {field}: {what}"
    return ClientFault(code, message, remedy, file=str(path), stage=stage.name, field=field)


def _split(error: msgspec.ValidationError) -> tuple[str, str]:
    """(text, dotted field) of msgspec's message, which ends in " - at `$.a.b[0]`"."""
    text = str(error)
    match = ANY_PATH.search(text)
    return (text[: match.start()], match["path"].lstrip(".")) if match else (text, "")


def _stage_of(data: dict[str, Any], field: str) -> str:
    match = re.match(r"stage\[(\d+)\]", field)
    stages = data.get("stage")
    if not match or not isinstance(stages, list) or not isinstance(stages[int(match[1])], dict):
        return ""
    return str(stages[int(match[1])].get("name", f"number {int(match[1]) + 1}"))


def _suggest(error: msgspec.ValidationError, wanted: type[msgspec.Struct]) -> str:
    return field_hint(error, wanted) or "correct the value"
