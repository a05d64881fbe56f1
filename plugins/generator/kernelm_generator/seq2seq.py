"""Encoder-decoders of transformers: a text is encoded once, and its answer is decoded in the same batch as all others.

The decoder's rows are padded on the left, as those of decoders alone (cache.py). Positions that are relative (T5: Raffel et al.
2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.1) take no notice of that;
absolute ones (BART, Marian, Pegasus) are looked up by row, since transformers would count columns.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding
from transformers.modeling_outputs import BaseModelOutput

from kernelm_generator.cache import KeyValues, Rows
from kernelm_generator.memory import Plan
from kernelm_generator.model import Model
from kernelm_generator.sources import Decoded, Encoding

# Values of `model_type` that tests/test_engine.py compares with `generate`, token by token
TYPES = {"t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus"}


class RowPositions(nn.Module):
    """In place of a decoder's table of positions: `at` [rows, tokens] are those of the next call; None: transformers counts."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table, self.at = table, None

    def forward(self, *shape: Any, **counted: Any) -> torch.Tensor:
        if self.at is None:
            return self.table(*shape, **counted)  # type: ignore[no-any-return]
        return embedding(self.at + getattr(self.table, "offset", 0), self.table.weight)  # BART's begins at row 2


class Seq2Seq(Model):
    """See `Model`. A prompt is what the encoder reads, all of it at once."""

    encodes = True

    def __init__(self, network: Any, tokenizer: Any, device: torch.device, precision: str) -> None:
        super().__init__(network, tokenizer, device, precision)
        decoder, asked = network.get_decoder(), network.generation_config
        self.layers = len(getattr(decoder, "layers", None) or decoder.block)
        self._positions: Any = None
        if hasattr(decoder, "embed_positions"):
            self._positions = decoder.embed_positions = RowPositions(decoder.embed_positions)
        starts = (asked.decoder_start_token_id, network.config.decoder_start_token_id, asked.bos_token_id)
        self._start = next(token for token in starts if token is not None)
        self._first: int | None = asked.forced_bos_token_id  # mBART: the language of the answer
        banned = {words[0] for words in asked.bad_words_ids or () if len(words) == 1}  # Marian: the token that it begins with
        self._banned = sorted(banned | set(asked.suppress_tokens or ()))

    def room(self, plan: Plan, slack: int) -> tuple[Rows, KeyValues]:
        rows, reading = Decoded(self.layers, plan.slots, plan.context, plan.max_tokens + 1, slack), Encoding(self.layers, 1)
        self.read(reading, [self._start] * plan.context, 0, 0)  # the longest text that can come
        text = reading.block(0, 1)
        rows.make(text[: len(text) // 2])
        for _ in range(plan.slots):
            rows.join(text, 1)
        self.step(rows, [self._start] * plan.slots)
        rows.clear()
        return rows, reading

    def read(self, reading: KeyValues, prompt: list[int], begin: int, most: int) -> tuple[int, torch.Tensor]:
        assert isinstance(reading, Encoding)
        reading.begin()
        states = self.network.get_encoder()(input_ids=torch.tensor([prompt], device=self.device)).last_hidden_state
        logits = self._decode([self._start], [0], states, reading.cache, None, None)
        reading.span.end = 1
        if self._first is not None:
            logits = torch.full_like(logits, -torch.inf)
            logits[:, self._first] = 0.0
        return len(prompt), logits

    def step(self, rows: Rows, tokens: list[int]) -> torch.Tensor:
        assert isinstance(rows, Decoded)
        read = torch.zeros(1, 1, 1, device=self.device).expand(len(tokens), rows.texts.width, 1)  # of the texts, the shape alone
        return self._decode(tokens, rows.lengths, read, rows.cache, rows.mask(self.device), rows.texts.mask(self.device))

    def _decode(self, tokens: list[int], at: list[int], states: torch.Tensor, cache: Any, mask: torch.Tensor | None,
                texts: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        """[rows, vocabulary] after a token more of each row, which is at position `at` of its answer."""
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        if self._positions is not None:
            self._positions.at = torch.tensor(at, device=self.device).unsqueeze(1)
        output = self.network(encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=texts,
                              decoder_input_ids=ids, decoder_attention_mask=mask, cache=cache, use_cache=True)  # fmt: skip
        if self._positions is not None:
            self._positions.at = None
        logits: torch.Tensor = output.logits[:, -1]
        logits[:, self._banned] = -torch.inf
        return logits

    def states(self, tokens: list[int]) -> torch.Tensor:
        return self.network.get_encoder()(input_ids=torch.tensor([tokens], device=self.device)).last_hidden_state  # type: ignore[no-any-return]
