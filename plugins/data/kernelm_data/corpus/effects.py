"""The effects of a corpus job: artifacts in, checkpoints on the way."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kernelm_contracts.data import DatasetCard, Input, PrepareRequest
from kernelm_data.corpus import pool
from kernelm_data.corpus.remote import check_address
from kernelm_data.settings import DataSettings
from kernelm_sdk import checkpoints
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Job

FORMAT = 1  # of checkpoints: raise it when what shards hold, or their books or `CHAIN`, changes
CHAIN = "chain.json"  # in a checkpoint: the digests of the checkpoints before it, each with other shards


def inputs_of(request: PrepareRequest, settings: DataSettings) -> tuple[Input, ...]:
    """`source` and `inputs`. ClientFault `credentials_in_url`, and `not_granted` for a URL outside what the settings grant."""
    given = (Input(artifact=request.source, format=request.format),) if request.source else ()
    for i, each in enumerate(request.inputs):
        check_address(each.url, f"inputs[{i}].url")  # first: no other message may show it
        if each.url and not granted(each.url, settings.urls):
            raise ClientFault(
                "not_granted",
                f"inputs[{i}].url: {each.url} is not granted to the data plugin",
                "put the files into an artifact, or add a prefix of the address to urls in the plugin's settings",
            )
    return (*given, *request.inputs)


def granted(url: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a URL lies under one of the prefixes; local paths are compared without `..` and symbolic links."""
    if "://" not in url:
        return any("://" not in prefix and Path(url).resolve().is_relative_to(Path(prefix).resolve()) for prefix in prefixes)
    return ".." not in url and any("://" in prefix and (url + "/").startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


async def chain_of(job: Job) -> list[str]:
    """The checkpoints of earlier attempts, oldest first. ClientFault "invalid_checkpoint" if the last one names none."""
    if (folder := await job.resume(FORMAT)) is None:
        return []
    try:
        return [*msgspec.json.decode((folder / CHAIN).read_bytes(), type=list[str]), job.checkpoint]
    except (OSError, msgspec.DecodeError) as error:
        raise invalid_checkpoint(CHAIN, error) from None


def _copy(tree: Path, work: Path) -> None:
    shutil.copytree(tree, work, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for name in (CHAIN, checkpoints.FILE):
        (work / name).unlink(missing_ok=True)


class Checkpoints:
    """Stores finished shards, each in one checkpoint; called from the thread that works."""

    def __init__(self, job: Job, work: Path, chain: list[str]) -> None:
        self._job, self._work, self._chain = job, work, chain

    def save(self, folders: list[str]) -> None:
        """Store these folders of the work folder."""
        tree = self._job.scratch / "checkpoint"
        shutil.rmtree(tree, ignore_errors=True)
        for name in folders:
            shutil.copytree(self._work / name, tree / name, copy_function=_link)
        for name in ("inputs.sha256", "tokenizer.json"):
            if (self._work / name).exists():
                shutil.copyfile(self._work / name, tree / name)
        (tree / CHAIN).write_bytes(msgspec.json.encode(self._chain))
        self._chain.append(self._job.wait(self._job.save(tree, format=FORMAT, shards=len(folders))))
        shutil.rmtree(tree)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


async def prepare_corpus(request: PrepareRequest, job: Job, settings: DataSettings, key: bytes, out: Path) -> DatasetCard:
    """Prepare a corpus into `out`; goes on from the job's checkpoint if it has one."""
    if request.engine == "local":
        pool.get_ready()  # while this process imports the pipeline
    with pool.rare_collections():
        from kernelm_data.corpus.pipeline import Sources, prepare

    inputs = inputs_of(request, settings)
    artifact = job.context.artifact
    sources = Sources(
        inputs,
        tuple([await artifact(given.artifact) if given.artifact else None for given in inputs]),
        await artifact(request.tokenize.tokenizer) if request.tokenize.tokenizer else None,
        tuple([await artifact(digest) for digest in request.against]),
        tuple([await artifact(digest) for digest in request.test_sets]),
        await artifact(request.store.append_to) if request.store.append_to else None,
    )
    work, engine = await job.in_thread(engine_of, request, job, settings, [folder for folder in sources.folders if folder])
    chain = await chain_of(job)
    for digest in chain:
        await job.in_thread(_copy, await artifact(digest), work)
    checkpoints = Checkpoints(job, work, chain)

    def say(fraction: float, phase: str, message: str, rate: float) -> None:
        job.progress(fraction, phase, message, mb_per_s=rate)

    def run() -> DatasetCard:
        return prepare(sources, request, work, out, say, key=key, save=checkpoints.save, engine=engine)

    try:
        return await job.in_thread(run)
    finally:
        await job.in_thread(shutil.rmtree, work)


def engine_of(request: PrepareRequest, job: Job, settings: DataSettings, inputs: Sequence[Path]) -> tuple[Path, pool.Engine]:
    """The work folder, and what runs the shards. ClientFault `no_ray`, or `not_shared` if not all nodes see the folders."""
    if request.engine != "ray":
        work = job.scratch / "work"
        work.mkdir(exist_ok=True)
        return work, pool.Crew(job.threads or os.cpu_count() or 1)
    if not settings.ray_address or not settings.shared_folder:
        remedy = "set ray_address and shared_folder in the settings of the data plugin"
        raise ClientFault("no_ray", 'engine: "ray" is not set up', remedy)
    from kernelm_data.corpus.cluster import Cluster

    work = Path(settings.shared_folder) / f"{job.id}-{job.epoch}"
    for old in Path(settings.shared_folder).glob(f"{job.id}-*"):  # of an attempt that was killed; its checkpoints are elsewhere
        shutil.rmtree(old)
    work.mkdir(parents=True)
    cluster = Cluster(settings.ray_address)
    cluster.check([work, *inputs])
    return work, cluster
