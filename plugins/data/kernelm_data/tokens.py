"""Text to token ids with a Hugging Face `tokenizer.json`, special tokens included, without padding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kernelm_data.account import Meter
from kernelm_sdk.errors import ClientFault

BATCH = 128  # documents in one call, which uses all cores it may


def load(folder: Path, max_tokens: int) -> Tokenizer:
    """The tokenizer in `folder`, set to cut at `max_tokens` and not to pad, whatever its file says: published files
    often carry the settings of their last use. ClientFault if there is none, or it is none, or `max_tokens` is too small."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        files = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "nothing"
        raise ClientFault("no_tokenizer", f"tokenize.tokenizer: the artifact has no tokenizer.json (it holds {files})",
                          "give the digest of an artifact with a Hugging Face tokenizer.json at its top")
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ClientFault("invalid_tokenizer", f"tokenizer.json: {error}",
                          "save it again with Tokenizer.save() of the tokenizers library") from None
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_tokens <= special:
        raise ClientFault("invalid", f"tokenize.max_tokens: {max_tokens} leaves no room beside {special} special tokens",
                          f"give {special + 1} or more")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], meter: Meter) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """The ids of each text, and how many there would have been without the cut."""
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    ids: list[npt.NDArray[np.int32]] = []
    lengths: list[int] = []
    meter.at(0)
    for start in range(0, len(texts), BATCH):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + BATCH])):
            ids.append(np.asarray(encoding.ids, np.int32))
            lengths.append(len(encoding.ids) + sum(len(rest.ids) - special for rest in encoding.overflowing))
        meter.at(len(ids))
    return ids, lengths
