"""Dynamic batching: one thread runs the model; texts that arrive meanwhile form the next batch.

No text waits for company: on a CPU a batch is little faster than its texts one by one (README.md), so that waiting only
costs. Batches take a text from each waiting request in turn: a request of a thousand texts delays nobody else for long.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from time import perf_counter
from typing import NamedTuple

import numpy as np

from kernelm_contracts.server import Entity
from kernelm_encoder.model import Array, Document, Model, Output
from kernelm_encoder.settings import Settings
from kernelm_sdk.errors import ClientFault, Fault, PluginFault

SMOOTHING = 0.2  # weight of the newest batch in the estimate of a token's time


class Answer(NamedTuple):
    """What the model said of the texts of one request, a text a row."""

    output: Output
    tokens: int


class _Request:
    """A request on its way: texts from `taken` on still wait."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.taken, self.tokens = texts, 0, 0
        self.next: Document | None = None  # texts[taken], once it is tokenized
        self.logits: list[Array] = []  # a text each
        self.embeddings: list[Array] = []
        self.entities: list[tuple[Entity, ...]] = []
        self.future: Future[Answer] = Future()

    @property
    def waiting(self) -> int:
        return len(self.texts) - self.taken

    def fail(self, fault: Fault) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(fault)

    def add(self, output: Output, row: int) -> None:
        self.logits.append(output.logits[row])
        if output.embeddings is not None:
            self.embeddings.append(output.embeddings[row])
        if output.entities:
            self.entities.append(output.entities[row])
        complete = len(self.logits) == len(self.texts)
        if complete and not self.future.done() and self.future.set_running_or_notify_cancel():
            whole = Output(np.stack(self.logits), np.stack(self.embeddings) if self.embeddings else None, self.entities)
            self.future.set_result(Answer(whole, self.tokens))


class Batcher:
    """Answers requests with `model` on a thread of its own, until `close`."""

    def __init__(self, model: Model, settings: Settings, log: logging.Logger) -> None:
        self._model, self._settings, self._log = model, settings, log
        self._inbox: SimpleQueue[_Request | None] = SimpleQueue()
        self._pending: deque[_Request] = deque()  # the thread's own
        self._lock = threading.Lock()  # of the two below
        self._waiting = 0  # texts accepted and in no batch yet
        self._closed = False
        self._ms_per_token = 0.0  # of a padded token; 0 until the first batch
        self._thread = threading.Thread(target=self._work, name=f"model {model.card.name}", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[str]) -> Future[Answer]:
        """The answer to come; cancel it to drop what still waits. From any thread.

        ClientFault "busy" (retriable) if the queue has no room now, "too_large" if it never has.
        """
        room = self._settings.max_queue
        if len(texts) > room:
            raise ClientFault("too_large", f"`input` has {len(texts)} texts, more than the queue holds ({room})",
                              f"send at most {room} texts in a request")  # fmt: skip
        with self._lock:
            if self._closed:
                raise PluginFault("not_ready", "the server is stopping", "call again", retriable=True)
            if self._waiting + len(texts) > room:
                raise ClientFault("busy", f"{self._waiting} of at most {room} texts are waiting already", "call again "
                                  "in a moment, or raise the pool's instances", retriable=True)  # fmt: skip
            self._waiting += len(texts)
            request = _Request(texts)
            self._inbox.put(request)  # under the lock, so that none comes behind the end
        return request.future

    def close(self) -> None:
        """Answer what was accepted, then end the thread. Blocks until then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        while open_ or self._pending:
            while open_ and (not self._pending or not self._inbox.empty()):
                if request := self._inbox.get():
                    self._pending.append(request)
                else:
                    open_ = False
            if batch := self._next_batch():
                self._run(batch)

    def _next_batch(self) -> list[tuple[_Request, Document]]:
        batch: list[tuple[_Request, Document]] = []
        longest = 0
        while self._pending and len(batch) < self._settings.max_batch:
            request = self._pending[0]
            if request.future.done() or (document := self._tokenized(request)) is None:
                self._leave(request, request.waiting)
                self._pending.popleft()
                continue
            longest = max(longest, document.tokens)
            if batch and longest * (len(batch) + 1) * self._ms_per_token > self._settings.max_batch_ms:
                break
            batch.append((request, document))
            request.next = None
            request.tokens += document.tokens
            self._leave(request, 1)
            self._pending.popleft()
            if request.waiting:
                self._pending.append(request)
        return batch

    def _tokenized(self, request: _Request) -> Document | None:
        try:
            request.next = request.next or self._model.tokenize(request.texts[request.taken])
        except Exception as error:  # of the tokenizer's own kinds; it must not end the thread
            self._fail([request], f"can't tokenize `input[{request.taken}]`", error)
        return request.next

    def _leave(self, request: _Request, texts: int) -> None:
        request.taken += texts
        with self._lock:
            self._waiting -= texts

    def _run(self, batch: list[tuple[_Request, Document]]) -> None:
        started = perf_counter()
        try:
            output = self._model.run([document for _, document in batch])
        except Exception as error:  # of the compute library's own kinds; it must not end the thread
            self._fail([request for request, _ in batch], "the model failed", error)
            return
        padded = len(batch) * max(1, *(document.tokens for _, document in batch))
        spent = (perf_counter() - started) * 1e3 / padded
        self._ms_per_token += (spent - self._ms_per_token) * (SMOOTHING if self._ms_per_token else 1.0)
        for row, (request, _) in enumerate(batch):
            request.add(output, row)

    def _fail(self, requests: list[_Request], what: str, error: Exception) -> None:
        self._log.error("%s", what, exc_info=error)
        for request in requests:
            request.fail(PluginFault("inference_failed", f"{what}: {type(error).__name__}: {error}",
                                     "the server's log has the traceback"))  # fmt: skip
