"""The simulated machines: nodes of so many devices of one type."""

import re

from msgspec import Struct

from kernelm_contracts.scheduler import Devices, NodeState, Share
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Resources
from kernelm_simulator.work import Placement

PLUGIN = "job"  # the one plugin that runs everything
SIA = "6x4:aws,3x8:rtx,2x8:dgx-ext"  # Sia, section 5: 64 devices; T4 (g4dn.12xlarge), RTX 2080 Ti, A100, as the profiles name them
HOST = Resources(cpu=1024.0, memory_mb=2**20)  # no job waits for cores: the public traces don't tell what they need
PART = re.compile(r"(\d+)x(\d+)(?::([\w.-]+))?")


class Node(Struct, frozen=True):
    name: str
    type: str
    devices: int


class Cluster(Struct, frozen=True):
    nodes: tuple[Node, ...]

    @property
    def types(self) -> dict[str, int]:
        """Devices of each type."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.type] = counts.get(node.type, 0) + node.devices
        return counts

    @property
    def devices(self) -> int:
        return sum(node.devices for node in self.nodes)

    def packed(self, type: str, members: int) -> Placement:
        """The placement of `members` on the fewest empty nodes of `type`; () if there are not that many devices."""
        sizes = sorted((n.devices for n in self.nodes if n.type == type), reverse=True)
        for size in reversed(sizes):  # the smallest that takes all
            if size >= members:
                return (members,)
        taken: list[int] = []
        for size in sizes:
            taken.append(min(size, members - sum(taken)))
            if sum(taken) == members:
                return tuple(sorted(taken))
        return ()


def parse(text: str) -> Cluster:
    """"6x4:t4,2x8:a100": six nodes of four devices of the type t4, and two of eight; without a type "" stands for any."""
    nodes: list[Node] = []
    for part in text.split(","):
        found = PART.fullmatch(part.strip())
        if found is None or not int(found[1]) or not int(found[2]):
            raise ClientFault("invalid_cluster", f"cluster {text!r}: {part!r} is no NODESxDEVICES[:TYPE]", f"for instance {SIA}")
        prefix = found[3] or "node"
        first = sum(n.type == (found[3] or "") for n in nodes)
        nodes += [Node(f"{prefix}-{first + i:03}", found[3] or "", int(found[2])) for i in range(int(found[1]))]
    return Cluster(tuple(nodes))


class Floor:
    """What is taken on the nodes. `take` refuses what is not there, so that no step can oversubscribe."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.types = {node.name: node.type for node in cluster.nodes}
        self.free = {node.name: node.devices for node in cluster.nodes}
        self._states: dict[tuple[str, int], NodeState] = {}
        self._nodes = {node.name: node for node in cluster.nodes}

    def take(self, job: str, allocation: tuple[Share, ...]) -> None:
        """Give `allocation` to `job`, all or nothing; ClientFault "refused" names what is not there."""
        for share in allocation:
            if share.node not in self.free:
                raise ClientFault("refused", f"job {job}: there is no node {share.node!r}")
            if share.type not in ("", self.types[share.node]):
                raise ClientFault("refused", f"job {job}: node {share.node} has {self.types[share.node]!r}, not {share.type!r}")
            if share.members < 1:
                raise ClientFault("refused", f"job {job}: {share.members} members on node {share.node}")
        if len({share.node for share in allocation}) < len(allocation):
            raise ClientFault("refused", f"job {job}: an allocation names a node twice")
        for share in allocation:
            if self.free[share.node] < share.members:
                free = self.free[share.node]
                raise ClientFault("refused", f"job {job}: {share.members} members on node {share.node}, which has {free} free")
        for share in allocation:
            self.free[share.node] -= share.members

    def give(self, allocation: tuple[Share, ...]) -> None:
        """Take `allocation` back."""
        for share in allocation:
            self.free[share.node] += share.members

    def states(self) -> tuple[NodeState, ...]:
        """The nodes as a scheduler sees them."""
        return tuple([self._state(name, free) for name, free in self.free.items()])

    def _state(self, name: str, free: int) -> NodeState:
        if (name, free) not in self._states:
            node = self._nodes[name]
            capacity, left = (Resources(HOST.cpu, HOST.memory_mb, gpus) for gpus in (node.devices, free))
            devices = (Devices(node.type, node.devices, free),) if node.type else ()
            self._states[name, free] = NodeState(name, capacity, left, {PLUGIN: 4096}, (), devices)
        return self._states[name, free]
