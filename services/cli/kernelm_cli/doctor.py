"""`kernelm doctor`: what this machine has, what is missing, and how to get it."""

import asyncio
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from rich.table import Table
from rich.text import Text

from kernelm_authority.broker import find_server
from kernelm_cli.home import find_process, read_up
from kernelm_cli.session import Output, print_json, stdout
from kernelm_cli.state import WELL, system_state
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import find_manifests

Verdict = Literal["ok", "warn", "missing"]  # "missing" is essential: exit code 1
SERVICES = ("kernelm", "kernelm-sdk", "kernelm-contracts", "kernelm-artifacts", "kernelm-node", "kernelm-jobs", "kernelm-gateway")
LIBRARIES = {"torch": "training and serving of encoders", "transformers": "encoders", "scikit-learn": "linear models",
             "onnxruntime": "int8 models"}  # fmt: skip
MEMORY_MB, DISK_MB = (2048, 6144), (1024, 10240)  # (essential, comfortable), for the run of deploy/runs/news.toml
COMMANDS: dict[str, str] = {}  # of third parties that were left out, with the reason
STYLES = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("✗", "red")}


class Check(NamedTuple):
    """One line of the report."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""  # shown only if there is something to mend


def doctor(*, output: Output = Output()) -> int:
    """Check this machine and the system on it; says what is missing and how to get it. Exit code 1 if it is essential."""
    home = output.folder
    checks = [c for group in (_python, _nats_server, _cores, _memory, lambda: _disk(home), _packages, _plugins,
                              lambda: _home(home), _ports, lambda: _system(home)) for c in group()]  # fmt: skip
    if output.json:
        print_json([c._asdict() for c in checks])
    else:
        table = Table()
        for name in ("", "check", "found", "remedy"):
            table.add_column(name, overflow="fold")
        for check in checks:
            table.add_row(Text(*STYLES[check.verdict]), check.what, Text(check.found),
                          Text("" if check.verdict == "ok" else check.remedy, "green"))  # fmt: skip
        stdout().print(table)
    return 1 if any(c.verdict == "missing" for c in checks) else 0


def _level(value: float, bounds: tuple[float, float]) -> Verdict:
    essential, comfortable = bounds
    return "ok" if value >= comfortable else "warn" if value >= essential else "missing"


def _python() -> Iterator[Check]:
    fine = sys.version_info >= (3, 11)
    yield Check("Python", "ok" if fine else "missing", f"{platform.python_version()} ({sys.executable})", "install 3.11 or newer")


def _nats_server() -> Iterator[Check]:
    try:
        path = find_server()
    except Fault as fault:
        yield Check("nats-server", "missing", fault.message, fault.remedy)
        return
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20)
    yield Check("nats-server", "ok", f"{answer.stdout.strip()} ({path})")


def _cores() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0))
    yield Check("cores", _level(usable, (1, 2)), str(usable), "2 or more train at a bearable speed")
    flags = _processor_flags()
    found = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("VNNI", "avx512_vnni"), ("bf16", "avx512_bf16"),
                                     ("AMX", "amx_tile")) if flag in flags]  # fmt: skip
    yield Check("vector units", "ok" if "bf16" in found else "warn", ", ".join(found) or platform.machine(),
                "a processor with avx512_bf16 trains faster; without it training uses fp32")  # fmt: skip


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split())


def _memory() -> Iterator[Check]:
    free = psutil.virtual_memory().available / 2**20
    yield Check("memory", _level(free, MEMORY_MB), f"{free:,.0f} MB available", f"{MEMORY_MB[1]:,} MB to fine-tune an encoder")


def _disk(home: Path) -> Iterator[Check]:
    place = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**20
    yield Check("disk", _level(free, DISK_MB), f"{free:,.0f} MB free at {place}", "free some, or choose another --home")


def _packages() -> Iterator[Check]:
    absent = [name for name in SERVICES if _version(name) is None]
    found = f"{', '.join(absent)} missing" if absent else f"all {len(SERVICES)} installed"
    yield Check("system packages", "missing" if absent else "ok", found, f"pip install {' '.join(absent)}")
    for name, purpose in LIBRARIES.items():
        number = _version(name)
        yield Check(name, "ok" if number else "warn", number or "not installed", f"pip install {name}: {purpose}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plugins() -> Iterator[Check]:
    manifests, broken = find_manifests()
    yield Check("plugins", "ok" if manifests else "warn", ", ".join(manifests) or "none", "pip install kernelm-data ...")
    for name, why in broken.items():
        yield Check(f"plugin {name}", "warn", why, f"correct or uninstall it: pip uninstall kernelm-{name}")
    for name, why in COMMANDS.items():
        yield Check(f"command {name}", "warn", f"left out, {why}", "uninstall its distribution, or have the command renamed")


def _home(home: Path) -> Iterator[Check]:
    if not home.exists():
        yield Check("home", "ok", f"{home} (not there yet; `kernelm up` makes it)")
        return
    if not os.access(home, os.W_OK | os.X_OK):
        yield Check("home", "missing", f"{home} can't be written by user {os.getuid()}", f"sudo chown -R {os.getuid()} {home}")
        return
    secrets = [p for p in (home, home / "identity", home / "admin.creds", *(home / "identity").glob("*")) if p.exists()]
    loose = [p for p in secrets if stat.S_IMODE(p.stat().st_mode) & 0o077]
    names = " ".join(map(str, loose))
    yield Check("home", "missing" if loose else "ok", f"others may use {names}" if loose else f"{home}, its secrets are private",
                f"chmod go-rwx {names}")  # fmt: skip


def _ports() -> Iterator[Check]:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except OSError:  # not Linux
        return
    count = int(text[1]) - int(text[0])
    yield Check("ports", _level(count, (16, 1000)), f"{count:,} for free choice", "widen ip_local_port_range")


def _system(home: Path) -> Iterator[Check]:
    up = read_up(home)
    if up is None or not up.alive():
        yield Check("system", "warn", f"nothing runs on {home}", "kernelm up --detach")
        return
    for name, process in up.processes.items():
        alive = find_process(process.pid, process.created) is not None
        again = f", started {process.restarts + 1} times" if process.restarts else ""
        yield Check(name, "ok" if alive else "missing", f"pid {process.pid}{again}" if alive else "is not running",
                    f"kernelm logs {name}")  # fmt: skip
    yield from _health(home)


def _health(home: Path) -> Iterator[Check]:
    try:
        state = asyncio.run(system_state(home))
    except Fault as fault:
        yield Check("kernel/1", "missing", fault.message, fault.remedy or f"read {home / 'logs' / 'kernel.log'}")
        return
    ready = sum(i.state == "ready" for i in state.instances)
    yield Check("instances", "ok" if ready else "missing", f"{ready} ready", "kernelm ps --all")
    for name, value in state.health.items():
        yield Check(name, "ok" if value in WELL else "missing", value, f"read the logs in {home / 'logs'}")


