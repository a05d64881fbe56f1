"""The handlers, with artifacts from a folder instead of the store."""

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

import kernelm_encoder
from kernelm_contracts.server import ClassifyRequest, EmbedRequest, ExtractRequest, InfoRequest
from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.plugin import EncoderPlugin
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import MANIFEST, Call, implemented, load_plugin, read_manifest

TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
DIGEST = "sha256:" + "ab" * 32
CALL = Call("tester", "news")
Serving = Callable[..., AbstractAsyncContextManager[EncoderPlugin]]


class Shelf:
    """The part of `Context` that the handlers use."""

    pool, threads = "g3", 1
    log = logging.getLogger("test")

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, list[Event]()

    async def publish(self, event: Event) -> None:
        self.events.append(event)

    async def artifact(self, digest: str) -> Path:
        assert digest == DIGEST
        return self.folder


def make(folder: Path, **settings: Any) -> EncoderPlugin:
    manifest = read_manifest(Path(kernelm_encoder.__path__[0]) / MANIFEST)
    plugin = load_plugin(manifest, Shelf(folder), settings)  # type: ignore[arg-type]
    assert isinstance(plugin, EncoderPlugin)
    return plugin


@pytest.fixture
def serving() -> Serving:
    @asynccontextmanager
    async def serve(folder: Path, **settings: Any) -> AsyncIterator[EncoderPlugin]:
        plugin = make(folder, model={"name": "news", "artifact": DIGEST, "generation": 3}, **settings)
        await plugin.on_start()
        try:
            yield plugin
        finally:
            await plugin.on_stop()

    return serve


async def refused(coroutine: Any, code: str) -> ClientFault:
    with pytest.raises(ClientFault) as caught:
        await coroutine
    assert caught.value.code == code
    return caught.value


async def test_each_label_of_a_multi_label_model_has_a_probability_of_its_own(
    serving: Serving, tfidf: Any, unseen: Any, tmp_path: Path
) -> None:  # fmt: skip
    folder = shutil.copytree(tfidf[0], tmp_path / "multi")
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | {"problem": "multi-label"}))
    async with serving(folder) as plugin:
        logits = plugin._model.run([plugin._model.tokenize(unseen.texts[0])]).logits[0]
        (row,) = (await plugin.classify(ClassifyRequest((unseen.texts[0],)), CALL)).results
    each = dict(zip(plugin._model.card.labels, (1 / (1 + np.exp(-logits))).tolist(), strict=True))
    assert {label.label: label.score for label in row} == pytest.approx(each, abs=1e-6)


async def test_answers_say_who_gave_them(serving: Serving, tfidf: Any, unseen: Any) -> None:
    folder, vectorizer, classifier = tfidf
    async with serving(folder) as plugin:
        assert plugin.models() == ("news",)
        assert [event.fraction for event in plugin.context.events] == [0.0, 1.0]  # type: ignore[attr-defined]
        reply = await plugin.classify(ClassifyRequest(tuple(unseen.texts), top=2, at_least=3), CALL)
    assert (reply.model, reply.generation, reply.artifact) == ("news", 3, DIGEST)
    assert reply.tokens == sum(len(vectorizer.build_tokenizer()(text)) for text in unseen.texts)
    assert reply.took_ms > 0
    expected = classifier.predict_proba(vectorizer.transform(unseen.texts))
    for row, probabilities in zip(reply.results, expected, strict=True):
        best, second = sorted(probabilities, reverse=True)[:2]
        assert [label.score for label in row] == [pytest.approx(best, abs=1e-4), pytest.approx(second, abs=1e-4)]
    assert msgspec.json.decode(msgspec.json.encode(reply), type=type(reply)) == reply


async def test_many_callers_at_once_get_their_own_answers(serving: Serving, onnx_int8: Path, unseen: Any) -> None:
    async with serving(onnx_int8, max_batch=8) as plugin:
        alone = [await plugin.classify(ClassifyRequest((text,), top=1), CALL) for text in unseen.texts[:30]]
        together = await asyncio.gather(*(plugin.classify(ClassifyRequest((text,), top=1), CALL) for text in unseen.texts[:30]))
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    # int8 activations are quantized by batch, so that scores move a little with the company
    same = [one.results[0][0].label == other.results[0][0].label for one, other in zip(alone, together, strict=True)]
    assert sum(same) >= 27


async def test_of_64_callers_the_bad_and_the_gone_disturb_nobody(serving: Serving, tagger: Path, unseen: Any) -> None:
    """Texts of all lengths beside blank ones, control characters, half a million letters, an overfull call, and who leaves."""
    texts = [text[: 7 + 23 * k % 300] for k, text in enumerate(unseen.texts[:64])]
    bad = ("", " \n", "\0\x01", "\u200b", "x" * 500_000, "😀" * 5000)

    async def ask(plugin: EncoderPlugin, *texts: str) -> Any:
        return (await plugin.extract(ExtractRequest(texts), CALL)).results

    async with serving(tagger, max_batch=8, max_queue=400) as plugin:
        alone = [await ask(plugin, text) for text in texts]
        calls = [asyncio.create_task(ask(plugin, text)) for text in texts]
        wrong = [asyncio.create_task(ask(plugin, text)) for text in bad] + [asyncio.create_task(ask(plugin, *["a"] * 401))]
        leave = [asyncio.create_task(ask(plugin, *texts[:16])) for _ in range(4)]
        await asyncio.sleep(0)
        for call in leave:
            call.cancel()
        together = await asyncio.gather(*calls)
        refused = [error.code if isinstance(error, ClientFault) else error
                   for error in await asyncio.gather(*wrong, return_exceptions=True)]  # fmt: skip
        await asyncio.gather(*leave, return_exceptions=True)
        assert plugin._batcher is not None
        await ask(plugin, "a")  # behind which nothing waits
        assert plugin._batcher._waiting == 0
    assert refused[:2] + refused[-1:] == ["invalid", "invalid", "too_large"]
    assert not [found for found in refused[2:-1] if isinstance(found, str | BaseException)]
    for one, other in zip(alone, together, strict=True):
        assert [(e.label, e.start, e.end) for e in one[0]] == [(e.label, e.start, e.end) for e in other[0]]


async def test_info_names_the_methods_that_are_answered(serving: Serving, encoder: Path, tfidf: Any) -> None:
    for folder, methods in ((encoder, ("classify", "embed")), (tfidf[0], ("classify",))):
        async with serving(folder) as plugin:
            info = await plugin.info(InfoRequest(at_least=3), CALL)
            await refused(plugin.info(InfoRequest(at_least=4), CALL), "stale_generation")
        assert (info.methods, info.model, info.generation, info.artifact) == (methods, "news", 3, DIGEST)
        assert info.details["labels"] == ", ".join(plugin._model.card.labels)


async def test_embeddings_have_unit_length_and_meaning(serving: Serving, encoder: Path) -> None:
    texts = ("The striker scored two goals.", "A late goal won the match.", "Shares fell after the profit warning.")
    async with serving(encoder) as plugin:
        reply = await plugin.embed(EmbedRequest(texts), CALL)
    vectors = np.array(reply.embeddings)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert (reply.model, reply.generation, reply.artifact) == ("news", 3, DIGEST)


@pytest.mark.parametrize("fixture", ["tfidf_int8", "onnx"])
async def test_a_model_without_embeddings_says_so(fixture: str, serving: Serving, request: Any) -> None:
    async with serving(request.getfixturevalue(fixture)) as plugin:
        fault = await refused(plugin.embed(EmbedRequest(("text",)), CALL), "unsupported_method")
    assert fault.http_status == 501


async def test_bad_requests_are_refused(serving: Serving, tfidf: Any) -> None:
    async with serving(tfidf[0], max_queue=100) as plugin:
        assert "`input` is empty" in (await refused(plugin.classify(ClassifyRequest(()), CALL), "invalid")).message
        blank = await refused(plugin.classify(ClassifyRequest(("fine", " \n")), CALL), "invalid")
        assert "`input[1]`" in blank.message
        assert "`top`" in (await refused(plugin.classify(ClassifyRequest(("a",), top=-1), CALL), "invalid")).message
        stale = await refused(plugin.classify(ClassifyRequest(("a",), at_least=4), CALL), "stale_generation")
        assert stale.retriable
        assert stale.details == {"generation": 3, "pool": plugin.context.pool}
        await refused(plugin.classify(ClassifyRequest(("a",), model="mail"), Call("tester")), "unknown_model")
        await refused(plugin.classify(ClassifyRequest(("a",)), Call("tester", "mail")), "unknown_model")
        await refused(plugin.classify(ClassifyRequest(("a",) * 1000), CALL), "too_large")
        long = await plugin.classify(ClassifyRequest(("word " * 2000, "a")), CALL)
        assert long.tokens == 2000  # "a" is no word to TF-IDF, but answered
        assert len(long.results) == 2


async def test_bad_text_and_bad_settings_are_refused_before_the_handlers(tfidf: Any) -> None:
    for body in (b'{"input": [1]}', b'{"input": "text"}', b"{}", b'{"input": ["\xff"]}', b'{"input": ["\\ud800"]}'):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
            msgspec.json.decode(body, type=ClassifyRequest)
    for settings in ({"max_batch": 0}, {"max_batch_ms": 0}, {"threads": -1}, {"modle": {}}, {"model": {"name": "news"}}):
        with pytest.raises(PluginFault, match="settings of encoder"):
            make(tfidf[0], **settings)


async def test_an_instance_without_a_model_offers_none(tmp_path: Path) -> None:
    plugin = make(tmp_path)
    await plugin.on_start()
    assert plugin.models() == ()
    await refused(plugin.classify(ClassifyRequest(("a",)), Call("tester")), "unknown_model")
    await plugin.on_stop()
    methods = {"classify", "embed", "extract", "info", "measure"}
    assert set(implemented(plugin, ("server/1",))) == {f"server.v1.{method}" for method in methods}


async def test_a_model_that_can_not_be_served_stops_the_start(serving: Serving, tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match=r"model\.json"):
        async with serving(tmp_path):
            pass


@pytest.fixture(scope="module")
def tagger(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM's vocabulary, random weights: many different entities."""
    folder = tmp_path_factory.mktemp("tagger")
    torch.manual_seed(0)
    names = dict(enumerate(TAGS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, initializer_range=1.0, id2label=names,
                                     label2id={label: k for k, label in names.items()})  # fmt: skip
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = ModelCard("tagger", "token-classification", "token-classification", TAGS, 64)
    (folder / "model.json").write_bytes(msgspec.json.encode(card))
    return folder


async def test_entities_are_those_of_transformers(serving: Serving, tagger: Path, unseen: Any) -> None:
    pipeline: Any = transformers.pipeline("token-classification", str(tagger), aggregation_strategy="first")
    texts = [text[:200] for text in unseen.texts[:8]]
    async with serving(tagger) as plugin:
        reply = await plugin.extract(ExtractRequest(tuple(texts)), CALL)
        info = await plugin.info(InfoRequest(), CALL)
        for call in (plugin.classify(ClassifyRequest(("x",)), CALL), plugin.embed(EmbedRequest(("x",)), CALL)):
            with pytest.raises(ClientFault) as caught:
                await call
            assert caught.value.code == "unsupported_method"
    assert info.methods == ("extract",)
    assert sum(map(len, reply.results)) > 20
    for text, row in zip(texts, reply.results, strict=True):
        wanted = [(e["entity_group"], e["start"], e["end"]) for e in pipeline(text)]
        assert [(e.label, e.start, e.end) for e in row] == wanted
        np.testing.assert_allclose([e.score for e in row], [e["score"] for e in pipeline(text)], atol=1e-4)


async def test_a_sentence_encoder_embeds_and_does_nothing_else(serving: Serving, encoder: Path, tmp_path: Path) -> None:
    texts = ("The striker scored two goals.", "Shares fell.")
    async with serving(encoder) as plugin:
        wanted = await plugin.embed(EmbedRequest(texts), CALL)
    for file in encoder.iterdir():
        if file.name not in ("head.safetensors", "model.json"):
            (tmp_path / file.name).symlink_to(file)
    card = msgspec.json.decode((encoder / "model.json").read_bytes())
    card |= {"structure": "sentence-embedding", "task": "sentence-similarity", "labels": []}
    (tmp_path / "model.json").write_bytes(msgspec.json.encode(card))
    async with serving(tmp_path) as plugin:
        assert (await plugin.info(InfoRequest(), CALL)).methods == ("embed",)
        reply = await plugin.embed(EmbedRequest(texts), CALL)
    np.testing.assert_allclose(reply.embeddings, wanted.embeddings, atol=1e-5)
