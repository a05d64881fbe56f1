"""Measured training jobs: throughput by placement, and statistical efficiency by batch size, from the public profiles of
Pollux (Qiao et al., OSDI 2021) and Sia (Jayaram Subramanya et al., SOSP 2023).

`<application>/placements-<type>.csv`: seconds of a step and of the synchronization within it, by the batch size of one device
and the placement, a digit for each node ("24": two devices on one node, four on another); `scalability-<type>.csv`: the
same by numbers of nodes and devices; `validation-<batch size>.csv`: progress, iterations and gradient noise after each epoch.
Goodput is throughput times efficiency (Pollux, section 3): with m = batch size / smallest batch size and the noise's variance v
and squared norm s, an iteration of batch size b makes (v + s) / (v / m + s) of progress. A batch that does not fit the devices is
accumulated over several passes, of which only the last one synchronizes.
"""

import csv
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

from kernelm_sdk.errors import ClientFault
from kernelm_simulator.work import Pace, Placement

BATCHES = 50  # sizes that are tried between the smallest and the largest, in geometric steps, as Pollux does
MOST = 64  # members of one job
# Of the artifact's simulator: seconds of a checkpoint and restart as measured, and how much slower real runs were
RESTART_S = {"bert": 120.0, "cifar10": 50.0, "deepspeech2": 25.0, "imagenet": 250.0, "ncf": 15.0, "yolov3": 80.0}
SLOWDOWN = {"cifar10": 1.8, "ncf": 1.5}
USUAL_SLOWDOWN = 1.2
MEMORY_LIMIT = {("deepspeech2", "rtx"): 57}  # largest batch of one device where the profile holds some that ran out of memory
Rows = np.ndarray  # columns: nodes, devices, batch size of one device, step seconds, synchronization seconds


def _columns(path: Path, *names: str) -> list[list[str]]:
    remedy = "see the simulator's README.md, 'Profiles'"
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            found = [[_number(row[name], name, rows.line_num) for name in names] for row in rows]
    except OSError as error:
        raise ClientFault("missing_profile", f"{path}: {error.strerror}", remedy) from None
    except KeyError as error:
        raise ClientFault("invalid_profile", f"{path} has no column {error}", remedy) from None
    except (ValueError, csv.Error) as error:
        raise ClientFault("invalid_profile", f"{path}, {error}", remedy) from None
    if not found:
        raise ClientFault("invalid_profile", f"{path} has no line beyond its columns", remedy)
    return found


def _number(text: str | None, name: str, line: int) -> str:
    """`text`, which must be that of a number, as a placement too is."""
    try:
        finite = math.isfinite(float(text or ""))
    except ValueError:
        finite = False
    if not finite or text is None:
        raise ValueError(f"line {line}: {name}: {text!r} is no number")
    return text


class Machine:
    """An application's steps on devices of one type."""

    def __init__(self, folder: Path, type: str) -> None:
        measured = _columns(folder / f"placements-{type}.csv", "placement", "local_bsz", "step_time", "sync_time")
        scaled = _columns(folder / f"scalability-{type}.csv", "num_nodes", "num_replicas", "local_bsz", "step_time", "sync_time")
        self.placed: dict[Placement, Rows] = {}
        grouped: dict[Placement, list[list[float]]] = {}
        for digits, *numbers in measured:
            placement = tuple(sorted(int(d) for d in digits))
            grouped.setdefault(placement, []).append([len(placement), sum(placement), *map(float, numbers)])
        for placement, rows in grouped.items():
            table = np.array(rows)
            self.placed[placement] = table[np.argsort(table[:, 2], kind="stable")]
        self.scaled: Rows = np.array([[float(x) for x in row] for row in scaled])
        self.least = int(min(t[:, 2].min() for t in self.placed.values()))
        self.limit = MEMORY_LIMIT.get((folder.name, type), math.inf)
        self._surface: tuple[LinearNDInterpolator, NearestNDInterpolator] | None = None

    def largest(self, placement: Placement) -> int:
        """Largest batch of one device that was measured there, or on something larger."""
        if placement in self.placed:
            return int(min(self.placed[placement][:, 2].max(), self.limit))
        enough = (self.scaled[:, 0] >= len(placement)) & (self.scaled[:, 1] >= sum(placement))
        return int(min(self.scaled[enough, 2].max(), self.limit)) if enough.any() else 0

    def steps(self, placement: Placement, batches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(step seconds, synchronization seconds) for batch sizes of one device; between measurements linear."""
        if placement in self.placed:
            table = self.placed[placement]
            return np.interp(batches, table[:, 2], table[:, 3]), np.interp(batches, table[:, 2], table[:, 4])
        if self._surface is None:
            rows = np.vstack([*self.placed.values(), self.scaled])
            self._surface = LinearNDInterpolator(rows[:, :3], rows[:, 3:]), NearestNDInterpolator(rows[:, :3], rows[:, 3:])
        at = np.column_stack([np.full(len(batches), len(placement)), np.full(len(batches), sum(placement)), batches])
        found = self._surface[0](at)
        unknown = np.isnan(found).any(axis=1)
        found[unknown] = self._surface[1](at[unknown]) if unknown.any() else found[unknown]
        return found[:, 0], found[:, 1]


class Application:
    """One of the profiled training programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        tables = {int(p.stem.split("-")[1]): np.array([[float(x) for x in r] for r in _columns(
            p, "progress", "grad_sqr", "grad_var")]) for p in folder.glob("validation-*.csv")}  # fmt: skip
        if not tables:
            raise ClientFault("missing_profile", f"{folder} holds no validation-*.csv", "name the artifact's folder of profiles")
        self.sizes = np.array(sorted(tables))
        epochs = min(map(len, tables.values()))
        stacked = np.stack([tables[size][:epochs] for size in self.sizes])  # size x epoch x (progress, sqr, var)
        self.bounds = (0.0, *stacked[:, :, 0].min(axis=0).tolist())
        self.sqr, self.var = stacked[:, :, 1], stacked[:, :, 2]
        self.types = tuple(sorted(p.stem.removeprefix("placements-") for p in folder.glob("placements-*.csv")))
        self.machine = cache(lambda type: Machine(folder, type))

    @property
    def batches(self) -> tuple[int, int]:
        """Smallest and largest batch size over all devices."""
        return int(self.sizes[0]), int(self.sizes[-1])

    def gains(self, batch: np.ndarray) -> np.ndarray:
        """Progress of one iteration: batch size x epoch."""
        sqr = np.stack([np.interp(batch, self.sizes, column) for column in self.sqr.T], axis=1)
        var = np.stack([np.interp(batch, self.sizes, column) for column in self.var.T], axis=1)
        scale = (batch / self.sizes[0])[:, None]
        return (var + sqr) / (var / scale + sqr)

    def speeds(self, type: str, placement: Placement, batch: int = 0) -> np.ndarray | None:
        """Progress per second in each epoch, with the best batch size or with `batch`; None if it can't run so."""
        machine, devices = self.machine(type), sum(placement)
        smallest, largest = self.batches
        most = machine.largest(placement)
        if most < machine.least or machine.least * devices > largest:
            return None
        first = max(smallest, machine.least * devices)
        wanted = np.array([float(batch)]) if batch else np.unique(np.geomspace(first, largest, BATCHES))
        each = wanted / devices
        passes = np.maximum(np.ceil(each / most - 1e-8), 1)
        if devices == 1:  # noise can't be told from a single pass
            passes = np.where(wanted > smallest + 1e-8, np.maximum(passes, 2), passes)
        one = np.ceil(each / passes - 1e-8)
        one = np.minimum(one, np.floor(largest / (devices * passes)))
        good = (one >= machine.least) & (one <= most)
        if batch and not good.any():  # smaller than one device needs: the least that runs
            passes, one, good = np.ones(1), np.array([float(machine.least)]), np.array([True])
        if not good.any():
            return None
        passes, one = passes[good], one[good]
        step, sync = machine.steps(placement, one)
        seconds = step + (passes - 1) * (step - sync)
        goodput = self.gains(devices * passes * one) / seconds[:, None]
        best: np.ndarray = goodput.max(axis=0) / SLOWDOWN.get(self.name, USUAL_SLOWDOWN)
        return best


@dataclass
class ProfiledWork:
    """A run of an application to its end; with `batch` its batch size stays, without it follows the noise."""

    application: Application
    batch: int = 0
    restart_s: float = 0.0
    _paces: dict[tuple[str, Placement], Pace | None] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> float:
        return self.application.bounds[-1]

    def types(self) -> tuple[str, ...]:
        return self.application.types

    def fits(self, type: str, placement: Placement) -> bool:
        return type in self.application.types and self._pace(type, placement) is not None

    def pace(self, type: str, placement: Placement) -> Pace:
        pace = self._pace(type, placement)
        if pace is None:
            raise ClientFault("unknown_placement", f"{self.application.name} has no profile for {placement} on {type}")
        return pace

    def stage(self, progress: float) -> int:
        return int(np.searchsorted(self.application.bounds, progress, "right"))

    def _pace(self, type: str, placement: Placement) -> Pace | None:
        key = (type, placement)
        if key not in self._paces:
            speeds = self.application.speeds(type, placement, self.batch)
            times = None if speeds is None else np.cumsum(np.diff(self.application.bounds) / speeds)
            self._paces[key] = None if times is None else Pace(self.application.bounds, (0.0, *times.tolist()))
        return self._paces[key]


class Profiles:
    """A folder of profiles; works are shared by the jobs that are alike, so that each placement is computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._works: dict[tuple[str, int], ProfiledWork] = {}
        self._applications: dict[str, Application] = {}

    def work(self, application: str, batch: int = 0) -> ProfiledWork:
        """What a job of `application` has to do; ClientFault if there is no such profile."""
        if (application, batch) not in self._works:
            if application not in self._applications:
                if application not in RESTART_S:
                    raise ClientFault("unknown_application", f"no profile of {application!r}", f"one of {', '.join(RESTART_S)}")
                self._applications[application] = Application(self.folder / application)
            known = self._applications[application]
            self._works[application, batch] = ProfiledWork(known, batch, RESTART_S[application])
        return self._works[application, batch]
