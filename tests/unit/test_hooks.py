"""Hooks of installed distributions: a broken one is named and left out, whatever is wrong with it, and the others go on."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from kernelm.testing.hooks import install as install_hook
from kernelm_sdk.hooks import Hooks, hookspec

GROUP = "kernelm.hooks.test"
Install = Callable[..., None]


class Specs:
    @hookspec
    def weigh(self, text: str, label: str) -> int: ...

    @hookspec(firstresult=True)
    def listed(self, text: str) -> list[str]: ...


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution: a name, the code of its module, and what its entry point names if not that."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    yield partial(install_hook, tmp_path, GROUP)
    for module in set(sys.modules) - before:
        if module.startswith("hooked_"):
            del sys.modules[module]


GOOD = "@hookimpl\ndef weigh(text): return len(text)\n"
BROKEN = {
    "absent": ("", "no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def (:", "", "SyntaxError"),
    "raises": ("1 / 0", "", "ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(3)", "", "SystemExit: 3"),
    "spelling": ("@hookimpl\ndef wiegh(text): return 1", "", "unknown hook 'wiegh'"),
    "arguments": ("@hookimpl\ndef weigh(words): return 1", "", "Argument(s) {'words'} are declared"),
    "async": ("@hookimpl\nasync def weigh(text): return 1", "", "weigh is async; a hook is a plain function"),
    "nothing": ("x = 1", "", "hooked_nothing implements no hook of kernelm.hooks.test"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_named_and_the_others_are_there(install: Install, name: str, caplog: pytest.LogCaptureFixture) -> None:
    code, value, why = BROKEN[name]
    install("good", GOOD)
    install(name, code, value)
    hooks = Hooks(GROUP, Specs)
    assert hooks.names == ("good",)
    assert why in hooks.quarantined[name]
    assert f"hook {name} of kernelm.hooks.test is left out" in caplog.text
    assert list(hooks.call("weigh", text="four", label="")) == [("good", 4)]


def test_one_that_raises_is_left_out_from_then_on(install: Install) -> None:
    install("a-first", GOOD)
    install("b-breaks", "@hookimpl\ndef weigh(text):\n    if text == 'bad': raise ValueError('not this')\n    return 0\n")
    install("c-last", "@hookimpl\ndef weigh(text, label): return -1\n")
    hooks = Hooks(GROUP, Specs)
    assert list(hooks.call("weigh", text="ok", label="")) == [("a-first", 2), ("b-breaks", 0), ("c-last", -1)]
    assert list(hooks.call("weigh", text="bad", label="")) == [("a-first", 3), ("c-last", -1)]
    assert hooks.quarantined == {"b-breaks": "weigh raised ValueError: not this"}
    assert [name for name, _ in hooks.call("weigh", text="ok", label="")] == ["a-first", "c-last"]


def test_a_hook_with_one_result_may_answer_a_list_or_nothing(install: Install) -> None:
    install("lists", "@hookimpl\ndef listed(text): return list(text)\n")
    install("nothing", "@hookimpl\ndef listed(text): return None\n")
    install("weighs", GOOD)
    hooks = Hooks(GROUP, Specs)
    assert list(hooks.call("listed", text="ab")) == [("lists", ["a", "b"]), ("nothing", None)]


def test_one_name_is_one_hook(install: Install, tmp_path: Path) -> None:
    install("same", GOOD)
    (tmp_path / "hooked_same-1.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nsame = hooked_same\n")
    other = tmp_path / "hooked_other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: hooked_other\nVersion: 1\n")
    (other / "entry_points.txt").write_text(f"[{GROUP}]\nsame = hooked_zzz\n")
    hooks = Hooks(GROUP, Specs)
    assert hooks.names == ()
    assert "another distribution has a hook of this name" in hooks.quarantined["same"]
    assert not hooks


def test_nothing_else_is_imported_for_one(install: Install) -> None:
    install("wanted", GOOD)
    install("other", "raise RuntimeError('imported')")
    hooks = Hooks(GROUP, Specs, only="wanted")
    assert hooks.names == ("wanted",)
    assert hooks.quarantined == {}
