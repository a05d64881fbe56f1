"""What the engine knows of a model of transformers: `Model`, which is also how one that is a decoder alone computes."""

import inspect
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.cache_utils import Cache

from kernelm_generator.cache import KeyValues, Rows
from kernelm_generator.memory import Plan


class Model:
    """A decoder alone. `tokens` is the tokenizer itself, `ends` are the tokens that end an answer."""

    encodes = False  # the prompt is read by an encoder, and is no part of what the decoder has said

    def __init__(self, network: Any, tokenizer: Any, device: torch.device, precision: str) -> None:
        self.network, self.tokenizer, self.device, self.precision = network, tokenizer, device, precision
        self.tokens: Tokenizer = tokenizer.backend_tokenizer
        self.layers: int = network.config.get_text_config().num_hidden_layers
        self.ends = _ends(network, tokenizer)
        self.longest = max(map(len, self.tokens.get_vocab()))  # characters of a token, at most
        self.parameters = sum(p.numel() for p in network.parameters())
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}

    def room(self, plan: Plan, slack: int) -> tuple[Rows, KeyValues]:
        """(the batch of the answers under way, the prompt that is being read), with all of their memory: it shows that the
        model works, too."""
        rows, reading = Rows(self.layers, plan.slots, plan.context, slack), KeyValues(self.layers, 1, plan.context)
        for held, count in ((rows, plan.slots), (reading, 1)):
            self.logits([[0]] * count, [[0]] * count, held.cache, None)
        return rows, reading

    def read(self, reading: KeyValues, prompt: list[int], begin: int, most: int) -> tuple[int, torch.Tensor]:
        """Read on in a prompt from token `begin`, `most` tokens if the model reads in pieces: (how many were read, logits)."""
        part = prompt[begin : begin + most]
        logits = self.logits([part], [list(range(begin, begin + len(part)))], reading.cache, None)
        reading.span.end += len(part)
        return len(part), logits

    def step(self, rows: Rows, tokens: list[int]) -> torch.Tensor:
        """[rows, vocabulary] after one token more of each row."""
        return self.logits([[token] for token in tokens], [[n] for n in rows.lengths], rows.cache, rows.mask(self.device))

    def logits(self, tokens: list[list[int]], positions: list[list[int]], cache: Cache, mask: torch.Tensor | None) -> torch.Tensor:
        """[rows, vocabulary] after the last of `tokens` [rows, tokens], whose keys and values go into `cache`."""
        output = self.network(input_ids=torch.tensor(tokens, device=self.device), cache=cache, attention_mask=mask, use_cache=True,
                              position_ids=torch.tensor(positions, device=self.device), **self._last_only)  # fmt: skip
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def cut(self, text: str, tokens: int) -> list[int]:
        """The first `tokens` tokens of a text."""
        return self.tokens.encode(text[: tokens * self.longest]).ids[:tokens]

    def mean_state(self, tokens: list[int]) -> list[float]:
        """The mean of the last hidden states, at unit length."""
        mean = self.states(tokens)[0].float().mean(0)
        return (mean / mean.norm()).tolist()  # type: ignore[no-any-return]

    def states(self, tokens: list[int]) -> torch.Tensor:
        """[1, tokens, hidden]: the last hidden states of a text."""
        ids = torch.tensor([tokens], device=self.device)
        return self.network.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _ends(network: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, wherever a model says so."""
    found: set[int] = set()
    for ids in (network.generation_config.eos_token_id, network.config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return frozenset(found - {None})
