"""vLLM behind the plugin: `AsyncLLM` in this process (tokenizer, templates, parsers), its engine in one below.

vLLM is imported by `Engine.load` alone, after the environment that it reads at its import was set.
"""

import asyncio
import os
import secrets
import sys
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

from kernelm_contracts.server import GenerateRequest, ToolCall
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_vllm.memory import MB, Plan
from kernelm_vllm.requests import chat, refusal, sampling
from kernelm_vllm.settings import Settings
from kernelm_vllm.tools import ToolCalls

METHODS = ("classify", "embed", "generate")  # vLLM calls them so too
Tell = Callable[[float, str], object]  # how far it got, 0 to 1, and what it does now; from any thread


class Piece(NamedTuple):
    """What one step of the engine added to an answer."""

    text: str
    tool_calls: tuple[ToolCall, ...]
    tokens: int  # generated in this step
    finish: str  # "" in all but the last
    prompt_tokens: int
    cached_tokens: int


def prepare(threads: int, scratch: Path) -> None:
    """Before the first import of vLLM: what it and the libraries below it read in the environment."""
    own = Path(sys.prefix)  # what vLLM finds out about a model's code it keeps for the next start, in place of half a minute
    cache = own / "vllm-cache" if os.access(own, os.W_OK) else scratch / "vllm-cache"
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",  # no way out
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would take the connection to the broker along
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the CPU's worker in the engine's process: 600 MB and 15 s less (AsyncLLM's
        #                                         engine has one of its own whatever this says)
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two instances would sit on the same cores
        "VLLM_CACHE_ROOT": str(cache), "HF_HOME": str(scratch / "huggingface"),
    } | ({"OMP_NUM_THREADS": str(threads)} if threads else {})  # fmt: skip


class Engine:
    """One loaded model."""

    def __init__(self, llm: Any, settings: Settings) -> None:
        from vllm.renderers.online_renderer import OnlineRenderer

        self._llm, self._settings = llm, settings
        self.methods: tuple[str, ...] = ()  # known once it is started
        self.calls = 0  # under way, those that wait included
        self._online = OnlineRenderer(llm.model_config, llm.renderer, request_logger=None, chat_template=None,
                                      chat_template_content_format="auto", enable_auto_tools=bool(settings.tool_parser),
                                      tool_parser=settings.tool_parser or None, tool_strict_level="parameter")  # fmt: skip

    @classmethod
    def load(cls, folder: Path, settings: Settings, plan: Plan, tell: Tell) -> "Engine":
        """In a worker thread, most of a minute on a CPU. A Fault where vLLM refuses the model."""
        tell(0.05, "importing vLLM")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        tell(0.3, "reading the model's configuration")
        pooling = settings.task in ("embed", "classify")
        eager = current_platform.is_cpu() if settings.eager is None else settings.eager
        arguments = AsyncEngineArgs(
            model=str(folder), runner="auto" if settings.task == "auto" else "pooling" if pooling else "generate",
            convert=settings.task if pooling else "auto", dtype=settings.dtype, max_model_len=plan.context,
            kv_cache_memory_bytes=plan.cache_mb * MB, block_size=settings.block_tokens, max_num_seqs=settings.sequences,
            max_num_batched_tokens=max(settings.batch_tokens, settings.sequences), enforce_eager=eager,
            tensor_parallel_size=settings.gpus, enable_lora=settings.adapters > 0, max_loras=max(settings.adapters, 1),
            max_cpu_loras=max(settings.adapters, 1), max_lora_rank=settings.adapter_rank, disable_log_stats=True,
            seed=secrets.randbits(31),  # of calls that bring none: another one in each instance
        )  # fmt: skip
        config = arguments.create_engine_config()
        tell(0.5, "loading the weights")
        llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        tell(0.95, "the engine is up")
        return cls(llm, settings)

    async def start(self) -> None:
        """In the event loop, once: ask the engine what its model can do."""
        tasks = await self._llm.get_supported_tasks()
        self.methods = tuple(method for method in METHODS if method in tasks)

    @property
    def config(self) -> Any:
        """The model's own configuration (transformers)."""
        return self._llm.model_config.hf_config

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return getattr(self._llm.get_tokenizer(), "chat_template", None) is not None

    def sentinels(self) -> list[int]:
        """Descriptors that become readable when a process of the engine has ended."""
        return [process.sentinel for process in self._llm.engine_core.resources.engine_manager.processes]

    async def pieces(self, request: GenerateRequest, most: int, adapter: Any, owner: str) -> AsyncGenerator[Piece, None]:
        """The answer, as it is made. Whoever leaves the loop takes the request out of the engine. Prompts are remembered for their
        owner alone, since how fast an answer begins would tell others what was asked before."""
        self.calls += 1
        try:
            prompt, params, parser = await self._prepare(request, most)
            prompt["cache_salt"] = owner
            outputs = self._llm.generate(prompt, params, uuid.uuid4().hex, lora_request=adapter)
            async with aclosing(outputs):
                async for output in outputs:
                    made = output.outputs[0]
                    if made.finish_reason not in (None, "stop", "length"):
                        raise RuntimeError(f"the answer ended by {made.finish_reason!r}")
                    finish, text = made.finish_reason or "", made.text
                    calls: tuple[ToolCall, ...] = ()
                    if parser is not None:
                        text, calls = parser.read(text, list(made.token_ids), output.prompt_token_ids, bool(finish))
                        finish = "tool_calls" if finish == "stop" and parser.called else finish
                    read, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
                    yield Piece(text, calls, len(made.token_ids), finish, read, cached)
        except (Fault, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            raise refusal(error) from error
        finally:
            self.calls -= 1

    async def _prepare(self, request: GenerateRequest, most: int) -> tuple[Any, Any, ToolCalls | None]:
        """(prompt in tokens, sampling parameters, parser of tool calls): as vLLM's own server makes them."""
        from vllm import SamplingParams
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        parser = None
        if request.messages:
            asked = ChatCompletionRequest(stream=request.stream or bool(request.tools), **chat(request))  # parsers read steps
            if asked.tools:
                parser = ToolCalls(self._online.parser, self._llm.get_tokenizer(), asked)
            rendered = await self._online.render_chat(asked)
            if not isinstance(rendered, tuple):
                raise ClientFault("invalid", rendered.error.message[:300], "these are vLLM's own words")
            prompt = rendered[1][0]
        else:
            prompt = await self._tokens(request.prompt)
        room = self._llm.model_config.max_model_len - len(prompt["prompt_token_ids"])
        if room < 1:
            raise ClientFault("too_large", f"the prompt has {len(prompt['prompt_token_ids'])} tokens, and the context "
                              f"{self._llm.model_config.max_model_len}", "send less")  # fmt: skip
        if request.messages:
            return prompt, asked.to_sampling_params(min(most, room), {}), parser
        schema = StructuredOutputsParams(json=request.schema) if request.schema else None
        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        return prompt, SamplingParams(max_tokens=min(most, room), output_kind=kind, structured_outputs=schema,
                                      **sampling(request)), None  # fmt: skip

    async def _tokens(self, text: str) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        parsed = parse_model_prompt(self._llm.model_config, text)
        return (await self._llm.renderer.render_cmpl_async([parsed]))[0]

    async def pooled(self, task: str, texts: tuple[str, ...]) -> tuple[list[list[float]], int]:
        """(a vector for each text: probabilities of the classes, or an embedding; tokens read)."""
        from vllm import PoolingParams

        async def one(text: str) -> tuple[list[float], int]:
            prompt = await self._tokens(text)
            async for output in self._llm.encode(prompt, PoolingParams(task=task), uuid.uuid4().hex):
                return output.outputs.data.float().flatten().tolist(), len(output.prompt_token_ids)
            raise RuntimeError("the engine gave no output")

        self.calls += len(texts)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(text)) for text in texts]
        except BaseExceptionGroup as several:
            raise refusal(several.exceptions[0]) from several  # type: ignore[arg-type]
        finally:
            self.calls -= len(texts)
        found = [task.result() for task in tasks]
        return [vector for vector, _ in found], sum(tokens for _, tokens in found)

    async def adapt(self, digest: str, number: int, folder: str) -> Any:
        """A LoRA adapter, loaded; ClientFault "invalid_adapter" where it does not fit the model."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(digest, number, folder)
        try:
            await self._llm.add_lora(adapter)
        except Exception as error:
            fault = refusal(error)
            if fault.code == "engine" and isinstance(error, ConnectionError):
                raise fault from error
            raise ClientFault("invalid_adapter", f"{digest[:19]} is no adapter of this model: {str(error)[:200]}",
                              "train one on the deployed model, of the setting's `adapter_rank` at most") from error  # fmt: skip
        return adapter

    def close(self) -> None:
        """In a worker thread: end the engine's process, which has nothing to do any more."""
        self._llm.shutdown(timeout=0)
