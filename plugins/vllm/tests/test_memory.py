"""What is asked for before a load, from files alone; no vLLM."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_vllm.memory import LIBRARIES_MB, MB, Shape, base_mb, base_of, plan, require_servable, shape_of
from kernelm_vllm.settings import Settings

CONFIG: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64,
                          "vocab_size": 1000, "max_position_embeddings": 4096}  # fmt: skip
SHAPE = Shape(weights=500 * MB, bytes_per_token=64 * 1024, vocabulary=32_000, hidden=1024, layers=16, positions=8192)


def write(folder: Path, tensors: dict[str, list[int]], **changes: Any) -> Path:
    described = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    header = json.dumps(described).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_sizes_come_from_headers_and_config(tmp_path: Path) -> None:
    shape = shape_of(write(tmp_path, {"a": [1000, 64], "b": [64]}), "bfloat16")
    assert shape.weights == 2 * (64_000 + 64)
    assert shape.bytes_per_token == 2 * 2 * 1 * 16 * 2  # keys and values, layers, heads, head's size, bytes
    assert shape_of(tmp_path, "float32").bytes_per_token == 2 * shape.bytes_per_token
    nested = write(tmp_path, {"a": [10]}, text_config={"num_hidden_layers": 4})
    assert shape_of(nested, "auto").bytes_per_token == 2 * shape.bytes_per_token


def test_quantized_weights_are_as_large_as_their_files(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": [1000]}, quantization_config={"quant_method": "fp8"})
    assert shape_of(folder, "auto").weights == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "config.json").unlink(),
    lambda folder: (folder / "config.json").write_text("{}"),
    lambda folder: (folder / "config.json").write_text("[1]"),
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 30),
])  # fmt: skip
def test_a_folder_that_is_no_model_is_refused_by_file(tmp_path: Path, spoil: Any) -> None:
    spoil(write(tmp_path, {"a": [10]}))
    with pytest.raises(ClientFault, match=r"config\.json|model\.safetensors|\*\.safetensors") as caught:
        shape_of(tmp_path, "auto")
    assert caught.value.code == "invalid_model"


def test_a_model_with_a_head_of_our_own_is_not_served_without_it(tmp_path: Path) -> None:
    require_servable(tmp_path)
    (tmp_path / "model.json").write_text('{"structure": "causal-lm"}')
    require_servable(tmp_path)
    (tmp_path / "model.json").write_text('{"structure": "encoder"}')
    with pytest.raises(ClientFault, match="'encoder'"):
        require_servable(tmp_path)
    assert base_of(tmp_path) == ""
    (tmp_path / "model.json").write_text('{"base": "sha256:ab"}')
    assert base_of(tmp_path) == "sha256:ab"
    (tmp_path / "model.json").write_text("[1]")
    with pytest.raises(ClientFault, match=r"model\.json"):
        require_servable(tmp_path)


def test_the_cache_takes_what_the_grant_leaves_and_the_context_what_the_cache_holds() -> None:
    base = base_mb(SHAPE, Settings())
    assert base > LIBRARIES_MB + 500
    narrow, wide = plan(SHAPE, Settings(), base + 128, 0), plan(SHAPE, Settings(), base + 1024, 0)
    assert (narrow.cache_mb, narrow.needed_mb) == (128, base + 128)
    assert narrow.context == 128 * 16 - 64  # 64 KiB a token, two blocks are vLLM's own
    assert (wide.cache_mb, wide.context) == (1024, 8192)
    assert plan(SHAPE, Settings(), base + 100_000, 0).cache_mb == 4096
    assert plan(SHAPE, Settings(kv_cache_mb=256), base + 1024, 0).cache_mb == 256
    assert plan(SHAPE, Settings(), 0, base + 100_000).cache_mb == 1024  # nobody granted anything


def test_what_does_not_fit_is_refused_before_it_is_loaded() -> None:
    base = base_mb(SHAPE, Settings())
    with pytest.raises(PluginFault, match="are granted") as caught:
        plan(SHAPE, Settings(), base + 10, 0)
    assert caught.value.code == "out_of_memory"
    assert plan(SHAPE, Settings(), caught.value.details["needed_mb"], 0).needed_mb == caught.value.details["needed_mb"]
    with pytest.raises(PluginFault, match="are free on this machine"):
        plan(SHAPE, Settings(), 0, base)
    with pytest.raises(PluginFault, match=f"memory_mb = {base + 516}"):  # 8,192 tokens and two blocks of 64 KiB each
        plan(SHAPE, Settings(context=8192), base + 300, 0)
    with pytest.raises(ClientFault, match="`kv_cache_mb` to 516"):
        plan(SHAPE, Settings(context=8192, kv_cache_mb=100), base + 1024, 0)
    with pytest.raises(ClientFault, match="reads 8192 tokens"):
        plan(SHAPE, Settings(context=9000), base + 1024, 0)


def test_adapters_and_batches_are_counted() -> None:
    assert base_mb(SHAPE, Settings(adapters=4)) > base_mb(SHAPE, Settings())
    assert base_mb(SHAPE, Settings(sequences=256)) > base_mb(SHAPE, Settings())
