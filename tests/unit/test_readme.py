"""What the READMEs show works, and what they link to is there."""

import re
from pathlib import Path
from typing import Any

import pytest

from kernelm_contracts.scheduler import ClusterState, NodeState, PendingJob
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import Resources

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in ROOT.rglob("README.md") if not {".venv", "build", "node_modules", ".git"} & set(p.parts))


async def test_the_plugin_of_the_readme_decides() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "plugins/README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": "readme"}
    exec(code[1], names)
    node = NodeState("local", Resources(2.0), Resources(2.0), {"trainer": 1})
    jobs = tuple(PendingJob(f"j{k}", f"j{k}", Resources(1.5), ("trainer",)) for k in range(2))
    answer = await names["FirstFit"](None, None).decide(ClusterState(7, 0.0, (node,), jobs), Call("jobs"))
    assert (answer.version, [d.action for d in answer.decisions]) == (7, ["place", "wait"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"
    assert "@@" not in page.read_text()
