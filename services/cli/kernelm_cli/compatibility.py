"""Whether a contract still keeps its major: its schema against the one of the last release, in plugins/contracts/schemas/released/.

    python -m kernelm_cli.compatibility check      exit code 1 and a list if a contract breaks what was released
    python -m kernelm_cli.compatibility release    after a release: what is now is what the next one is compared with

Within a major optional fields are added, and methods and events, which older sides don't know and need not, and values of an
enumeration: an older side refuses the one message that has such a value. All else (a field that goes, or becomes required, or
changes its type; a value or method that goes, or changes its kind) needs another major.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from kernelm_cli.reference import ROOT, SCHEMAS, contracts

RELEASED = ROOT / SCHEMAS / "released"
ABOUT = ("description", "title", "default")  # for people, or for who writes; a reader does not depend on it


def breaks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a side that was built against the schema `old` can't rely on any more under `new`; [] if it can on all."""
    found: list[str] = []
    for name, method in old["methods"].items():
        now = new["methods"].get(name)
        if now is None:
            found.append(f"method {name} is gone")
            continue
        found += [f"method {name}: {k} was {method[k]}, and is {now[k]}" for k in ("kind", "scope") if method[k] != now[k]]
        for side in ("request", "reply"):
            found += _differences(f"{name}.{side}", method[side], now[side], old, new, ())
    for name, event in old["events"].items():
        if name in new["events"]:
            found += _differences(f"event {name}", event, new["events"][name], old, new, ())
        else:
            found.append(f"event {name} is gone")
    return list(dict.fromkeys(found))


def _differences(where: str, a: Any, b: Any, old: dict[str, Any], new: dict[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    """Differences of the nodes `a` and `b` with all that is below them."""
    if isinstance(a, dict) and (reference := a.get("$ref")):
        if reference in above:
            return
        above = (*above, reference)
    a, b = _resolved(a, old), _resolved(b, new)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        if a != b:
            yield f"{where}: was {a}, and is {b}"
        return
    for name in [k for k in {**a, **b} if k not in (*ABOUT, "properties", "required")]:
        if name == "enum" and set(a.get(name, ())) <= set(b.get(name, ())):
            continue
        if name in ("anyOf", "prefixItems") and len(a.get(name, ())) == len(b.get(name, ())):
            for k, (one, other) in enumerate(zip(a[name], b[name], strict=True)):
                yield from _differences(f"{where}[{k}]", one, other, old, new, above)
        else:
            yield from _differences(f"{where}.{name}", a.get(name), b.get(name), old, new, above)
    had, has = set(a.get("required", ())), set(b.get("required", ()))
    yield from (f"{where}.{name} is required now" for name in sorted(has - had))
    yield from (f"{where}.{name} is not required any more" for name in sorted(had - has))
    for name, below in a.get("properties", {}).items():
        if name not in b.get("properties", {}):
            yield f"{where}.{name} is gone"
        else:
            yield from _differences(f"{where}.{name}", below, b["properties"][name], old, new, above)


def _resolved(node: Any, schema: dict[str, Any]) -> Any:
    while isinstance(node, dict) and "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def broken() -> list[str]:
    """The breaks of all contracts, each with the contract's id."""
    now = {f"{c.name}.v{c.major}.json": c for c in contracts()}
    found = []
    for file in sorted(RELEASED.glob("*.json")):
        if file.name not in now:
            found.append(f"{file.name}: this contract was released, and is gone")
            continue
        contract = now[file.name]
        found += [f"{contract.id()}: {text}" for text in breaks(json.loads(file.read_text()), contract.schema())]
    return found


def release() -> None:
    """Keep the present schemas as those of the release."""
    RELEASED.mkdir(exist_ok=True)
    for contract in contracts():
        text = json.dumps({**contract.schema(), "schema_hash": contract.schema_hash()}, indent=1, ensure_ascii=False)
        (RELEASED / f"{contract.name}.v{contract.major}.json").write_text(text + "\n")


def main(arguments: Sequence[str]) -> int:
    """The whole program."""
    if list(arguments) == ["release"]:
        release()
        return 0
    found = broken()
    for line in found:
        print(f"{line}: declare another major, or put it back", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
