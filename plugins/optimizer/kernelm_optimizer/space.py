"""The space of a search: which training requests there are, and how one is drawn. Pure.

A dimension that has `only` is asked for where the dimensions before it, or the request itself, have one of these values; so a
space may hold the algorithms of one structure and those of another.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from kernelm_contracts.optimizer import Dimension, Search, Value
from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault

GRID_MOST = 10_000  # points of a grid
Draw = Callable[[str, Dimension, bool], Value]  # parameter, its dimension, whether it is a whole number


class Space:
    """What `search` varies of its training request. ClientFault `invalid` that names the dimension which makes no sense."""

    def __init__(self, search: Search, dataset: str) -> None:
        if search.train.dataset not in ("", dataset):
            raise invalid(f"train.dataset is {search.train.dataset}, the search's is {dataset}", "leave train.dataset empty")
        self._train = msgspec.to_builtins(msgspec.structs.replace(search.train, dataset=dataset, report_test=False))
        if not search.space:
            raise invalid("space is empty", "name at least one dimension, or give the request as a candidate")
        fields = Counter(d.field for d in search.space)
        self.dimensions = {d.field if fields[d.field] == 1 else f"{d.field} {i}": d for i, d in enumerate(search.space)}
        self.whole = {name: self._check(f"space[{i}]", d) for i, (name, d) in enumerate(self.dimensions.items())}

    def parameters(self, draw: Draw) -> dict[str, Value]:
        """What `draw` gives for each dimension that is asked for, in their order."""
        drawn: dict[str, Value] = {}
        request = msgspec.json.decode(msgspec.json.encode(self._train))
        for name, dimension in self.dimensions.items():
            if all(_at(request, field) in wanted for field, wanted in dimension.only.items()):
                drawn[name] = draw(name, dimension, self.whole[name])
                _set(request, dimension.field, drawn[name])
        return drawn

    def request(self, parameters: Mapping[str, Value]) -> TrainRequest:
        """The training request with these parameters."""
        request = msgspec.json.decode(msgspec.json.encode(self._train))
        for name, value in parameters.items():
            _set(request, self.dimensions[name].field, value)
        return msgspec.convert(request, TrainRequest)

    def grid(self) -> list[dict[str, Value]]:
        """All points, the last dimension running fastest. ClientFault where a dimension has no end of values."""
        found: list[dict[str, Value]] = [{}]
        for at, name in enumerate(self.dimensions):
            found = [more for point in found for more in self._extended(point, at, name)]
            if len(found) > GRID_MOST:
                raise invalid(f"the grid has more than {GRID_MOST} points", "take another sampler, or fewer values")
        return found

    def _extended(self, point: dict[str, Value], at: int, name: str) -> Iterator[dict[str, Value]]:
        dimension, request = self.dimensions[name], msgspec.to_builtins(self.request(point))
        if not all(_at(request, field) in wanted for field, wanted in dimension.only.items()):
            yield point
            return
        for value in self._values(f"space[{at}]", name, dimension):
            yield point | {name: value}

    def _values(self, where: str, name: str, dimension: Dimension) -> tuple[Value, ...]:
        if dimension.values:
            return dimension.values
        if not dimension.step and not self.whole[name]:
            raise invalid(f"{where} ({dimension.field}) has no end of values, which no grid has", "give it `values` or a `step`")
        step = dimension.step or 1.0
        numbers = [dimension.low + i * step for i in range(math.floor((dimension.high - dimension.low) / step + 1e-9) + 1)]
        return tuple(round(n) if self.whole[name] else n for n in numbers)

    def _check(self, where: str, dimension: Dimension) -> bool:
        """Whether the field holds whole numbers, after all of the dimension was looked at."""
        field = dimension.field
        for other in (field, *dimension.only):
            if not _types(TrainRequest, other):
                raise invalid(f"{where}: a training request has no field {other!r}", "see TrainRequest in trainer/1")
        if dimension.values:
            for value in dimension.values:
                self._try(where, field, value)
            return False
        types = _types(TrainRequest, field)
        numbers = (dimension.low, dimension.high, dimension.step)
        free = any(isinstance(t, inspect.AnyType) for t in types) and all(n == round(n) for n in numbers)
        whole = free or any(isinstance(t, inspect.IntType) for t in types)
        if not whole and not any(isinstance(t, inspect.FloatType | inspect.AnyType) for t in types):
            raise invalid(f"{where}: {field} is no number", "give it `values`")
        low, high, step = numbers
        if not (math.isfinite(low) and math.isfinite(high) and low < high and 0 <= step <= high - low):
            raise invalid(f"{where} ({field}) goes from {low:g} to {high:g} by {step:g}", "give `low` below `high`, or `values`")
        if dimension.log and (low <= 0 or step):
            raise invalid(f"{where} ({field}) is `log` from {low:g} by {step:g}", "start above 0, and give no `step`")
        if whole and any(n != round(n) for n in (low, high, step)):
            raise invalid(f"{where}: {field} takes whole numbers", "give whole ones")
        for end in (low, high):
            self._try(where, field, round(end) if whole else end)
        return whole

    def _try(self, where: str, field: str, value: Value) -> None:
        request = msgspec.json.decode(msgspec.json.encode(self._train))
        try:
            _set(request, field, value)
            msgspec.convert(request, TrainRequest)
        except msgspec.ValidationError as error:
            raise invalid(f"{where}: {field} can't be {value!r}: {error}", "see TrainRequest in trainer/1") from None


def _at(request: Any, field: str) -> Any:
    for part in field.split("."):
        request = request.get(part) if isinstance(request, dict) else None
    return request


def _set(request: dict[str, Any], field: str, value: Value) -> None:
    *above, last = field.split(".")
    for part in above:
        request[part] = request.get(part) or {}
        request = request[part]
    request[last] = value


def _types(struct: type, field: str) -> list[inspect.Type]:
    """What the field may hold; [] where there is no such field."""
    types: list[inspect.Type] = [inspect.type_info(struct)]
    for part in field.split("."):
        if any(isinstance(t, inspect.DictType) for t in types):  # of another library's making: its fields are not known here
            return [inspect.AnyType()]
        structs = [t for t in types if isinstance(t, inspect.StructType)]
        found = [f.type for s in structs for f in s.fields if f.encode_name == part]
        types = list(itertools.chain.from_iterable(t.types if isinstance(t, inspect.UnionType) else (t,) for t in found))
    return types


def invalid(message: str, remedy: str) -> ClientFault:
    """The fault of a search that makes no sense."""
    return ClientFault("invalid", f"optimize: search: {message}", remedy)
