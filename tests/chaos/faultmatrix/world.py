"""Faults of the world around: a neighbour that crashes in a loop, a clock that is wrong, a network that is cut."""

import asyncio
import signal
import subprocess
import time

from chaosplugin import journal

from faultmatrix.rig import Rig, send
from faultmatrix.stage import LEASE_S, Stage, fault, find_faketime
from kernelm.testing.harness import until
from kernelm_cli.home import read_up
from kernelm_sdk.system import Kernel, PoolName, PoolSpec

HOUR_S = 3600
SKEWED = ("jobs", "artifacts", "node", "gateway", "kernel")


@fault("crash loop", 3)
async def crash_loop(stage: Stage) -> str:
    """A third party's plugin crashes at every start, until it is quarantined; meanwhile others answer as before."""
    rig, load = stage.rig, stage.load
    await asyncio.sleep(2.0)
    before = [c.took_s for c in load.calls if not c.failure and not c.hold_s]
    first = len(load.calls)
    pool = "crashplugin"
    await rig.bus.call(Kernel.start_pool, PoolSpec(pool, pool, contracts=False), patience_s=10.0)

    async def quarantined() -> str:
        return (await rig.state()).health.get(f"pool {pool}", "")

    why = await until(quarantined, 60.0, "a quarantine")
    stage.over()
    during = [c.took_s for c in load.calls[first:] if not c.failure and not c.hold_s]
    await rig.bus.call(Kernel.stop_pool, PoolName(pool), patience_s=10.0)
    ratio = _p99(during) / _p99(before)
    stage.figures["p99_ratio"] = round(ratio, 2)
    stage.check("SIGSEGV" in why, f"the quarantine does not say why: {why}")
    return f"quarantined; neighbours' p99 {_p99(during) * 1e3:.0f} ms, {ratio:.2f} times"


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


# ---- clocks --------------------------------------------------------------------------------------------------------

SITE = """
# Python runs this at its start. One member, the one that the file `skewed` names, is started once more under libfaketime;
# the node, when a file `namespace` says so, goes into that network namespace, with all that it starts.
import ctypes, os, sys
from pathlib import Path
here, argv = Path(__file__).parent, sys.orig_argv
if (here / "skewed").exists() and "LD_PRELOAD" not in os.environ:
    member, seconds, library = (here / "skewed").read_text().split()
    if member in argv[:4]:
        os.environ.update(LD_PRELOAD=library, FAKETIME=seconds, FAKETIME_DONT_FAKE_MONOTONIC="1", FAKETIME_NO_CACHE="1")
        os.execv(sys.executable, [sys.executable, *argv[1:]])
if (here / "namespace").exists() and "kernelm_node" in argv[:4]:
    with open((here / "namespace").read_text()) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
"""


class Prepared(Rig):
    """A system whose members run the code above at their start."""

    def __init__(self) -> None:
        super().__init__()
        (self.work / "site" / "sitecustomize.py").write_text(SITE)


@fault("clock skew", 5, fresh=True, rig=Prepared, needs=("faketime",))
async def clock_skew(stage: Stage) -> str:
    """One member comes back with a clock that is an hour off, works so for a while, and gets its clock set right."""
    rig = stage.rig
    victim = stage.rng.choice(SKEWED)
    seconds = stage.rng.choice((-HOUR_S, HOUR_S))
    skewed = rig.work / "site" / "skewed"
    module = "kernelm" if victim == "kernel" else f"kernelm_{victim}"
    skewed.write_text(f"{module} {seconds:+d} {find_faketime()}")
    old = rig.pid(victim)
    send(old, signal.SIGKILL)
    await until(lambda: rig.pid(victim) != old, 30.0, f"another {victim}")
    await asyncio.sleep(6.0)  # a lease, and more
    with open(f"/proc/{rig.pid(victim)}/environ", "rb") as file:  # noqa: PTH123
        stage.check(b"FAKETIME=" in file.read(), f"{victim} does not run under libfaketime")
    note = f"{victim} {seconds:+d} s"
    load = stage.load
    worked = [c for c in load.calls if not c.failure]
    await rig.whole()  # with the wrong clock
    stage.check(len(worked) > 50, "too few calls")
    skewed.unlink()
    send(rig.pid(victim), signal.SIGKILL)
    stage.over()
    return note


# ---- the network ---------------------------------------------------------------------------------------------------


class TwoHosts(Prepared):
    """The node with all its instances in a network namespace, behind a pair of veth; the way to the broker goes through it."""

    def __init__(self) -> None:
        super().__init__()
        mark = f"{int(time.time() * 1000) % 10**6:06d}"
        self.namespace, self.link = f"kmc{mark}", f"kmc{mark}h"
        net = f"10.{200 + int(mark) % 50}.{int(mark) // 50 % 250}"
        self.outside = f"{net}.1"
        for line in (
            f"ip netns add {self.namespace}",
            f"ip link add {self.link} type veth peer name {self.link[:-1]}n netns {self.namespace}",
            f"ip addr add {net}.1/30 dev {self.link}", f"ip link set {self.link} up",
            f"sysctl -qw net.ipv4.conf.{self.link}.route_localnet=1",
            f"ip -n {self.namespace} addr add {net}.2/30 dev {self.link[:-1]}n", f"ip -n {self.namespace} link set lo up",
            f"ip -n {self.namespace} link set {self.link[:-1]}n up",
            f"ip netns exec {self.namespace} sysctl -qw net.ipv4.conf.all.route_localnet=1",
            # the broker listens on the host's loopback only: what the node sends to its own goes there
            f"ip netns exec {self.namespace} iptables -t nat -A OUTPUT -d 127.0.0.1 -p tcp -j DNAT --to {net}.1",
            f"ip netns exec {self.namespace} iptables -t nat -A POSTROUTING -o {self.link[:-1]}n -j MASQUERADE",
            f"iptables -t nat -I PREROUTING -i {self.link} -p tcp -j DNAT --to 127.0.0.1",
        ):  # fmt: skip
            subprocess.run(line.split(), check=True, capture_output=True)
        (self.work / "site" / "namespace").write_text(f"/run/netns/{self.namespace}")

    async def down(self, keep: bool = False) -> None:
        self.up_again()
        try:
            await super().down(keep)
        finally:
            for line in (f"iptables -t nat -D PREROUTING -i {self.link} -p tcp -j DNAT --to 127.0.0.1",
                         f"ip link del {self.link}", f"ip netns del {self.namespace}"):  # fmt: skip
                subprocess.run(line.split(), check=True, capture_output=True)

    def cut(self) -> None:
        subprocess.run(["ip", "link", "set", self.link, "down"], check=True)

    def up_again(self) -> None:
        subprocess.run(["ip", "link", "set", self.link, "up"], check=True)


@fault("network cut", 4, fresh=True, rig=TwoHosts, needs=("root", "network namespaces"))
async def network_cut(stage: Stage) -> str:
    """The node is cut off for longer than a lease, with all its instances, which go on working; then it is back. No job may
    be finished, or its checkpoint be moved, by one who does not own it any more."""
    rig = stage.rig
    assert isinstance(rig, TwoHosts)
    up = read_up(rig.home)
    assert up is not None
    await asyncio.sleep(1.0)
    rig.cut()
    await asyncio.sleep(LEASE_S + 2.5 + stage.rng.random())
    rig.up_again()
    stage.over()
    await rig.whole()
    lines = [line for line in journal.read(rig.folder) if "job" in line]
    newest: dict[str, int] = {}
    zombie = 0
    for line in lines:
        newest[line["job"]] = max(newest.get(line["job"], 0), line["epoch"])
        zombie += line["what"] == "step" and line["epoch"] < newest[line["job"]]
        if line["what"] == "saved" and line["epoch"] < newest[line["job"]]:
            stage.complain(f"{line['job']}/{line['epoch']} saved a checkpoint after another had begun")
    stage.figures["steps_of_zombies"] = zombie
    return f"{zombie} steps of old owners after the new one's start"
