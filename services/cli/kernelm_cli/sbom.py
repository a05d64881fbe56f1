"""The bill of materials of a plugin: CycloneDX 1.6, with what it requires, in the versions that are installed where it is packed,
which are those that it was tried with. Nothing is asked of a network, and nothing of the plugin is run.

Source: cyclonedx.org/docs/1.6/json; where it lies in a wheel: PEP 770.
"""

import importlib.metadata
import json
import uuid
from pathlib import Path
from typing import NamedTuple

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.bom_ref import BomRef
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Manifest

NAMESPACE = uuid.UUID("6f1c2a39-1d39-5d2c-9d11-6a9a6a3b7c11")  # of serial numbers that are made of the content


class Part(NamedTuple):
    """One thing that a plugin requires, by itself or by way of another."""

    kind: str  # of its package URL: "pypi" or "npm"
    name: str
    version: str  # "" where it is not installed here
    asked: str  # the requirement as it was written
    needs: tuple[str, ...] = ()  # names of what it requires itself


def python_parts(requirements: list[str]) -> dict[str, Part]:
    """What the requirements lead to, by canonical name. ClientFault for a line that is no requirement."""
    parts: dict[str, Part] = {}
    waiting = [(_parsed(line), "") for line in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in parts or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pins = [s.version for s in requirement.specifier if s.operator == "=="]
            parts[name] = Part("pypi", name, pins[0] if pins else "", str(requirement))
            continue
        below = [(_parsed(line), e) for line in found.requires or () for e in ("", *sorted(requirement.extras))]
        below = [(r, e) for r, e in below if not r.marker or r.marker.evaluate({"extra": e})]
        needs = tuple(sorted({canonicalize_name(r.name) for r, _ in below}))
        parts[name] = Part("pypi", name, found.version, str(requirement), needs)
        waiting += below
    return parts


def names_of(requirements: list[str]) -> list[str]:
    """The canonical names of what is required."""
    return [canonicalize_name(_parsed(line).name) for line in requirements]


def _parsed(line: str) -> Requirement:
    try:
        return Requirement(line)
    except InvalidRequirement as error:
        raise ClientFault("invalid", f"requirement {line!r}: {error}", "correct it in pyproject.toml") from None


def node_parts(folder: Path) -> dict[str, Part]:
    """What a package-lock.json (version 2 or 3) at the root of `folder` pins, by its place; {} without one."""
    file = folder / "package-lock.json"
    if not file.is_file():
        return {}
    try:
        packages = json.loads(file.read_text())["packages"]
        return {place: Part("npm", place.rpartition("node_modules/")[2], str(about.get("version", "")), place)
                for place, about in sorted(packages.items()) if place}  # fmt: skip
    except (ValueError, KeyError, AttributeError) as error:
        raise ClientFault("invalid", f"{file}: {error!r}", "write it anew: npm install --package-lock-only") from None


def sbom(manifest: Manifest, parts: dict[str, Part], direct: list[str]) -> bytes:
    """The document. Made of the same, it is the same: its serial number is of its content, and it tells no time."""
    root = Component(name=manifest.name, version=manifest.version, type=ComponentType.APPLICATION, description=manifest.summary,
                     bom_ref=f"kernelm/{manifest.name}@{manifest.version}")  # fmt: skip
    components = {key: _component(part) for key, part in parts.items()}
    bom = Bom(components=components.values(), metadata=BomMetaData(component=root))
    bom.register_dependency(root, [components[n] for n in direct if n in components])
    for key, part in parts.items():
        bom.register_dependency(components[key], [components[n] for n in part.needs if n in components])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["metadata"]["timestamp"]
    del document["serialNumber"]
    text = json.dumps(document, sort_keys=True)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(NAMESPACE, text)}"
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _component(part: Part) -> Component:
    group, _, name = part.name.rpartition("/")  # of npm: "@nats-io/transport-node"
    url = PackageURL(part.kind, group or None, name, part.version or None)
    return Component(name=name, group=group or None, version=part.version or None, type=ComponentType.LIBRARY, purl=url,
                     bom_ref=BomRef(f"{url.to_string()}#{part.asked}" if part.kind == "npm" else url.to_string()),
                     properties=[Property(name="kernelm:requirement", value=part.asked)])  # fmt: skip
