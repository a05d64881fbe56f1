"""Texts to token ids: Hugging Face's `tokenizers`, or Gigatoken where that gives the same ids; training; packing."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kernelm_contracts.data import Train
from kernelm_sdk.errors import ClientFault

Ids = npt.NDArray[np.int32]
END = "<|endoftext|>"
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # what tokenizers call the end of a text
PROBES = (
    "",
    " ",
    "\n\n\n",
    "a",
    "  two  blanks ",
    "caf\u00e9 na\u00efve \u4e2d\u6587\u5b57\u7b26 \U0001f600",
    "x" * 300,
    "1234567890 3.14",
    "don't I'll WE'RE",
    f"before {END} after",
    "tab\tand\r\nline",
    "e\u0301 \u00a0 \u200d",
    "<s> [SEP] [CLS] </s>",
)


class Encoder:
    """Texts to ids with the special tokens that the tokenizer puts around a text."""

    def __init__(self, path: Path, fast: bool) -> None:
        self.tokenizer = load(path)
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        full = self.tokenizer.encode("a").ids
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        self.prefix, self.suffix = np.array(full[:at], np.int32), np.array(full[at + len(plain) :], np.int32)
        self._fast: Any = None
        if fast:
            import gigatoken

            self._fast = gigatoken.Tokenizer(str(path))

    @property
    def special(self) -> int:
        """Tokens around a text."""
        return len(self.prefix) + len(self.suffix)

    def plain(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], Ids]:
        """The ids of the texts one after the other without special tokens around them, and where each begins and ends."""
        if self._fast is not None:
            layout = self._fast.encode_batch(list(texts)).layout
            offsets = np.asarray(layout.offsets.data, np.int64)
            return offsets - offsets[0], np.asarray(layout.content.data[offsets[0] : offsets[-1]]).view(np.int32)
        found = self.tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(encoding.ids) for encoding in found], out=offsets[1:])
        return offsets, np.concatenate([np.array(e.ids, np.int32) for e in found]) if found else np.empty(0, np.int32)

    def whole(self, texts: Sequence[bytes], most: int) -> tuple[npt.NDArray[np.int64], Ids, int]:
        """The same with special tokens, cut at `most` tokens; and how many were cut."""
        offsets, ids = self.plain(texts)
        lengths = np.diff(offsets)
        room = max(most - self.special, 0)
        kept = np.minimum(lengths, room)
        cut = int((lengths > room).sum())
        if not cut and not self.special:
            return offsets, ids, 0
        where = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(kept + self.special, out=where[1:])
        out = np.empty(int(where[-1]), np.int32)
        for i in range(len(texts)):
            row = out[where[i] : where[i + 1]]
            row[: len(self.prefix)] = self.prefix
            row[len(self.prefix) : len(self.prefix) + kept[i]] = ids[offsets[i] : offsets[i] + kept[i]]
            row[len(row) - len(self.suffix) :] = self.suffix
        return where, out, cut

    def end(self, separator: str) -> int:
        """The id of the token between packed documents; ClientFault if the tokenizer has none."""
        names = (separator,) if separator else ENDS
        found = next((i for name in names if (i := self.tokenizer.token_to_id(name)) is not None), None)
        if found is None:
            raise ClientFault("no_separator", f"pack.separator: the tokenizer has none of the tokens {', '.join(names)}",
                              "name a token of the tokenizer in pack.separator")  # fmt: skip
        return int(found)


def load(path: Path) -> Tokenizer:
    """A tokenizer.json, set neither to cut nor to pad. ClientFault if it is none."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ClientFault("invalid_tokenizer", f"{path.name}: {error}",
                          "save it again with Tokenizer.save() of the tokenizers library") from None  # fmt: skip
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def same_ids(path: Path, sample: Sequence[bytes]) -> tuple[bool, str]:
    """Whether Gigatoken gives the ids of Hugging Face's tokenizers on the sample and on texts made to tell them apart; if not,
    why."""
    slow = Encoder(path, fast=False)
    texts = [*sample, *(probe.encode() for probe in PROBES)]
    try:
        fast = Encoder(path, fast=True)
        offsets, ids = fast.plain(texts)
    except Exception as error:  # for kinds of tokenizers that it does not know it raises what it likes
        return False, f"Gigatoken does not take this tokenizer: {error}"
    expected_offsets, expected = slow.plain(texts)
    if not np.array_equal(offsets, expected_offsets) or not np.array_equal(ids, expected):
        return False, "Gigatoken gives other ids"
    return True, ""


def train(settings: Train, texts: Iterable[str]) -> Tokenizer:
    """A new tokenizer, trained on the texts: byte-level BPE (Radford et al., 2019) or WordPiece (Devlin et al., 2019)."""
    if settings.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=settings.vocabulary, special_tokens=[END], show_progress=False,
                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=settings.vocabulary, show_progress=False,
                                        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer


class Packer:
    """Documents one after the other in sequences of one length, a separator after each; the last may be shorter."""

    def __init__(self, length: int, separator: int) -> None:
        self._length, self._separator = length, separator
        self._ids = np.empty(0, np.int32)
        self._starts: list[int] = []

    def add(self, offsets: npt.NDArray[np.int64], ids: Ids) -> Iterator[tuple[Ids, list[int]]]:
        """The sequences that are full now: ids, and the positions where documents begin."""
        lengths = np.diff(offsets) + 1
        where = np.cumsum(lengths) - lengths
        joined = np.full(int(lengths.sum()), self._separator, np.int32)
        mask = np.ones(len(joined), np.bool_)
        mask[where + lengths - 1] = False
        joined[mask] = ids
        base = len(self._ids)
        self._ids = np.concatenate([self._ids, joined])
        self._starts += (where + base).tolist()
        full = len(self._ids) // self._length
        starts = np.asarray(self._starts, np.int64)
        for i in range(full):
            low, high = np.searchsorted(starts, (i * self._length, (i + 1) * self._length))
            yield self._ids[i * self._length : (i + 1) * self._length], (starts[low:high] - i * self._length).tolist()
        self._ids = self._ids[full * self._length :]
        self._starts = [int(s) - full * self._length for s in self._starts if s >= full * self._length]

    def rest(self) -> tuple[Ids, list[int]] | None:
        """What is left at the end."""
        return (self._ids, self._starts) if len(self._ids) else None
