"""Bad input: what is said, and that nothing is lost. Wrong keys of what lies on disk are in test_encrypted.py, a port that is taken
in test_compose.py, an engine that is not there in services/cli/tests/test_deploy.py."""

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.parts import absent
from kernelm_cli import certificates

Stack = Any  # conftest's
HOUR = timedelta(hours=1)
pytestmark = pytest.mark.timeout(900)


@contextlib.contextmanager
def certificate(stack: Stack, authority: Path, days: float = 1) -> Iterator[None]:
    """The command line shows a certificate of another making; the good one comes back at the end."""
    folder = stack.home / "tls" / "cli"
    good = {path: path.read_bytes() for path in folder.iterdir()}
    certificates.CertificateAuthority(authority).issue("cli", [], folder, days)
    (folder / "ca.pem").write_bytes(good[folder / "ca.pem"])
    for file in folder.iterdir():
        os.chown(file, *stack.owner)
    try:
        yield
    finally:
        for path, content in good.items():
            path.write_bytes(content)


@pytest.mark.parametrize("how", ["expired", "of another CA", "of a clock that is off"])
def test_a_bad_certificate_is_named_and_nothing_is_lost(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        how: str) -> None:  # fmt: skip
    authority = tmp_path / "ca" if how == "of another CA" else stack.home / "ca"
    if how == "of a clock that is off":  # who made it, or who is shown it: it begins an hour from now
        monkeypatch.setattr(certificates, "EARLIER", -HOUR)
    with certificate(stack, authority, -1 / 24 if how == "expired" else 1), \
         pytest.raises(AssertionError, match="does not accept our certificate"):  # fmt: skip
        stack.kernelm("ps")
    assert stack.asked("ps")["instances"]
    assert stack.classify("tech")


def test_clocks_may_differ_by_an_hour(stack: Stack) -> None:
    """A certificate is good from before it was made, as whoever is behind by an hour sees it."""
    for member in ("nats", "gateway", "node"):
        made = certificates.read_certificate(stack.home / "tls" / member / "tls.pem")
        written = (stack.home / "tls" / member / "tls.pem").stat().st_mtime
        assert written - made.not_valid_before_utc.timestamp() > HOUR.total_seconds()


def _status(stack: Stack, secret: str) -> int:
    with stack.client_of(secret) as client:
        return int(client.post("/v1/classify", json={"model": "news", "input": "Who scored?"}).status_code)


@pytest.mark.parametrize(("member", "off"), [("kernel", "+3600"), ("kernel", "-3600"), ("jobs", "+3600"), ("artifacts", "-3600"),
                                             ("gateway", "+3600"), ("node", "+3600")])  # fmt: skip
def test_a_member_whose_clock_is_off_by_an_hour_serves_on(stack: Stack, member: str, off: str) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None) or absent("apt-get install libfaketime")
    fake = {"LD_PRELOAD": "/faketime.so", "FAKETIME": off, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    stack.again(member, environment=fake, volumes=[f"{library}:/faketime.so:ro"])
    try:
        said = stack.containers()[member].exec_run(["python", "-c", "import time; print(time.time())"]).output
        assert abs(float(said) - time.time() - int(off)) < 60, "the clock is off"
        if member == "kernel":
            stack.compose("restart", "jobs")
            stack.until(lambda: "jobs" in stack.healthy(), 120, "a service that joins meanwhile")
        key = stack.asked("key", "create", "clock", "--models", "news")  # the kernel signs, the gateway learns of it
        stack.until(lambda: stack.classify("tech", stack.client_of(key["secret"])), 60, "answers to who came while it was off")
        stack.kernelm("artifact", "verify")
        stack.kernelm("run", "tests/compose/news.toml", timeout_s=600)  # each of its jobs is found
    finally:
        stack.again(member)
    stack.kernelm("key", "revoke", key["key"]["id"])
    stack.until(lambda: _status(stack, key["secret"]) == 401, 60, "a key of then to be refused")
    assert stack.until(lambda: stack.classify("tech"), 60, "answers with the clock put right")


def test_a_client_of_another_ca_is_told_so(stack: Stack) -> None:
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("localhost", stack.http)) as raw:
        ssl.create_default_context().wrap_socket(raw, server_hostname="localhost")


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Nothing more can be written to the volume of `folder`; there is room again at the end."""
    filler = folder / "filler"
    try:
        for size in (1 << 24, 1 << 12):
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(bytes(size)):
                    continue
        assert os.statvfs(folder).f_bavail == 0
        yield
    finally:
        filler.unlink()


def test_a_full_volume_loses_nothing(stack: Stack) -> None:
    """What was acknowledged is there, what can't be kept is refused, and with room again all goes on by itself."""
    if not os.path.ismount(stack.folder):
        pytest.skip("a volume of its own needs root")
    keys = {key["id"] for key in stack.asked("key", "list")}

    def keys_until_refused() -> None:
        for number in range(40):  # the rest of what the broker has allotted to its files is soon used up
            keys.add(stack.asked("key", "create", f"full{number}", "--models", "news")["key"]["id"])

    with full(stack.folder), pytest.raises(AssertionError, match=r"exit code [12]") as refused:
        keys_until_refused()
    stack.until(lambda: keys <= {key["id"] for key in stack.asked("key", "list")}, 180, f"all keys, after {refused.value}")
    stack.until(lambda: stack.asked("key", "create", "room", "--models", "news"), 180, "room for one more")
    assert stack.until(lambda: stack.classify("tech"), 180, "answers")
