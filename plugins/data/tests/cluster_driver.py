"""Run by test_corpus_cluster.py beside the head of a Ray cluster: the same corpus on the cluster and on this machine."""

import json
import sys
from pathlib import Path

from kernelm_contracts.data import Input, Pack, PrepareRequest, Store, Train
from kernelm_data.corpus.cluster import Cluster
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.pool import Crew, Engine
from kernelm_sdk.errors import ClientFault


def run(tmp: Path, folder: Path, engine: Engine, name: str):
    work, out = tmp / name / "work", tmp / name / "out"
    work.mkdir(parents=True)
    out.mkdir()
    request = PrepareRequest("sha256:x", "auto", engine=name, max_broken=1.0, store=Store(shard_mb=0.005), pack=Pack(128),
                             train=Train("bpe", 500))  # fmt: skip
    sources = Sources((Input(artifact="sha256:x"),), (folder,))
    return prepare(sources, request, work, out, lambda *_: None, engine=engine)


def main(tmp: Path, folder: Path, address: str) -> None:
    cluster = Cluster(address)
    cluster.check([tmp, folder])
    try:
        cluster.check([tmp / "nowhere"])
        absent = ""
    except ClientFault as error:
        absent = error.code
    card = run(tmp, folder, cluster, "ray")
    run(tmp, folder, Crew(1), "local")
    told = {"ran": dict(cluster.ran), "reasons": card.steps[0].reasons, "absent": absent}
    (tmp / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
