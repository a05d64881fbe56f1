"""Small datasets and models for the tasks beside classification of texts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from newsdata import articles
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

END = "<|endoftext|>"
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
SPLITS = {"train": (0, 24), "validation": (24, 30), "test": (30, 36)}


def bpe(folder: Path, vocabulary: int = 512) -> Tokenizer:
    """A byte-level BPE tokenizer, learned from a few articles and written to `folder`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator((text for _, text, _ in articles(10)), trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


def write_packed(folder: Path, length: int = 32) -> Path:
    """A corpus of `data/1`: articles one behind the other, in sequences of `length` tokens."""
    tokenizer = bpe(folder)
    card = {"name": "articles", "labels": [], "steps": [], "splits": {}, "max_tokens": length}
    (folder / "dataset.json").write_text(json.dumps(card))
    texts = [text for _, text, _ in articles(20)]
    for split, (begin, end) in SPLITS.items():
        ids = [i for text in texts[begin:end] for i in [*tokenizer.encode(text).ids, tokenizer.token_to_id(END)]]
        rows = [ids[k : k + length] for k in range(0, len(ids), length)]
        for number, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            path = folder / "packed" / split / f"{number:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = pa.list_(pa.int32())
            pq.write_table(pa.table({"input_ids": pa.array(part, kind), "starts": pa.array([[0]] * len(part), kind)}), path)
    return folder


def write_lines(folder: Path, lines: list[dict]) -> Path:
    """`<split>.jsonl`: 70, 15, 15 percent of the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    a, b = round(0.7 * len(lines)), round(0.85 * len(lines))
    for split, part in (("train", lines[:a]), ("validation", lines[a:b]), ("test", lines[b:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    return folder


def tiny(folder: Path, kind: str) -> Path:
    """A base folder with random weights: "llama", "t5" or "bert"."""
    tokenizer = bpe(folder)
    torch.manual_seed(1)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=size, eos_token_id=end, pad_token_id=end, **LLAMA))
    elif kind == "t5":
        model = T5ForConditionalGeneration(T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                                                    eos_token_id=end, pad_token_id=end, decoder_start_token_id=end))  # fmt: skip
    else:
        model = BertModel(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=64, pad_token_id=end),
                          add_pooling_layer=False)  # fmt: skip
    model.save_pretrained(folder)
    return folder
