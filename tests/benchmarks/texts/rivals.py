"""What `bench-data` compares with, each run in a process of its own that ends with a line of JSON."""

import json
import shutil
from pathlib import Path
from typing import Any


def usual(source: str, out: str, tokenizer: str) -> None:
    """Regular expressions, datasketch, Hugging Face's tokenizers."""
    import re
    import unicodedata

    from datasketch import MinHash, MinHashLSH
    from tokenizers import Tokenizer

    control, blanks, breaks, word = (
        re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]"),
        re.compile(r"[^\S\n]+"),
        re.compile(r"\n{3,}"),
        re.compile(r"\w+"),
    )
    model = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    index = MinHashLSH(threshold=0.8, num_perm=128)
    seen: set[str] = set()
    kept: list[str] = []
    for path in sorted(Path(source).glob("*.jsonl")):
        for n, line in enumerate(path.open()):
            text = unicodedata.normalize("NFC", json.loads(line)["text"])
            text = breaks.sub("\n\n", blanks.sub(" ", control.sub("", text))).strip()
            if len(text) < 20 or text in seen:
                continue
            seen.add(text)
            words = word.findall(text.lower())
            sketch = MinHash(num_perm=128)
            sketch.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))])
            if not index.query(sketch):
                index.insert(f"{path}{n}", sketch)
                kept.append(text)
    tokens = 0
    with Path(out).open("w") as sink:
        for start in range(0, len(kept), 128):
            for text, encoding in zip(kept[start : start + 128], model.encode_batch(kept[start : start + 128]), strict=True):
                tokens += len(encoding.ids)
                sink.write(json.dumps({"text": text, "input_ids": encoding.ids}) + "\n")
    print(json.dumps({"documents": len(kept), "tokens": tokens}))


def datatrove(source: str, out: str, tokenizer: str) -> None:
    """datatrove's own pipeline: the same filters, MinHash deduplication, tokens."""
    import xxhash

    digest = xxhash.xxh64_intdigest  # datatrove 0.10 gives it text, which xxhash 4 does not take any more
    xxhash.xxh64_intdigest = lambda data: digest(data.encode() if isinstance(data, str) else data)
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import FTFYFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    shutil.rmtree(out, ignore_errors=True)
    tasks, form = len(list(Path(source).glob("*.jsonl"))), MinhashConfig(num_buckets=14, hashes_per_bucket=8)
    clean = [JsonlReader(source), FTFYFormatter(), GopherQualityFilter(), GopherRepetitionFilter(), FineWebQualityFilter(),
             JsonlWriter(f"{out}/clean", compression=None)]  # fmt: skip
    stages: list[tuple[list[Any], int]] = [
        (clean, tasks),
        ([JsonlReader(f"{out}/clean"), MinhashDedupSignature(f"{out}/sig", config=form)], tasks),
        ([MinhashDedupBuckets(f"{out}/sig", f"{out}/buckets", config=form)], form.num_buckets),
        ([MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=form)], 1),
        (
            [
                JsonlReader(f"{out}/clean"),
                MinhashDedupFilter(f"{out}/remove"),
                DocumentTokenizer(
                    f"{out}/tokens", str(Path(tokenizer) / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False
                ),
            ],
            tasks,
        ),
    ]
    for number, (pipeline, count) in enumerate(stages):
        LocalPipelineExecutor(pipeline, tasks=count, workers=1, logging_dir=f"{out}/logs{number}").run()
    tokens = sum(path.stat().st_size // 2 for path in Path(f"{out}/tokens").glob("*.ds"))
    print(json.dumps({"tokens": tokens}))
