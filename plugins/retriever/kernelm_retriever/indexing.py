"""Making an index: documents in, vectors out, with checkpoints."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kernelm_contracts.retriever import IndexCard, IndexRequest
from kernelm_retriever import index, passages
from kernelm_retriever.asking import vectors
from kernelm_retriever.index import Array
from kernelm_retriever.passages import Passage
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Job

FORMAT = 1  # of checkpoints: raise it when their vectors become others of the same request, or are kept otherwise
LARGEST, MOST = 500_000, 64  # bytes of one answer of the embedder, which the broker has to carry; texts of one request
NUMBER = 24  # bytes of a number in JSON, at most
WORDS = (10, 2000)  # of a passage


async def make(request: IndexRequest, dataset: Path, job: Job, checkpoint_every_s: float) -> tuple[Path, IndexCard]:
    """(folder of the index, its card), of a checked request. A job that was interrupted goes on with the vectors that it had."""
    parts = await job.in_thread(passages.read, dataset, request.words)
    made = await _begin(request, parts, job)
    size = max(1, min(MOST, LARGEST // (made.shape[1] * NUMBER)))
    blocks, done, saved, began = [made], len(made), time.monotonic(), (time.monotonic(), len(made))
    while done < len(parts):
        texts = [part.text for part in parts[done : done + size]]
        blocks.append(await vectors(job.context, texts, request.embedder, request.model))
        done += len(texts)
        rate = (done - began[1]) / max(time.monotonic() - began[0], 1e-6)
        job.progress(0.98 * done / len(parts), "embed", f"{done:,} of {len(parts):,} passages", passages_per_s=rate)
        if time.monotonic() - saved > checkpoint_every_s and done < len(parts):
            blocks, saved = [np.concatenate(blocks)], time.monotonic()
            await job.save(await job.in_thread(_keep, job.scratch, blocks[0]), format=FORMAT, passing=True)
    documents = len({part.document for part in parts})
    card = IndexCard(request.name, documents, len(parts), made.shape[1], request.embedder, request.model, request.dataset,
                     request.words)  # fmt: skip
    folder = job.scratch / "index"
    folder.mkdir()
    await job.in_thread(index.write, folder, card, parts, np.concatenate(blocks))
    return folder, card


def check(request: IndexRequest) -> None:
    """ClientFault "invalid" that names the field."""
    for field in ("dataset", "embedder", "model"):
        if not getattr(request, field):
            raise ClientFault("invalid", f"`{field}` is empty", "`embedder` and `model` are those of a stage that uses \"deploy\": "
                              '"${stage.model}", "${stage.artifact}"')  # fmt: skip
    if not WORDS[0] <= request.words <= WORDS[1]:
        raise ClientFault("invalid", f"`words` is {request.words}", f"give {WORDS[0]} to {WORDS[1]}")


async def _begin(request: IndexRequest, parts: Sequence[Passage], job: Job) -> Array:
    """The vectors of the job's last checkpoint, or the first one: its length says how many fit into an answer."""
    if folder := await job.resume(FORMAT):
        try:
            known = load_file(folder / index.VECTORS)["vectors"]
        except (OSError, SafetensorError, KeyError) as error:
            raise invalid_checkpoint(index.VECTORS, error) from None
        job.progress(0.98 * len(known) / len(parts), "embed", f"{len(known):,} of {len(parts):,} passages are known")
        return known
    job.progress(0.0, "embed", f"{len(parts):,} passages")
    return await vectors(job.context, [parts[0].text], request.embedder, request.model)


def _keep(scratch: Path, made: Array) -> Path:
    folder = scratch / "checkpoint"
    folder.mkdir(exist_ok=True)
    save_file({"vectors": made}, folder / index.VECTORS)
    return folder
