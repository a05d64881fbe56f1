"""Chats as token ids, with a loss on the assistant's turns alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelm_trainer.lines import Chat, refuse

NO_LOSS = -100
# for a base without a template; where it has an end-of-text token, that ends a turn, so that generation stops there
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token or '<|im_end|>' }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip


class Encoded(NamedTuple):
    """A row of token ids, and the labels of each (NO_LOSS for those without one)."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]


def encode(chat: Chat, tokenizer: Any, where: str) -> Encoded:
    """A chat by the tokenizer's template. The tokens of what the template adds for an assistant's turn, its end included, have a
    loss. ClientFault that names `where` for a chat without one, or a template that does not write one turn after the other."""
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    if not any(m["role"] == "assistant" for m in messages):
        raise refuse(where, "no message of the role assistant: there is nothing to learn", "leave the line out")
    spans, text = _spans(messages, tokenizer, where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = np.asarray(encoding["input_ids"], np.int64), np.asarray(encoding["offset_mapping"], np.int64)
    inside = np.zeros(len(ids), bool)
    for begin, end in spans:
        inside |= (offsets[:, 0] >= begin) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
    return Encoded(ids, np.where(inside, ids, NO_LOSS))


def _spans(messages: Sequence[dict[str, str]], tokenizer: Any, where: str) -> tuple[list[tuple[int, int]], str]:
    """Where the assistant's turns lie in the text of the chat, and the text."""
    template = None if tokenizer.chat_template else CHATML

    def render(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], chat_template=template, tokenize=False,
                                                  add_generation_prompt=prompt)  # fmt: skip
        return text

    try:
        whole, spans = render(len(messages)), []
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(k, prompt=True) if k else "", render(k + 1)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise refuse(where, "the base's chat template does not write one turn after the other",
                                 "give a base whose template does")  # fmt: skip
                spans.append((len(before), len(after)))
    except Exception as error:  # jinja's own, and what a template raises about the order of roles
        if hasattr(error, "remedy"):
            raise
        raise refuse(where, f"the chat template refuses it: {error}", "see which roles the base knows, in which order") from None
    return spans, whole
