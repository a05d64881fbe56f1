"""The Open Inference Protocol: our descriptor is that of its file, and its methods answer, also for a client in JavaScript."""

import asyncio
import json
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from kernelm.testing.parts import absent
from kernelm_contracts.data import Redacted, RedactRequest
from kernelm_contracts.server import InfoRequest, ServerInfo
from kernelm_gateway import open_inference, protobuf
from kernelm_gateway.grpc_api import start_grpc
from kernelm_sdk.errors import ClientFault

HERE = Path(__file__).parent
PROTO = HERE.parent / "kernelm_gateway" / "open_inference.proto"
CLIENT = HERE / "inference_client.mjs"
PACKAGES = {"@grpc/grpc-js": "1.14.7", "@grpc/proto-loader": "0.8.1"}
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
async def address(bus: Any, gate: Any) -> AsyncIterator[str]:
    def info(request: InfoRequest, model: str) -> ServerInfo:
        return ServerInfo(model, 3, DIGEST, ("classify", "embed", "generate"))

    bus.answers["server/1.info"] = info
    server, port = await start_grpc(gate, "127.0.0.1", 0)
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def call(address: str, auth: Any) -> AsyncIterator[Any]:
    service = protobuf.make_pool([open_inference.describe()]).FindServiceByName(open_inference.SERVICE)
    async with grpc.aio.insecure_channel(address) as channel:
        async def one(method: str, key: bool = True, said: dict[str, str] | None = None, **fields: Any) -> Any:
            described = service.methods_by_name[method]
            taken, given = map(message_factory.GetMessageClass, (described.input_type, described.output_type))
            stub = channel.unary_unary(f"/{open_inference.SERVICE}/{method}", taken.SerializeToString, given.FromString)
            metadata = tuple({**({"authorization": auth()} if key else {}), **(said or {})}.items())
            return await stub(taken(**fields), metadata=metadata, timeout=10)

        yield one


def texts(*values: str) -> list[dict[str, Any]]:
    contents = {"bytes_contents": [value.encode() for value in values]}
    return [{"name": "text", "datatype": "BYTES", "shape": [len(values)], "contents": contents}]


def test_the_descriptor_is_that_of_the_file(tmp_path: Path) -> None:
    out = tmp_path / "set.pb"
    assert protoc.main(["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={out}", str(PROTO)]) == 0
    compiled = FileDescriptorSet.FromString(out.read_bytes()).file[0]

    def plain(message: Any, prefix: str = "") -> dict[str, Any]:
        fields = [(f.name, f.number, f.label, f.type, f.type_name, f.HasField("oneof_index")) for f in message.field]
        found = {prefix + message.name: (fields, message.options.map_entry)}
        for nested in message.nested_type:
            found |= plain(nested, f"{prefix}{message.name}.")
        return found

    def messages(file: FileDescriptorProto) -> list[dict[str, Any]]:
        return [plain(message) for message in file.message_type]

    ours = open_inference.describe()
    assert messages(ours) == messages(compiled)
    assert (ours.package, list(ours.service)) == (compiled.package, list(compiled.service))


async def test_live_ready_and_metadata(call: Any, bus: Any) -> None:
    assert (await call("ServerLive", key=False)).live
    assert (await call("ServerReady", key=False)).ready
    assert (await call("ServerMetadata", key=False)).name == "kernelm"
    assert (await call("ModelReady", name="news")).ready
    assert not (await call("ModelReady", name="gone")).ready
    found = await call("ModelMetadata", name="news")
    assert (found.name, list(found.versions), found.inputs[0].datatype) == ("news", ["3"], "BYTES")
    assert [o.name for o in found.outputs] == ["label", "score", "embedding", "text", "finish_reason", "prompt_tokens",
                                               "completion_tokens"]  # fmt: skip
    bus.connected = False
    assert not (await call("ServerReady", key=False)).ready


async def test_classify_embed_and_generate(call: Any, bus: Any) -> None:
    found = await call("ModelInfer", model_name="news", id="7", inputs=texts("a", "b"))
    assert (found.model_name, found.model_version, found.id) == ("news", "3", "7")
    assert found.parameters["artifact"].string_param == DIGEST
    label, score = found.outputs
    assert (label.name, list(label.shape), list(label.contents.bytes_contents)) == ("label", [2, 2], [b"sport", b"business"] * 2)
    assert (score.datatype, list(score.contents.fp64_contents)) == ("FP64", [0.75, 0.25] * 2)
    found = await call("ModelInfer", model_name="news", inputs=texts("a"), outputs=[{"name": "embedding"}],
                       parameters={"method": {"string_param": "embed"}})  # fmt: skip
    assert list(found.outputs[0].contents.fp32_contents) == pytest.approx([0.6, -0.8])
    wanted = {"method": {"string_param": "generate"}, "max_tokens": {"int64_param": 5}, "temperature": {"int64_param": 1}}
    found = await call("ModelInfer", model_name="news", inputs=texts("a"), parameters=wanted)
    assert [o.contents.bytes_contents[0] for o in found.outputs[:2]] == [b"w0w1", b"stop"]
    assert [o.contents.int64_contents[0] for o in found.outputs[2:]] == [3, 2]
    asked = bus.calls[-1][2]
    assert (asked.prompt, asked.max_tokens, asked.temperature, asked.stream) == ("a", 5, 1.0, False)


async def test_what_is_private_is_redacted_here_too(call: Any, bus: Any) -> None:
    def redact(request: RedactRequest, _: str) -> Redacted:
        return Redacted(tuple(text.replace("Ada", "[NAME]") for text in request.texts), ({},) * len(request.texts))

    bus.answers["data/1.redact"] = redact
    await call("ModelInfer", model_name="news", inputs=texts("Ada won"), said={"kernelm-redact": "prompt"})
    assert bus.of_models[-1][2].input == ("[NAME] won",)
    wanted = {"method": {"string_param": "generate"}}
    await call("ModelInfer", model_name="news", inputs=texts("Ada"), parameters=wanted, said={"kernelm-redact": "prompt"})
    assert bus.calls[-1][2].prompt == "[NAME]"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call("ModelInfer", model_name="news", inputs=texts("Ada"), said={"kernelm-redact": "all of it"})
    assert caught.value.code().name == "INVALID_ARGUMENT"
    assert len(bus.of_models) == 3, "the last one did not reach a model"


async def test_a_models_first_method_is_asked_for_once_a_generation(call: Any, bus: Any) -> None:
    async def infer() -> None:
        await call("ModelInfer", model_name="news", inputs=texts("a"))

    await infer()
    await infer()
    assert [name for name, *_ in bus.of_models] == ["server/1.info", "server/1.classify", "server/1.classify"]
    bus.answers["server/1.classify"] = lambda request, model: ClientFault("unsupported_method", "it only embeds now")
    bus.answers["server/1.info"] = lambda request, model: ServerInfo(model, 4, DIGEST, ("embed",))
    await infer()
    assert [name for name, *_ in bus.of_models[3:]] == ["server/1.classify", "server/1.info", "server/1.embed"]
    await infer()  # that embedding was generation 3's answer: asked again
    assert [name for name, *_ in bus.of_models[6:]] == ["server/1.info", "server/1.embed"]


async def test_raw_contents_are_answered_raw(call: Any) -> None:
    tensor = [{"name": "text", "datatype": "BYTES", "shape": [2, 1]}]
    raw = b"".join(struct.pack("<I", len(t)) + t for t in (b"one", "zw\u00f6lf".encode()))
    found = await call("ModelInfer", model_name="news", inputs=tensor, raw_input_contents=[raw])
    labels, scores = found.raw_output_contents
    assert labels == (struct.pack("<I", 5) + b"sport" + struct.pack("<I", 8) + b"business") * 2
    assert struct.unpack("<4d", scores) == (0.75, 0.25, 0.75, 0.25)


@pytest.mark.parametrize(("fields", "code", "what"), [
    ({"inputs": []}, "INVALID_ARGUMENT", "0 tensors"), ({"inputs": texts("a") * 2}, "INVALID_ARGUMENT", "2 tensors"),
    ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}, "INVALID_ARGUMENT", "datatype"),
    ({"inputs": [{**texts("a")[0], "shape": [3]}]}, "INVALID_ARGUMENT", "shape"),
    ({"inputs": [{"datatype": "BYTES", "shape": [1]}], "raw_input_contents": [b"\x09\0\0\0a"]}, "INVALID_ARGUMENT", "middle"),
    ({"inputs": [{"datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"\xff"]}}]}, "INVALID_ARGUMENT", "utf-8"),
    ({"inputs": texts("a"), "parameters": {"wibble": {"bool_param": True}}}, "INVALID_ARGUMENT", "wibble"),
    ({"inputs": texts("a"), "parameters": {"top": {"string_param": "x"}}}, "INVALID_ARGUMENT", "top"),
    ({"inputs": texts("a"), "parameters": {"method": {"string_param": "fly"}}}, "UNIMPLEMENTED", "fly"),
    ({"inputs": texts("a"), "outputs": [{"name": "colour"}]}, "INVALID_ARGUMENT", "colour"),
    ({"inputs": texts("a"), "model_version": "9"}, "FAILED_PRECONDITION", "generation 3"),
    ({"inputs": texts("a"), "model_name": "../x"}, "NOT_FOUND", "no model"),
    ({"inputs": texts("a"), "key": False}, "UNAUTHENTICATED", "no API key"),
])  # fmt: skip
async def test_what_is_refused(call: Any, fields: dict[str, Any], code: str, what: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call("ModelInfer", **{"model_name": "news", **fields})
    assert caught.value.code().name == code
    assert what in str(caught.value.details())


async def test_a_client_in_javascript(address: str, auth: Any) -> None:
    """From the .proto file alone, with gRPC's own library for Node.js."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        absent(f"needs {' and '.join(missing)}: apt-get install nodejs npm")
    folder = Path(__file__).parents[3] / "build" / "thirdparty" / "inference-client"
    folder.mkdir(parents=True, exist_ok=True)
    wanted, stamp = json.dumps({"private": True, "dependencies": PACKAGES}), folder / "installed.json"
    if not stamp.exists() or stamp.read_text() != wanted:
        (folder / "package.json").write_text(wanted)
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"]
        await asyncio.to_thread(subprocess.run, install, cwd=folder, check=True, timeout=240)
        stamp.write_text(wanted)
    shutil.copy(CLIENT, folder)
    command = ["node", str(folder / CLIENT.name), str(PROTO), address, auth()]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said == {"live": True, "labels": ["sport", "business"], "version": "3", "refused": [16, "no API key was given"]}
