"""Settings of a pool of vLLM servers."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kernelm_contracts.server import ServedModel

Count = Annotated[int, Meta(ge=1)]
Amount = Annotated[int, Meta(ge=0)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None  # what the pool serves: a folder of Hugging Face's form; without it an instance serves nothing
    task: Literal["auto", "generate", "embed", "classify"] = "auto"  # "auto": what the model's architecture is for
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of weights and keys; "auto": 16 bits
    context: Amount = 0  # tokens of one call, prompt and answer together; 0 for what the model was made for and the cache holds
    max_tokens: Count = 1024  # of one answer, at most; less where the context is shorter
    kv_cache_mb: Amount = 0  # for keys and values; 0 for what is left of the memory granted, at most 4,096
    block_tokens: Literal[16, 32, 64, 128] = 32  # of the cache: prompts share whole blocks of what they begin with
    sequences: Count = 32  # calls that are worked on at a time
    queue: Amount = 128  # calls that wait beyond these; more are refused with `busy`
    batch_tokens: Count = 2048  # of one step, prompts included: a longer prompt is read in several
    threads: Amount = 0  # of the compute library; 0 for as many as the deployment has cores, or all that the process may use
    gpus: Count = 1  # over which the model is spread (tensor parallelism), where there are GPUs
    eager: bool | None = None  # without torch.compile and CUDA graphs: quicker to start, slower to answer; None: so on the CPU
    tool_parser: str = ""  # vLLM's name of the form in which the model writes tool calls ("hermes", "llama3_json", ...); "": none
    adapters: Amount = 0  # LoRA adapters in one batch, at most; 0 for none: being ready for them costs memory and speed
    adapter_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16  # of an adapter, at most
