"""GGUF files get 8-bit matrices, and keep all else."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from kernelm_optimizer.gguf_models import requantize
from kernelm_sdk.errors import ClientFault

Q8_0, F16, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    random = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", random.normal(size=(8, 64)).astype(np.float16))
    writer.add_tensor("blk.0.attn_q.weight", random.normal(size=(64, 64)).astype(np.float32))
    writer.add_tensor("blk.0.odd.weight", random.normal(size=(4, 33)).astype(np.float32))
    writer.add_tensor("output_norm.weight", random.normal(size=64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_matrices_become_8_bit_and_all_else_stays(model, tmp_path):
    requantize(model, tmp_path / "small.gguf")
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(tmp_path / "small.gguf")
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    assert [t.tensor_type for t in after.tensors] == [Q8_0, Q8_0, F32, F32]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        was, now = (gguf.quants.dequantize(t.data, t.tensor_type) for t in (old, new))
        step = np.abs(was).max() / 127 if new.tensor_type == Q8_0 else 0.0
        assert np.abs(was.astype(np.float32) - now).max() <= 0.51 * step
    kept = [name for name in before.fields if not name.startswith("GGUF.") and name != "general.file_type"]
    assert {n: after.fields[n].contents() for n in kept} == {n: before.fields[n].contents() for n in kept}
    assert after.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert after.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no model" * 100)
    with pytest.raises(ClientFault, match=r"text\.gguf"):
        requantize(tmp_path / "text.gguf", tmp_path / "out.gguf")
    with pytest.raises(ClientFault, match=r"gone\.gguf"):
        requantize(tmp_path / "gone.gguf", tmp_path / "out.gguf")
