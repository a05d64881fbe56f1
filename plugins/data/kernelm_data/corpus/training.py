"""Training of tokenizers. The same texts give the same tokenizer, in every run."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kernelm_contracts.data import Train
from kernelm_data.corpus.tokenizing import END

KINDS = ("bpe", "bpe-characters", "wordpiece")
UNKNOWN = "[UNK]"
BERT = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
LONGEST = 16  # characters of a token of characters: Chinese has no blanks that would end one
PART = 4_000_000  # characters that are counted at a time

Texts = Callable[[], Iterable[str]]


def train(settings: Train, texts: Texts) -> Tokenizer:
    """A new tokenizer, trained on the texts: byte-level BPE (Radford et al., 2019), BPE over characters (Sennrich et al., 2016) or
    WordPiece (Devlin et al., 2019)."""
    if settings.kind == "wordpiece":
        return _train_wordpiece(settings.vocabulary, texts)
    if settings.kind == "bpe-characters":
        return _train_characters(settings.vocabulary, texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(vocab_size=settings.vocabulary, special_tokens=[END], show_progress=False,
                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _train_characters(vocabulary: int, texts: Texts) -> Tokenizer:
    """Half of the vocabulary, at most, are characters, the most frequent ones, and all others [UNK]; a blank is written as U+2581
    and begins the token after it, as SentencePiece does it. Which of two equally frequent characters comes in the trainer leaves
    to the order of a hash table, so that the characters are counted here."""
    alphabet = _frequent(texts(), vocabulary // 2)
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
        pre_tokenizers.Punctuation("contiguous"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, UNKNOWN],
        show_progress=False,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=LONGEST,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _frequent(texts: Iterable[str], most: int) -> list[str]:
    """The `most` most frequent characters, of equally frequent ones those first that Unicode has first; blanks as U+2581."""
    counts = np.zeros(0x110000, np.int64)
    held, size = list[str](), 0
    for text in chain(texts, [None]):
        if text is not None:
            held.append(text)
            size += len(text)
        if held and (text is None or size > PART):
            codes = np.frombuffer("".join(held).encode("utf-32-le"), np.uint32)
            counts += np.bincount(codes, minlength=len(counts))
            held, size = [], 0
    counts[0x2581] += counts[0x20]
    counts[0x20] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    return [chr(code) for code in order[counts[order] > 0]]


def _train_wordpiece(vocabulary: int, texts: Texts) -> Tokenizer:
    """The trainer numbers the characters within words in the order of a hash table that is another one in each run, and of two
    pairs that are equally frequent it merges the one with the lower numbers. So it runs twice: for the characters alone, then with
    these, in order, where it numbers special tokens."""

    def trained(size: int, first: list[str]) -> dict[str, int]:
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=size, show_progress=False, special_tokens=first)
        tokenizer.train_from_iterator(texts(), trainer)
        return tokenizer.get_vocab()

    within = sorted(token for token in trained(0, []) if token.startswith("##"))
    vocab = trained(vocabulary, [*BERT, *within])
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(BERT))
    ids = [(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer
