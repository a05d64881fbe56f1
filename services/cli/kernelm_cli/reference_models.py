"""What the recorder of the reference's examples compresses: a small causal model, and a corpus for it."""

from pathlib import Path

import msgspec

from kernelm_contracts.trainer import ModelCard


def untrained(folder: Path) -> None:
    """A causal language model of random weights."""
    import transformers

    transformers.set_seed(0)  # what is recorded changes no more than the contracts do
    config = transformers.LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "model.json").write_bytes(msgspec.json.encode(ModelCard("small", "text-generation", "causal-lm", (), 64)))


def numbers(folder: Path) -> None:
    """A packed corpus of numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "packed" / "validation").mkdir(parents=True)
    rows = pa.array([[(7 * row + place) % 128 for place in range(32)] for row in range(8)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": rows}), folder / "packed" / "validation" / "00000.parquet")
