"""Protobuf messages to msgspec structs and back, by the rules of `protobuf.py`.

A struct is read through `msgspec.convert`, so that a message over gRPC is held to exactly what JSON over NATS is held to:
types, literals, required fields. A field that was left unset takes the struct's default. proto3 can't tell an unset
sequence or map from an empty one: empty means unset where the struct has a default. Whole numbers in free JSON are exact up
to 2**53.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from google.protobuf import json_format
from google.protobuf.message import Message
from msgspec import inspect as types

from kernelm_gateway.protobuf import SCALARS, SEQUENCES, VALUES, is_free, is_free_object, without_none

Reader = Callable[[Any], Any]  # a field's value -> plain Python
Writer = Callable[[Any, Any], None]  # plain Python or a struct, the message to fill


class Codec:
    """Reads and writes the messages of one struct, and is made once for each."""

    def __init__(self, struct: type[msgspec.Struct], message: type[Message]) -> None:
        self.struct, self.message = struct, message
        self._read, self._write = _struct_reader(struct, {}), _struct_writer(struct, {})

    def read(self, message: Message) -> msgspec.Struct:
        """The struct; msgspec.ValidationError that names the field if it is not valid."""
        return msgspec.convert(self._read(message), self.struct)

    def write(self, struct: msgspec.Struct) -> Message:
        """The message; ValueError if a value does not fit its field (an int beyond 64 bits)."""
        message = self.message()
        self._write(struct, message)
        return message


def _fields(struct: type[msgspec.Struct]) -> tuple[types.Field, ...]:
    info = types.type_info(struct)
    assert isinstance(info, types.StructType)
    return info.fields


# ---- reading ----


def _struct_reader(struct: type[msgspec.Struct], known: dict[type, Reader]) -> Reader:
    if struct in known:
        return known[struct]
    plan: list[tuple[str, bool, bool, Reader]] = []

    def read(message: Any) -> dict[str, Any]:
        result = {}
        for name, presence, required, reader in plan:
            if presence:
                if message.HasField(name):
                    result[name] = reader(getattr(message, name))
            elif (value := getattr(message, name)) or required:
                result[name] = reader(value)
        return result

    known[struct] = read  # before its fields are planned: a struct may contain itself
    for field in _fields(struct):
        kind = without_none(field.type)
        many = isinstance(kind, (*SEQUENCES, types.DictType)) and not is_free_object(kind)
        message_like = isinstance(kind, types.StructType) or is_free(kind) or is_free_object(kind)
        presence = message_like or (not many and (not field.required or kind is not field.type))
        plan.append((field.encode_name, presence, field.required, _reader(kind, known)))
    return read


def _reader(kind: types.Type, known: dict[type, Reader]) -> Reader:
    if isinstance(kind, types.StructType):
        return _struct_reader(kind.cls, known)
    if isinstance(kind, types.RawType):
        return lambda value: msgspec.Raw(msgspec.json.encode(_free_value(value)))
    if is_free(kind):
        return _free_value
    if is_free_object(kind):
        return _free_object
    if isinstance(kind, types.DictType):
        item = _item_reader(kind.value_type, known)
        return lambda value: {key: item(value[key]) for key in value}
    if isinstance(kind, SEQUENCES):
        if type(kind.item_type) in SCALARS:
            return list
        item = _item_reader(kind.item_type, known)
        return lambda value: [item(one) for one in value]
    return lambda value: value


def _free_value(value: Any) -> Any:
    """What a google.protobuf.Value holds. Its numbers are doubles: whole ones become ints, as they were in JSON."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _free_object(value.struct_value)
    if kind == "list_value":
        return [_free_value(one) for one in value.list_value.values]
    if kind == "number_value" and value.number_value.is_integer():
        return int(value.number_value)
    return None if kind in (None, "null_value") else getattr(value, kind)


def _free_object(struct: Any) -> dict[str, Any]:
    return {key: _free_value(struct.fields[key]) for key in struct.fields}


def _item_reader(kind: types.Type, known: dict[type, Reader]) -> Reader:
    """Of what stands in a sequence or map: an inner one is wrapped in a message."""
    reader = _reader(kind, known)
    if isinstance(kind, (*SEQUENCES, types.DictType)) and not is_free_object(kind):
        return lambda row: reader(getattr(row, VALUES))
    return reader


# ---- writing ----


def _struct_writer(struct: type[msgspec.Struct], known: dict[type, Writer]) -> Writer:
    if struct in known:
        return known[struct]
    plan: list[tuple[str, str, Writer | None]] = []

    def write(value: Any, message: Any) -> None:
        for attribute, name, writer in plan:
            if (of := getattr(value, attribute)) is None:
                continue
            if writer is None:
                setattr(message, name, of)
            else:
                writer(of, getattr(message, name))

    known[struct] = write
    for field in _fields(struct):
        kind = without_none(field.type)
        if isinstance(kind, types.StructType):
            plan.append((field.name, field.encode_name, _present(_writer(kind, known))))
        else:
            plan.append((field.name, field.encode_name, _writer(kind, known)))
    return write


def _present(writer: Writer | None) -> Writer:
    """A message with nothing in it must still be there."""
    assert writer is not None

    def write(value: Any, message: Any) -> None:
        message.SetInParent()
        writer(value, message)

    return write


def _writer(kind: types.Type, known: dict[type, Writer]) -> Writer | None:
    """None for a scalar, which is assigned."""
    if isinstance(kind, types.StructType):
        return _struct_writer(kind.cls, known)
    if isinstance(kind, types.RawType):
        return lambda raw, message: json_format.ParseDict(msgspec.json.decode(raw), message)
    if is_free(kind) or is_free_object(kind):
        return lambda value, message: json_format.ParseDict(msgspec.to_builtins(value), message)
    if isinstance(kind, types.DictType):
        return _map_writer(_item_writer(kind.value_type, known))
    if isinstance(kind, SEQUENCES):
        return _sequence_writer(_item_writer(kind.item_type, known))
    return None


def _item_writer(kind: types.Type, known: dict[type, Writer]) -> Writer | None:
    writer = _writer(kind, known)
    if writer is not None and isinstance(kind, (*SEQUENCES, types.DictType)) and not is_free_object(kind):
        return lambda value, row: writer(value, getattr(row, VALUES))
    return writer


def _map_writer(item: Writer | None) -> Writer:
    if item is None:
        return lambda value, field: field.update(value)

    def write(value: dict[str, Any], field: Any) -> None:
        for key, one in value.items():
            item(one, field[key])  # reading a missing key of a map of messages creates it

    return write


def _sequence_writer(item: Writer | None) -> Writer:
    if item is None:
        return lambda value, field: field.extend(value)

    def write(value: Any, field: Any) -> None:
        for one in value:
            item(one, field.add())

    return write
