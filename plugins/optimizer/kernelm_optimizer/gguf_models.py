"""Models for small devices: GGUF files, which llama.cpp runs. No kernelm I/O.

Q8_0 keeps 8-bit integers with one scale for every 32 weights of a row; vectors (norms, biases) stay float32. The format is that of
the `gguf` package and of llama.cpp's documentation, "GGUF".
"""

from pathlib import Path
from typing import TYPE_CHECKING

from kernelm_sdk.errors import ClientFault

if TYPE_CHECKING:
    import gguf

OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")  # the writer's own fields


def requantize(source: Path, target: Path) -> None:
    """Write the GGUF model in the file `source` to the file `target`, with all matrices as Q8_0. ClientFault `invalid_model` if it
    is none, or one of a type that the library can't read."""
    import gguf
    import numpy as np

    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ClientFault("invalid_model", f"{source.name}: {error}", "give a GGUF file") from None
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith(OWN):
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            message = f"{source.name}: {tensor.name}: {error}"
            raise ClientFault("invalid_model", message, "give one in f16, bf16 or Q-types") from None
        add(writer, tensor.name, values)
    finish(writer)


def add(writer: "gguf.GGUFWriter", name: str, values: "object") -> None:
    """Add a float32 array: a matrix as Q8_0 where its rows divide into blocks, all else as it is."""
    import gguf
    import numpy as np

    array = np.ascontiguousarray(values, np.float32)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    if array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[q8_0][0] == 0:
        writer.add_tensor(name, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
    else:
        writer.add_tensor(name, array)


def finish(writer: "gguf.GGUFWriter") -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
