"""What is needed is known before a model is loaded, and never more than granted is planned."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kernelm_generator.loading import load
from kernelm_generator.memory import Shape, needed_mb, plan, shape_of
from kernelm_generator.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault

LOG = logging.getLogger("test")
SHAPE = Shape(500_000_000, 2, 32_768, 128_000, 8192)


def test_sizes_are_read_from_headers_and_config(tiny: Path) -> None:
    shape = shape_of(tiny, AutoConfig.from_pretrained(tiny), 2)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).cache
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.bytes_per_token == held / 3
    assert (shape.vocabulary, shape.positions) == (258, 512)


def test_slots_and_prefixes_follow_the_memory() -> None:
    settings = Settings()
    free, least = plan(SHAPE, settings, 0), needed_mb(SHAPE, 1, 2048, 0, 1024)
    assert (free.context, free.max_tokens, free.slots, free.prefix_tokens) == (2048, 1024, 8, 8192)
    for granted in range(least, free.needed_mb + 10):
        planned = plan(SHAPE, settings, granted)
        assert planned.needed_mb <= granted
        assert 1 <= planned.slots <= 8
    assert plan(SHAPE, settings, free.needed_mb) == free
    assert (planned := plan(SHAPE, settings, least)).slots == 1
    assert planned.prefix_tokens <= 2**20 // SHAPE.bytes_per_token
    with pytest.raises(PluginFault) as caught:
        plan(SHAPE, settings, least - 1)
    assert (caught.value.code, caught.value.details) == ("out_of_memory", {"needed_mb": least})
    assert plan(SHAPE, Settings(context=512, slots=1, prefix_tokens=0), 0).needed_mb < least


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ClientFault, match="8192"):
        plan(SHAPE, Settings(context=10_000), 0)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_broken_file_is_named(data: bytes, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ClientFault, match=r"model\.safetensors"):
        shape_of(tmp_path, AutoConfig.from_pretrained(tiny), 2)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_memory_of_an_encoder_decoder_is_known_before_the_model_is_loaded(kind: str, seq2seq: Any, tmp_path: Path) -> None:
    folder = seq2seq(tmp_path, kind)
    model, plan = load(folder, Settings(precision="fp32", slots=2), 0, 1, LOG)
    shape = shape_of(folder, model.network.config, 4)
    with torch.inference_mode():
        rows, _ = model.room(plan, 256)
    own = sum(tensor.nbytes for tensor in rows._tensors())
    texts = sum(tensor.nbytes for tensor in rows.texts._held)  # type: ignore[attr-defined]
    assert own + texts == 2 * (plan.context + plan.max_tokens + 1 + 256) * shape.bytes_per_token
    assert 0 <= shape.parameters - model.parameters <= 258  # BART's file has a bias for each token, which is no parameter
    assert (shape.encoder_heads, plan.prefix_tokens) == (4, 0)
    assert shape.positions == (256 if kind == "bart" else 0)
    least = needed_mb(shape, 1, plan.context, 0, plan.max_tokens)
    with pytest.raises(PluginFault, match=f"needs {least} MB"):
        load(folder, Settings(precision="fp32"), least - 1, 1, LOG)
