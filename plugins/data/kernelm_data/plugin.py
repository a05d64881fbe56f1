"""`data/1`: the effects around `kernelm_data.prepare`, which is imported at the first job."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from kernelm_contracts.data import (
    Data,
    DatasetCard,
    DatasetPrepared,
    Prepared,
    PrepareRequest,
    Private,
    Redacted,
    RedactedPart,
    RedactPart,
    RedactRequest,
    RedactState,
)
from kernelm_data.settings import DataSettings, read_key
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, Plugin
from kernelm_sdk.system import ArtifactName, Artifacts

KIND = "dataset"
SMALL = "folders"  # the format whose datasets fit into memory; all others make a corpus


class DataPlugin(Plugin, Data):
    """Turns raw text into datasets."""

    Settings = DataSettings

    async def prepare(self, request: PrepareRequest, job: Job) -> Prepared:
        out = job.scratch / KIND
        out.mkdir()
        if request.format == SMALL:
            card = await self._prepare_small(request, job, out)
        else:
            from kernelm_data.corpus.effects import prepare_corpus

            card = await prepare_corpus(request, job, self.settings, self._key(request.private), out)
        splits = {name: split.documents for name, split in card.splits.items()}
        documents = sum(splits.values())
        lineage = {"job": job.id, **sources_of(request)}
        job.raise_if_cancelled()
        metadata = {"name": card.name, "documents": documents, "labels": list(card.labels)}
        dataset = await job.context.store(out, KIND, metadata=metadata, **lineage)
        await job.context.publish(DatasetPrepared(name=card.name, dataset=dataset, documents=documents))
        return Prepared(dataset, documents, card.labels, splits, card)

    async def _prepare_small(self, request: PrepareRequest, job: Job, out: Path) -> DatasetCard:
        source = await job.context.artifact(request.source)
        tokenizer = await job.context.artifact(request.tokenize.tokenizer) if request.tokenize.tokenizer else None
        card: DatasetCard = await job.in_thread(_prepare, source, tokenizer, out, request, job, self._key(request.private))
        return card

    async def describe(self, request: ArtifactName, call: Call) -> DatasetCard:
        artifact = await self.context.call(Artifacts.describe, request)
        if artifact.kind != KIND:
            raise ClientFault("not_a_dataset", f"{request.digest}: is an artifact of kind {artifact.kind!r}, not {KIND!r}",
                              "give the digest that data.prepare answered with")
        folder = await self.context.artifact(request.digest)
        return await asyncio.to_thread(read_card, folder, request.digest)

    async def redact(self, request: RedactRequest, call: Call) -> Redacted:
        return await asyncio.to_thread(_redact, request, self._key(request.private))

    async def redact_part(self, request: RedactPart, call: Call) -> RedactedPart:
        return await asyncio.to_thread(_redact_part, request, self._key(request.private))

    def _key(self, private: Private | None) -> bytes:
        return read_key(self.settings) if private is not None and private.style == "hash" else b""


def sources_of(request: PrepareRequest) -> dict[str, str]:
    """Name -> digest of everything that goes into a dataset."""
    found = {"source": request.source, "tokenizer": request.tokenize.tokenizer, "parent": request.store.append_to}
    inputs = tuple(given.artifact for given in request.inputs)
    for name, digests in (("input", inputs), ("against", request.against), ("test_set", request.test_sets)):
        found |= {f"{name}{i}": digest for i, digest in enumerate(digests)}
    return {name: digest for name, digest in found.items() if digest}


def _redact(request: RedactRequest, key: bytes) -> Redacted:
    from kernelm_data.private.redact import Placeholders
    from kernelm_data.private.screen import Screen

    screen, placeholders = Screen(_redacting(request.private), key), Placeholders(request.private.style, key)
    screened = [screen(text, placeholders=placeholders) for text in request.texts]
    return Redacted(tuple(text or "" for text, _ in screened), tuple(found for _, found in screened))


def _redact_part(request: RedactPart, key: bytes) -> RedactedPart:
    from kernelm_data.private.screen import Screen

    state = request.state
    if request.private.style == "number" or not 0 <= state.given <= len(state.text):
        raise ClientFault("invalid", "redact-part: style 'number', or a state that was not given", "give the state back as it came")
    redactor = Screen(_redacting(request.private), key).stream((state.text, state.given, state.persons))
    text = redactor.feed(request.text) + (redactor.close() if request.last else "")
    return RedactedPart(text, RedactState(*redactor.state), dict(sorted(redactor.found.items())))


def _redacting(private: Private) -> Private:
    if private.action != "redact":
        raise ClientFault("invalid", f"private.action: {private.action!r} is for datasets", 'give "redact", or leave it out')
    return private


def _prepare(source: Path, tokenizer: Path | None, out: Path, request: PrepareRequest, job: Job, key: bytes) -> Any:
    from kernelm_data.prepare import prepare

    def report(fraction: float, phase: str, message: str, rate: float) -> None:
        job.progress(fraction, phase, message, documents_per_s=rate)

    return prepare(source, tokenizer, out, request, report, key)


def read_card(folder: Path, name: str) -> DatasetCard:
    """The card in a dataset's folder; ClientFault `not_a_dataset` if there is none that is valid."""
    try:
        return msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetCard)
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise ClientFault("not_a_dataset", f"{name}: dataset.json: {error}", "prepare the dataset again") from None
