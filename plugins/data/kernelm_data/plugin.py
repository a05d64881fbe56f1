"""`data/1`: the effects around `kernelm_data.prepare`, which is imported at the first job."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from kernelm_contracts.data import Data, DatasetCard, DatasetPrepared, Prepared, PrepareRequest
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, Plugin
from kernelm_sdk.system import ArtifactName, Artifacts

KIND = "dataset"


class DataPlugin(Plugin, Data):
    """Turns raw text into datasets."""

    async def prepare(self, request: PrepareRequest, job: Job) -> Prepared:
        source = await job.context.artifact(request.source)
        tokenizer = await job.context.artifact(request.tokenize.tokenizer) if request.tokenize.tokenizer else None
        out = job.scratch / KIND
        out.mkdir()
        card: DatasetCard = await job.in_thread(_prepare, source, tokenizer, out, request, job)
        splits = {name: split.documents for name, split in card.splits.items()}
        documents = sum(splits.values())
        lineage = {"job": job.id, "source": request.source}
        if request.tokenize.tokenizer:
            lineage["tokenizer"] = request.tokenize.tokenizer
        job.raise_if_cancelled()
        metadata = {"name": card.name, "documents": documents, "labels": list(card.labels)}
        dataset = await job.context.store(out, KIND, metadata=metadata, **lineage)
        await job.context.publish(DatasetPrepared(name=card.name, dataset=dataset, documents=documents))
        return Prepared(dataset, documents, card.labels, splits, card)

    async def describe(self, request: ArtifactName, call: Call) -> DatasetCard:
        artifact = await self.context.call(Artifacts.describe, request)
        if artifact.kind != KIND:
            raise ClientFault("not_a_dataset", f"{request.digest}: is an artifact of kind {artifact.kind!r}, not {KIND!r}",
                              "give the digest that data.prepare answered with")
        folder = await self.context.artifact(request.digest)
        return await asyncio.to_thread(read_card, folder, request.digest)


def _prepare(source: Path, tokenizer: Path | None, out: Path, request: PrepareRequest, job: Job) -> Any:
    from kernelm_data.prepare import prepare

    def report(fraction: float, phase: str, message: str, rate: float) -> None:
        job.progress(fraction, phase, message, documents_per_s=rate)

    return prepare(source, tokenizer, out, request, report)


def read_card(folder: Path, name: str) -> DatasetCard:
    """The card in a dataset's folder; ClientFault `not_a_dataset` if there is none that is valid."""
    try:
        return msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetCard)
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise ClientFault("not_a_dataset", f"{name}: dataset.json: {error}", "prepare the dataset again") from None
