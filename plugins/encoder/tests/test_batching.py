"""What goes into a batch, and what becomes of requests that can't be answered. The model here is a gate: each run waits
until the test lets it go, so that what arrives meanwhile is known."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from kernelm_contracts.trainer import ModelCard
from kernelm_encoder import batching
from kernelm_encoder.batching import Batcher
from kernelm_encoder.model import Document, Output, open_model
from kernelm_encoder.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault

LOG = logging.getLogger("test")


class Gate:
    """A model whose logit is the number that the text is; "bad" can't be tokenized, "-1" can't be run."""

    embeds, extracts = False, False
    size = 0
    card = ModelCard("gate", "text-classification", "encoder", ("a", "b"), 8)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        self.during: Callable[[Sequence[Document]], None] = lambda documents: None

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        raise NotImplementedError

    def tokenize(self, text: str) -> Document:
        return Document(10, int(text))

    def run(self, documents: Sequence[Document]) -> Output:
        self.batches.append([document.features for document in documents])
        self.entered.release()
        assert self.leave.acquire(timeout=60)
        self.during(documents)
        if -1 in self.batches[-1]:
            raise ValueError("no such thing")
        return Output(np.array([[number, 0.0] for number in self.batches[-1]], np.float32), None)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def batcher(gate: Gate) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(**settings: Any) -> Batcher:
        made.append(Batcher(gate, Settings(**settings), LOG))
        return made[-1]

    yield make
    gate.leave.release(1000)
    for batcher in made:
        batcher.close()


def numbers(future: Any) -> list[float]:
    return [float(row[0]) for row in future.result(10).output.logits]


def test_what_arrives_during_a_batch_is_the_next_one(gate: Gate, batcher: Any) -> None:
    server = batcher()
    first = server.submit(["0"])
    assert gate.entered.acquire(timeout=60)
    others = [server.submit([str(i)]) for i in range(1, 6)]
    gate.leave.release(2)
    assert [numbers(future) for future in [first, *others]] == [[0], [1], [2], [3], [4], [5]]
    assert gate.batches == [[0], [1, 2, 3, 4, 5]]


def test_batches_are_bounded_and_take_from_requests_in_turn(gate: Gate, batcher: Any) -> None:
    server = batcher(max_batch=3)
    server.submit(["0"])
    assert gate.entered.acquire(timeout=60)
    large = server.submit([str(i) for i in range(10, 16)])
    small = server.submit(["99"])
    gate.leave.release(2)
    assert numbers(small) == [99]
    assert gate.batches[1] == [10, 99, 11]
    gate.leave.release(2)
    assert numbers(large) == [10, 11, 12, 13, 14, 15]
    assert large.result().tokens == 60
    assert [len(batch) for batch in gate.batches] == [1, 3, 3, 1]


def test_batches_are_cut_at_the_latency_bound(gate: Gate, batcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def spend(documents: Sequence[Document]) -> None:
        nonlocal now
        now += 0.010 * len(documents)

    gate.during = spend
    monkeypatch.setattr(batching, "perf_counter", lambda: now)
    server = batcher(max_batch_ms=45.0)  # 10 ms a text: four fit
    server.submit(["0"])
    assert gate.entered.acquire(timeout=60)
    future = server.submit([str(i) for i in range(1, 11)])
    gate.leave.release(10)
    assert numbers(future) == list(range(1, 11))
    assert [len(batch) for batch in gate.batches] == [1, 4, 4, 2]


def test_a_full_queue_is_busy_until_it_has_room(gate: Gate, batcher: Any) -> None:
    server = batcher(max_queue=5)
    with pytest.raises(ClientFault, match="1000 texts") as never:
        server.submit(["0"] * 1000)
    assert (never.value.code, never.value.retriable) == ("too_large", False)
    running = server.submit(["0"])
    assert gate.entered.acquire(timeout=60)
    waiting = server.submit(["1", "2", "3"])
    with pytest.raises(ClientFault, match="3 of at most 5") as now:
        server.submit(["4", "5", "6"])
    assert (now.value.code, now.value.retriable) == ("busy", True)
    fits = server.submit(["7", "8"])
    gate.leave.release(10)
    assert [numbers(future) for future in (running, waiting, fits)] == [[0], [1, 2, 3], [7, 8]]
    assert numbers(server.submit(["9"] * 5)) == [9] * 5


def test_a_cancelled_request_leaves_the_queue(gate: Gate, batcher: Any) -> None:
    server = batcher(max_queue=6)
    server.submit(["0"])
    assert gate.entered.acquire(timeout=60)
    gone = server.submit(["1", "2", "3", "4", "5"])
    behind = server.submit(["6"])
    assert gone.cancel()
    gate.leave.release(2)
    assert numbers(behind) == [6]
    gate.leave.release(1)
    assert numbers(server.submit(["7"] * 6)) == [7] * 6  # its places are free again
    assert gate.batches == [[0], [6], [7] * 6]


def test_a_failure_is_that_requests_alone(gate: Gate, batcher: Any) -> None:
    server = batcher(max_batch=1)
    gate.leave.release(20)
    futures = [server.submit(texts) for texts in (["1"], ["2", "-1", "3"], ["4", "bad"], ["5"])]
    assert numbers(futures[0]) == [1]
    assert numbers(futures[3]) == [5]
    for future, what in ((futures[1], "no such thing"), (futures[2], r"`input\[1\]`")):
        with pytest.raises(PluginFault, match=what) as caught:
            future.result(10)
        assert caught.value.code == "inference_failed"
    assert 3 not in [number for batch in gate.batches for number in batch]  # nobody waits for it any more
    assert numbers(server.submit(["6"])) == [6]


def test_closing_answers_what_was_accepted(gate: Gate, batcher: Any) -> None:
    server = batcher(max_batch=1)
    futures = [server.submit([str(i)]) for i in range(5)]
    gate.leave.release(5)
    server.close()
    assert [numbers(future) for future in futures] == [[i] for i in range(5)]
    with pytest.raises(PluginFault) as caught:
        server.submit(["6"])
    assert (caught.value.code, caught.value.retriable) == ("not_ready", True)


def test_batched_answers_are_those_of_texts_alone(onnx: Path, unseen: Any) -> None:
    model = open_model(onnx, threads=1)
    alone = [model.run([model.tokenize(text)]).logits[0] for text in unseen.texts]
    server = Batcher(model, Settings(max_batch=8), LOG)
    try:
        futures = [server.submit(unseen.texts[i : i + 7]) for i in range(0, 100, 7)]
        together = np.concatenate([future.result(60).output.logits for future in futures])
    finally:
        server.close()
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)
