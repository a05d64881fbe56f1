"""The handlers, with artifacts from a folder instead of the store."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import kernelm_encoder
from kernelm_contracts.server import ClassifyRequest, EmbedRequest
from kernelm_encoder.plugin import EncoderPlugin
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import MANIFEST, Call, implemented, load_plugin, read_manifest

DIGEST = "sha256:" + "ab" * 32
CALL = Call("tester", "news")
Serving = Callable[..., AbstractAsyncContextManager[EncoderPlugin]]


class Shelf:
    """The part of `Context` that the handlers use."""

    pool, threads = "g3", 1
    log = logging.getLogger("test")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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


async def test_answers_say_who_gave_them(serving: Serving, tfidf: Any, unseen: Any) -> None:
    folder, vectorizer, classifier = tfidf
    async with serving(folder) as plugin:
        assert plugin.models() == ("news",)
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
    assert set(implemented(plugin, ("server/1",))) == {"server.v1.classify", "server.v1.embed", "server.v1.measure"}


async def test_a_model_that_can_not_be_served_stops_the_start(serving: Serving, tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match=r"model\.json"):
        async with serving(tmp_path):
            pass
