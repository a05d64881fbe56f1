"""Keys and values of many answers in one batch, which any of them joins and leaves between two steps.

A row is an answer. Rows end at the same column, so that a step writes one column of all rows, and what lies before a row's
first token is masked: to a model of transformers this is a batch with padding on the left, which every one of them can read.
Rows in use are the first ones, so that a step reads views and copies nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class Span:
    """The columns in use are [start, end); the next tokens are written from `end` on."""

    def __init__(self) -> None:
        self.start = self.end = 0

    @property
    def length(self) -> int:
        return self.end - self.start


class Layer(CacheLayerMixin):  # type: ignore[no-untyped-call] # of transformers, without annotations
    """One layer's keys and values, [rows, heads, columns, size], made when the first ones come. Layers with a sliding window
    keep all columns too: the model's own mask hides what is outside the window."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, span: Span, rows: int, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._span, self._rows, self._columns = span, rows, columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def make(states: torch.Tensor) -> torch.Tensor:
            return states.new_zeros(self._rows, states.shape[1], self._columns, states.shape[3])

        self.keys, self.values, self.is_initialized = make(key_states), make(value_states), True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, start, begin = len(key_states), self._span.start, self._span.end
        end = begin + key_states.shape[2]
        self.keys[:rows, :, begin:end] = key_states
        self.values[:rows, :, begin:end] = value_states
        return self.keys[:rows, :, start:end], self.values[:rows, :, start:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._span.length + query_length, 0

    def get_seq_length(self) -> int:
        return self._span.length

    def get_max_length(self) -> int:
        return self._columns


Block = list[torch.Tensor]  # keys and values of some tokens, apart from any batch: of each layer two [heads, tokens, size]


class KeyValues:
    """The cache of `rows` answers with up to `columns` tokens."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.columns, self.span = columns, Span()
        self._layers = [Layer(self.span, rows, columns) for _ in range(layers)]
        self.cache = Cache(layers=[*self._layers])

    def _tensors(self) -> list[Any]:
        """All that is held. A layer that shares the keys of another one has none of its own."""
        return [tensor for layer in self._layers if layer.is_initialized for tensor in (layer.keys, layer.values)]

    def block(self, row: int, length: int, copy: bool = True) -> Block:
        """The last `length` tokens of a row; without `copy` they are gone with the next write."""
        end = self.span.end
        held = [tensor[row, :, end - length : end] for tensor in self._tensors()]
        return [tensor.clone() for tensor in held] if copy else held

    def make(self, block: Block) -> None:
        """Take the memory for tokens as those of `block`, which has keys and values of every layer."""
        for layer, keys, values in zip(self._layers, block[::2], block[1::2], strict=True):
            layer.lazy_initialization(keys.unsqueeze(0), values.unsqueeze(0))

    def put(self, row: int, block: Block, length: int, begin: int) -> None:
        """Write the first `length` tokens of `block` into a row, from column `begin` on."""
        for to, source in zip(self._tensors(), block, strict=True):
            to[row, :, begin : begin + length] = source[:, :length]


class Rows(KeyValues):
    """The batch of the answers under way; `lengths` of the rows in use, in tokens."""

    def __init__(self, layers: int, rows: int, context: int, slack: int) -> None:
        super().__init__(layers, rows, context + slack)
        self.lengths: list[int] = []

    def join(self, block: Block, length: int) -> None:
        """A new last row with the tokens of `block`."""
        if not self.lengths:
            self.span.end = length
        elif self.span.end < length:
            self._move(length)
        self.lengths.append(length)
        self.put(len(self.lengths) - 1, block, length, self.span.end - length)
        self._narrow()

    def leave(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        last, length = len(self.lengths) - 1, self.lengths.pop()
        if row != last:
            self.put(row, self.block(last, length, copy=False), length, self.span.end - length)
            self.lengths[row] = length
        self._narrow()

    def clear(self) -> None:
        """Free all rows."""
        self.lengths.clear()
        self._narrow()

    def make_room(self) -> None:
        """Before a step: see that there is a column for it."""
        if self.span.end == self.columns:
            self._move(max(self.lengths))

    def grown(self) -> None:
        """After a step: each row has one token more."""
        self.lengths = [length + 1 for length in self.lengths]
        self.span.end += 1
        self._narrow()

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """[rows, columns in use and the next one], 1 where a row has a token; None where all have one everywhere."""
        if min(self.lengths) == self.span.length:
            return None
        first = torch.tensor([self.span.length - length for length in self.lengths], device=device)
        return (torch.arange(self.span.length + 1, device=device) >= first.unsqueeze(1)).long()

    def _narrow(self) -> None:
        self.span.start = self.span.end - max(self.lengths, default=0)

    def _move(self, end: int) -> None:
        """Let all rows end at column `end`."""
        rows, length, old = len(self.lengths), max(self.lengths), self.span.end
        for tensor in self._tensors():
            tensor[:rows, :, end - length : end] = tensor[:rows, :, old - length : old].clone()
        self.span.end = end
        self._narrow()


class Prefixes:
    """Keys and values of earlier calls, the least recently used forgotten first; each for its own caller alone, since how
    fast an answer begins would tell others what was asked before."""

    LEAST = 16  # tokens alike from which on it is worth it

    def __init__(self, tokens: int) -> None:
        self._limit, self._held = tokens, 0
        self._entries: list[tuple[str, list[int], Block]] = []  # the last used last

    def wants(self, tokens: int) -> bool:
        """Whether so many tokens are worth keeping, and fit."""
        return self.LEAST <= tokens <= self._limit

    def keep(self, owner: str, tokens: Sequence[int], block: Block) -> None:
        """Remember the tokens, in place of those that they begin with."""
        for at in reversed([k for k, (who, old, _) in enumerate(self._entries) if who == owner and alike(old, tokens) == len(old)]):
            self._forget(at)
        self._entries.append((owner, list(tokens), block))
        self._held += len(tokens)
        while self._held > self._limit:
            self._forget(0)

    def find(self, owner: str, tokens: Sequence[int]) -> tuple[int, Block | None]:
        """(how many of the first tokens are known, their block); (0, None) if it is not worth it."""
        lengths = [alike(held, tokens) if who == owner else 0 for who, held, _ in self._entries]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=-1)
        if best < 0 or lengths[best] < self.LEAST:
            return 0, None
        self._entries.append(self._entries.pop(best))
        return lengths[best], self._entries[-1][2]

    def _forget(self, at: int) -> None:
        self._held -= len(self._entries.pop(at)[1])


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
