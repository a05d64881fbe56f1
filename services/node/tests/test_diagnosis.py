"""From real logs to advice."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernelm_node.diagnosis import diagnose, how, last_lines
from kernelm_node.runtimes.runtime import Exit


def crash(program: str) -> list[str]:
    """The last lines of what a real interpreter writes when `program` fails."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.splitlines()


@pytest.mark.parametrize(("program", "advice"), [
    ("import surely_not_there", "pip install surely-not-there"),
    ("import sys; sys.modules['sklearn'] = None\nimport sklearn.svm", "pip install scikit-learn"),
    ("open('/nowhere/x')", "file /nowhere/x is missing"),
    ("b'x' * (1 << 62)", "memory_mb"),
    ("import socket; a = socket.create_server(('127.0.0.1', 0)); socket.create_server(a.getsockname())", "is taken"),
    ("raise OSError(28, 'No space left on device', '/data')", "disk is full at /data"),
    ("raise OSError(24, 'Too many open files')", "ulimit -n"),
    ("raise PermissionError(13, 'Permission denied', '/etc/nowhere')", "/etc is drwx"),
    ("from kernelm_sdk.errors import ClientFault; import sys; print(ClientFault('bad', 'x is wrong', 'mend x'), file=sys.stderr)\n"
     "sys.exit(1)", "x is wrong (bad) -> mend x"),
    ("import os, resource; os.setuid(65534); resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)); os.fork()", "limits.pids"),
    ("import threading; raise RuntimeError(\"can't start new thread\")", "limits.pids"),
    ("from kernelm_sdk.errors import PluginFault; import sys\n"
     "print(PluginFault('invalid_entry', \"p: entry 'm:C' is no subclass\"), file=sys.stderr); sys.exit(1)", "correct `entry`"),
    ("raise ValueError('an odd one')", "ValueError: an odd one"),
])  # fmt: skip
def test_a_crash_becomes_advice(program: str, advice: str) -> None:
    lines = crash(program)
    assert lines
    first, *rest = diagnose(Exit(1), lines).splitlines()
    assert first.startswith("ended with code 1")
    assert advice in first
    assert rest == [f"  | {line}" for line in lines[-8:] if line.strip().removeprefix("remedy: ") not in first]
    assert all(f"{first}\n".count(line) == 1 for line in lines if line in first), "and nothing is said twice"


def test_what_a_fault_says_is_said_once() -> None:
    lines = ["loading", "config.json: it is missing (invalid_model)", "  remedy: import the whole folder"]
    said = "ended with code 1; config.json: it is missing (invalid_model) -> import the whole folder\n  | loading"
    assert diagnose(Exit(1), lines) == said


def test_a_module_whose_import_is_blocked_is_named_once() -> None:
    assert diagnose(Exit(1), ["ModuleNotFoundError: No module named 'a.b'"]).count("pip install a\n") == 1


@pytest.mark.parametrize(("exit", "text"), [
    (Exit(0), "ended with code 0"),
    (Exit(-9), "killed by signal 9 (SIGKILL)"),
    (Exit(-9, "out of memory: the kernel says so"), "killed by signal 9 (SIGKILL): out of memory: the kernel says so"),
    (Exit(-11), "killed by signal 11 (SIGSEGV): a fault in native code"),
    (Exit(-99), "killed by signal 99 (no signal with a name)"),
    (Exit(255, "no node was watching"), "ended with a code that nobody could see: no node was watching"),
])  # fmt: skip
def test_how_it_ended(exit: Exit, text: str) -> None:
    assert how(exit) == text


def test_success_gets_no_advice_and_memory_gets_it() -> None:
    assert diagnose(Exit(0), ["MemoryError"]) == "ended with code 0\n  | MemoryError"
    assert "memory_mb" in diagnose(Exit(-9, "out of memory: x"), [])


def test_only_the_lines_since_the_start_count(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n" * 10)
    offset = log.stat().st_size
    assert last_lines(log, offset) == []
    with log.open("a") as file:
        file.write("".join(f"line {k}\n\n" for k in range(100_000)))
    assert last_lines(log, offset, 2) == ["line 99998", "line 99999"]
    log.write_text("rotated\n")
    assert last_lines(log, offset) == ["rotated"]
    assert last_lines(tmp_path / "none") == []
