"""The RPCs and messages, from the descriptors of the protocol and the comments in its files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from fedgrpc.identity.access import ROLES
from fedgrpc.identity.roles import Role

PROTOS = Path(__file__).resolve().parent.parent.parent / "protos"
HEAD = """# RPCs

Package `fedgrpc.v1`. Every RPC with its error conditions, who may call it, and every field.
[The wire format](../../protos/WIRE.md) says what the bytes of a payload mean. Both together are enough to write a
worker in another language.

"""
# Numbers of fields in descriptor.proto, of which the paths of comments are made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_FIELD, _NESTED, _NESTED_ENUM, _METHOD, _VALUE = 2, 3, 4, 2, 2
Paths = dict[tuple[int, ...], str]


def page() -> str:
    described = sorted(_descriptors(), key=lambda each: not each.service)
    services = [
        f"[`{service.name}`](#service-{service.name.lower()})" for each in described for service in each.service
    ]
    return HEAD + f"Services: {', '.join(services)}.\n" + "".join(_file(each) for each in described)


def _descriptors() -> list[FileDescriptorProto]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
        command = ["protoc", f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}", "--include_source_info"]
        if protoc.main([*command, f"--descriptor_set_out={target}", *sources]) != 0:
            raise RuntimeError("protoc failed")
        return list(FileDescriptorSet.FromString(target.read_bytes()).file)


def _file(file: FileDescriptorProto) -> str:
    comments = {
        tuple(place.path): _comment(place.leading_comments or place.trailing_comments)
        for place in file.source_code_info.location
    }
    parts = [_service(each, (_SERVICE, i), comments) for i, each in enumerate(file.service)]
    if file.message_type or file.enum_type:
        parts.append(f"\n## Messages of {Path(file.name).name}\n")
    for name, message, path in _messages(file):
        parts.append(_message(name, message, path, comments))
    for name, enum, path in _enums(file):
        parts.append(_enum(name, enum, path, comments))
    return "".join(parts)


def _service(service: ServiceDescriptorProto, path: tuple[int, ...], comments: Paths) -> str:
    text = f"\n## Service {service.name}\n\n{_paragraphs(comments.get(path, ''))}"
    for i, method in enumerate(service.method):
        roles = ROLES.get(f"/fedgrpc.v1.{service.name}/{method.name}", frozenset())
        who = ", ".join(role for role in Role if role in roles) or "callers on the device"
        asked = ("stream of " if method.client_streaming else "") + _link(method.input_type)
        answered = ("stream of " if method.server_streaming else "") + _link(method.output_type)
        text += f"\n### {service.name}.{method.name}\n\n{asked} → {answered}\n\nCallers: {who}.\n\n"
        text += _paragraphs(comments.get((*path, _METHOD, i), ""))
    return text


def _message(name: str, message: DescriptorProto, path: tuple[int, ...], comments: Paths) -> str:
    text = f"\n### {name}\n\n{_paragraphs(comments.get(path, ''))}"
    if not message.field:
        return text + "No fields.\n"
    rows = ["| no. | field | type | |", "| --: | --- | --- | --- |"]
    for i, field in enumerate(message.field):
        about = " ".join(comments.get((*path, _FIELD, i), "").split()).replace("|", "\\|")
        rows.append(f"| {field.number} | `{field.name}` | {_type(field, message)} | {about} |")
    return text + "\n" + "\n".join(rows) + "\n"


def _enum(name: str, enum: EnumDescriptorProto, path: tuple[int, ...], comments: Paths) -> str:
    rows = ["| no. | value | |", "| --: | --- | --- |"]
    for i, value in enumerate(enum.value):
        about = " ".join(comments.get((*path, _VALUE, i), "").split()).replace("|", "\\|")
        rows.append(f"| {value.number} | `{value.name}` | {about} |")
    return f"\n### {name}\n\n{_paragraphs(comments.get(path, ''))}\n" + "\n".join(rows) + "\n"


def _messages(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto, tuple[int, ...]]]:
    for i, message in enumerate(file.message_type):
        yield message.name, message, (_MESSAGE, i)
        for j, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield f"{message.name}.{nested.name}", nested, (_MESSAGE, i, _NESTED, j)


def _enums(file: FileDescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto, tuple[int, ...]]]:
    for i, enum in enumerate(file.enum_type):
        yield enum.name, enum, (_ENUM, i)
    for i, message in enumerate(file.message_type):
        for j, nested in enumerate(message.enum_type):
            yield f"{message.name}.{nested.name}", nested, (_MESSAGE, i, _NESTED_ENUM, j)


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
            key, value = (_plain(each) for each in nested.field)
            return f"map of {key} to {value}"
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    oneof = field.HasField("oneof_index") and not field.proto3_optional
    words = ["repeated"] * repeated + ["optional"] * field.proto3_optional
    choice = f", one of `{message.oneof_decl[field.oneof_index].name}`" if oneof else ""
    return " ".join([*words, _plain(field)]) + choice


def _plain(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(full_name: str) -> str:
    """Return a link to a message of ours, and the bare name of one of Google's."""
    name = full_name.removeprefix(".fedgrpc.v1.")
    if name == full_name:
        return f"`{full_name.removeprefix('.')}`"
    return f"[`{name}`](#{name.lower().replace('.', '')})"


def _comment(text: str) -> str:
    return "\n".join(line.removeprefix(" ") for line in text.rstrip().splitlines())


def _paragraphs(text: str) -> str:
    """Return a comment as Markdown: what looks like a tag or a list of it is text."""
    return text.replace("<", "&lt;") + "\n" if text else ""
