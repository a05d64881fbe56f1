"""The profiles: what watches the system from within, and what gives it GPUs."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.parts import absent

Stack = Any  # conftest's
WATCHING = {"collector", "prometheus", "grafana"}
pytestmark = pytest.mark.timeout(900)


def test_profiles_say_what_they_start(stack: Stack) -> None:
    services = json.loads(stack.compose("--profile", "*", "config", "--format", "json"))["services"]
    assert {name for name, made in services.items() if made.get("profiles") == ["observability"]} == WATCHING
    for name in WATCHING:
        made = services[name]
        assert ":" in made["image"].partition("/")[2], f"{name}: a version"
        assert made["read_only"]
        assert made["cap_drop"] == ["ALL"]
        assert all(Path(volume["source"]).exists() for volume in made["volumes"]), name
    assert services["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu", "utility"]


def test_an_engine_without_gpus_says_so(stack: Stack) -> None:
    if "nvidia" in stack.engine.info()["Runtimes"]:
        assert "NVIDIA" in stack.compose("run", "--rm", "--no-TTY", "gpu")
        return
    with contextlib.suppress(AssertionError):  # with an engine as old as 20.10 Compose 2.40 only prints it
        stack.compose("--profile", "gpu", "up", "--no-deps", "gpu")
    assert "could not select device driver" in stack.containers(all=True)["gpu"].attrs["State"]["Error"]
    stack.compose("--profile", "gpu", "rm", "--force", "gpu")


COLLECTOR = """
import http.server, ssl
class Spans(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        size = len(self.rfile.read(int(self.headers["content-length"])))
        print(self.path, size, "bytes of", dict(self.connection.getpeercert()["subject"][0])["commonName"], flush=True)
        self.send_response(200)
        self.end_headers()
served = http.server.ThreadingHTTPServer(("", 4318), Spans)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile="/etc/kernelm/tls/ca.pem")
context.verify_mode, context.minimum_version = ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_3
context.load_cert_chain("/etc/kernelm/tls/tls.pem")
served.socket = context.wrap_socket(served.socket, server_side=True)
served.serve_forever()
"""


def test_spans_go_to_the_collector_over_mutual_tls(stack: Stack, tmp_path: Path) -> None:
    """With another one in its place, since its image may be out of reach: it asks for a certificate as collector.yaml says."""
    (tmp_path / "collector.py").write_text(COLLECTOR)
    (tmp_path / "Dockerfile").write_text('FROM kernelm-bare:latest\nCOPY collector.py /\nENTRYPOINT ["python", "/collector.py"]\n')
    image, _ = stack.engine.images.build(path=str(tmp_path), network_mode="none", rm=True)
    stack.environment |= {"KERNELM_IMAGE_COLLECTOR": image.id, "KERNELM_TRACES": "https://collector:4318"}
    try:
        stack.compose("--profile", "observability", "up", "--detach", "--no-deps", "--wait", "collector", "gateway")
        stack.until(lambda: stack.classify("tech"), 180, "answers")
        stack.until(lambda: b"/v1/traces" in stack.containers()["collector"].logs(), 180, "spans of the gateway")
        assert b"bytes of gateway" in stack.containers()["collector"].logs()
    finally:
        stack.environment["KERNELM_TRACES"] = ""
        stack.compose("--profile", "observability", "rm", "--stop", "--force", "collector")
        stack.compose("up", "--detach", "--no-deps", "--wait", "gateway")


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> str:
    """The id of an image with this machine's Prometheus, in place of the official one, which may be out of reach."""
    (tmp_path / "Dockerfile").write_text("FROM kernelm-bare:latest\nCOPY prometheus promtool /opt/kernelm/bin/\n")
    for program in ("prometheus", "promtool"):
        found = shutil.which(program)
        if found is None:
            absent("needs prometheus and promtool: apt-get install prometheus")
        shutil.copy(found, tmp_path)
    image, _ = stack.engine.images.build(path=str(tmp_path), network_mode="none", rm=True)
    return str(image.id)


def test_prometheus_reads_the_gateway_over_tls(stack: Stack, prometheus: str, table: list[str]) -> None:
    secret = stack.asked("key", "create", "prometheus", "--methods", "metrics")["secret"]
    (stack.folder / "secrets" / "observability" / "metrics-key").write_text(secret)
    stack.environment["KERNELM_IMAGE_PROMETHEUS"] = prometheus
    stack.compose("--profile", "observability", "up", "--detach", "--no-deps", "--wait", "prometheus")

    def asked(query: str) -> str:
        done = stack.containers()["prometheus"].exec_run(["promtool", "query", "instant", "http://localhost:9090", query])
        assert done.exit_code == 0, done.output
        return str(done.output.decode())

    stack.until(lambda: "=> 1 @" in asked('up{job="kernelm"}'), 180, "a reading of the gateway")
    stack.until(lambda: "ready" in asked('kernelm_instances{state="ready"} > 0'), 180, "what it says of instances")
    table.append(f"Prometheus in the network: {asked('count(kernelm_instances)').strip()}")
    stack.compose("--profile", "observability", "rm", "--stop", "--force", "prometheus")
