"""What the READMEs show works, and what they link to is there."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
import pytest

from kernelm_cli.app import app
from kernelm_cli.run_file import read
from kernelm_contracts.scheduler import ClusterState, NodeState, PendingJob
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import Manifest, Resources

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in ROOT.rglob("README.md") if not {".venv", "build", "node_modules", ".git"} & set(p.parts))
REFERENCE = sorted((ROOT / "plugins/contracts/reference").glob("*.v*.md"))


async def test_the_plugin_of_the_readme_decides() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "plugins/README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": "readme"}
    exec(code[1], names)
    node = NodeState("local", Resources(2.0), Resources(2.0), {"trainer": 1})
    jobs = tuple(PendingJob(f"j{k}", f"j{k}", Resources(1.5), ("trainer",)) for k in range(2))
    answer = await names["FirstFit"](None, None).decide(ClusterState(7, 0.0, (node,), jobs), Call("jobs"))
    assert (answer.version, [d.action for d in answer.decisions]) == (7, ["place", "wait"])


def test_the_run_file_of_the_plugins_readme_is_one(tmp_path: Path) -> None:
    text = re.search(r"```toml\n(.*?)```", (ROOT / "plugins/README.md").read_text(), re.DOTALL)
    assert text is not None
    (tmp_path / "run.toml").write_text(dedent(text[1]))
    assert [stage.uses for stage in read(tmp_path / "run.toml").spec.stage] == ["data/1.prepare", "trainer/1.train", "deploy"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return [(language, dedent(text)) for language, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.M | re.S)]


GUIDES = [ROOT / name for name in ("README.md", "plugins/README.md", "kernel/README.md", "kernel/PROTOCOL.md")]


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_is_valid(page: Path) -> None:
    """Python compiles, TOML and JSON can be read, and every `kernelm ...` is a command with options that there are."""
    for language, text in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")
        elif language == "toml":
            tomllib.loads(text)
        elif language == "json":
            json.loads(text)
        elif language == "":
            for line in (line.removeprefix("$ ") for line in text.splitlines()):
                if re.match(r"kernelm [a-z]", line):
                    command = re.split(r"\s{2,}", line)[0]  # what follows says what it does
                    app.parse_args(shlex.split(command, comments=True)[1:], exit_on_error=False, print_error=False)


def test_the_protocol_names_only_what_there_is() -> None:
    text = (ROOT / "kernel/PROTOCOL.md").read_text()
    calls = set(re.findall(r"\bsvc\.([a-z]+)\.v(\d+)\.([a-z-]+)", text))
    assert len(calls) > 4
    for name, major, method in calls:
        assert method in CONTRACTS[f"{name}/{major}"].methods, f"svc.{name}.v{major}.{method}"
    section = text.partition("## The manifest")[2].partition("## ")[0]
    rows = [cell for row in re.findall(r"^\| (`.*?) \|", section, re.M) for cell in re.findall(r"`\[?(\w+)(?:\.\w+)?\]?`", row)]
    assert set(rows) == {f.name for f in msgspec.structs.fields(Manifest)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "kernel/PROTOCOL.md", *REFERENCE], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"
    assert "@@" not in page.read_text()
