"""Protocol Buffers from contracts: one proto3 file a contract, derived from its msgspec structs.

    int -> int64                     tuple[T, ...], list[T] -> repeated T
    float -> double                  tuple[tuple[T, ...], ...] -> repeated TRow { repeated T values = 1; }
    str, Literal[...] -> string      dict[str, T] -> map<string, T>; T a dict or a tuple: TMap or TRow around it
    bool -> bool                     dict[str, Any] -> google.protobuf.Struct; Any, Raw -> google.protobuf.Value
    struct -> message                a scalar with a default, or `| None` -> optional

Field numbers are the positions of the struct's fields, so contracts grow at the end of a struct and never in between. A scalar
with a default is `optional`, since proto3 cannot tell an unset 0 from a sent one: what a client leaves out takes the
contract's default. A file is complete in itself, as the contract's JSON Schema is: a struct that several contracts use
becomes a message in each of their packages, so that no contract's major version binds another's.

Job methods are dispatched by the job table and never called, so they are left out; so is a contract that has no other.
Source: protobuf.dev, "Language Guide (proto 3)" and "Style Guide".
"""

import ast
import functools
import inspect
import sys
import tokenize
from io import StringIO
from typing import Any

import msgspec
from google.protobuf import descriptor_pool, struct_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from msgspec import inspect as types

from kernelm_sdk.contract import Contract, Method

STRUCT, VALUE = ".google.protobuf.Struct", ".google.protobuf.Value"
REPEATED, SINGLE = FieldDescriptorProto.LABEL_REPEATED, FieldDescriptorProto.LABEL_OPTIONAL
MESSAGE = FieldDescriptorProto.TYPE_MESSAGE
SCALARS: dict[type, tuple[int, str]] = {
    types.IntType: (FieldDescriptorProto.TYPE_INT64, "Int64"),
    types.FloatType: (FieldDescriptorProto.TYPE_DOUBLE, "Double"),
    types.StrType: (FieldDescriptorProto.TYPE_STRING, "String"),
    types.LiteralType: (FieldDescriptorProto.TYPE_STRING, "String"),
    types.BoolType: (FieldDescriptorProto.TYPE_BOOL, "Bool"),
}
SEQUENCES = (types.VarTupleType, types.ListType)
VALUES = "values"  # the one field of a generated row or map message


def callable_methods(contract: type[Contract]) -> list[Method]:
    """The unary and streamed methods, in the order of declaration."""
    return [m for m in contract.methods.values() if m.kind != "job"]


def package(contract: type[Contract]) -> str:
    """`kernelm.server.v1` for `server/1`."""
    return f"kernelm.{contract.name.replace('-', '_')}.v{contract.major}"


def file_name(contract: type[Contract]) -> str:
    """`server_v1.proto` for `server/1`."""
    return f"{contract.name.replace('-', '_')}_v{contract.major}.proto"


def method_name(method: Method) -> str:
    """`GetRun` for `get_run`."""
    return "".join(part.capitalize() for part in method.attribute.split("_"))


def without_none(kind: types.Type) -> types.Type:
    """`T` for `T | None`; other types as they are. TypeError for a union of several."""
    if not isinstance(kind, types.UnionType):
        return kind
    rest = [t for t in kind.types if not isinstance(t, types.NoneType)]
    if len(rest) != 1:
        raise TypeError(f"a union of {len(rest)} types has no form in proto3")
    return rest[0]


def is_free(kind: types.Type) -> bool:
    """Whether any JSON may stand there."""
    return isinstance(kind, types.AnyType | types.RawType)


def is_free_object(kind: types.Type) -> bool:
    """Whether any JSON object may stand there: `dict[str, Any]`."""
    return isinstance(kind, types.DictType) and is_free(kind.value_type)


class _File:
    """One file in the making: messages are added as fields ask for them."""

    def __init__(self, contract: type[Contract]) -> None:
        self.proto = FileDescriptorProto(name=file_name(contract), package=package(contract), syntax="proto3")
        self._known: dict[str, type | None] = {}  # message -> its struct; None for rows and maps

    def comment(self, text: str, *path: int) -> None:
        if text:
            self.proto.source_code_info.location.add(path=path, leading_comments=text)

    def message(self, struct: type[msgspec.Struct]) -> str:
        """The full name of the struct's message, which is added if it is not there yet."""
        name = struct.__name__
        if self._known.setdefault(name, struct) is not struct:
            raise TypeError(f"{self.proto.name}: two structs are called {name}: {self._known[name]} and {struct}")
        if not any(m.name == name for m in self.proto.message_type):
            index, proto = len(self.proto.message_type), self.proto.message_type.add(name=name)
            self.comment(docstring(struct), 4, index)
            comments = field_comments(struct)
            info = types.type_info(struct)
            assert isinstance(info, types.StructType)
            for number, field in enumerate(info.fields, 1):
                try:
                    self.field(proto, number, field.encode_name, field.type, optional=not field.required)
                except TypeError as error:
                    raise TypeError(f"{struct.__module__}.{name}.{field.name}: {error}") from None
                self.comment(comments.get(field.name, ""), 4, index, 2, number - 1)
        return f".{self.proto.package}.{name}"

    def field(self, parent: DescriptorProto, number: int, name: str, kind: types.Type, optional: bool = False) -> None:
        """Add a field of `kind` to the message `parent`."""
        optional = optional or without_none(kind) is not kind
        kind = without_none(kind)
        if is_free_object(kind):
            parent.field.add(name=name, number=number, label=SINGLE, type=MESSAGE, type_name=self._well_known(STRUCT))
        elif isinstance(kind, types.DictType):
            entry = "".join(part.capitalize() for part in name.split("_")) + "Entry"
            parent.field.add(name=name, number=number, label=REPEATED, type=MESSAGE,
                             type_name=f".{self.proto.package}.{parent.name}.{entry}")  # fmt: skip
            nested = parent.nested_type.add(name=entry)
            nested.options.map_entry = True
            for place, part, of in ((1, "key", kind.key_type), (2, "value", kind.value_type)):
                scalar, type_name = self.element(of)
                nested.field.add(name=part, number=place, label=SINGLE, type=scalar, type_name=type_name)
        elif isinstance(kind, SEQUENCES):
            scalar, type_name = self.element(kind.item_type)
            parent.field.add(name=name, number=number, label=REPEATED, type=scalar, type_name=type_name)
        else:
            scalar, type_name = self.element(kind)
            field = parent.field.add(name=name, number=number, label=SINGLE, type=scalar, type_name=type_name)
            if optional and scalar != MESSAGE:  # a message has presence anyway
                field.proto3_optional, field.oneof_index = True, len(parent.oneof_decl)
                parent.oneof_decl.add(name=f"_{name}")

    def element(self, kind: types.Type) -> tuple[Any, str | None]:
        """The type of one value in a field, a sequence or a map, and its name if it is a message."""
        if isinstance(kind, types.StructType):
            return MESSAGE, self.message(kind.cls)
        if is_free(kind):
            return MESSAGE, self._well_known(VALUE)
        if is_free_object(kind):
            return MESSAGE, self._well_known(STRUCT)
        if isinstance(kind, types.DictType | types.VarTupleType | types.ListType):
            return MESSAGE, self._wrapper(kind)
        if type(kind) not in SCALARS:
            raise TypeError(f"{kind} has no form in proto3 here; use int, float, str, bool, a struct, tuple[T, ...], dict[str, T]")
        return SCALARS[type(kind)][0], None

    def _wrapper(self, kind: Any) -> str:
        """The message around an inner sequence or map, which proto3 can't repeat by itself."""
        inner = kind.value_type if isinstance(kind, types.DictType) else kind.item_type
        _, type_name = self.element(inner)
        stem = type_name.rpartition(".")[2] if type_name else SCALARS[type(inner)][1]
        name = stem + ("Map" if isinstance(kind, types.DictType) else "Row")
        if self._known.setdefault(name, None) is not None:
            raise TypeError(f"a struct is called {name}, as the message around {stem} would be")
        if not any(m.name == name for m in self.proto.message_type):
            self.field(self.proto.message_type.add(name=name), 1, VALUES, kind)
        return f".{self.proto.package}.{name}"

    def _well_known(self, name: str) -> str:
        if not self.proto.dependency:
            self.proto.dependency.append(struct_pb2.DESCRIPTOR.name)
        return name


def describe(contract: type[Contract]) -> FileDescriptorProto:
    """The contract's proto3 file: its callable methods, their messages, and docstrings and comments as comments.
    TypeError that names the struct and field if a type has no form in proto3."""
    file = _File(contract)
    service = file.proto.service.add(name=contract.__name__)
    file.comment(docstring(contract), 6, 0)
    for index, method in enumerate(callable_methods(contract)):
        taken, given = file.message(method.request), file.message(method.reply)
        rpc = service.method.add(name=method_name(method), input_type=taken, output_type=given)
        if method.kind == "streamed":
            rpc.server_streaming = True
        file.comment(method.doc, 6, 0, 2, index)
    if any(m.name == service.name for m in file.proto.message_type):
        raise TypeError(f"{contract.id()}: a struct has the name of the contract's class, {service.name}")
    return file.proto


def make_pool(files: list[FileDescriptorProto]) -> descriptor_pool.DescriptorPool:
    """A pool of its own with `files` and google/protobuf/struct.proto."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def docstring(cls: type) -> str:
    """The class's own docstring, not an inherited one."""
    return inspect.cleandoc(cls.__doc__) if cls.__doc__ and "__doc__" in vars(cls) else ""


def field_comments(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> the comment at the end of its line in the source: units and meanings are written there once. None for a
    struct that was made at run time."""
    return _comments_in(struct.__module__).get(struct.__qualname__, {})


@functools.cache
def _comments_in(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> comment, of the classes at the top of a module."""
    source = inspect.getsource(sys.modules[module])
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(StringIO(source).readline)
                if token.type == tokenize.COMMENT}  # fmt: skip
    return {cls.name: {node.target.id: comments[node.end_lineno or 0] for node in cls.body
                       if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in comments}
            for cls in ast.parse(source).body if isinstance(cls, ast.ClassDef)}  # fmt: skip
