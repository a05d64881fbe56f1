"""Folders of text (one a class) become a dataset: cleaned, without exact and near duplicates, split by a hash."""

import hashlib
import json
from pathlib import Path

import msgspec
import pyarrow as pa
from pyarrow import parquet

from kernelm_contracts.data import Data, DatasetCard, DatasetPrepared, Prepared, PrepareRequest, SplitCard, Step
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, Plugin
from kernelm_sdk.system import ArtifactName


class FolderData(Plugin, Data):
    async def prepare(self, request: PrepareRequest, job: Job) -> Prepared:
        if request.tokenize.tokenizer or request.format != "folders":
            raise ClientFault("invalid", "this plugin reads folders and makes no token ids", "use another plugin for data/1")
        if request.private is not None:
            raise ClientFault("invalid", "private: this plugin does not look for private data", "use another plugin for data/1")
        out = job.scratch / "dataset"
        out.mkdir()
        card = await job.in_thread(self.write, await self.context.artifact(request.source), out, request)
        splits = {name: split.documents for name, split in card.splits.items()}
        dataset = await self.context.store(out, "dataset", job=job.id, source=request.source)
        await self.context.publish(DatasetPrepared(name=card.name, dataset=dataset, documents=sum(splits.values())))
        return Prepared(dataset, sum(splits.values()), card.labels, splits, card)

    async def describe(self, request: ArtifactName, call: Call) -> DatasetCard:
        file = await self.context.artifact(request.digest) / "dataset.json"
        if not file.is_file():
            raise ClientFault("not_a_dataset", f"{request.digest} has no dataset.json", "give the digest of a dataset")
        return msgspec.json.decode(file.read_bytes(), type=DatasetCard)

    def write(self, source: Path, out: Path, request: PrepareRequest) -> DatasetCard:
        labels = tuple(sorted(p.name for p in source.iterdir() if p.is_dir()))
        if request.expect_labels and set(labels) != set(request.expect_labels):
            raise ClientFault("unexpected_labels", f"the classes are {', '.join(labels)}", "correct `expect_labels` or the source")
        rows, seen = {"train": [], "validation": [], "test": []}, []
        read, why = 0, {"short": 0, "duplicate": 0}
        for file in sorted(source.glob("*/*.txt")):
            words, read = file.read_text(errors="replace").split(), read + 1
            grams = {tuple(words[k : k + 5]) for k in range(max(len(words) - 4, 1))}
            if len(" ".join(words)) < request.clean.min_characters:
                why["short"] += 1
            elif any(len(grams & other) >= request.deduplicate.jaccard * len(grams | other) for other in seen):
                why["duplicate"] += 1
            else:
                seen.append(grams)
                place = int(hashlib.sha256(f"{request.split.seed} {words}".encode()).hexdigest()[:8], 16) / 2**32
                name = (
                    "validation"
                    if (v := request.split.validation) > place
                    else "test"
                    if v + request.split.test > place
                    else "train"
                )
                row = {"id": f"{file.parent.name}/{file.name}", "text": " ".join(words), "label": labels.index(file.parent.name)}
                rows[name].append({**row, "input_ids": []})
        schema = pa.schema({"id": pa.string(), "text": pa.string(), "label": pa.int32(), "input_ids": pa.list_(pa.int32())})
        for name, found in rows.items():
            parquet.write_table(pa.Table.from_pylist(found, schema), out / f"{name}.parquet")
        (out / "labels.json").write_text(json.dumps(labels))
        card = DatasetCard(request.name, labels, (Step("clean", read, len(seen), why),),
                           {name: SplitCard(len(found), 0) for name, found in rows.items()}, 0, source=request.source)  # fmt: skip
        (out / "dataset.json").write_bytes(msgspec.json.encode(card))
        return card
