"""An encoder-decoder that has learned nothing yet, its tokenizer, and pairs of texts for it: where a training from scratch begins.

No package that we know of ships a small one. `write` makes dataset and `base` of a `trainer/1.train` of the structure "seq2seq-lm";
the same texts make the same files.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PADDING, END = "<pad>", "</s>"
TEMPLATE = "{{ messages[-1].content }}" + END  # so that a program that can but chat is understood: what was said last is the text
SHARES = (("test", 0.1), ("validation", 0.15))  # up to here, of the hash; the rest is for training
# A transformer as Vaswani et al. 2017 have it, normalized before each part (Pegasus: Zhang et al. 2020): 6 layers
SIZES = {"d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "max_position_embeddings": 256, "scale_embedding": True, "dropout": 0.1,
         "activation_function": "relu"}  # fmt: skip


def split_of(what: str) -> str:
    """Where all pairs of `what` belong, such as the program that the texts are from: always the same split."""
    place = int(hashlib.sha256(what.encode()).hexdigest()[:8], 16) / 16**8
    return next((name for name, end in SHARES if place < end), "train")


def write(folder: Path, pairs: dict[str, list[tuple[str, str]]], vocabulary: int, **sizes: Any) -> None:
    """`folder`/texts, a line a pair of each split, and `folder`/base: the tokenizer has learned from the texts to train with."""
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for split, found in pairs.items():
        lines = (json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in found)
        (texts / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{split}: {len(found):,} pairs in {texts / split}.jsonl")
    tokenizer = _tokenizer((text for pair in pairs["train"] for text in pair), vocabulary)
    print(f"base: {_base(folder / 'base', tokenizer, {**SIZES, **sizes}):,} parameters in {folder / 'base'}")


def _tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Byte pairs (Sennrich et al. 2016): no text has an unknown letter. Every text ends with `END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PADDING, END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, core.token_to_id(END))])
    made: Any = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PADDING, eos_token=END)  # type: ignore[no-untyped-call]
    made.chat_template = TEMPLATE
    return made


def _base(folder: Path, tokenizer: Any, sizes: dict[str, Any]) -> int:
    """The folder as `save_pretrained` writes it; how many parameters the model has."""
    import torch
    from transformers import PegasusConfig, PegasusForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call] # of a file that is written at once
    torch.manual_seed(0)
    padding, end = tokenizer.convert_tokens_to_ids([PADDING, END])
    config = PegasusConfig(vocab_size=len(tokenizer), pad_token_id=padding, eos_token_id=end, forced_eos_token_id=None,
                           decoder_start_token_id=padding, **sizes)  # fmt: skip
    model: Any = PegasusForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(part.numel() for part in model.parameters())
