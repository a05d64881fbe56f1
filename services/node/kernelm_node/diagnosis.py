"""From how an instance ended, and the last lines of its log, to advice. Pure but for looking at the paths that a log names."""

import os
import pwd
import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

from kernelm_node.runtimes.runtime import UNKNOWN_CODE, Exit

REMEDY = "remedy: "  # before that of a fault, as `str` writes it
TAIL_BYTES = 64 * 1024
# where the module's name is not the distribution's
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "PyYAML", "cv2": "opencv-python", "grpc": "grpcio",
                 "google.protobuf": "protobuf", "nats": "nats-py", "bs4": "beautifulsoup4", "dateutil": "python-dateutil",
                 "kernelm_contracts": "kernelm-contracts", "kernelm_sdk": "kernelm-sdk"}  # fmt: skip


def last_lines(log: Path, offset: int = 0, count: int = 40) -> list[str]:
    """The last `count` lines of `log` behind byte `offset`; none where there is no log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset if offset <= size else 0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def diagnose(exit: Exit, lines: list[str]) -> str:
    """One line on how it ended and what to do about it, then those of the last lines of the log that are not in it, indented."""
    advice = _advice(lines) if exit.code != 0 else ""
    if not advice and exit.code == -signal.SIGKILL and exit.note.startswith("out of memory"):
        advice = MEMORY
    head = "; ".join(part for part in (how(exit), advice) if part)
    return "\n".join([head, *(f"  | {line}" for line in lines[-8:] if line.strip().removeprefix(REMEDY) not in head)])


def how(exit: Exit) -> str:
    """How it ended, in words."""
    if exit.code < 0:
        try:
            name = signal.Signals(-exit.code).name
        except ValueError:
            name = "no signal with a name"
        text = f"killed by signal {-exit.code} ({name})"
        note = exit.note or SIGNALS.get(name, "")
    elif exit.code == UNKNOWN_CODE:
        text, note = "ended with a code that nobody could see", exit.note
    else:
        text, note = f"ended with code {exit.code}", exit.note
    return f"{text}: {note}" if note else text


def _advice(lines: list[str]) -> str:
    """What the log itself says of the cause: the last line that a rule knows, else the last line of an exception."""
    for k in range(len(lines) - 1, -1, -1):
        if lines[k].strip().startswith(REMEDY) and k > 0:  # a kernelm fault brings its own
            return f"{lines[k - 1].strip()} -> {lines[k].strip().removeprefix(REMEDY)}"
        for pattern, advise in RULES:
            if found := pattern.search(lines[k]):
                return advise(found)
    exceptions = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Fault|Interrupt)\b", line)]
    return exceptions[-1] if exceptions else ""


def _missing_module(found: re.Match[str]) -> str:
    module = found[1]
    top = module.partition(".")[0]
    name = DISTRIBUTIONS.get(module) or DISTRIBUTIONS.get(top, top.replace("_", "-"))
    return f"Python module {module!r} is missing: pip install {name}"


def _missing_package(found: re.Match[str]) -> str:
    name = found[1]
    if name.startswith(("/", ".")):
        return f"Node.js module {name} is missing: correct `command`, or put the file among the plugin's"
    return f"npm package {name!r} is missing: `npm install` in the plugin's folder, and load it again"


def _denied(found: re.Match[str]) -> str:
    path = Path(found[1])
    return f"no permission for {path} ({_rights(path)}; the node runs as {_user(os.geteuid())}): change its owner or mode"


def _rights(path: Path) -> str:
    """Mode and owner of the first part of `path` that can be looked at."""
    for part in (path, *path.parents):
        try:
            status = part.stat()
        except OSError:
            continue
        return f"{part} is {stat.filemode(status.st_mode)} {_user(status.st_uid)}"
    return "it does not exist"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # containers run as numbers without a name
        return f"uid {uid}"


MEMORY = "out of memory: give it more memory_mb, or run less beside it (smaller batches, fewer instances)"
SIGNALS = {"SIGSEGV": "a fault in native code", "SIGABRT": "an assertion in native code",
           "SIGBUS": "a file that it had mapped is gone, or /dev/shm is full",
           "SIGILL": "a binary that was built for another processor"}  # fmt: skip
RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = tuple((re.compile(p), f) for p, f in (
    (r"ModuleNotFoundError: No module named '([\w.]+)'", _missing_module),
    (r"Cannot find (?:module|package) '([^']+)'", _missing_package),
    (r"(?:BlockingIOError|RuntimeError|OSError): .*(?:Resource temporarily unavailable|can't start new thread)",
     lambda _: "too many processes or threads: raise limits.pids in its manifest, or let it start fewer"),
    (r"kernelm-join: .*cgroup\.procs", lambda _: "its control groups are not to be written: see that the node may write to "
                                                 "/sys/fs/cgroup"),
    (r"(.*) \(invalid_entry\)$", lambda m: f"{m[1]}: correct `entry` in kernelm-plugin.toml, it is 'module:Class'"),
    (r"ImportError: .*(circular import)", lambda m: f"{m[1]}: two of the plugin's modules import each other"),
    (r"CUDA out of memory|torch\.\w*OutOfMemoryError", lambda _: "out of GPU memory: a smaller batch, or a model that fits"),
    (r"MemoryError|[Cc]annot allocate memory|can't allocate memory|std::bad_alloc", lambda _: MEMORY),
    (r"[Aa]ddress already in use(?:.*?[:,] ?(\d{2,5})\b)?",
     lambda m: f"port {m[1] or ''} is taken".replace("  ", " ") + ": end what listens there (ss -ltnp), or choose another, or 0"),
    (r"PermissionError: \[Errno 13\] [^:]*: '([^']+)'", _denied),
    (r"No space left on device(?:: '([^']+)')?",
     lambda m: f"the disk is full{f' at {m[1]}' if m[1] else ''}: free some space (df -h)"),
    (r"Too many open files", lambda _: "too many open files: raise the limit (ulimit -n)"),
    (r"FileNotFoundError: \[Errno 2\] [^:]*: '([^']+)'", lambda m: f"file {m[1]} is missing"),
    (r"(lib\S+\.so\S*): cannot open shared object file", lambda m: f"library {m[1]} is missing: install the package that has it"),
    (r"ImportError: (cannot import name .*)", lambda m: f"{m[1]}: the installed versions don't fit each other (pip check)"),
))  # fmt: skip
