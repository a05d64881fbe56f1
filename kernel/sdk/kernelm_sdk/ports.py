"""A TCP port for a server that starts in a moment."""

import random
import socket
from pathlib import Path

LOWEST, HIGHEST = 16_384, 65_535
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A port on `host` that can be bound, and that the system gives to nobody who did not ask for it.

    Binding port 0 gives one of those that connections get too: on a machine where many begin, one has it before the server has
    started, and again while it is started anew. OSError if `host` is not of this machine.
    """
    low, high = _given_to_connections()
    ports = [port for port in range(LOWEST, HIGHEST + 1) if not low <= port <= high]
    for port in random.sample(ports, min(TRIES, len(ports))):
        if _can_be_bound(host, port):
            return port
    with socket.socket(_family(host)) as probe:  # connections may get any, or all of these are taken
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _given_to_connections() -> tuple[int, int]:
    try:
        low, high = RANGE.read_text().split()
    except OSError:  # no Linux: what IANA reserves for it
        return 49_152, HIGHEST
    return int(low), int(high)


def _can_be_bound(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
