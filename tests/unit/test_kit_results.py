"""What `kernelm plugin check` shows of a plugin that can't be checked, and of one that does not start."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from kernelm.testing.conformance import Report, Result, as_json, read, show
from kernelm.testing.conformance.results import NOT_STARTED
from kernelm.testing.conformance.stand import own_frames
from kernelm_sdk.errors import ClientFault

MANIFEST = 'name = "p"\nversion = "1"\nsummary = ""\ncontracts = ["data/1"]\nentry = "p:P"\nruntimes = ["process", "proces"]\n'


def test_what_is_no_plugin_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="absent does not exist"):
        read(tmp_path / "absent")
    (tmp_path / "p.py").touch()
    with pytest.raises(ClientFault, match=r"p\.py is no folder"):
        read(tmp_path / "p.py")
    (tmp_path / "kernelm-plugin.toml").write_text(MANIFEST)
    with pytest.raises(ClientFault, match=r"kernelm-plugin\.toml: `runtimes` has 'proces'") as caught:
        read(tmp_path)
    assert "process, venv" in caught.value.remedy


def test_what_was_not_tried_is_one_line_for_people_and_all_of_it_for_programs() -> None:
    skipped = [Result(f"calls.{n}", "a rule", "skipped", NOT_STARTED) for n in range(30)]
    report = Report("p", "1", "process", ("data/1",), (Result("handshake.starts", "starts", "failed", "no"), *skipped), 1.0)
    console = Console(file=io.StringIO(), width=140)
    show(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count(NOT_STARTED) == 1
    assert "30 more" in text
    assert "0 passed, 1 failed, 30 skipped" in text
    assert as_json([report]).count(NOT_STARTED) == 30


def test_of_a_traceback_the_frames_above_the_plugins_own_are_left_out(tmp_path: Path) -> None:
    runner = ['  File "/x/kernelm_sdk/runner.py", line 8, in run', "    f()", "    ^^^"]
    own = [f'  File "{tmp_path}/p.py", line 3, in fit', "    import nosuchmodule", "ModuleNotFoundError: nosuchmodule"]
    lines = ["p starts", "Traceback (most recent call last):", *runner, *own]
    assert own_frames(lines, tmp_path) == ["p starts", "Traceback (most recent call last):", *own]
    assert own_frames(lines, tmp_path / "elsewhere") == lines
