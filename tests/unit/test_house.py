"""The tree stays a house: sizes, who may import whom, and what the kernel must not know."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("policies",)  # several small plugins in one distribution
SUBSYSTEMS = ("scheduler", "data", "trainer", "optimizer", "vllm", "encoder", "retriever")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in (ROOT / folder).rglob("*.py") if ".venv" not in p.parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_kernel_is_read_in_one_sitting() -> None:
    lines = {p.name: len(p.read_text().splitlines()) for p in sources("kernel/kernelm") if "testing" not in p.parts}
    assert sum(lines.values()) < 1500, lines


def test_no_kernel_file_names_a_subsystem() -> None:
    for path in sources("kernel/kernelm", "kernel/sdk"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        words = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        names = {n.id for n in nodes if isinstance(n, ast.Name)}
        for subsystem in SUBSYSTEMS:
            if subsystem == "data":  # an English word: the contract's id is what counts
                assert not any(w.startswith(("data/", "svc.data")) for w in words if " " not in w), path
            else:
                assert subsystem not in words | names, f"{path} names {subsystem}"


def test_only_the_bus_imports_nats() -> None:
    users = {p for p in sources("kernel", "plugins", "services") if any(m.split(".")[0] == "nats" for m in imports(p))}
    assert users == {ROOT / "kernel/sdk/kernelm_sdk/bus.py"}


def packages() -> list[str]:
    return [p.parent.name for p in ROOT.glob("plugins/*/pyproject.toml") if p.parent.name != "contracts"]


@pytest.mark.parametrize("name", packages())
def test_plugins_import_contracts_and_the_sdk_and_never_each_other(name: str) -> None:
    for path in sources(f"plugins/{name}/kernelm_{name}"):
        ours = {m.split(".")[0] for m in imports(path) if m.startswith("kernelm")}
        assert ours <= {"kernelm_sdk", "kernelm_contracts", f"kernelm_{name}"}, path


@pytest.mark.parametrize("name", packages())
def test_every_plugin_has_the_one_shape(name: str) -> None:
    folder = ROOT / "plugins" / name
    if name in FAMILIES:
        return  # see the test of families
    for part in ("pyproject.toml", "README.md", f"kernelm_{name}/kernelm-plugin.toml", f"kernelm_{name}/__init__.py",
                 f"kernelm_{name}/plugin.py", "tests"):  # fmt: skip
        assert (folder / part).exists(), f"{name} has no {part}"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"kernelm-{name}"
    assert project["entry-points"]["kernelm.plugins"] == {name: f"kernelm_{name}"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_plugins_holds_a_package_for_each(name: str) -> None:
    folder = ROOT / "plugins" / name
    assert (folder / "README.md").exists()
    assert (folder / "tests").exists()
    points = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]["kernelm.plugins"]
    assert points == {p.parent.name: f"kernelm_{name}.{p.parent.name}" for p in folder.glob("kernelm_*/*/kernelm-plugin.toml")}
    for point in points:
        for part in ("kernelm-plugin.toml", "__init__.py", "plugin.py"):
            assert (folder / f"kernelm_{name}" / point / part).exists(), f"{point} has no {part}"


def test_nothing_of_one_machine_is_committed() -> None:
    for path in [*sources("kernel", "plugins", "services", "deploy", "tests"), *ROOT.glob("*.md"), *ROOT.glob("deploy/*")]:
        if path.is_file() and path != Path(__file__):
            text = path.read_text(errors="replace")
            for place in ("/work/" + "main", "pypi" + ".org", "/opt/" + "wheels"):
                assert place not in text, f"{path} holds {place}"


def test_files_and_functions_keep_their_size() -> None:
    for path in sources("kernel", "plugins", "services"):
        if "tests" in path.parts:
            continue
        text = path.read_text()
        assert len(text.splitlines()) <= 400, f"{path} has {len(text.splitlines())} lines: what is it made of?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name} is {node.end_lineno - node.lineno} lines long"
