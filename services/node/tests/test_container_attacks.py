"""Somebody inside a container who wants more than was granted: what is tried, and what the answer is."""

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from kernelm_node.runtimes.relay import CONNECTIONS
from kernelm_node.runtimes.runtime import Launch
from kernelm_node.runtimes.template import USER

pytestmark = pytest.mark.asyncio(loop_scope="module")
TRY = """
import ctypes, errno, os, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if getattr(libc, function)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
try:
    {attempt}
    print("GOT IN")
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
finally:
    subprocess.run(["rm", "-f", "/tmp/x"])
"""
ATTEMPTS = {
    "write to the system": ("open('/etc/passwd', 'a')", "Permission denied"),
    "write where everybody may": ("open('/var/tmp/x', 'w')", "Read-only file system"),
    "write to its image": ("open('/opt/kernelm/x', 'w')", "Read-only file system"),
    "change its own files": ("open('{source}/intruder.py', 'w')", "Permission denied|Read-only"),
    "add to its own files": ("open('{source}/x.py', 'w')", "Permission denied|Read-only"),
    "change an artifact": ("os.chmod('{granted}/data', 0o666)", "not permitted|Read-only"),
    "read another tenant's artifact": ("open('{foreign}/data').read()", "No such file"),
    "list the artifacts": ("'foreign' in os.listdir('{home}/artifacts') or int('hidden')", "hidden"),
    "read another instance's token": ("open('{token}').read()", "No such file"),
    "list the tokens": ("os.listdir('{home}/run/tokens')", "No such file"),
    "read another instance's scratch": ("open('{scratch}/private').read()", "No such file"),
    "read the keys of the system": ("os.listdir('{home}/identity')", "No such file"),
    "reach the engine": ("socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')", "No such file"),
    "reach the Internet": ("socket.create_connection(('1.1.1.1', 53), 5)", "Network is unreachable"),
    "reach the host by its bridge": ("socket.create_connection(('{bridge}', {port}), 5)", "Network is unreachable"),
    "reach the host by its address": ("socket.create_connection(('{address}', {port}), 5)", "Network is unreachable"),
    "reach the host's loopback": ("socket.create_connection(('127.0.0.1', {port}), 5)", "Connection refused"),
    "open a raw socket": ("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)", "not permitted"),
    "signal a host's process": ("os.kill({pid}, 0)", "No such process"),
    "trace a host's process": ("call('ptrace', 16, {pid}, 0, 0)", "No such process|not permitted"),
    "see the host's processes": ("'{pid}' in os.listdir('/proc') or int('hidden')", "hidden"),
    "become root": ("os.setuid(0)", "not permitted"),
    "make a device": ("os.mknod('{own}/disk', 0o60600, os.makedev(8, 0))", "not permitted"),
    "mount": ("call('mount', b'proc', b'/tmp', b'proc', 0, 0)", "not permitted"),
    "enter a namespace of its own": ("call('unshare', 0x10000000)", "not permitted"),
    "lift its limits": ("open('/sys/fs/cgroup/memory/memory.limit_in_bytes', 'w').write('-1')", "Read-only|Permission|No such"),
    "fill the memory by /tmp": ("f = open('/tmp/x', 'wb'); [f.write(bytes(2**20)) for _ in range(300)]", "No space left"),
    "inherit the node's environment": ("os.environ.get('A_SECRET') or int('nothing')", "nothing"),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surroundings(house: Any, inside: Launch) -> AsyncIterator[dict[str, Any]]:
    """What there is to be had around the container: a listener on all the host's addresses, and a neighbour."""
    neighbour = house.launch()
    (neighbour.scratch / "private").write_text("secret")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address that the host is known by outside
        address = probe.getsockname()[0]
    server = await asyncio.start_server(lambda _, w: w.close(), "0.0.0.0", 0)
    yield {"source": house.source, "granted": house.granted, "foreign": house.foreign, "home": house.system.home,
           "token": neighbour.environment["KERNELM_TOKEN_FILE"], "scratch": neighbour.scratch, "own": inside.scratch,
           "bridge": ipaddress.ip_network(house.engine.networks.get("bridge").attrs["IPAM"]["Config"][0]["Subnet"])[1],
           "address": address, "port": server.sockets[0].getsockname()[1], "pid": os.getpid()}  # fmt: skip
    server.close()


@pytest.mark.parametrize("attempt", ATTEMPTS)
async def test_one_who_is_inside_can_not(house: Any, inside: Launch, surroundings: dict[str, Any], attempt: str) -> None:
    program, answers = ATTEMPTS[attempt]
    told = await house.do(inside, TRY.format(attempt=program.format(**surroundings)))
    assert "GOT IN" not in told
    assert any(answer in told for answer in answers.split("|")), told


async def test_no_capability_and_no_new_privilege_is_left(house: Any, inside: Launch) -> None:
    told = await house.do(inside, "print(open('/proc/self/status').read())")
    status = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # filtered


async def test_the_broker_admits_nobody_who_only_has_the_socket(house: Any, inside: Launch) -> None:
    told = await house.do(inside, """
import socket
wire = socket.socket(socket.AF_UNIX)
wire.settimeout(20)
wire.connect("/run/kernelm/broker.sock")
wire.sendall(b'CONNECT {"verbose":false,"user":"admin","pass":"x"}\\r\\nPUB kernel 2\\r\\nhi\\r\\nPING\\r\\n')
text = b""
while data := wire.recv(4096):
    text += data
print(text)
""")  # fmt: skip
    assert "INFO" in told
    assert "Authorization Violation" in told


async def test_one_that_floods_the_broker_with_connections_shuts_out_nobody(house: Any, inside: Launch) -> None:
    told = await house.do(inside, """
import socket
wires = []
for _ in range(100):
    wire = socket.socket(socket.AF_UNIX)
    wire.settimeout(20)
    wire.connect("/run/kernelm/broker.sock")
    wires.append(wire)
print(sum(bool(wire.recv(1)) for wire in wires))
""")  # fmt: skip
    assert 0 < int(told) < CONNECTIONS
    other = house.launch()
    await house.ready(other)
    assert await house.do(other, "print('alive')") == await house.do(inside, "print('alive')") == "alive\n"


async def test_a_fork_bomb_stops_at_the_limit_and_the_plugin_lives(house: Any, inside: Launch) -> None:
    told = await house.do(inside, """
import os, signal, time
children = []
try:
    while True:
        child = os.fork()
        if child == 0:
            time.sleep(1000)
        children.append(child)
except OSError as error:
    print(len(children), error)
for child in children:
    os.kill(child, signal.SIGKILL)
""")  # fmt: skip
    assert "Resource temporarily unavailable" in told
    assert int(told.split()[0]) < 40
    assert await house.do(inside, "print('alive')") == "alive\n"


async def test_what_is_granted_works(house: Any, inside: Launch) -> None:
    told = await house.do(inside, f"""
import os
open("{inside.scratch}/result", "w").write(open("{house.granted}/data").read())
print(os.getcwd(), os.getuid())
""")  # fmt: skip
    assert told.split() == [str(inside.scratch), str(USER if os.geteuid() == 0 else os.geteuid())]
    assert (inside.scratch / "result").read_text() == "mine"  # the same path outside


async def test_with_a_network_the_host_is_in_reach(house: Any, surroundings: dict[str, Any]) -> None:
    launch = house.launch(network=True)
    await house.ready(launch)
    attempt = ATTEMPTS["reach the host by its bridge"][0].format(**surroundings)
    assert "GOT IN" in await house.do(launch, TRY.format(attempt=attempt))
