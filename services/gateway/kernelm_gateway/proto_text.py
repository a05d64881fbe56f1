"""The text of a .proto file from its descriptor; protoc reads it back to the same descriptor."""

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, ServiceDescriptorProto

NAMES = {
    FieldDescriptorProto.TYPE_INT64: "int64", FieldDescriptorProto.TYPE_DOUBLE: "double",
    FieldDescriptorProto.TYPE_STRING: "string", FieldDescriptorProto.TYPE_BOOL: "bool",
}  # fmt: skip
Comments = dict[tuple[int, ...], str]


def render(file: FileDescriptorProto, origin: str) -> str:
    """The file as proto3 source. `origin` is the first line's comment: what it was derived from."""
    comments: Comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    lines = [f"// {origin}", f'syntax = "{file.syntax}";', "", f"package {file.package};"]
    lines += ["", *(f'import "{name}";' for name in file.dependency)] if file.dependency else []
    for index, service in enumerate(file.service):
        lines += ["", *_service(service, index, file.package, comments)]
    for index, message in enumerate(file.message_type):
        lines += ["", *_message(message, index, file.package, comments)]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}// {line}".rstrip() for line in text.splitlines()]


def _service(service: ServiceDescriptorProto, index: int, package: str, comments: Comments) -> Iterator[str]:
    yield from _comment(comments.get((6, index), ""))
    names = {method.name for method in service.method}

    def of(type_name: str) -> str:
        short = _short(type_name, package)
        return type_name if short in names else short  # within a service the method of that name would be found first

    yield f"service {service.name} {{"
    for number, method in enumerate(service.method):
        yield from _comment(comments.get((6, index, 2, number), ""), "  ")
        stream = "stream " if method.server_streaming else ""
        yield f"  rpc {method.name}({of(method.input_type)}) returns ({stream}{of(method.output_type)});"
    yield "}"


def _message(message: DescriptorProto, index: int, package: str, comments: Comments) -> Iterator[str]:
    yield from _comment(comments.get((4, index), ""))
    if not message.field:
        yield f"message {message.name} {{}}"
        return
    yield f"message {message.name} {{"
    for number, field in enumerate(message.field):
        comment = comments.get((4, index, 2, number), "")
        yield f"  {_field(field, message, package)};" + (f"  // {comment}" if comment else "")
    yield "}"


def _field(field: FieldDescriptorProto, message: DescriptorProto, package: str) -> str:
    entries = {f".{package}.{message.name}.{nested.name}": nested for nested in message.nested_type}
    if (entry := entries.get(field.type_name)) is not None:
        key, value = (_type(part, package) for part in entry.field)
        kind = f"map<{key}, {value}>"
    else:
        kind = _type(field, package)
        if field.proto3_optional:
            kind = f"optional {kind}"
        elif field.label == FieldDescriptorProto.LABEL_REPEATED:
            kind = f"repeated {kind}"
    return f"{kind} {field.name} = {field.number}"


def _type(field: FieldDescriptorProto, package: str) -> str:
    return _short(field.type_name, package) if field.type_name else NAMES[field.type]


def _short(name: str, package: str) -> str:
    return name.removeprefix(f".{package}.").lstrip(".")
