"""Whom the broker refuses, and what they take it for when the end of the connection comes in pieces."""

import asyncio
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernelm_cli.certificates import CertificateAuthority
from kernelm_sdk import links
from kernelm_sdk.links import Credentials, Link, Refusals
from kernelm_sdk.tls import client_context, server_context

URL = "tls://127.0.0.1:4222"


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLError:
    """What OpenSSL says where the broker's last words come in after we have closed: of a real connection, in memory."""
    CertificateAuthority(tmp_path / "ca").issue("us", ["localhost"], tmp_path / "us")
    for name, file in (("CA", "ca.pem"), ("CERT", "tls.pem"), ("KEY", "tls.pem")):
        monkeypatch.setenv(f"KERNELM_TLS_{name}", str(tmp_path / "us" / file))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    we = client_context().wrap_bio(down, up, server_hostname="localhost")
    broker = server_context().wrap_bio(up, down, server_side=True)
    for side in (we, broker, we, broker):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    with pytest.raises(ssl.SSLWantReadError):
        we.unwrap()
    broker.write(b"-ERR 'Authorization Violation'\r\n")
    with pytest.raises(ssl.SSLError) as caught:
        we.unwrap()
    assert caught.value.reason == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"
    return caught.value


@pytest.mark.parametrize("told_first", [True, False])
def test_words_that_come_after_the_end_are_no_failure_of_tls(late: ssl.SSLError, told_first: bool) -> None:
    refusals = Refusals()
    for error in [RuntimeError("nats: 'Authorization Violation'"), late][:: 1 if told_first else -1]:
        refusals.note(error)
    assert not refusals.hopeless.is_set()
    fault = refusals.fault(late, URL, "node-two")
    assert fault.code == "unauthorized"
    assert "refused 'node-two': nats: 'Authorization Violation'" in fault.message


def test_a_handshake_that_fails_is_one(late: ssl.SSLError) -> None:
    refusals = Refusals()
    wrong = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    wrong.reason = "WRONG_VERSION_NUMBER"
    refusals.note(late)
    refusals.note(wrong)
    assert refusals.hopeless.is_set()
    assert refusals.fault(late, URL, "node-two").code == "no_tls"


async def test_an_end_that_is_never_told_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    async def flush(*_: Any) -> None: ...

    monkeypatch.setattr(links, "CLOSE_S", 0.05)
    client = SimpleNamespace(CLOSED=2, flush=flush, close=never, _close=never, _reconnection_task=None)
    await asyncio.wait_for(Link(client, Credentials("node-two", "", "")).close(), 20)
