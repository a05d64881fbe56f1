"""Local extension points: pure functions of installed distributions, called in the process of whoever has the hook (pluggy). Calls
and events between members of the system go over the bus; this is for what is too small for a plugin of its own.

    # whoever has a hook                               # a distribution that uses it
    class Filters:                                     [project.entry-points."kernelm.hooks.data"]
        @hookspec                                      short-words = "my_filters"
        def keep(self, text: str) -> bool: ...
                                                       # my_filters.py
    hooks = Hooks("kernelm.hooks.data", Filters)       from kernelm_sdk.hooks import hookimpl
    for name, keep in hooks.call("keep", text=text):   @hookimpl
        ...                                            def keep(text): return len(text) > 3

One that can't be imported, does not fit the specification, or raises is quarantined: named with its reason, in the log and in
`Hooks.quarantined`, and left out from then on. The others go on. (pluggy alone stops at the first broken entry point, ends a whole
call when one implementation raises, and hands back the coroutine of an `async def` that nobody awaits.)
"""

import inspect
import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

PROJECT = "kernelm"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
log = logging.getLogger("kernelm.hooks")


class Hooks:
    """The implementations that installed distributions have of the hooks in `specs`, found by their entry points in `group`; in the
    order of their names, so that all who have the same installed do the same."""

    def __init__(self, group: str, specs: Any, only: str = "") -> None:
        """`only`: the name of one entry point, the others are left alone."""
        self.group = group
        self.quarantined: dict[str, str] = {}  # name -> why
        self._specs = specs
        self._alone: dict[str, pluggy.PluginManager] = {}  # a manager each, so that none can end the call of another
        for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
            if not only or point.name == only:
                self._take(point)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are in use."""
        return tuple(self._alone)

    def __bool__(self) -> bool:
        return bool(self._alone)

    def call(self, hook: str, /, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(name, what it answered) of each that implements `hook`; one that raises is quarantined."""
        for name, manager in list(self._alone.items()):
            caller: pluggy.HookCaller = getattr(manager.hook, hook)
            if not caller.get_hookimpls():
                continue
            try:
                answer = caller(**arguments)
            except Exception as error:
                self.quarantine(name, f"{hook} raised {type(error).__name__}: {error}")
                continue
            yield from ((name, each) for each in ([answer] if caller.spec and caller.spec.opts["firstresult"] else answer))

    def quarantine(self, name: str, why: str) -> None:
        """Leave it out from now on; also for an answer that makes no sense, which only the caller can tell."""
        self._alone.pop(name, None)
        self.quarantined[name] = why
        log.warning("hook %s of %s is left out: %s", name, self.group, why)

    def _take(self, point: EntryPoint) -> None:
        if point.name in self._alone:
            self.quarantine(point.name, f"{point.value}: another distribution has a hook of this name")
            return
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(self._specs)
        try:
            plugin = point.load()
            manager.register(plugin, point.name)
            manager.check_pending()  # a hook that nobody has is a mistake of spelling, or of another version
            callers = manager.get_hookcallers(plugin) or []
            if not callers:
                raise LookupError(f"{point.value} implements no hook of {self.group}")
            for implementation in [i for caller in callers for i in caller.get_hookimpls()]:
                if inspect.iscoroutinefunction(implementation.function) or inspect.isasyncgenfunction(implementation.function):
                    raise TypeError(f"{implementation.function.__qualname__} is async; a hook is a plain function")
        except (Exception, SystemExit) as error:  # whatever is wrong with a stranger's module must not stop the others
            self.quarantine(point.name, f"{type(error).__name__}: {error}")
            return
        self._alone[point.name] = manager
