"""`pip install kernelm[testing]` brings all that the conformance kit imports; the rest it only uses where it is there."""

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
KIT = (ROOT / "kernel/kernelm/testing", ROOT / "plugins/contracts/kernelm_contracts/conformance")
LOOKED_FOR = {"kernelm-node", "pyarrow"}  # with find_spec, before they are imported


def imported(folder: Path) -> Iterator[str]:
    """Top-level modules."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def test_the_extra_names_all_that_the_kit_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["testing"]]
    declared = {Requirement(line).name.lower() for line in lines} | {project["name"]}
    owners = importlib.metadata.packages_distributions()
    needed = {module: {name.lower().replace("_", "-") for name in owners.get(module, [module])}  # of a namespace there are several
              for folder in KIT for module in imported(folder) if module not in sys.stdlib_module_names}  # fmt: skip
    assert {"jsonschema", "pytest", "rich", "msgspec"} <= set(needed)
    assert {module: names for module, names in needed.items() if not names & (declared | LOOKED_FOR)} == {}
