"""Runtimes by name. A new one (container, venv) is a module here with a `Runtime`, and a line in RUNTIMES."""

from kernelm_node.runtimes.inproc import InprocRuntime
from kernelm_node.runtimes.process import ProcessRuntime
from kernelm_node.runtimes.runtime import Runtime
from kernelm_sdk.errors import ClientFault

RUNTIMES: dict[str, type[Runtime]] = {r.name: r for r in (ProcessRuntime, InprocRuntime)}


def find_runtime(name: str) -> Runtime:
    """A runtime by its name; ClientFault "unsupported_runtime" that names what there is."""
    if name not in RUNTIMES:
        raise ClientFault("unsupported_runtime", f"this node has no runtime {name!r}", f"it has {', '.join(sorted(RUNTIMES))}")
    return RUNTIMES[name]()
