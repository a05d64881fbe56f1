"""Traces of jobs: the public formats, each known by its columns. A reader makes `TraceJob`s, sorted by time, from 0 on."""

import csv
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path

from msgspec import Struct

from kernelm_sdk.errors import ClientFault
from kernelm_simulator.profiles import MOST, Profiles
from kernelm_simulator.work import FixedWork, Work

Row = dict[str, str]
PAI_COLUMNS = ("job_name", "task_name", "inst_num", "status", "start_time", "end_time", "plan_cpu", "plan_mem", "plan_gpu",
               "gpu_type")  # fmt: skip
WHOLE_DEVICE = 100.0  # plan_gpu of PAI is in percent of a device


class TraceJob(Struct, frozen=True):
    """A job as its owner submitted it."""

    id: str
    submitted: float  # seconds from the first job on
    work: Work  # with the batch size free, if the job has one
    members: int = 1  # that its owner asked for
    most: int = 0  # members it can use, from 1 on; 0: not elastic
    tenant: str = "default"
    rigid: Work | None = None  # with the owner's batch size, for `members` members; None: as `work`


def read(path: Path, profiles: Profiles | None = None, jobs: int = 0, serial: float = 0.0) -> list[TraceJob]:
    """The first `jobs` (0: all) jobs that use accelerators of the file `path`. `serial`: see `FixedWork`; ClientFault says what
    was wrong in which line."""
    try:
        with path.open(newline="") as file:
            first = next(csv.reader(file), [])
            file.seek(0)
            named = not (len(first) == len(PAI_COLUMNS) and not set(first) & set(PAI_COLUMNS))
            rows = csv.DictReader(file, None if named else PAI_COLUMNS)
            reader = _reader(set(rows.fieldnames or ()), path)
            found = list(_parsed(rows, reader, path, profiles, serial))
    except OSError as error:
        raise ClientFault("missing_trace", f"{path}: {error.strerror}", "name a CSV file; see the simulator's README.md") from None
    found.sort(key=lambda job: (job.submitted, job.id))
    if not found:
        raise ClientFault("empty_trace", f"{path} holds no job that uses an accelerator", "name another trace")
    start = 0.0 if reader is _sia else found[0].submitted
    return [TraceJob(j.id, j.submitted - start, j.work, j.members, j.most, j.tenant, j.rigid) for j in islice(found, jobs or None)]


Reader = Callable[[int, Row, Profiles | None, float], TraceJob | None]


def _reader(columns: set[str], path: Path) -> Reader:
    for needed, reader in FORMATS:
        if needed <= columns:
            return reader
    known = "; ".join(", ".join(sorted(needed)) for needed, _ in FORMATS)
    raise ClientFault("unknown_trace", f"{path}: columns {', '.join(sorted(columns)) or 'none'} are of no format that is read",
                      f"one of: {known}")  # fmt: skip


def _parsed(rows: Iterator[Row], reader: Reader, path: Path, profiles: Profiles | None, serial: float) -> Iterator[TraceJob]:
    for number, row in enumerate(rows, 2):
        try:
            job = reader(number, row, profiles, serial)
        except (ValueError, TypeError, KeyError) as error:
            raise ClientFault("invalid_trace", f"{path}, line {number}: {error}", "correct the line or leave it out") from None
        if job is not None:
            yield job


def _sia(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob:
    """Workloads of the Pollux and Sia artifacts: an application's run, submitted with so many replicas and a batch size."""
    if profiles is None:
        raise ClientFault("missing_profiles", "this trace names applications: their profiles are needed",
                          "--data FOLDER or KERNELM_SIA_DATA: the folder that holds profiles/")  # fmt: skip
    work = profiles.work(row["application"])
    machines = [work.application.machine(type) for type in work.application.types]
    most = min(MOST, work.application.batches[1] // min(m.least for m in machines))
    rigid = profiles.work(row["application"], int(row["batch_size"]))
    return TraceJob(row["name"], float(row["time"]), work, int(row["num_replicas"]), most, rigid=rigid)


def _philly(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob | None:
    """Microsoft's Philly (Jeon et al., ATC 2019), as the artifact of Sia condenses it; `cluster` is a virtual cluster."""
    return _fixed(f"job-{number}", _seconds(row["timestamp"]), float(row["duration"]), int(row["num_gpus"]), row["cluster"], serial)


def _helios(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob | None:
    """SenseTime's Helios (Hu et al., SC 2021; `vc`) and Acme (Hu et al., NSDI 2024; `type`): only what ran."""
    tenant = row.get("vc") or row.get("type") or row["user"]
    return _fixed(row["job_id"], _seconds(row["submit_time"]), float(row["duration"] or 0), int(float(row["gpu_num"] or 0)), tenant,
                  serial)  # fmt: skip


def _pai(number: int, row: Row, profiles: Profiles | None, serial: float) -> TraceJob | None:
    """Alibaba's PAI (Weng et al., NSDI 2022), pai_task_table: instances of a share of a device each, which are rounded up to whole
    devices; the trace has the start and not the submission."""
    if not (row["start_time"] and row["end_time"] and row["plan_gpu"]):
        return None
    start, instances = float(row["start_time"]), int(float(row["inst_num"] or 1))
    devices = instances * max(1, round(float(row["plan_gpu"]) / WHOLE_DEVICE))
    id, seconds = f"{row['job_name']}/{row['task_name']}", float(row["end_time"]) - start
    return _fixed(id, start, seconds, devices, row.get("user", ""), serial)


def _fixed(id: str, submitted: float, seconds: float, members: int, tenant: str, serial: float) -> TraceJob | None:
    if members < 1 or seconds <= 0:
        return None
    return TraceJob(id, submitted, FixedWork(seconds, members, serial=serial), members, tenant=tenant or "default")


def _seconds(text: str) -> float:
    """A time as the traces write it: seconds, or "2020-04-01 10:00:00", with or without an offset."""
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.strip())
    return (moment - datetime(1970, 1, 1, tzinfo=moment.tzinfo)).total_seconds()


FORMATS: tuple[tuple[set[str], Reader], ...] = (
    ({"name", "time", "application", "num_replicas", "batch_size"}, _sia),
    ({"timestamp", "duration", "num_gpus", "cluster"}, _philly),
    ({"job_id", "user", "gpu_num", "state", "submit_time", "duration"}, _helios),
    ({"job_name", "task_name", "inst_num", "start_time", "end_time", "plan_gpu", "gpu_type"}, _pai),
)
