"""Eight bytes at a time, in the 64 bits of one integer, the first of them lowest; for the compiled functions of `kernels`.

Masks have 0x80 in each byte for which something is true. No sum carries from a byte into the next: their highest bits are cleared
before. Numba does not see that a function which it has in its cache calls one in another file that has changed: after a change
here remove its cache, `__pycache__/*.nb?`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LOW = np.uint64(0x7F7F7F7F7F7F7F7F)
HIGH = np.uint64(0x8080808080808080)
BLANKS, NEWLINES = np.uint64(0x2020202020202020), np.uint64(0x0A0A0A0A0A0A0A0A)
FROM_BLANK, DELETE = np.uint64(0x5F5F5F5F5F5F5F5F), np.uint64(0x0101010101010101)  # 0x80 - 0x21, 0x80 - 0x7F
FROM_A, FROM_BRACKET = np.uint64(0x3F3F3F3F3F3F3F3F), np.uint64(0x2525252525252525)  # 0x80 - "A", 0x80 - "["
FROM_0, FROM_COLON = np.uint64(0x5050505050505050), np.uint64(0x4646464646464646)  # 0x80 - "0", 0x80 - ":"
FROM_SMALL_A, FROM_BRACE = np.uint64(0x1F1F1F1F1F1F1F1F), np.uint64(0x0505050505050505)  # 0x80 - "a", 0x80 - "{"
UNDERSCORES = np.uint64(0x5F5F5F5F5F5F5F5F)


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())


@intrinsic
def get(typing: Any, array: Any, at: Any) -> Any:
    """The 8 bytes of an array from `at` on as an integer, wherever they lie."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature, arguments), align=1)

    return types.uint64(array, at), code


@intrinsic
def put(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Write 8 bytes into an array from `at` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature, arguments), align=1)
        return context.get_dummy_value()

    return types.none(array, at, types.uint64), code


@intrinsic
def leading(typing: Any, mask: Any) -> Any:
    """How many bytes there are before the first one in the mask."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0)), ir.Constant(ir.IntType(64), 3))

    return types.int64(types.uint64), code


@intrinsic
def members(typing: Any, mask: Any) -> Any:
    """How many bytes are in the mask."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), code


@njit(cache=True, inline="always")
def lower(chunk: np.uint64) -> np.uint64:
    """The bytes with A to Z in lower case."""
    low = chunk & LOW
    capital = (low + FROM_A) ^ (low + FROM_BRACKET)
    return chunk | (capital & ~chunk & HIGH) >> np.uint64(2)


@njit(cache=True, inline="always")
def tidied(chunk: np.uint64) -> np.uint64:
    """The mask of bytes that tidying leaves as they are, if there is none but these before them: visible ASCII, and a blank or
    newline with such on either side, of which the left one may lie before the chunk, but not the right one behind it."""
    low, ascii_ = chunk & LOW, ~chunk & HIGH
    visible = (low + FROM_BLANK) & ~(low + DELETE) & ascii_
    blank = (~((low ^ BLANKS) + LOW) | ~((low ^ NEWLINES) + LOW)) & ascii_
    return visible | (blank & (visible << np.uint64(8) | np.uint64(0x80)) & visible >> np.uint64(8))


@njit(cache=True, inline="always")
def letters(chunk: np.uint64) -> np.uint64:
    """The mask of ASCII letters, digits and underscores; the chunk is ASCII."""
    small = chunk | BLANKS
    letter = (small + FROM_SMALL_A) & ~(small + FROM_BRACE)
    digit = (chunk + FROM_0) & ~(chunk + FROM_COLON)
    return (letter | digit | ~((chunk ^ UNDERSCORES) + LOW)) & HIGH


@njit(cache=True, inline="always")
def solid(chunk: np.uint64) -> np.uint64:
    """The mask of bytes that are no blanks."""
    other = chunk ^ BLANKS
    return ((other & LOW) + LOW | other) & HIGH
