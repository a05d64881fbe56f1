"""The AsyncAPI document in AsyncAPI's own tools: the parser finds nothing wrong with it, and the viewer shows all of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.parts import absent
from kernelm_cli import reference

NPM = reference.ROOT / "build/npm"
PACKAGES = "npm install --prefix build/npm @asyncapi/parser @asyncapi/react-component"
PARSE = """
const { Parser } = require("@asyncapi/parser");
const text = require("fs").readFileSync(process.argv[1], "utf8");
new Parser().parse(text).then(({ document, diagnostics }) => console.log(JSON.stringify({
  operations: document ? document.allOperations().all().map(o => o.id()) : [],
  problems: diagnostics.filter(d => d.severity < 2).map(d => `${d.path.join(".")}: ${d.message}`) })));
"""
PAGE = """<!doctype html><meta charset="utf-8"><div id="page"></div><script src="{viewer}"></script>
<script>
AsyncApiStandalone.render({{ schema: {document}, config: {{ show: {{ errors: true }} }} }}, document.getElementById("page"));
</script>"""


def require(what: str, there: bool, remedy: str) -> None:
    """A user may not have it; CI does."""
    if not there:
        absent(f"{what} is not here: {remedy}")


def parsed(document: dict[str, Any], folder: Path) -> Any:
    file = folder / "asyncapi.json"
    file.write_text(json.dumps(document))
    told = subprocess.run(["node", "-e", PARSE, str(file)], cwd=NPM, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(told.stdout)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(json.loads((reference.ROOT / reference.SCHEMAS / "asyncapi.json").read_text()))


def test_the_official_parser_takes_it(document: dict[str, Any], tmp_path: Path) -> None:
    require("AsyncAPI's parser", shutil.which("node") is not None and (NPM / "node_modules/@asyncapi/parser").is_dir(), PACKAGES)
    found = parsed(document, tmp_path)
    assert found["problems"] == []
    assert set(found["operations"]) == set(document["operations"])
    document = json.loads(json.dumps(document))
    document["operations"]["svc.jobs.v1.get"]["channel"] = {"$ref": "#/channels/none"}
    assert parsed(document, tmp_path)["problems"], "it would have taken anything"


@pytest.mark.needs_browser
@pytest.mark.slow
def test_the_viewer_shows_every_operation(document: dict[str, Any], tmp_path: Path) -> None:
    viewer = NPM / "node_modules/@asyncapi/react-component/browser/standalone/index.js"
    require("AsyncAPI's viewer", viewer.is_file(), PACKAGES)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    require("Chromium", chromium is not None, "apt-get install chromium")
    page = tmp_path / "page.html"
    page.write_text(PAGE.format(viewer=viewer.as_uri(), document=json.dumps(document).replace("</", "<\\/")))
    shown = subprocess.run(
        [str(chromium), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=120000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=280).stdout  # fmt: skip
    text = re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL)
    assert not [name for name in document["operations"] if name not in text], "not shown"
    assert not re.search(r"There are errors|Error occurred", text)
