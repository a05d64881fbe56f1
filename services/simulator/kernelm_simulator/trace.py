"""Traces of jobs: the public formats, each known by its columns. A reader makes `TraceJob`s, sorted by time, from 0 on."""

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, TextIO, cast

from msgspec import Struct
from msgspec.structs import replace

from kernelm_sdk.errors import ClientFault
from kernelm_simulator.profiles import MOST, Profiles
from kernelm_simulator.work import FixedWork, Work

Row = dict[str, Any]  # a field that a line has not is None
PAI_COLUMNS = ("job_name", "task_name", "inst_num", "status", "start_time", "end_time", "plan_cpu", "plan_mem", "plan_gpu",
               "gpu_type")  # fmt: skip
WHOLE_DEVICE = 100.0  # plan_gpu of PAI is in percent of a device
PAI_STATES = frozenset(("Terminated", "Failed", "Running", "Waiting"))
SLURM_STATES = frozenset((
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING", "PREEMPTED",
    "REQUEUED", "RESIZING", "REVOKED", "RUNNING", "SUSPENDED", "TIMEOUT"))  # fmt: skip  # squeue(1)
GZIP = b"\x1f\x8b"  # what a compressed file begins with
SHOWN = 80  # characters of a field, in an error
DAY_S = 86400.0


class TraceJob(Struct, frozen=True):
    """A job as its owner submitted it."""

    id: str
    submitted: float  # seconds from the first job on
    work: Work  # with the batch size free, if the job has one
    members: int = 1  # that its owner asked for
    most: int = 0  # members it can use, from 1 on; 0: not elastic
    tenant: str = "default"
    rigid: Work | None = None  # with the owner's batch size, for `members` members; None: as `work`


def read(path: Path, profiles: Profiles | None = None, jobs: int = 0, serial: float = 0.0, from_s: float = 0.0,
         for_s: float = inf) -> list[TraceJob]:  # fmt: skip
    """The first `jobs` (0: all) jobs that use accelerators of the file `path`, which may be compressed (gzip): those that were
    submitted `from_s` after its first one or later, for `for_s`. `serial`: see `FixedWork`; ClientFault says what was wrong in
    which field of which line."""
    try:
        with _opened(path) as file:
            first = next(csv.reader(file), [])
            file.seek(0)
            named = not (len(first) == len(PAI_COLUMNS) and not set(first) & set(PAI_COLUMNS))
            rows = csv.DictReader(file, None if named else PAI_COLUMNS)
            reader = _reader(set(rows.fieldnames or ()), path)
            found = list(_parsed(rows, reader, path, profiles, serial))
    except OSError as error:
        remedy = "name a CSV file, as it is or as .gz; see the simulator's README.md"
        raise ClientFault("missing_trace", f"{path}: {error.strerror or error}", remedy) from None
    except (UnicodeDecodeError, EOFError, zlib.error, csv.Error) as error:
        raise ClientFault("invalid_trace", f"{path} is no text in UTF-8, or damaged: {error}", "fetch it again") from None
    found.sort(key=lambda job: (job.submitted, job.id))
    if not found:
        raise ClientFault("empty_trace", f"{path} holds no job that uses an accelerator", "name another trace")
    start = from_s + (0.0 if reader is _sia else found[0].submitted)
    chosen = [job for job in found if start <= job.submitted < start + for_s]
    if not chosen:
        said = f"{(found[-1].submitted - start + from_s) / DAY_S:.1f} days after the first"
        raise ClientFault("empty_trace", f"{path}: no job was submitted then; the last one was {said}", "name other days")
    return [replace(job, submitted=job.submitted - start) for job in islice(chosen, jobs or None)]


def _opened(path: Path) -> TextIO:
    with path.open("rb") as file:
        zipped = file.read(len(GZIP)) == GZIP
    opened = gzip.open if zipped else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=""))


Reader = Callable[[int, Row, Profiles | None, float], TraceJob | None]


def _reader(columns: set[str], path: Path) -> Reader:
    for needed, reader in FORMATS:
        if needed <= columns:
            return reader
    known = "; ".join(", ".join(sorted(needed)) for needed, _ in FORMATS)
    nearest = max((needed for needed, _ in FORMATS), key=lambda needed: len(needed & columns) / len(needed))
    lacks = f"; nearest is one without {', '.join(sorted(nearest - columns))}" if nearest & columns else ""
    shown = ", ".join(sorted(columns))
    raise ClientFault("unknown_trace", f"{path}: columns {shown[:SHOWN] or 'none'} are of no format that is read{lacks}",
                      f"one of: {known}")  # fmt: skip


def _parsed(rows: "csv.DictReader[str]", reader: Reader, path: Path, profiles: Profiles | None,
            serial: float) -> Iterator[TraceJob]:  # fmt: skip
    lines: dict[str, int] = {}
    for row in rows:
        number = rows.line_num
        try:
            if None in row:
                raise ValueError(f"{len(row[None])} more fields than columns")
            job = reader(number, row, profiles, serial)
            if job is not None and lines.setdefault(job.id, number) != number:
                raise ValueError(f"job {job.id} is that of line {lines[job.id]} again")
        except ValueError as error:
            raise ClientFault("invalid_trace", f"{path}, line {number}: {error}", "correct the line or leave it out") from None
        except ClientFault as fault:
            if fault.code != "unknown_application":
                raise
            raise ClientFault(fault.code, f"{path}, line {number}: {fault.message}", fault.remedy) from None
        if job is not None:
            yield job


def _sia(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob:
    """Workloads of the Pollux and Sia artifacts: an application's run, submitted with so many replicas and a batch size."""
    if profiles is None:
        raise ClientFault("missing_profiles", "this trace names applications: their profiles are needed",
                          "--data FOLDER or KERNELM_SIA_DATA: the folder that holds profiles/")  # fmt: skip
    work = profiles.work(_text(row, "application"))
    machines = [work.application.machine(type) for type in work.application.types]
    most = min(MOST, work.application.batches[1] // min(m.least for m in machines))
    rigid = profiles.work(work.application.name, _count(row, "batch_size", 1))
    return TraceJob(_text(row, "name"), _number(row, "time"), work, _count(row, "num_replicas", 1), most, rigid=rigid)


def _philly(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob | None:
    """Microsoft's Philly (Jeon et al., ATC 2019), as the artifact of Sia condenses it; `cluster` is a virtual cluster."""
    return _fixed(f"job-{number}", _moment(row, "timestamp"), _number(row, "duration"), _count(row, "num_gpus"),
                  _text(row, "cluster"), serial)  # fmt: skip


def _helios(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob | None:
    """SenseTime's Helios (Hu et al., SC 2021; `vc`) and Acme (Hu et al., NSDI 2024; `type`): only what ran."""
    _known(row, "state", SLURM_STATES)
    tenant = row.get("vc") or row.get("type") or _text(row, "user")
    return _fixed(_text(row, "job_id"), _moment(row, "submit_time"), _number(row, "duration", "0"), _count(row, "gpu_num", 0, "0"),
                  tenant, serial)  # fmt: skip


def _pai(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob | None:
    """Alibaba's PAI (Weng et al., NSDI 2022), pai_task_table: instances of a share of a device each, which are rounded up to whole
    devices; the trace has the start and not the submission."""
    _known(row, "status", PAI_STATES)
    if not (row["start_time"] and row["end_time"] and row["plan_gpu"]):
        return None
    start, end = _number(row, "start_time"), _number(row, "end_time")
    if end < start:
        raise ValueError(f"end_time: {end:g} is before start_time, {start:g}")
    devices = _count(row, "inst_num", 1, "1") * math.ceil(_number(row, "plan_gpu") / WHOLE_DEVICE)
    return _fixed(f"{_text(row, 'job_name')}/{_text(row, 'task_name')}", start, end - start, devices, row.get("user", ""), serial)


def _fixed(id: str, submitted: float, seconds: float, members: int, tenant: str, serial: float) -> TraceJob | None:
    if members < 1 or seconds <= 0:
        return None
    return TraceJob(id, submitted, FixedWork(seconds, members, serial=serial), members, tenant=tenant or "default")


# ---- fields: ValueError names the one that is wrong ----------------------------------------------------------------------


def _text(row: Row, field: str) -> str:
    if not row[field]:
        raise ValueError(f"{field}: is missing")
    return row[field]


def _number(row: Row, field: str, blank: str = "") -> float:
    """Finite and not negative; of an empty field that of `blank`."""
    text = row[field] if row[field] or not blank else blank
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{field}: {repr(text[:SHOWN]) + ' is no number' if text else 'is missing'}") from None
    if not 0 <= value < inf:
        raise ValueError(f"{field}: {text[:SHOWN]} is not finite, or negative")
    return value


def _count(row: Row, field: str, least: int = 0, blank: str = "") -> int:
    value = _number(row, field, blank)
    if value < least or value != int(value):
        raise ValueError(f"{field}: {value:g} is no whole number from {least} on")
    return int(value)


def _moment(row: Row, field: str) -> float:
    """A time as the traces write it: seconds, or "2020-04-01 10:00:00", with or without an offset."""
    text = _text(row, field).strip()
    if text[4:5] != "-":
        return _number(row, field)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{field}: {text[:SHOWN]!r} is no time") from None
    return (moment - datetime(1970, 1, 1, tzinfo=moment.tzinfo)).total_seconds()


def _known(row: Row, field: str, states: frozenset[str]) -> None:
    """Refuse a state that nobody has: the line is garbled, or of another format."""
    if (row.get(field) or "").partition(" ")[0] not in states:  # Slurm writes "CANCELLED by 1000"
        raise ValueError(f"{field}: {(row.get(field) or '')[:SHOWN]!r} is none of {', '.join(sorted(states))}")


FORMATS: tuple[tuple[set[str], Reader], ...] = (
    ({"name", "time", "application", "num_replicas", "batch_size"}, _sia),
    ({"timestamp", "duration", "num_gpus", "cluster"}, _philly),
    ({"job_id", "user", "gpu_num", "state", "submit_time", "duration"}, _helios),
    ({"job_name", "task_name", "inst_num", "start_time", "end_time", "plan_gpu", "gpu_type"}, _pai),
)
