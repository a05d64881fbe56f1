"""What the decoder of an encoder-decoder attends to: keys and values of the encoded text, a row for each answer under way.

A text begins at the first column of its row, and what lies behind its end is masked. Rows join and leave as those of cache.py.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from kernelm_generator.cache import Block, KeyValues, Rows


class Texts:
    """The encoded texts; their tensors, of each layer two [rows, heads, columns, size], are made with the first one."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.lengths: list[int] = []  # of the rows in use, in tokens
        self._rows, self._columns = rows, columns
        self._held: list[torch.Tensor] = []
        self._layers = [DynamicLayer() for _ in range(layers)]  # type: ignore[no-untyped-call]
        self.cache = Cache(layers=[*self._layers])  # views of the rows and columns in use

    @property
    def width(self) -> int:
        """Columns in use."""
        return max(self.lengths, default=0)

    def join(self, block: Block) -> None:
        """A new last row with the text of `block`."""
        if not self._held:
            self._held = [part.new_zeros(self._rows, part.shape[0], self._columns, part.shape[2]) for part in block]
        self.lengths.append(block[0].shape[1])
        self._put(len(self.lengths) - 1, block)

    def leave(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        last, length = len(self.lengths) - 1, self.lengths.pop()
        if row != last:
            self.lengths[row] = length
            self._put(row, [tensor[last, :, :length] for tensor in self._held])
        self._show()

    def clear(self) -> None:
        """Free all rows."""
        self.lengths.clear()
        self._show()

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """[rows, columns in use], 1 where a row has a token; None where all have one everywhere."""
        if min(self.lengths) == self.width:
            return None
        lengths = torch.tensor(self.lengths, device=device)
        return (torch.arange(self.width, device=device) < lengths.unsqueeze(1)).long()

    def _put(self, row: int, block: Block) -> None:
        for to, source in zip(self._held, block, strict=True):
            to[row, :, : source.shape[1]] = source
        self._show()

    def _show(self) -> None:
        used = [tensor[: len(self.lengths), :, : self.width] for tensor in self._held]
        for layer, keys, values in zip(self._layers, used[::2], used[1::2], strict=bool(used)):
            layer.keys, layer.values, layer.is_initialized = keys, values, True


class Decoded(Rows):
    """The batch of an encoder-decoder: the answers' tokens, and the texts that they are made from."""

    def __init__(self, layers: int, rows: int, context: int, answer: int, slack: int) -> None:
        super().__init__(layers, rows, answer, slack)
        self.texts = Texts(layers, rows, context)
        self.cache = EncoderDecoderCache(self.cache, self.texts.cache)
        self.cache.is_updated = dict.fromkeys(range(layers), True)  # a step reads the texts and writes none

    def join(self, block: Block, length: int) -> None:
        own = len(block) // 2
        super().join(block[:own], length)
        self.texts.join(block[own:])

    def leave(self, row: int) -> None:
        super().leave(row)
        self.texts.leave(row)

    def clear(self) -> None:
        super().clear()
        self.texts.clear()


class Encoding(KeyValues):
    """A text that is being encoded, and what the decoder makes of it first."""

    def __init__(self, layers: int, columns: int) -> None:
        super().__init__(layers, 1, columns)
        self._own = self.cache
        self.begin()

    def begin(self) -> None:
        """Another text."""
        self.span.start = self.span.end = 0
        self.texts: Any = DynamicCache()
        self.cache = EncoderDecoderCache(self._own, self.texts)

    def block(self, row: int, length: int, copy: bool = True) -> Block:
        """What is decoded, then the text: see `Decoded.join`."""
        text = [tensor[row] for layer in self.texts.layers for tensor in (layer.keys, layer.values)]
        return super().block(row, length, copy) + text
