"""`kernelm plugin new KIND NAME`: a distribution that passes `kernelm plugin check` as it is; its text lies in templates/."""

import re
import shlex
import string
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import Parameter

import kernelm_contracts  # noqa: F401  declares the contracts
from kernelm_cli.session import stdout
from kernelm_sdk.contract import CONTRACTS, TOKEN, Contract
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST
from kernelm_sdk.system.common import PLUGIN_EVENT

TEMPLATES = files("kernelm_cli") / "templates"
ALWAYS = ("kernelm-contracts", "kernelm-sdk")


class Kind(NamedTuple):
    """What a template is for."""

    contract: str
    class_name: str
    summary: str
    needs: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


KINDS = {
    "scheduler": Kind("scheduler/1", "InOrder", "Places jobs in the order they came, within each priority"),
    "data": Kind("data/1", "FolderData", "Turns folders of text into datasets", ("msgspec>=0.22", "pyarrow>=20")),
    "trainer": Kind("trainer/1", "WordTrainer", "Trains text classifiers on words with scikit-learn",
                    ("numpy>=2", "pyarrow>=20", "safetensors>=0.6", "scikit-learn>=1.7")),
    "server": Kind("server/1", "WordServer", "Serves text classifiers on words", ("numpy>=2", "safetensors>=0.6")),
    "optimizer": Kind("optimizer/1", "MostAccurate", "Measures candidates side by side, and picks the most accurate",
                      ("msgspec>=0.22",), ("jobs/1.submit", "jobs/1.get")),
}  # fmt: skip


def new(kind: Annotated[str, Parameter(name="KIND")], name: Annotated[str, Parameter(name="NAME")], /, *,
        folder: Path | None = None) -> int:  # fmt: skip
    """Write a new plugin, ready to run.

    Parameters
    ----------
    kind
        scheduler, data, trainer, optimizer, server, or the id of any contract, e.g. jobs/1.
    name
        Of the plugin: a-z, 0-9 and '-'.
    folder
        Where it is written; by default a folder of its name.
    """
    made = create(kind, name, folder or Path(name))
    where = shlex.quote(str(folder or Path(name)))
    where = where if "/" in where or where.startswith(".") else f"./{where}"
    console = stdout()
    for path in made:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print(f"next: kernelm plugin check {where}", highlight=False, soft_wrap=True)
    return 0


def create(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the plugin into `folder`; its files. ClientFault for a bad name, an unknown kind, a folder that is not empty."""
    package = name.replace("-", "_")
    if not TOKEN.match(name) or not package.isidentifier():
        raise ClientFault("invalid", f"{name!r} is no name for a plugin", "a-z, 0-9 and '-', beginning with a letter")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ClientFault("already_exists", f"{folder} is there, and not empty", "another NAME, or --folder")
    known = KINDS.get(kind) or next((k for k in KINDS.values() if k.contract == kind), None)
    own: dict[str, str] = {}  # files of this kind's template
    if known is not None:
        own = {f.name: f.read_text() for f in (TEMPLATES / known.contract.partition("/")[0]).iterdir() if f.is_file()}
        code = own.pop("plugin.py")
    else:
        contract = _contract(kind)
        class_name = "".join(part.title() for part in name.split("-"))
        known = Kind(contract.id(), class_name, f"Implements {contract.id()}")
        code = _generic(contract, class_name)
    events = [event.TYPE for event in CONTRACTS[known.contract].events if PLUGIN_EVENT.fullmatch(event.TYPE)]
    words = {"name": name, "package": package, "contract": known.contract, "class_name": known.class_name, "summary": known.summary,
             "dependencies": _listed(sorted(ALWAYS + known.needs)),
             "events": f"events = [{_listed(events)}]\n" if events else "",
             "calls": f"calls = [{_listed(known.calls)}]\n" if known.calls else ""}  # fmt: skip

    def common(template: str) -> str:
        return string.Template((TEMPLATES / "common" / template).read_text()).substitute(words)

    written = {"pyproject.toml": common("pyproject.toml.in"), "README.md": common("README.md.in"), f"{package}/__init__.py":
               f'"""{known.summary}."""\n', f"{package}/{MANIFEST}": common(f"{MANIFEST}.in"), f"{package}/plugin.py": code,
               "tests/test_conformance.py": common("conformance.py")} | own  # fmt: skip
    for path, text in written.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return [folder / path for path in written]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _contract(kind: str) -> type[Contract]:
    found = [c for c in CONTRACTS.values() if kind in (c.id(), c.name)]
    if not found:
        raise ClientFault(
            "invalid", f"{kind!r} is no kind of plugin", f"one of {', '.join(KINDS)}, or of {', '.join(sorted(CONTRACTS))}"
        )
    return max(found, key=lambda c: c.major)


def _generic(contract: type[Contract], class_name: str) -> str:
    """A class with every method of the contract, each of which says that it is not there yet."""
    base, module = contract.__name__, contract.__module__
    system = module.startswith("kernelm_sdk.system")
    kinds = {m.kind for m in contract.methods.values()}
    hands = sorted({"Job" if kind == "job" else "Call" for kind in kinds})
    homes = dict[str, set[str]]()
    for m in contract.methods.values():
        for t in (m.request, m.reply):
            homes.setdefault("kernelm_sdk.system" if t.__module__.startswith("kernelm_sdk.system") else t.__module__, set()).add(
                t.__name__
            )
    homes.setdefault("kernelm_sdk.system" if system else module, set()).add(base)
    lines = [f'"""{re.sub(chr(34), "", contract.__doc__ or contract.id()).splitlines()[0]}"""', ""]
    if "streamed" in kinds:
        lines += ["from collections.abc import AsyncIterator", ""]
    imports = [f"from {home} import {', '.join(sorted(names))}" for home, names in homes.items()]
    imports += ["from kernelm_sdk.errors import ClientFault", f"from kernelm_sdk.plugin import {', '.join([*hands, 'Plugin'])}"]
    lines += [*sorted(imports), "", "", f"class {class_name}(Plugin, {base}):"]
    for m in contract.methods.values():
        hand, reply = ("job: Job" if m.kind == "job" else "call: Call"), m.reply.__name__
        reply = f"AsyncIterator[{reply}]" if m.kind == "streamed" else reply
        lines += [f"    async def {m.attribute}(self, request: {m.request.__name__}, {hand}) -> {reply}:",
                  f'        """{(m.doc or m.name).splitlines()[0]}"""',
                  f'        raise ClientFault("unsupported_method", "{m.name} is not written yet",'
                  f' "write {class_name}.{m.attribute}")']  # fmt: skip
        lines += (["        yield"] if m.kind == "streamed" else []) + [""]
    return "\n".join(lines).rstrip() + "\n"
