"""Continuous batching: one thread makes a token of every answer under way at each step; calls join and leave between steps.

Prompts are read in pieces (`prefill_tokens` between two steps), so that a long one does not hold up the answers of others.
Orca: Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models"; prompts in pieces: Agrawal et
al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve".
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from kernelm_generator.cache import KeyValues, Prefixes
from kernelm_generator.memory import SLACK, Plan
from kernelm_generator.model import Model
from kernelm_generator.sampling import Chooser, Sampling, choose
from kernelm_generator.settings import Finish
from kernelm_generator.text import TextStream
from kernelm_sdk.errors import ClientFault, Fault, PluginFault

SMOOTHING = 0.2  # weight of the newest answer in the estimate of how long one takes
Task = Callable[[], Any]


class Asked(NamedTuple):
    """What a call wants."""

    prompt: list[int]  # tokens
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    owner: str = ""  # whose earlier calls it may go on from


class Piece(NamedTuple):
    """What is added to an answer; `finish` at its end."""

    text: str = ""
    finish: Finish = ""
    fault: Fault | None = None


class Answer:
    """One answer on its way, in the engine's thread but for `gone` and `pieces`."""

    def __init__(self, asked: Asked, stream: TextStream, loop: asyncio.AbstractEventLoop) -> None:
        self.asked, self.stream, self.loop = asked, stream, loop
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.chooser = Chooser(asked.sampling)
        self.made: list[int] = []  # tokens
        self.read = self.cached = 0  # of the prompt: tokens read, and of these the ones that were known
        self.begun = time.monotonic()
        self.gone = False  # nobody waits for it any more


class Engine:
    """Answers with `model` on a thread of its own, until `close`."""

    def __init__(self, model: Model, plan: Plan, prefill_tokens: int, queue: int, log: logging.Logger) -> None:
        self._model, self._plan, self._chunk, self._queue, self._log = model, plan, prefill_tokens, queue, log
        self._inbox: SimpleQueue[Answer | tuple[Task, Future[Any]] | None] = SimpleQueue()
        with torch.inference_mode():  # all memory is taken, and the model has worked, before it is ready
            self._rows, self._reading = model.room(plan, SLACK)
        self._prefixes = Prefixes(plan.prefix_tokens)
        self._running: list[Answer] = []  # a row each
        self._waiting: deque[Answer] = deque()  # the first one may be read in part
        self._tasks: deque[tuple[Task, Future[Any]]] = deque()
        self._out: list[tuple[Answer, Piece]] = []
        self._lock = threading.Lock()  # of the two below
        self._accepted, self._closed = 0, False  # answers that are not over
        self._answer_s = 1.0  # that an answer takes
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # ---- the event loop's side ----

    def submit(self, asked: Asked) -> Answer:
        """Take a call; ClientFault "busy" (retriable) if as many wait as may."""
        said = () if self._model.encodes else asked.prompt
        answer = Answer(asked, TextStream(self._model.tokens, said, asked.stops), asyncio.get_running_loop())
        self._accept(answer)
        return answer

    async def pieces(self, answer: Answer) -> AsyncIterator[Piece]:
        """The answer as it is made: what has come together is one piece. Who leaves the loop stops the work."""
        try:
            while True:
                piece = await answer.pieces.get()
                while not piece.finish and piece.fault is None and not answer.pieces.empty():
                    more = answer.pieces.get_nowait()
                    piece = Piece(piece.text + more.text, more.finish, more.fault)
                if piece.fault is not None:
                    raise piece.fault
                yield piece
                if piece.finish:
                    return
        finally:
            answer.gone = True

    async def run(self, task: Task) -> Any:
        """The result of `task`, which has the model for itself between two steps."""
        future: Future[Any] = Future()
        self._accept((task, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread; answers under way get a fault."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    def _accept(self, item: Answer | tuple[Task, Future[Any]]) -> None:
        with self._lock:
            if self._closed:
                raise PluginFault("stopping", "the instance is stopping", "call again", retriable=True)
            waiting = self._accepted - self._plan.slots
            if waiting >= self._queue:
                after_s = round(max(self._answer_s * waiting / self._plan.slots, 1.0), 1)
                raise ClientFault("busy", f"{waiting} calls are waiting already", "call again later, or deploy more instances",
                                  retriable=True, retry_after_s=after_s)  # fmt: skip
            self._accepted += 1
            self._inbox.put(item)  # under the lock, so that none comes behind the end

    # ---- the thread ----

    def _work(self) -> None:
        with torch.inference_mode():
            while self._take():
                try:
                    self._step()
                except Exception as error:  # whatever the library raises ends these answers, and not the server
                    self._log.exception("a step of the engine failed")
                    self._give_up(PluginFault("inference_failed", f"the model failed with {type(error).__name__}",
                                              "see the log of the instance"))  # fmt: skip
                self._deliver()
            self._give_up(PluginFault("stopping", "the instance is stopping", "call again", retriable=True))
            self._deliver()

    def _take(self) -> bool:
        """Take in what has come, and wait for it if there is nothing to do; False once the engine is closed."""
        while True:
            idle = not (self._running or self._waiting or self._tasks)
            if not idle and self._inbox.empty():
                return True
            match self._inbox.get():
                case None:
                    return False
                case Answer() as answer:
                    self._waiting.append(answer)
                case task:
                    self._tasks.append(task)

    def _step(self) -> None:
        self._drop_gone()
        if self._running:
            self._make_tokens()
        if self._tasks:
            self._do(*self._tasks.popleft())
        left = self._chunk
        while left > 0 and self._waiting and len(self._running) < self._plan.slots:
            left -= self._read(self._waiting[0], left)

    def _drop_gone(self) -> None:
        for row in reversed([k for k, answer in enumerate(self._running) if answer.gone]):
            self._leave(row)
        kept = deque(answer for answer in self._waiting if not answer.gone)
        self._over(len(self._waiting) - len(kept))
        self._waiting = kept

    def _make_tokens(self) -> None:
        """One step: a token for each row."""
        rows = self._rows
        rows.make_room()
        logits = self._model.step(rows, [answer.made[-1] for answer in self._running])
        rows.grown()
        tokens = choose(logits, [answer.chooser for answer in self._running])
        ended = [self._add(answer, token) for answer, token in zip(self._running, tokens, strict=True)]
        for row in reversed([k for k, end in enumerate(ended) if end]):
            self._keep(self._running[row], rows, row)
            self._leave(row)

    def _read(self, answer: Answer, most: int) -> int:
        """Read up to `most` more tokens of a prompt; with the last one the answer begins. How many were read."""
        prompt, span = answer.asked.prompt, self._reading.span
        if answer.read == 0:
            span.start = span.end = 0
            known, block = self._prefixes.find(answer.asked.owner, prompt[:-1])
            if block is not None:
                self._reading.put(0, block, known, 0)
            answer.read = answer.cached = span.end = known
        count, logits = self._model.read(self._reading, prompt, answer.read, most)
        answer.read += count
        if answer.read == len(prompt):
            self._waiting.popleft()
            if self._add(answer, choose(logits, [answer.chooser])[0]):
                self._keep(answer, self._reading, 0)
                self._over(1)
            else:
                self._rows.join(self._reading.block(0, span.end, copy=False), span.end)
                self._running.append(answer)
        return count

    def _add(self, answer: Answer, token: int) -> bool:
        """Add a token to an answer; True at its end."""
        answer.made.append(token)
        if token in self._model.ends:
            return self._end(answer, answer.stream.rest(), "stop")
        text, stopped = answer.stream.push(token)
        if stopped:
            return self._end(answer, text, "stop")
        if len(answer.made) == answer.asked.max_tokens:
            return self._end(answer, text + answer.stream.rest(), "length")
        if text:
            self._out.append((answer, Piece(text)))
        return False

    def _end(self, answer: Answer, text: str, finish: Finish) -> bool:
        self._out.append((answer, Piece(text, finish)))
        self._answer_s += SMOOTHING * (time.monotonic() - answer.begun - self._answer_s)
        return True

    def _keep(self, answer: Answer, where: KeyValues, row: int) -> None:
        """Remember the keys and values of an answer that is over; its last token was not read."""
        tokens = answer.asked.prompt + answer.made[:-1]
        if self._prefixes.wants(len(tokens)):
            self._prefixes.keep(answer.asked.owner, tokens, where.block(row, len(tokens)))

    def _leave(self, row: int) -> None:
        """Free a row, as `Rows.leave` does."""
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last
        self._rows.leave(row)
        self._over(1)

    def _do(self, task: Task, future: Future[Any]) -> None:
        self._over(1)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task())
            except Exception as error:
                future.set_exception(error)

    def _over(self, count: int) -> None:
        with self._lock:
            self._accepted -= count

    def _give_up(self, fault: Fault) -> None:
        self._out += [(answer, Piece(fault=fault)) for answer in (*self._running, *self._waiting)]
        self._over(len(self._running) + len(self._waiting) + len(self._tasks))
        for _, future in self._tasks:
            if future.set_running_or_notify_cancel():
                future.set_exception(fault)
        self._running.clear()
        self._waiting.clear()
        self._tasks.clear()
        self._rows.clear()

    def _deliver(self) -> None:
        """Hand what this step has made to the event loops that wait for it."""
        out, self._out = self._out, []
        for loop in {answer.loop for answer, _ in out}:
            loop.call_soon_threadsafe(_hand_over, [(answer, piece) for answer, piece in out if answer.loop is loop])


def _hand_over(out: list[tuple[Answer, Piece]]) -> None:
    for answer, piece in out:
        answer.pieces.put_nowait(piece)
