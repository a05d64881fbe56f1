"""The handlers, with artifacts from a folder instead of the store."""

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import kernelm_generator
from kernelm_contracts.server import EmbedRequest, GenerateFrame, GenerateRequest, InfoRequest, Message, Tool
from kernelm_generator.plugin import GeneratorPlugin
from kernelm_generator.seq2seq import Seq2Seq
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import MANIFEST, Call, load_plugin, read_manifest

DIGEST = "sha256:" + "ab" * 32
CALL = Call("tester", "chat")
MODEL = {"name": "chat", "artifact": DIGEST, "generation": 3}


class Shelf:
    """The part of `Context` that the handlers use."""

    pool, threads, memory_mb = "g3", 1, 0
    log = logging.getLogger("test")

    def __init__(self, folder: Path, memory_mb: int = 0) -> None:
        self.folder, self.memory_mb, self.events = folder, memory_mb, list[Event]()

    async def publish(self, event: Event) -> None:
        self.events.append(event)

    async def artifact(self, digest: str) -> Path:
        assert digest == DIGEST
        return self.folder


@asynccontextmanager
async def serving(folder: Path, memory_mb: int = 0, **settings: Any) -> AsyncIterator[GeneratorPlugin]:
    manifest = read_manifest(Path(kernelm_generator.__path__[0]) / MANIFEST)
    plugin = load_plugin(manifest, Shelf(folder, memory_mb), {"model": MODEL, "precision": "fp32", **settings})  # type: ignore[arg-type]
    assert isinstance(plugin, GeneratorPlugin)
    await plugin.on_start()
    try:
        yield plugin
    finally:
        await plugin.on_stop()


async def answer(plugin: GeneratorPlugin, call: Call = CALL, **request: Any) -> tuple[str, GenerateFrame]:
    frames = [frame async for frame in plugin.generate(GenerateRequest(**{"temperature": 0.0, **request}), call)]
    assert not any(frame.finish_reason or frame.usage for frame in frames[:-1])
    return "".join(frame.text for frame in frames), frames[-1]


async def test_a_chat_is_what_the_template_makes_of_it(tiny: Path) -> None:
    async with serving(tiny) as plugin:
        assert [event.fraction for event in plugin.context.events] == [0.0, 0.2, 1.0]  # type: ignore[attr-defined]
        chat, last = await answer(plugin, messages=(Message("system", "Be brief."), Message("user", "Hi")), max_tokens=20)
        text = "<system>Be brief.<user>Hi<assistant>"
        assert (chat, last.usage.prompt_tokens) == ((await answer(plugin, prompt=text, max_tokens=20))[0], len(text))
        assert (last.finish_reason, last.model, last.generation, last.artifact) == ("length", "chat", 3, DIGEST)
        assert 0 < last.first_ms <= last.took_ms
        waits = GenerateRequest(prompt=text, max_tokens=20, temperature=0.0, stream=False)
        assert [frame.text async for frame in plugin.generate(waits, CALL)] == ["", chat, ""]
        again = await answer(plugin, messages=(Message("system", "Be brief."), Message("user", "Hi")), max_tokens=20)
        assert (again[0], again[1].usage.cached_tokens) == (chat, len(text) - 1)
        with pytest.raises(ClientFault, match="no tools"):
            await answer(plugin, messages=(Message("tool", "x"),))
        info = await plugin.info(InfoRequest(), CALL)
        assert (info.methods, info.context_tokens, info.max_tokens) == (("embed", "generate"), 512, 256)


async def test_what_cannot_be_honoured_is_refused_by_name(tiny: Path) -> None:
    async with serving(tiny) as plugin:
        for wrong in ({"schema": {"type": "object"}}, {"tools": (Tool("f"),)}, {"adapter": DIGEST}, {"tool_choice": "none"}):
            with pytest.raises(ClientFault, match=next(iter(wrong))) as caught:
                await answer(plugin, prompt="x", **wrong)
            assert caught.value.code == "unsupported_parameter"
        for wrong, code in (({"prompt": "x" * 600}, "too_large"), ({"prompt": "x" * 400, "max_tokens": 200}, "too_large"),
                            ({"prompt": "word " * 10_000_000}, "too_large"), ({"prompt": "x", "top_k": -1}, "invalid"),
                            ({"prompt": "x", "presence_penalty": 3.0}, "invalid"), ({"prompt": "x", "max_tokens": 257}, "invalid"),
                            ({"prompt": "x", "model": "other"}, "unknown_model"),
                            ({"prompt": "x", "at_least": 4}, "stale_generation")):  # fmt: skip
            with pytest.raises(ClientFault) as caught:
                await answer(plugin, Call("tester"), **wrong)
            assert caught.value.code == code
        text, _ = await answer(plugin, prompt="x" * 505)  # what the context leaves
        assert len(text) == 7


async def test_a_deadline_ends_the_answer(tiny: Path) -> None:
    async with serving(tiny) as plugin:
        call = Call("tester", "chat", {"Kernelm-Deadline": str(time.time() + 0.05)})
        with pytest.raises(Fault) as caught:
            await answer(plugin, call, prompt="x", max_tokens=256)
        assert (caught.value.code, caught.value.retriable) == ("timeout", True)


async def test_embeddings_are_the_mean_of_the_last_states(tiny: Path) -> None:
    async with serving(tiny) as plugin:
        reply = await plugin.embed(EmbedRequest(("one", "two words")), CALL)
        with torch.inference_mode():
            states = plugin._model.network.model(torch.tensor([plugin._model.cut("one", 512)])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(reply.embeddings[0], states / states.norm(), atol=1e-5)
    assert reply.tokens == 12


def integers_of_others(folder: Path) -> None:
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    config |= {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))


async def test_a_model_that_does_not_fit_is_not_loaded(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Fault, match="are granted") as caught:
        async with serving(tiny, memory_mb=300):
            pass
    assert (caught.value.code, caught.value.details["needed_mb"] > 300) == ("out_of_memory", True)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"x"), "unsafe_file", "optimizer.pt"),
        (lambda folder: (folder / "model.gguf").write_bytes(b"GGUF"), "invalid_model", "model.gguf: a GGUF is read by llama.cpp"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "invalid_model", "tokenizer.json: the file is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "invalid_model", "model.safetensors: the file is missing"),
        (integers_of_others, "invalid_model", "of compressed-tensors, which vLLM reads"),
        (lambda folder: (folder / "config.json").write_text("{"), "invalid_model", "config.json: transformers can't load it"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bloom"}'), "invalid_model", "takes no positions"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), "invalid_model", "no causal language model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "m2m_100"}'), "invalid_model", "it can bart, marian"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "whisper"}'), "invalid_model", "it can bart, marian"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}'),
            "invalid_model",
            "ByT5Tokenizer does not use tokenizer.json",
        ),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "mamba"}'), "invalid_model", "mamba"),
    ],
)
async def test_what_is_no_model_is_refused_by_file(spoil: Any, code: str, words: str, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ClientFault, match=words) as caught:
        async with serving(tmp_path / "model"):
            pass
    assert caught.value.code == code


async def test_callers_who_leave_are_forgotten(tiny: Path) -> None:
    async with serving(tiny, slots=2) as plugin:
        calls = [asyncio.create_task(answer(plugin, prompt=f"{k}", max_tokens=256)) for k in range(6)]
        await asyncio.sleep(0)
        for call in calls[1:]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await answer(plugin, prompt="x", max_tokens=2)
        assert plugin._engine is not None
        assert plugin._engine._accepted == 0


async def test_a_text_is_answered_by_the_handlers(translator: Path) -> None:
    async with serving(translator, context=128) as plugin:
        assert isinstance(plugin._model, Seq2Seq)
        said, last = await answer(plugin, prompt="one two three", max_tokens=20)
        text = torch.tensor([plugin._model.cut("one two three", 99)])
        ids = plugin._model.network.generate(text, max_new_tokens=20)[0, 1:].tolist()
        assert said == plugin._model.tokens.decode(ids)
        assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.finish_reason) == (13, 20, "length")
        again, _ = await answer(plugin, prompt="one two three", max_tokens=20, stop=(said[3:6],))
        assert again == said[: said.find(said[3:6])]
        pieces = [f async for f in plugin.generate(GenerateRequest(prompt="one two three", max_tokens=20, temperature=0.0), CALL)]
        assert len([piece for piece in pieces if piece.text]) > 1
        info = await plugin.info(InfoRequest(), CALL)
        assert (info.methods, info.context_tokens, info.max_tokens) == (("embed", "generate"), 128 + 64, 64)
        full, _ = await answer(plugin, prompt="x" * 128, max_tokens=64)  # text and answer are bounded each by itself
        assert full
        for wrong, code in (({"prompt": "x" * 129}, "too_large"), ({"prompt": "x", "max_tokens": 65}, "invalid"),
                            ({"messages": (Message("tool", "x"),)}, "invalid")):  # fmt: skip
            with pytest.raises(ClientFault) as caught:
                await answer(plugin, **wrong)
            assert caught.value.code == code
        reply = await plugin.embed(EmbedRequest(("one",)), CALL)
        with torch.inference_mode():
            states = plugin._model.network.encoder(torch.tensor([plugin._model.cut("one", 128)])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(reply.embeddings[0], states / states.norm(), atol=1e-5)
