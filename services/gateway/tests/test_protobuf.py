"""The mapping from contracts to proto3: against protoc, against fixed expectations, and there and back."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from kernelm_contracts.jobs import Jobs, JobSpec
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label
from kernelm_contracts.trainer import ModelCard, Scores
from kernelm_gateway import proto_text, protobuf
from kernelm_gateway.messages import Codec
from kernelm_sdk.contract import CONTRACTS, Contract, streamed, unary

OURS = [c for c in CONTRACTS.values() if c.__module__.startswith(("kernelm_contracts", "kernelm_sdk"))]


class Leaf(msgspec.Struct, frozen=True):
    name: str = ""


class Everything(msgspec.Struct, frozen=True, rename={"with_": "with"}):
    """All forms that a field may take."""

    text: str  # UTF-8
    number: int
    ratio: float
    flag: bool
    choice: Literal["a", "b"]
    leaf: Leaf
    leaves: tuple[Leaf, ...]
    words: list[str]
    matrix: tuple[tuple[float, ...], ...]
    rows: tuple[tuple[Leaf, ...], ...]
    counts: dict[str, int]
    by_name: dict[str, Leaf]
    table: dict[str, dict[str, float]]
    lists: dict[str, tuple[str, ...]]
    free: dict[str, Any]
    frees: tuple[dict[str, Any], ...]
    anything: Any
    raw: msgspec.Raw
    with_: str = "x"
    maybe: int | None = None
    other: Leaf | None = None
    size: int = 16


@pytest.fixture
def probe() -> Iterator[type[Contract]]:
    class Probe(Contract, name="probe-test", major=2):
        """Says it back."""

        @unary
        async def say_back(self, request: Everything, call: Any) -> Everything:
            """Once.
            In two lines."""
            ...

        @streamed
        async def repeat(self, request: Leaf, call: Any) -> AsyncIterator[Leaf]: ...

    yield Probe
    del CONTRACTS[Probe.id()]


def codec(contract: type[Contract], struct: type[msgspec.Struct]) -> Codec:
    pool = protobuf.make_pool([protobuf.describe(contract)])
    descriptor = pool.FindMessageTypeByName(f"{protobuf.package(contract)}.{struct.__name__}")
    return Codec(struct, message_factory.GetMessageClass(descriptor))


def compiled(folder: Path, contracts: list[type[Contract]]) -> dict[str, FileDescriptorProto]:
    """What protoc makes of the rendered text."""
    for contract in contracts:
        (folder / protobuf.file_name(contract)).write_text(proto_text.render(protobuf.describe(contract), "test"))
    names = [protobuf.file_name(c) for c in contracts]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={folder / 'set'}", *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {f.name: f for f in FileDescriptorSet.FromString((folder / "set").read_bytes()).file}


def without_comments_and_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    plain = FileDescriptorProto.FromString(file.SerializeToString())
    plain.ClearField("source_code_info")
    for message in plain.message_type:
        for part in [message, *message.nested_type]:
            for field in part.field:
                field.ClearField("json_name")  # protoc writes out the default
    return plain


def test_protoc_reads_the_text_back_to_the_same_descriptors(tmp_path: Path, probe: type[Contract]) -> None:
    contracts = [c for c in [*OURS, probe] if protobuf.callable_methods(c)]
    files = compiled(tmp_path, contracts)
    assert len(files) == len(contracts) >= 10
    for contract in contracts:
        ours = without_comments_and_json_names(protobuf.describe(contract))
        assert without_comments_and_json_names(files[ours.name]) == ours, ours.name


def test_text(probe: type[Contract]) -> None:
    text = proto_text.render(protobuf.describe(probe), "where it comes from")
    assert text.startswith('// where it comes from\nsyntax = "proto3";\n\npackage kernelm.probe_test.v2;\n')
    assert "  // Once.\n  // In two lines.\n  rpc SayBack(Everything) returns (Everything);\n" in text
    assert "  rpc Repeat(Leaf) returns (stream Leaf);\n" in text
    for line in ("string text = 1;  // UTF-8", "int64 number = 2;", "string choice = 5;", "repeated Leaf leaves = 7;",
                 "repeated DoubleRow matrix = 9;", "repeated LeafRow rows = 10;", "map<string, int64> counts = 11;",
                 "map<string, DoubleMap> table = 13;", "map<string, StringRow> lists = 14;",
                 "google.protobuf.Struct free = 15;", "repeated google.protobuf.Struct frees = 16;",
                 "google.protobuf.Value anything = 17;", "google.protobuf.Value raw = 18;", "optional string with = 19;",
                 "optional int64 maybe = 20;", "Leaf other = 21;", "optional int64 size = 22;"):  # fmt: skip
        assert f"  {line}\n" in text
    assert "message LeafRow {\n  repeated Leaf values = 1;\n}" in text


def test_job_methods_are_not_callable() -> None:
    server = protobuf.describe(CONTRACTS["server/1"])
    assert [m.name for m in server.service[0].method] == ["Classify", "Embed", "Extract", "Generate", "Info"]
    assert "MeasureRequest" not in {m.name for m in server.message_type}
    assert protobuf.callable_methods(CONTRACTS["optimizer/1"]) == []


def test_there_and_back(probe: type[Contract]) -> None:
    value = Everything("é", -(2**53), 0.1, True, "b", Leaf("l"), (Leaf("1"), Leaf()), ["a", ""],
                       ((1.0, 2.0), ()), ((Leaf("r"),), ()), {"a": 2**62}, {"x": Leaf()},
                       {"t": {"u": 1.5}, "empty": {}}, {"l": ("p", "q")},
                       {"n": 2, "f": 2.5, "deep": [{"z": None}]}, ({"a": True},), [1, "two"], msgspec.Raw(b'{"k":[1,2]}'),
                       "", None, Leaf("o"), 0)  # fmt: skip
    both = codec(probe, Everything)
    back = both.read(both.message.FromString(both.write(value).SerializeToString()))
    assert msgspec.json.encode(back, order="sorted") == msgspec.json.encode(value, order="sorted")
    assert back.number == -(2**53)
    assert back.size == 0, "a zero that was sent is not the default"


def test_what_is_left_out_takes_the_default(probe: type[Contract]) -> None:
    both = codec(CONTRACTS["server/1"], ClassifyRequest)
    assert both.read(both.message(input=["a"])) == ClassifyRequest(("a",), "", 0, 0)
    assert codec(probe, Leaf).read(codec(probe, Leaf).message()) == Leaf()
    jobs = codec(Jobs, JobSpec)
    assert jobs.read(jobs.message(name="n", uses="u", request={})).attempts == 3


def test_what_is_not_valid_is_refused_with_its_place(probe: type[Contract]) -> None:
    jobs = codec(Jobs, JobSpec)
    with pytest.raises(msgspec.ValidationError, match="missing required field `request`"):
        jobs.read(jobs.message(name="n", uses="u"))
    both = codec(probe, Everything)
    message = both.message(choice="c", leaf={}, free={}, anything={}, raw={})
    with pytest.raises(msgspec.ValidationError, match=r"Invalid enum value 'c' - at `\$.choice`"):
        both.read(message)


def test_of_the_contracts() -> None:
    both = codec(CONTRACTS["server/1"], ClassifyReply)
    reply = ClassifyReply("news", 3, "sha256:00", ((Label("a", 0.25), Label("b", 0.75)), ()), 7, 1.5)
    message = both.write(reply)
    assert message.results[0].values[1].label == "b"
    assert both.read(message) == reply
    card = ModelCard("m", "text-classification", "encoder", ("a", "b"), 256, request={"epochs": 2},
                     scores={"test": Scores("test", 9, 1.0, 1.0, 1.0, 0.0, {"a": {"f1": 1.0}}, ((9, 0), (0, 0)))})  # fmt: skip
    both = codec(CONTRACTS["trainer/1"], ModelCard)
    assert both.read(both.write(card)) == card


def declared(kind: Any) -> type[msgspec.Struct]:
    return msgspec.defstruct("Odd", [("odd", kind)], module=__name__)


@pytest.mark.parametrize("kind", [bytes, int | str, set[int], dict[str, int | str]])
def test_a_type_without_a_form_is_named(kind: Any) -> None:
    file = protobuf._File(CONTRACTS["server/1"])
    with pytest.raises(TypeError, match=r"\.Odd\.odd: .*no form in proto3"):
        file.message(declared(kind))
