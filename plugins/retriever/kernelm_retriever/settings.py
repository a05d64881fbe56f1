"""Settings of a pool of the retriever."""

from typing import Annotated

from msgspec import Meta, Struct

from kernelm_contracts.server import ServedModel

INSTRUCTION = ("Answer the question from the numbered passages alone, in one or two sentences. Behind each statement name the "
               "passage that says so, like [1]. If no passage says it, answer that the documents do not say it.")  # fmt: skip


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None  # the index that the pool serves; None for instances that only make some
    generator: str = ""  # the deployment that writes answers; "" for none: then there is no `answer`
    chat: bool = True  # False: the generator has no chat template, and gets a prompt
    instruction: str = INSTRUCTION  # what the generator is told
    least_score: Annotated[float, Meta(ge=-1, le=1)] = 0.3  # cosine; a passage below it is no source for an answer
    max_tokens: Annotated[int, Meta(ge=1)] = 256  # of an answer, where the caller does not say
    checkpoint_every_s: Annotated[float, Meta(gt=0)] = 30.0  # while an index is made
