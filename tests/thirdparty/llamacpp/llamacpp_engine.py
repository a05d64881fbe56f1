"""llama.cpp in a process of its own, one JSON object a line each way. Its loader holds Python's interpreter lock for as long as
it reads the model: in the instance's own process no lease would be renewed meanwhile, and what crashes here takes only this along.

    in:   {"id": 1, "chat": false, "body": {...}}   {"id": 1, "cancel": true}
    out:  {"ready": true}   {"id": 1, "chunk": {...}} ...   {"id": 1, "end": "" or what went wrong}
"""

import asyncio
import json
import os
import secrets
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LINE_BYTES = 16 * 2**20


class EngineLost(Exception):
    """The engine's process has ended."""


class Engine:
    """The instance's side."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process, self._answers, self._number = process, dict[int, asyncio.Queue[dict[str, Any]]](), 0
        self.ended = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, **settings: Any) -> "Engine":
        """Load the model; EngineLost if it can't be."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, __file__, json.dumps(settings), stdin=pipe, stdout=pipe,
                                                       limit=LINE_BYTES)  # fmt: skip
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise EngineLost(f"llama.cpp ended with code {await process.wait()} while it loaded the model")
        return cls(process)

    @property
    def calls(self) -> int:
        """How many are under way."""
        return len(self._answers)

    async def stream(self, chat: bool, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one answer, in OpenAI's form. Whoever leaves the loop stops the work."""
        self._number += 1
        number, answers = self._number, asyncio.Queue[dict[str, Any]]()
        self._answers[number] = answers
        over = False
        try:
            self._send({"id": number, "chat": chat, "body": body})
            while "end" not in (answer := await answers.get()):
                yield answer["chunk"]
            over = True
            if answer["end"]:
                raise EngineLost(answer["end"])
        finally:
            del self._answers[number]
            if not over:
                self._send({"id": number, "cancel": True})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        if self.ended.done():
            raise EngineLost("llama.cpp has ended")
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if (answers := self._answers.get(message["id"])) is not None:
                answers.put_nowait(message)
        for answers in self._answers.values():
            answers.put_nowait({"end": "llama.cpp has ended"})

    async def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


def load(model: str, context: int, slots: int, threads: int, max_tokens: int) -> Any:
    """llama.cpp's server in this process."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = model
    p.n_parallel, p.n_ctx, p.n_predict = slots, context * slots, max_tokens
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.api_keys = [secrets.token_hex(32)]  # it listens on a local port as well, where nobody shall get in
    p.endpoint_slots, p.endpoint_props, p.ui, p.verbosity = False, False, False, 0
    return xllamacpp.Server(p)


def main() -> None:
    """The engine's side: until its input ends, which it does with the instance."""
    settings = json.loads(sys.argv[1])
    output, lock = os.fdopen(os.dup(1), "w"), threading.Lock()
    os.dup2(2, 1)  # what the library prints goes to the log
    engine, gone = load(**settings), dict[int, threading.Event]()
    pool = ThreadPoolExecutor(settings["slots"])

    def tell(message: dict[str, Any]) -> None:
        with lock:
            output.write(json.dumps(message) + "\n")
            output.flush()

    def work(number: int, chat: bool, body: dict[str, Any]) -> None:
        def on_chunk(chunk: dict[str, Any]) -> bool:
            tell({"id": number, "chunk": chunk})
            return gone[number].is_set()  # True ends the work on it

        end = ""
        try:
            if not gone[number].is_set():
                (engine.handle_chat_completions if chat else engine.handle_completions)(body, on_chunk)
        except Exception as error:  # the caller is told, and the others are worked on
            end = f"llama.cpp: {type(error).__name__}"
            print(f"request {number}: {error}", file=sys.stderr, flush=True)
        del gone[number]
        tell({"id": number, "end": end})

    tell({"ready": True})
    for line in sys.stdin:
        message = json.loads(line)
        if "body" in message:
            gone[message["id"]] = threading.Event()
            pool.submit(work, message["id"], message["chat"], message["body"])
        elif (event := gone.get(message["id"])) is not None:
            event.set()
    os._exit(0)  # nobody reads what is still being made


if __name__ == "__main__":
    main()
