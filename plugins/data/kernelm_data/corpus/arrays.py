"""Arrow arrays from values that lie in memory as Arrow wants them: their buffers are taken as they are.

`pyarrow.array` asks of whatever it gets whether it is one of pandas', and so imports pandas: 0.2 s in each process.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def strings(values: Sequence[str]) -> pa.Array:
    """Texts as `string`: at most 2 GB of them."""
    joined = "".join(values)
    sizes = map(len, values) if joined.isascii() else (len(value.encode()) for value in values)
    offsets = np.fromiter(accumulate(sizes, initial=0), np.int32, len(values) + 1)
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(joined.encode())])


def binaries(values: Sequence[bytes], type: pa.DataType) -> pa.Array:
    """Bytes as `large_binary`, or, valid UTF-8, as `large_string`."""
    offsets = np.fromiter(accumulate(map(len, values), initial=0), np.int64, len(values) + 1)
    return pa.Array.from_buffers(type, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])


def fixed(values: Sequence[bytes], size: int) -> pa.Array:
    """Bytes that are all `size` long, as `fixed_size_binary`."""
    return pa.Array.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(b"".join(values))])


def bits(values: npt.NDArray[np.bool_]) -> pa.Array:
    """Truth values, a bit each."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))])


def lists(offsets: npt.NDArray[np.integer], values: npt.NDArray[np.int32]) -> pa.Array:
    """`list<int32>`: of each list where it begins in the values; one offset more than lists."""
    whole = pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int32))])
    starts = pa.py_buffer(np.ascontiguousarray(offsets, np.int32))
    return pa.Array.from_buffers(pa.list_(pa.int32()), len(offsets) - 1, [None, starts], children=[whole])
