"""Texts to token ids: Hugging Face's `tokenizers`, or Gigatoken where that gives the same ids; packing."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

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


class Facts(msgspec.Struct, frozen=True):
    """What the workers have to know of a tokenizer; found out once."""

    path: str  # of tokenizer.json
    fast: bool  # Gigatoken gives the same ids
    prefix: tuple[int, ...] = ()  # special tokens before a text
    suffix: tuple[int, ...] = ()  # and after it


class Encoder:
    """Texts to ids with the special tokens that the tokenizer puts around a text."""

    def __init__(self, facts: Facts, tokenizer: Tokenizer | None = None) -> None:
        self.prefix, self.suffix = np.array(facts.prefix, np.int32), np.array(facts.suffix, np.int32)
        self._fast = _gigatoken(facts.path, Path(facts.path).stat().st_mtime_ns) if facts.fast else None
        self._tokenizer = tokenizer if facts.fast else tokenizer or load(Path(facts.path))

    @property
    def special(self) -> int:
        """Tokens around a text."""
        return len(self.prefix) + len(self.suffix)

    def plain(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], Ids]:
        """The ids of the texts one after the other without special tokens around them, and where each begins and ends."""
        found = list(self.each(texts))
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(ids) for ids in found], out=offsets[1:])
        return offsets, np.concatenate(found) if found else np.empty(0, np.int32)

    def each(self, texts: Sequence[bytes]) -> Iterator[Ids]:
        """The ids of one text after the other, without special tokens around them."""
        if self._fast is not None:
            for text in texts:
                yield self._fast.encode(text).view(np.int32)
            return
        assert self._tokenizer is not None
        encodings = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        for encoding in encodings:
            yield np.array(encoding.ids, np.int32)

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


@lru_cache(1)
def _gigatoken(path: str, modified: int) -> Any:
    import gigatoken

    return gigatoken.Tokenizer(path)


def separator(tokenizer: Tokenizer, name: str) -> int:
    """The id of the token between packed documents; ClientFault if the tokenizer has none."""
    names = (name,) if name else ENDS
    found = next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)
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


def examine(tokenizer: Tokenizer, path: Path, sample: Sequence[bytes]) -> tuple[Facts, str]:
    """The facts of a tokenizer that was saved to `path`, and why Gigatoken is not taken for it: it is if it gives the ids of
    Hugging Face's tokenizers on the sample and on texts made to tell them apart."""
    plain, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    facts = Facts(str(path), True, tuple(full[:at]), tuple(full[at + len(plain) :]))
    slow = msgspec.structs.replace(facts, fast=False)
    texts = [*sample, *(probe.encode() for probe in PROBES)]
    try:
        offsets, ids = Encoder(facts).plain(texts)
    except Exception as error:  # for kinds of tokenizers that it does not know it raises what it likes
        return slow, f"Gigatoken does not take this tokenizer: {error}"
    expected_offsets, expected = Encoder(slow, tokenizer).plain(texts)
    if not np.array_equal(offsets, expected_offsets) or not np.array_equal(ids, expected):
        return slow, "Gigatoken gives other ids"
    return facts, ""


class Sequences(NamedTuple):
    """Packed sequences, end to end: the ids, which are overwritten when more documents are packed, where each sequence begins in
    them, the positions within their sequences where documents begin, and where each sequence's positions begin."""

    ids: Ids
    id_offsets: Ids
    starts: Ids
    start_offsets: Ids


class Room:
    """Memory for ids, used again and again: fresh memory is filled with zeros first by the system, page by page."""

    def __init__(self) -> None:
        self.ids = np.empty(1 << 16, np.int32)

    def grow(self, size: int) -> Ids:
        """Room for `size` ids, with what there is."""
        if size > len(self.ids):
            before, self.ids = self.ids, np.empty(1 << size.bit_length(), np.int32)
            self.ids[: len(before)] = before
        return self.ids


class Packer:
    """Documents one after the other in sequences of one length, a separator after each; the last may be shorter."""

    def __init__(self, length: int, separator: int, room: Room | None = None) -> None:
        self._length, self._separator, self._room = length, separator, room or Room()
        self._rest = np.empty(0, np.int32)  # the ids of the sequence that is not full yet
        self._starts = np.empty(0, np.int64)

    def add(self, documents: Iterable[Ids]) -> Sequences:
        """The sequences that are full now. Each document is copied before the next one is asked for."""
        at, begins = len(self._rest), list[int]()
        room = self._room.grow(at)
        room[:at] = self._rest
        for ids in documents:
            end = at + len(ids)
            if end >= len(room):
                room = self._room.grow(end + 1)
            room[at:end] = ids
            room[end] = self._separator
            begins.append(at)
            at = end + 1
        self._starts = np.concatenate([self._starts, np.array(begins, np.int64)])
        return self._take(room[:at], at // self._length)

    def rest(self) -> Sequences:
        """What is left at the end: one sequence, or none."""
        return self._take(self._rest, -(-len(self._rest) // self._length))

    def _take(self, ids: Ids, count: int) -> Sequences:
        end = min(count * self._length, len(ids))
        ids, self._rest = ids[:end], ids[end:].copy()
        here = int(np.searchsorted(self._starts, end))
        starts, self._starts = self._starts[:here], self._starts[here:] - end
        bounds = np.minimum(np.arange(count + 1) * self._length, end)
        begins = np.searchsorted(starts, bounds)
        begins[-1] = here
        return Sequences(ids, bounds.astype(np.int32), (starts % self._length).astype(np.int32), begins.astype(np.int32))
