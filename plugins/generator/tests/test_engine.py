"""Answers in a batch are those that the model gives alone, whoever joins and leaves; who is gone stops the work."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelm.testing.harness import until
from kernelm_generator.engine import Answer, Asked, Engine, Piece
from kernelm_generator.loading import load
from kernelm_generator.memory import Plan
from kernelm_generator.model import Model
from kernelm_generator.sampling import Sampling
from kernelm_generator.seq2seq import TYPES
from kernelm_generator.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault

LOG = logging.getLogger("test")
TEXTS = Plan(context=256, max_tokens=128, slots=3, prefix_tokens=0, needed_mb=0)  # of an encoder-decoder


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load(tiny, Settings(precision="fp32", threads=1), 0, 1, LOG)[0]


@pytest.fixture
async def engine(model: Model) -> AsyncIterator[Engine]:
    made = Engine(model, Plan(context=512, max_tokens=500, slots=3, prefix_tokens=2000, needed_mb=0), 16, 4, LOG)
    yield made
    await asyncio.to_thread(made.close)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Model, prompt: list[int], count: int) -> list[int]:
    made = model.network.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def decoded(model: Model, prompt: list[int], count: int) -> list[int]:
    """The same by an encoder-decoder, without the token that it begins with."""
    made = model.network.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return made[0, 1:].tolist()  # type: ignore[no-any-return]


async def whole(engine: Engine, asked: Asked) -> tuple[Answer, list[Piece]]:
    answer = engine.submit(asked)
    return answer, [piece async for piece in engine.pieces(answer)]


async def test_each_answer_of_a_batch_is_the_one_that_generate_gives(engine: Engine, model: Model) -> None:
    sizes = ((3, 40), (50, 10), (170, 60), (5, 80), (2, 100), (100, 33), (16, 1))
    calls = [Asked(tokens(n, n), count, Sampling()) for n, count in sizes]
    found = await asyncio.gather(*(whole(engine, asked) for asked in calls))
    for asked, (answer, pieces) in zip(calls, found, strict=True):
        assert answer.made == alone(model, asked.prompt, asked.max_tokens)
        assert (pieces[-1].finish, answer.cached) == ("length", 0)


async def test_rows_are_moved_when_the_columns_are_used_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm_generator.engine.SLACK", 4)
    engine = Engine(model, Plan(context=64, max_tokens=60, slots=3, prefix_tokens=0, needed_mb=0), 16, 20, LOG)
    calls = [Asked(tokens(4 + seed, seed), 20 + 7 * seed % 23, Sampling()) for seed in range(12)]
    found = await asyncio.gather(*(whole(engine, asked) for asked in calls))
    await asyncio.to_thread(engine.close)
    assert sum(asked.max_tokens for asked in calls) / 3 > engine._rows.columns
    for asked, (answer, _) in zip(calls, found, strict=True):
        assert answer.made == alone(model, asked.prompt, asked.max_tokens)


async def test_a_model_with_sliding_windows_is_served_alike(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    config = Gemma3TextConfig(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                              num_key_value_heads=1, head_dim=16, max_position_embeddings=512, sliding_window=8, eos_token_id=257,
                              initializer_range=0.3,
                              layer_types=["sliding_attention", "full_attention", "sliding_attention"])  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, plan = load(tmp_path, Settings(precision="fp32", slots=3), 0, 1, LOG)
    engine = Engine(model, plan, 16, 4, LOG)
    calls = [Asked(tokens(n, n), count, Sampling()) for n, count in ((3, 30), (50, 20), (70, 40), (20, 30))]
    for asked, (answer, _) in zip(calls, await asyncio.gather(*(whole(engine, asked) for asked in calls)), strict=True):
        made = alone(model, asked.prompt, asked.max_tokens)
        assert made[: len(answer.made)] == answer.made
        assert len(answer.made) == asked.max_tokens or answer.made[-1] in model.ends
    await asyncio.to_thread(engine.close)


async def test_what_was_read_before_is_not_read_again_by_the_same_caller(engine: Engine, model: Model) -> None:
    first, _ = await whole(engine, Asked(tokens(60, 1), 20, Sampling(), owner="acme"))
    more = [*first.asked.prompt, *first.made, *tokens(7, 2)]
    for owner, cached in (("other", 0), ("acme", 79)):
        again, _ = await whole(engine, Asked(more, 20, Sampling(), owner=owner))
        assert again.cached == cached
        assert again.made == alone(model, more, 20)
    same, _ = await whole(engine, Asked(more, 20, Sampling(), owner="acme"))
    assert same.cached == len(more) - 1  # the last token is always read: the first new one comes after it


async def test_a_long_prompt_does_not_hold_up_others(engine: Engine) -> None:
    """While 480 tokens are read, 16 a step, an answer under way gets its token at each of these steps."""
    under_way = engine.submit(Asked(tokens(4, 1), 400, Sampling()))
    stream = engine.pieces(under_way)
    await anext(stream)
    long = engine.submit(Asked(tokens(480, 2), 2, Sampling()))
    before = len(under_way.made)
    first = await anext(engine.pieces(long))
    assert first
    assert len(under_way.made) - before >= 480 // 16
    await stream.aclose()


async def test_a_seed_gives_the_same_alone_and_among_others(engine: Engine) -> None:
    asked = Asked(tokens(9, 3), 30, Sampling(temperature=1.3, top_p=0.9, top_k=40, seed=5))
    (answer, _), *_ = found = await asyncio.gather(whole(engine, asked), *(
        whole(engine, Asked(tokens(12, seed), 40, Sampling(temperature=1.0, seed=seed))) for seed in range(3)))  # fmt: skip
    assert answer.made == (await whole(engine, asked))[0].made
    assert len({tuple(other.made) for other, _ in found}) == 4
    other, _ = await whole(engine, asked._replace(sampling=asked.sampling._replace(seed=6)))
    assert other.made != answer.made


async def test_who_is_gone_stops_the_work_and_frees_the_slot(engine: Engine) -> None:
    answers = [engine.submit(Asked(tokens(4, k), 490, Sampling())) for k in range(5)]  # two of them wait
    stream = engine.pieces(answers[0])
    await anext(stream)
    await stream.aclose()
    for answer in answers:
        answer.gone = True
    last, _ = await whole(engine, Asked(tokens(4, 9), 3, Sampling()))
    assert len(last.made) == 3
    assert all(len(answer.made) < 490 for answer in answers)
    assert await engine.run(lambda: (engine._running, list(engine._waiting), engine._rows.lengths)) == ([], [], [])
    assert engine._accepted == 0


async def test_a_call_beyond_the_queue_is_refused(engine: Engine) -> None:
    answers = [engine.submit(Asked(tokens(4, k), 490, Sampling())) for k in range(7)]
    with pytest.raises(ClientFault) as caught:
        engine.submit(Asked([1], 1, Sampling()))
    assert (caught.value.code, caught.value.retriable) == ("busy", True)
    assert caught.value.details["retry_after_s"] >= 1
    for answer in answers:
        answer.gone = True
    await until(lambda: engine._accepted == 0)
    assert (await whole(engine, Asked([1], 1, Sampling())))[0].made


async def test_a_step_that_fails_ends_its_answers_and_not_the_server(engine: Engine, model: Model, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", fail)
        with pytest.raises(PluginFault, match="RuntimeError"):
            await whole(engine, Asked(tokens(5, 1), 5, Sampling()))
    answer, _ = await whole(engine, Asked(tokens(5, 1), 5, Sampling()))
    assert answer.made == alone(model, tokens(5, 1), 5)


async def test_what_is_under_way_is_told_when_the_engine_closes(model: Model) -> None:
    engine = Engine(model, Plan(512, 500, 1, 0, 0), 16, 4, LOG)
    answers = [engine.submit(Asked(tokens(4, k), 490, Sampling())) for k in range(2)]
    await asyncio.to_thread(engine.close)
    for answer in answers:
        with pytest.raises(PluginFault, match="stopping"):
            _ = [piece async for piece in engine.pieces(answer)]
    with pytest.raises(PluginFault, match="stopping"):
        engine.submit(Asked([1], 1, Sampling()))


class ClosesBehind:
    """A lock whose first holder finds the engine closed as soon as it lets go."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock, self._first = engine, engine._lock, True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        first, self._first = self._first, False
        self._lock.release()
        if first:
            self._engine.close()


async def test_a_call_that_was_accepted_is_told_when_the_engine_closes_behind_it(model: Model) -> None:
    for task in (False, True):
        engine = Engine(model, Plan(512, 500, 1, 0, 0), 16, 4, LOG)
        engine._lock = ClosesBehind(engine)  # type: ignore[assignment]
        call = engine.run(lambda: None) if task else whole(engine, Asked([1], 490, Sampling()))
        with pytest.raises(PluginFault, match="stopping"):
            await asyncio.wait_for(call, 60)


@pytest.mark.parametrize("kind", sorted(TYPES))
async def test_each_answer_of_an_encoder_decoder_is_the_one_that_generate_gives(kind: str, seq2seq: Any, tmp_path: Path) -> None:
    model, _ = load(seq2seq(tmp_path, kind), Settings(precision="fp32", threads=1), 0, 1, LOG)
    engine = Engine(model, TEXTS, 16, 20, LOG)
    sizes = ((3, 40), (50, 10), (170, 60), (5, 80), (2, 100), (100, 33), (200, 25), (16, 1))
    calls = [Asked(tokens(n, n), count, Sampling()) for n, count in sizes]
    try:
        found = await asyncio.gather(*(whole(engine, asked) for asked in calls))
        assert len({tuple(made.made[:10]) for made, _ in found}) >= 5, "answers depend on their texts"
        assert len({token for made, _ in found for token in made.made}) >= 5
        for asked, (made, pieces) in zip(calls, found, strict=True):
            wanted = decoded(model, asked.prompt, asked.max_tokens)
            assert made.made == wanted
            assert pieces[-1].finish == ("stop" if wanted[-1] in model.ends else "length")
    finally:
        await asyncio.to_thread(engine.close)


async def test_rows_of_an_encoder_decoder_are_moved_and_freed(translator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm_generator.engine.SLACK", 4)
    model, _ = load(translator, Settings(precision="fp32"), 0, 1, LOG)
    engine = Engine(model, TEXTS._replace(max_tokens=40), 16, 40, LOG)
    calls = [Asked(tokens(4 + 11 * seed % 60, seed), 10 + 7 * seed % 23, Sampling()) for seed in range(15)]
    try:
        stream = engine.pieces(engine.submit(Asked(tokens(9, 1), 40, Sampling())))
        await anext(stream)
        await stream.aclose()
        found = await asyncio.gather(*(whole(engine, asked) for asked in calls))
        assert sum(asked.max_tokens for asked in calls) / 3 > engine._rows.columns
        for asked, (made, _) in zip(calls, found, strict=True):
            assert made.made == decoded(model, asked.prompt, asked.max_tokens)
        assert await engine.run(lambda: (engine._running, engine._rows.lengths, engine._rows.texts.lengths)) == ([], [], [])  # type: ignore[attr-defined]
    finally:
        await asyncio.to_thread(engine.close)
