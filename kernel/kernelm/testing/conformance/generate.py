"""Requests made from a contract's JSON Schema: valid ones, and ones that are wrong in one place. Pure, and the same for a seed.

The schemas are those that `kernelm_sdk.contract.Contract.schema` derives (or that a plugin in another language publishes):
JSON Schema 2020-12 with `type`, `properties`, `items`, `prefixItems`, `anyOf`, `enum`, `const`, `additionalProperties` and `$ref`.
"""

import random
import string
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]
TEXTS = (
    "",
    "a",
    "news",
    "The striker scored two goals.",
    "sha256:" + "0" * 64,
    "Grüße, 世界",
    "../../etc/passwd",
    "a b\tc\n",
    "🙂" * 3,
)
DEEP = 6  # below it optional properties are left out, and lists empty


class Shapes:
    """One contract's schema: values that fit its types, and a verdict on a value."""

    def __init__(self, schema: Schema) -> None:
        self.schema, self.definitions = schema, schema.get("$defs", {})

    def resolve(self, node: Schema) -> Schema:
        """The node that a `$ref` means."""
        while "$ref" in node:
            node = self.definitions[node["$ref"].rpartition("/")[2]]
        return node

    def problem(self, node: Schema, value: Any) -> str:
        """Where and why `value` does not fit `node`; "" if it fits."""
        full = {"$schema": self.schema.get("$schema"), "$defs": self.definitions, **node}
        error = next(iter(Draft202012Validator(full).iter_errors(value)), None)
        if error is None:
            return ""
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
        return f"`{where.lstrip('.') or 'the body'}`: {error.message[:200]}"

    def valid(self, node: Schema, chance: random.Random, depth: int = 0, full: bool = False) -> Any:
        """A value that fits; with `full` every optional property is there."""
        node = self.resolve(node)
        if "const" in node:
            return node["const"]
        if "enum" in node:
            return chance.choice(node["enum"])
        if "anyOf" in node:
            return self.valid(chance.choice(node["anyOf"]), chance, depth + 1, full)
        kinds = node.get("type", "object")
        kind = kinds if isinstance(kinds, str) else chance.choice(kinds)
        match kind:
            case "null":
                return None
            case "boolean":
                return chance.random() < 0.5
            case "integer":
                return max(chance.choice((0, 1, 2, 7, -1, 100, 2**31, 2**53 - 1)), node.get("minimum", -(2**53)))
            case "number":
                return max(chance.choice((0.0, 0.5, 1.0, -1.0, 3.25, 1e9)), node.get("minimum", -1e9))
            case "string":
                return chance.choice((*TEXTS, "".join(chance.choices(string.printable, k=chance.randint(1, 40)))))
            case "array":
                return self._array(node, chance, depth, full)
        return self._object(node, chance, depth, full)

    def _array(self, node: Schema, chance: random.Random, depth: int, full: bool) -> list[Any]:
        found = [self.valid(n, chance, depth + 1, full) for n in node.get("prefixItems", ())]
        least = max(node.get("minItems", 0) - len(found), 0)
        if isinstance(items := node.get("items"), dict):
            count = max(least, 0 if depth > DEEP else chance.randint(0, 3))
            found += [self.valid(items, chance, depth + 1, full) for _ in range(count)]
        return found

    def _object(self, node: Schema, chance: random.Random, depth: int, full: bool) -> dict[str, Any]:
        required, found = node.get("required", ()), {}
        for name, below in node.get("properties", {}).items():
            if name in required or (depth <= DEEP and (full or chance.random() < 0.4)):
                found[name] = self.valid(below, chance, depth + 1, full)
        if isinstance(more := node.get("additionalProperties"), dict) and depth <= DEEP:
            found |= {
                chance.choice(("a", "b", "test")): self.valid(more, chance, depth + 1, full) for _ in range(chance.randint(0, 2))
            }
        return found

    def wrong(self, node: Schema, chance: random.Random) -> Iterator[tuple[str, Any]]:
        """(what is wrong, value): each fits but for one place."""
        bodies: tuple[Any, ...] = ([], "text", 1, True, None)
        for body in bodies:
            yield f"the body is {body!r} and no object", body
        target = self.resolve(node)
        for name in target.get("required", ()):
            value: Any = self.valid(node, chance, full=True)
            del value[name]
            yield f"without the required `{name}`", value
        for name, below in target.get("properties", {}).items():
            others: tuple[Any, ...] = ({"?": 1}, [[]], "?", -0.5, None)
            for other in others:
                if self.problem(below, other):
                    yield f"`{name}` is {other!r}", {**self.valid(node, chance, full=True), name: other}
                    break
