"""A port for a server to come is none that a connection may be given before."""

import socket
from pathlib import Path

import pytest

from kernelm_authority.broker import Broker
from kernelm_authority.identity import init_home
from kernelm_cli.home import check_port
from kernelm_sdk import ports
from kernelm_sdk.ports import RANGE, free_port


def test_connections_get_none_of_these_ports(tmp_path: Path) -> None:
    low, high = map(int, RANGE.read_text().split())
    broker = Broker(tmp_path, init_home(tmp_path))
    chosen = [broker.port, check_port(0, "--http-port"), *(free_port() for _ in range(100))]
    assert not [port for port in chosen if low <= port <= high]


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "LOWEST", 20_000)
    monkeypatch.setattr(ports, "HIGHEST", 20_009)
    held = []
    try:
        for port in range(20_000, 20_009):
            held.append(socket.create_server(("127.0.0.1", port)))
        assert {free_port() for _ in range(20)} == {20_009}
        held.append(socket.create_server(("127.0.0.1", 20_009)))
        low, high = map(int, RANGE.read_text().split())
        assert low <= free_port() <= high  # none is left: one of those that the system gives
    finally:
        for server in held:
            server.close()


def test_where_connections_may_get_any_port_it_is_one_of_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "RANGE", everything)
    with socket.create_server(("127.0.0.1", free_port())):
        pass
