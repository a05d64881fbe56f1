"""Settings of a pool of the generative server."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kernelm_contracts.server import ServedModel

Count = Annotated[int, Meta(ge=1)]
Amount = Annotated[int, Meta(ge=0)]
Finish = Literal["", "stop", "length"]  # how an answer has ended; "" before


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None  # what the pool serves; without it an instance serves nothing
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto": a GPU where torch finds one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # "auto": bf16 where the processor computes with it
    threads: Amount = 0  # of torch; 0 for as many as the deployment has cores, or all that the process may use
    context: Amount = 0  # tokens of one call, prompt and answer together; 0 for what the model is made for, at most 2,048
    max_tokens: Count = 1024  # of one answer, at most; less where the context is shorter
    slots: Count = 8  # answers that are made at a time, at most; fewer where the memory granted is short
    queue: Count = 64  # calls that wait for a slot; a call beyond is refused with `busy`
    prefill_tokens: Count = 128  # tokens of prompts that are read between two steps of the answers under way
    prefix_tokens: Amount = 8192  # of earlier calls, whose keys and values are kept for prompts that begin alike
