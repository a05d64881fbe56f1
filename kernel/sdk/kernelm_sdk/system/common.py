"""What several of the system's contracts speak of: resources, limits, and what is known of a plugin without its code."""

import re
from typing import Any, Literal

from msgspec import Struct


class Empty(Struct, frozen=True):
    """Nothing to say: the request or reply of methods that need none."""


class Resources(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What a job or an instance asks for, or a node has."""

    cpu: float = 1.0  # cores
    memory_mb: int = 512
    gpus: int = 0


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """What an instance with its jobs must not exceed; 0 for no limit. Refused where the runtime can't enforce it."""

    cpu: float = 0.0  # cores
    memory_mb: int = 0
    pids: int = 0  # processes and threads


class Restart(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens when an instance ends: after `intensity` failures within `period_s` its pool is quarantined."""

    type: Literal["permanent", "transient", "temporary"] = "permanent"  # always; only after a failure; never
    intensity: int = 5
    period_s: float = 60.0
    backoff_s: float = 0.2  # before the first restart; doubles up to `backoff_max_s`
    backoff_max_s: float = 10.0


class ProbeCall(Struct, frozen=True, forbid_unknown_fields=True):
    """A call that a healthy new instance answers without a fault, and without an effect: it proves itself ready by it."""

    call: str  # "contract/major.method"
    request: dict[str, Any] = {}
    of_model: bool = False  # asked of each deployment that the pool serves; where it serves none, nothing is asked


class Environment(Struct, frozen=True, forbid_unknown_fields=True):
    """What a Python environment of the plugin's own has beside what its distribution requires anyway."""

    extras: tuple[str, ...] = ()  # of its distribution
    without: tuple[str, ...] = ()  # distributions that its requirements bring along and that don't work there: taken out again


class Environments(Struct, frozen=True, forbid_unknown_fields=True):
    """Of the runtime `venv`, by what the instance was given."""

    cpu: Environment = Environment()
    gpu: Environment | None = None  # with `needs.gpus`; None for the same as without


# domain.name of an event; not one that the system publishes, or whoever follows it would take a plugin's word for the system's
PLUGIN_EVENT = re.compile(r"(?!(plugin|route|swap|key|job|run|artifact)\.|model\.(deployed|scaled)$)[a-z0-9-]+\.[a-z0-9-]+")


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """`kernelm-plugin.toml`: all that is known of a plugin without running its code."""

    name: str
    version: str
    summary: str
    contracts: tuple[str, ...]  # "name/major"
    entry: str  # "module:Class" of a plugin in Python; "" where there is a command
    runtimes: tuple[str, ...] = ("process",)  # in order of preference
    each_node: bool = False  # one instance a node (a worker) instead of one in all
    default: bool = True  # started by `kernelm up`; False for plugins that only run when a pool asks for them
    events: tuple[str, ...] = ()  # "domain.name" that it may publish
    calls: tuple[str, ...] = ()  # "contract/major.method" it may call, "contract/major" for all of them
    max_jobs: int = 1  # jobs at once in one instance
    needs: Resources = Resources(cpu=0.0, memory_mb=256)  # of an idle instance; a job brings its own request
    limits: Limits = Limits()  # of an instance with its jobs
    isolated: bool = False  # only in a runtime that keeps it away from its neighbours' memory, files and processes
    network: bool = False  # needs more than the broker
    drain_s: float = 30.0  # for calls and jobs that are under way when it is stopped; jobs then go on elsewhere
    restart: Restart = Restart()
    probe: ProbeCall | None = None
    command: tuple[str, ...] = ()  # of a plugin in another language: program and arguments, run in the plugin's folder
    venv: Environments = Environments()

    def __post_init__(self) -> None:
        if wrong := [e for e in self.events if not PLUGIN_EVENT.fullmatch(e)]:
            raise ValueError(f"plugin {self.name!r} wants to publish {', '.join(wrong)}: an event is called domain.name, "
                             "and those of the system itself are its own")  # fmt: skip
        if bool(self.entry) == bool(self.command):
            raise ValueError(f"plugin {self.name!r} has {'both' if self.entry else 'neither'} `entry` (module:Class, for Python) "
                             f"{'and' if self.entry else 'nor'} `command` (for any other language): give exactly one")  # fmt: skip
        if self.command and (not self.command[0] or self.runtimes != ("process",)):
            raise ValueError('`command` begins with a program, and runs in the runtime "process" alone')
