"""Scheduler plugins by name (`fifo`) or by class (`my_package.plugin:MyScheduler`), in this process, as a function."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Plugin, find_manifests

CONTRACT = Scheduler.id()


class Loaded(Struct):
    name: str
    decide: Callable[[ClusterState], Decisions]
    resizes: bool  # False: it leaves jobs at the members they were submitted with
    steady: Callable[[ClusterState], float] | None = None  # see `engine.Steady`; None: it may decide anew at any moment


def load(name: str, settings: dict[str, Any] | None = None) -> Loaded:
    """The scheduler `name` with `settings`; ClientFault if there is none, or it is no scheduler."""
    entry = name
    if ":" not in name:
        good, broken = find_manifests()
        if name in broken:
            raise ClientFault("broken_plugin", broken[name], "correct the plugin's manifest")
        if name not in good or CONTRACT not in good[name].contracts:
            have = ", ".join(sorted(n for n, m in good.items() if CONTRACT in m.contracts))
            message = f"no installed plugin {name!r} implements {CONTRACT}"
            raise ClientFault("unknown_scheduler", message, f"one of {have}, or MODULE:CLASS")
        entry = good[name].entry
    module, _, attribute = entry.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: one that is no Python has no entry
        raise ClientFault("unknown_scheduler", f"{entry}: {error}", "MODULE:CLASS that can be imported") from None
    if not (isinstance(factory, type) and issubclass(factory, Plugin) and issubclass(factory, Scheduler)):
        raise ClientFault("unknown_scheduler", f"{entry} is no Plugin that implements {CONTRACT}", "see plugins/README.md")
    try:
        chosen = msgspec.convert(settings or {}, factory.Settings)
    except msgspec.ValidationError as error:
        raise ClientFault("invalid_settings", f"settings of {name}: {error}", "see the plugin's README.md") from None
    plugin: Any = factory(SimpleNamespace(scratch=Path.cwd()), chosen)  # no bus: a scheduler has no effects
    return Loaded(name, lambda state: _at_once(plugin.decide(state, None), name), getattr(factory, "resizes", True),
                  getattr(plugin, "steady", None))  # fmt: skip


def _at_once(coroutine: Any, name: str) -> Decisions:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: Decisions = done.value
        return result
    coroutine.close()
    raise ClientFault("not_pure", f"scheduler {name} waits for something while it decides", "decide() must be a pure function")
