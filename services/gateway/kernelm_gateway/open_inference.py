"""KServe's Open Inference Protocol v2 over gRPC: its descriptor, and tensors in and out of it.

Field numbers are positions, as in the published protocol (github.com/kserve/open-inference-protocol,
specification/protocol/open_inference_grpc.proto); `open_inference.proto` beside this file is the same for other languages.
"""

import struct
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from kernelm_sdk.errors import ClientFault

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
VERSIONED, TENSOR = "string name, string version", "string name, string datatype, int64* shape"
NAMED = "string model_name, string model_version, string id, map parameters"
MESSAGES = {  # message -> its fields; "*": repeated, "map": of string to InferParameter
    "ServerLiveRequest": "", "ServerLiveResponse": "bool live", "ServerReadyRequest": "", "ServerReadyResponse": "bool ready",
    "ModelReadyRequest": VERSIONED, "ModelReadyResponse": "bool ready", "ServerMetadataRequest": "",
    "ServerMetadataResponse": f"{VERSIONED}, string* extensions", "ModelMetadataRequest": VERSIONED,
    "ModelMetadataResponse": "string name, string* versions, string platform, ModelMetadataResponse.TensorMetadata* inputs, "
                             "ModelMetadataResponse.TensorMetadata* outputs",
    "ModelMetadataResponse.TensorMetadata": TENSOR,
    "ModelInferRequest": f"{NAMED}, ModelInferRequest.InferInputTensor* inputs, "
                         "ModelInferRequest.InferRequestedOutputTensor* outputs, bytes* raw_input_contents",
    "ModelInferRequest.InferInputTensor": f"{TENSOR}, map parameters, InferTensorContents contents",
    "ModelInferRequest.InferRequestedOutputTensor": "string name, map parameters",
    "ModelInferResponse": f"{NAMED}, ModelInferResponse.InferOutputTensor* outputs, bytes* raw_output_contents",
    "ModelInferResponse.InferOutputTensor": f"{TENSOR}, map parameters, InferTensorContents contents",
    "InferParameter": "bool bool_param, int64 int64_param, string string_param, double double_param, uint64 uint64_param",
    "InferTensorContents": "bool* bool_contents, int32* int_contents, int64* int64_contents, uint32* uint_contents, "
                           "uint64* uint64_contents, float* fp32_contents, double* fp64_contents, bytes* bytes_contents",
}  # fmt: skip
SCALARS = {name: getattr(FieldDescriptorProto, f"TYPE_{name.upper()}")
           for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")}  # fmt: skip
SINGLE, REPEATED = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED
FORMS = {"FP32": ("fp32_contents", "f"), "FP64": ("fp64_contents", "d"), "INT64": ("int64_contents", "q")}  # datatypes given


def describe() -> FileDescriptorProto:
    """The file's descriptor."""
    file = FileDescriptorProto(name="open_inference.proto", package="inference", syntax="proto3")
    made: dict[str, DescriptorProto] = {}
    for name, fields in MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        for number, text in enumerate(filter(None, fields.split(", ")), 1):
            _field(made[name], name, number, *text.split())
    made["InferParameter"].oneof_decl.add(name="parameter_choice")
    for field in made["InferParameter"].field:
        field.oneof_index = 0
    service = file.service.add(name=SERVICE.rpartition(".")[2])
    for method in METHODS:
        service.method.add(name=method, input_type=f".inference.{method}Request", output_type=f".inference.{method}Response")
    return file


def _field(message: DescriptorProto, full: str, number: int, kind: str, name: str) -> None:
    label, kind = (REPEATED, kind[:-1]) if kind.endswith("*") else (SINGLE, kind)
    if kind in SCALARS:
        message.field.add(name=name, number=number, label=label, type=SCALARS[kind])
    elif kind == "map":
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=SINGLE, type=SCALARS["string"])
        entry.field.add(name="value", number=2, label=SINGLE, type=FieldDescriptorProto.TYPE_MESSAGE,
                        type_name=".inference.InferParameter")  # fmt: skip
        message.field.add(name=name, number=number, label=REPEATED, type=FieldDescriptorProto.TYPE_MESSAGE,
                          type_name=f".inference.{full}.ParametersEntry")  # fmt: skip
    else:
        message.field.add(name=name, number=number, label=label, type=FieldDescriptorProto.TYPE_MESSAGE,
                          type_name=f".inference.{kind}")  # fmt: skip


def texts(request: Any) -> tuple[str, ...]:
    """The texts of a ModelInferRequest's one tensor, of datatype BYTES; ClientFault "invalid" for another."""
    if len(request.inputs) != 1:
        raise _wrong("inputs", f"{len(request.inputs)} tensors", "send one, of datatype BYTES, with a text an element")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES":
        raise _wrong(f"inputs[0] {tensor.name!r}", f"its datatype is {tensor.datatype[:16]!r}", "send texts as BYTES")
    raw = request.raw_input_contents
    if len(raw) > 1 or (raw and tensor.contents.bytes_contents):
        raise _wrong("raw_input_contents", "does not belong to the one tensor", "send contents in one of the two forms")
    elements = _unpacked(raw[0]) if raw else list(tensor.contents.bytes_contents)
    count = 1
    for size in tensor.shape:
        count *= max(size, 0)
    if not elements or count != len(elements):
        raise _wrong("inputs[0].shape", f"{list(tensor.shape)} with {len(elements)} elements", "let both say the same")
    try:
        return tuple(element.decode() for element in elements)
    except UnicodeDecodeError as error:
        raise _wrong("inputs[0]", str(error), "send UTF-8") from None


def _unpacked(raw: bytes) -> list[bytes]:
    """Elements of a raw BYTES tensor: each behind its length, 4 bytes, little-endian."""
    elements, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            raise _wrong("raw_input_contents", "ends in the middle of an element", "send each element behind its length")
        elements.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return elements


def parameters(request: Any, allowed: dict[str, type]) -> dict[str, Any]:
    """The request's parameters as Python has them; ClientFault "invalid" for one that is unknown or of another type."""
    given: dict[str, Any] = {}
    for name in request.parameters:
        value = request.parameters[name]
        kind = value.WhichOneof("parameter_choice")
        given[name] = getattr(value, kind) if kind else None
        if name not in allowed:
            raise _wrong(f"parameters.{name[:64]}", "is not known here", f"known are: {', '.join(allowed)}")
        if allowed[name] is float and isinstance(given[name], int) and not isinstance(given[name], bool):
            given[name] = float(given[name])
        if type(given[name]) is not allowed[name]:
            raise _wrong(f"parameters.{name}", f"{given[name]!r} is no {allowed[name].__name__}", "send it in its own type")
    return given


def fill(response: Any, raw: bool, name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> None:
    """Add a tensor to a ModelInferResponse: row after row, as contents or, for who sent raw contents, raw."""
    tensor = response.outputs.add(name=name, datatype=datatype, shape=shape)
    if datatype == "BYTES":
        encoded = [value.encode() for value in values]
        if raw:
            response.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in encoded))
        else:
            tensor.contents.bytes_contents.extend(encoded)
        return
    field, kind = FORMS[datatype]
    if raw:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{kind}", *values))
    else:
        getattr(tensor.contents, field).extend(values)


def _wrong(param: str, what: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"{param}: {what}", remedy, param=param)
