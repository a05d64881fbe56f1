"""A corpus on a Ray cluster of two nodes, each in a network namespace of its own: Ray listens on all interfaces."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kernelm.testing.parts import absent
from kernelm_contracts.data import PrepareRequest
from kernelm_data.corpus.effects import engine_of
from kernelm_data.settings import DataSettings
from kernelm_sdk.errors import ClientFault

MISSING = [what for what, there in (
    ("Ray (deploy/bench.txt)", importlib.util.find_spec("ray")), ("iproute2", shutil.which("ip")), ("root", os.geteuid() == 0),
) if not there]  # fmt: skip
HEAD, OTHER, NET = "kmdata0", "kmdata1", "10.231.7"
PORT = 6391


def inside(namespace: str, *command: str, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", "netns", "exec", namespace, *command], text=True, capture_output=True, check=False, **options)
    assert not done.returncode, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Addresses of two nodes; what runs on them dies at the page of death."""
    if MISSING:
        absent(f"needs {', '.join(MISSING)}")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, importlib.util\n"
        "if importlib.util.find_spec('resiliparse'):\n"
        "    import resiliparse.parse.html as html\n"
        "    class Tree:\n"
        "        @staticmethod\n"
        "        def parse(text):\n"
        "            if 'page of death' in text: os.abort()\n"
        "            return real.parse(text)\n"
        "    real, html.HTMLTree = html.HTMLTree, Tree\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")  # the defaults are too short for a machine with other work
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "240")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ip = ("ip", "netns")
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=100000000",
           "--disable-usage-stats"]  # fmt: skip
    try:
        for namespace in (HEAD, OTHER):
            subprocess.run([*ip, "add", namespace], check=True)
            inside(namespace, "ip", "link", "set", "lo", "up")
        link = ["ip", "link", "add", HEAD, "netns", HEAD, "type", "veth", "peer", "name", OTHER, "netns", OTHER]
        subprocess.run(link, check=True)
        for number, namespace in enumerate((HEAD, OTHER), 1):
            inside(namespace, "ip", "address", "add", f"{NET}.{number}/24", "dev", namespace)
            inside(namespace, "ip", "link", "set", namespace, "up")
        first = ("--head", "--include-dashboard=false", f"--port={PORT}", f"--temp-dir=/tmp/kmdata{os.getpid()}")
        inside(HEAD, *ray, *first, f"--node-ip-address={NET}.1")
        inside(OTHER, *ray, f"--address={NET}.1:{PORT}", f"--node-ip-address={NET}.2")
        yield f"{NET}.1", f"{NET}.2"
    finally:
        for namespace in (HEAD, OTHER):
            found = subprocess.run([*ip, "pids", namespace], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            subprocess.run([*ip, "delete", namespace], check=False, capture_output=True)
        shutil.rmtree(f"/tmp/kmdata{os.getpid()}", ignore_errors=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_nodes_make_the_same_bytes_as_one_machine(nodes, tmp_path, source):
    (source / "page.html").write_text("<html><body><p>A page of death, which kills whatever parses it.</p></body></html>")
    driver = Path(__file__).with_name("cluster_driver.py")
    inside(HEAD, sys.executable, str(driver), str(tmp_path), str(source), f"{nodes[0]}:{PORT}", timeout=300)
    told = json.loads((tmp_path / "told.json").read_text())
    assert sorted(told["ran"]) == sorted(nodes)
    assert told["reasons"] == {"kills its parser": 1}
    assert told["absent"] == "not_shared"
    assert tree(tmp_path / "ray" / "out") == tree(tmp_path / "local" / "out")


def test_an_engine_that_is_not_set_up_is_refused(tmp_path):
    with pytest.raises(ClientFault) as caught:
        engine_of(PrepareRequest("sha256:x", "auto", engine="ray"), None, DataSettings(), [])
    assert caught.value.code == "no_ray"
