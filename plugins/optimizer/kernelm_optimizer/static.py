"""Static int8: the ranges of activations are found once, on documents, and stand in the graph. No kernelm I/O.

(Jacob et al. 2018, section 3.) Where ranges are found at each call, a document's answer depends a little on those beside it in
its batch; here it does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from tokenizers import Tokenizer

from kernelm_sdk.errors import ClientFault

Rows = Sequence[NDArray[np.int64]]


class _Documents(CalibrationDataReader):  # type: ignore[misc]
    """One document at a time: padding is none of what a model sees."""

    def __init__(self, rows: Rows) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._rows, None)
        return None if row is None else {"input_ids": row, "attention_mask": np.ones_like(row)}


def write_static(graph: onnx.ModelProto, path: Path, rows: Rows, reduce_range: bool) -> None:
    """The graph of an encoder with int8 weights, and 8-bit activations in the ranges that `rows` ([1, tokens] int64) show."""
    # embeddings first, and as everywhere: a range for what is looked up would have the whole table widened at each call
    quantize_dynamic(graph, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["Gather"])
    quantize_static(
        onnx.load(path), path, _Documents(rows), quant_format=QuantFormat.QOperator, per_channel=True, reduce_range=reduce_range,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True})  # what attention multiplies stays fp32, as with dynamic ranges


def token_rows(folder: Path, texts: Sequence[str], max_tokens: int) -> Rows:
    """Token ids of `texts`, [1, tokens] int64 each, as the model in `folder` reads them. ClientFault `invalid_model` without a
    tokenizer."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust side raises bare Exception
        raise ClientFault("invalid_model", f"tokenizer.json: {error}", "give the digest of a trained model") from None
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()  # the file may ask for a fixed length
    return [np.array([encoding.ids], np.int64) for encoding in tokenizer.encode_batch(list(texts)) if encoding.ids]
