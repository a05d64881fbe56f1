"""`make bench-data`: raw text to deduplicated token ids, ours, a chain of what people use, and datatrove with the same steps.

Text: Python files, Markdown, reStructuredText, plain text and HTML of this machine: the folders of DATA_ROOTS (default: Python's
library and site-packages, /usr/share/doc). MB/s/core is MB of input by CPU seconds of all processes, imports included, so that
other work on the machine counts for nobody. Ours runs before and after each rival. The usual chain gets all DATA_MB, datatrove,
which is slow, a part of them, on which ours is measured too: `same_text` has the ratios over what both got.

Its parts were measured on two busy cores, in CPU seconds: the usual chain 173 on 200 MB, datatrove 49 on 20 MB, ours 8 to 10 on
200 MB (six runs) and 61 on 2,000 MB, training the tokenizer 15. The whole, in one piece, has not been timed yet. What is missing
(packages, disk, memory) is said before anything is measured; every run is a line of build/bench/data/runs.jsonl at once, and one
that fails leaves out its goals only. A quick check: DATA_MB=20 DATA_PEER_MB=10 DATA_PEAK_MB=0 make bench-data. DATA_USUAL_MB gives
the usual chain less, too.
"""

import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from reporting import ROOT, conditions, finish, median, say
from texts.rivals import datatrove, usual

MB = float(os.environ.get("DATA_MB", "200"))
USUAL_MB = float(os.environ.get("DATA_USUAL_MB", str(MB)))  # of these, the usual chain gets
PEER_MB = float(os.environ.get("DATA_PEER_MB", "20"))  # of these, datatrove gets
PEAK_MB = float(os.environ.get("DATA_PEAK_MB", "2000"))  # 0: the peak is not measured
HTML_MB = float(os.environ.get("DATA_HTML_MB", "5"))
RECALL_DOCUMENTS = int(os.environ.get("DATA_RECALL_DOCUMENTS", "4000"))
DEFAULT_ROOTS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc", "/usr/lib/python3")
ROOTS = [Path(p) for p in (os.environ["DATA_ROOTS"].split(":") if os.environ.get("DATA_ROOTS") else DEFAULT_ROOTS)]
SUFFIXES = {".py", ".md", ".rst", ".txt", ".html"}
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
WORK = ROOT / "build" / "bench" / "data"
NEEDED = ("datasketch", "datatrove", "ftfy", "gigatoken", "kernelm_data", "scipy", "spacy", "tokenizers", "trafilatura", "xxhash")
MEMORY_GB = 4.0  # that have to be free: the exact similarities of `recalled` take the most
SAY_S = 30  # between two signs of life of a run
ONE = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}


def check_ready() -> None:
    """SystemExit that names all that is missing."""
    WORK.mkdir(parents=True, exist_ok=True)
    disk, memory = shutil.disk_usage(WORK).free / 1e9, psutil.virtual_memory().available / 1e9
    needed = 2 + (9 * MB + 4.5 * PEAK_MB) / 1e3
    lacks = [f"pip install {name}" for name in NEEDED if find_spec(name) is None]
    lacks += [f"{needed:.0f} GB of disk at {WORK}, of which {disk:.1f} are free"] if disk < needed else []
    lacks += [f"{MEMORY_GB:.0f} GB of memory, of which {memory:.1f} are free"] if memory < MEMORY_GB else []
    if lacks:
        raise SystemExit("bench-data needs " + "; ".join(lacks))


def collect() -> tuple[list[Path], list[Path]]:
    """Files of text and of HTML, in a random order that is always the same."""
    found = sorted(
        {path for root in ROOTS for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink()}
    )
    random.Random(0).shuffle(found)
    return [p for p in found if p.suffix != ".html"], [p for p in found if p.suffix == ".html"]


def decoded(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < 2_000_000 and text.strip():
            yield path.as_posix(), text


def write_jsonl(files: list[Path], folder: Path, mb: float, parts: int, laps: int = 40) -> float:
    """Documents of about `mb` MB in `parts` files; the MB that there were. Over again, with a word more, if there are too few."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sinks = [(folder / f"{i:03}.jsonl").open("w") for i in range(parts)]
    size, n, lap = 0, 0, 0
    while size < mb * 1e6 and lap < laps:
        for id, text in decoded(files):
            more = text.replace(" ", f" lap{lap} ") if lap else text  # no near duplicate of the lap before
            sinks[n % parts].write(json.dumps({"id": f"{id}#{lap}", "text": more}, ensure_ascii=False) + "\n")
            size += len(more.encode())
            n += 1
            if size >= mb * 1e6:
                break
        lap += 1
    for sink in sinks:
        sink.close()
    say(f"{folder.name}: {size / 1e6:,.0f} MB, {n:,} documents, {lap} lap(s)")
    return size / 1e6


def measured(part: str, *arguments: str, one: bool = True) -> dict[str, Any]:
    """Run a part of this file in a process of its own: its answer, with wall and CPU seconds of it and of all that it started, and
    their peak of memory in GB."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what outlives its parent is waited for, and counted, here
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    log = (WORK / f"{part}.log").open("w")  # datatrove tells a lot
    command = [sys.executable, __file__, part, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=os.environ | (ONE if one else {}))
    peak = [0]
    threading.Thread(target=_watch, args=(child.pid, peak), daemon=True).start()
    out, _ = child.communicate()
    wall = time.monotonic() - began
    log.close()
    if child.returncode:
        tail = (WORK / f"{part}.log").read_text("utf-8", "replace").strip().splitlines()[-1:]
        raise PartError(f"{part} ended with {child.returncode}: {''.join(tail)} (all of it: {WORK / part}.log)")
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = json.loads(out.splitlines()[-1]) if out.strip() else {}
    return result | {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2), "peak_gb": round(peak[0] / 1e9, 3)}


class PartError(RuntimeError):
    """A part did not come to its end."""


def _watch(pid: int, peak: list[int]) -> None:
    began = said = time.monotonic()
    while True:
        if (now := time.monotonic()) - said > SAY_S:
            said = now
            say(f"  ... {now - began:.0f} s")
        try:
            process = psutil.Process(pid)
            total = 0
            for each in (process, *process.children(recursive=True)):
                try:
                    total += each.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)
        except psutil.Error:
            return
        time.sleep(0.2)  # between two looks


def ours(source: str, out: str, filters: str, workers: str, tokenizer: str) -> None:
    """kernelm, as the plugin's process calls it."""
    from kernelm_data.corpus import pool

    if int(workers):
        pool.get_ready()
    with pool.rare_collections():
        from kernelm_data.corpus.pipeline import Sources, prepare
    from kernelm_contracts.data import Filter, Input, Pack, PrepareRequest, Split, Store, Tokenize

    shutil.rmtree(out, ignore_errors=True)
    (Path(out) / "dataset").mkdir(parents=True)
    request = PrepareRequest(
        "sha256:bench",
        "auto",
        filters=tuple(Filter(name) for name in filters.split(",") if name),
        pack=Pack(2048),
        split=Split(0, 0),
        tokenize=Tokenize("sha256:t"),
        max_broken=1.0,
        store=Store(shard_mb=16, zstd_level=1),
    )
    sources = Sources((Input(artifact="sha256:bench"),), (Path(source),), Path(tokenizer))
    card = prepare(sources, request, Path(out) / "work", Path(out) / "dataset", lambda *_: None, workers=int(workers))
    print(json.dumps({"documents": card.splits["train"].documents, "tokens": card.splits["train"].tokens}))


def recall(tokenizer: Path) -> tuple[float, int]:
    """The share of pairs with an exact Jaccard similarity of 0.8 or more of which not both stay, and how many pairs there are."""
    source = WORK / "recall"
    write_jsonl(collect()[0][:RECALL_DOCUMENTS], source, 60, 1, laps=1)
    measured("ours", str(source), str(WORK / "out-recall"), "", "0", str(tokenizer))
    return recalled(WORK / "out-recall" / "work")


def recalled(work: Path) -> tuple[float, int]:
    """The same of what a run left in its work folder. Common 5-grams are counted one by one, as strings with a number each."""
    import numpy as np
    from scipy.sparse import csr_matrix, triu

    from kernelm_data.corpus.store import Documents
    from kernelm_data.duplicates import grams

    numbers: dict[str, int] = {}
    sets, stays, seen = [], [], set()
    for folder in sorted((work / "first").iterdir()):
        documents = Documents(folder / "docs.arrow")
        assigned = np.load(work / "keep" / f"{folder.name}.npy")
        for row in range(len(documents)):
            text = documents.text(row).tobytes()
            if text not in seen and len(text) < 200_000:
                seen.add(text)
                members = set(grams(text.decode()))
                sets.append(np.fromiter((numbers.setdefault(gram, len(numbers)) for gram in members), np.int64, len(members)))
                stays.append(assigned[row] != 255)
    sizes, kept = np.array([len(members) for members in sets]), np.array(stays)
    values = np.concatenate(sets)
    held = csr_matrix((np.ones(len(values), np.int32), values, np.concatenate([[0], np.cumsum(sizes)])))
    common = triu(held @ held.T, 1).tocoo()
    near = common.data / (sizes[common.row] + sizes[common.col] - common.data) >= 0.8
    missed = near & kept[common.row] & kept[common.col]
    return 1 - int(missed.sum()) / max(int(near.sum()), 1), int(near.sum())


def identical(folder: Path, tokenizer: Path) -> tuple[int, int]:
    """Documents of one shard, and how many of them have exactly the ids of Hugging Face's tokenizers."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = model.token_to_id("<|endoftext|>")
    path = sorted((folder / "train").glob("*.parquet"))[0]
    packed = [i for row in pq.read_table(folder / "packed" / "train" / path.name)["input_ids"].to_pylist() for i in row]
    at = same = 0
    found = pq.read_table(path)["text"].to_pylist()
    for text in found:
        ids = [*model.encode(text, add_special_tokens=False).ids, end]
        same += packed[at : at + len(ids)] == ids
        at += len(ids)
    return len(found), same


def html_rates(pages: list[Path]) -> dict[str, float]:
    """MB/s of CPU time from HTML to text: ours, trafilatura (datatrove's extractor), tags taken out by a regular expression."""
    import re

    from trafilatura import extract

    from kernelm_data.corpus.markup import html_text

    chosen, size = [], 0
    for page in pages:
        chosen.append(page.read_bytes())
        size += len(chosen[-1])
        if size > HTML_MB * 1e6:
            break
    html_text(chosen[0])
    rates = {"mb": size / 1e6}
    ways: dict[str, Any] = {"ours": html_text, "trafilatura": lambda page: extract(page.decode("utf-8", "replace")),
                            "regex": lambda page: re.sub(r"<[^>]+>", " ", page.decode("utf-8", "replace"))}  # fmt: skip
    for name, way in ways.items():
        began = time.process_time()
        for page in chosen:
            way(page)
        rates[name] = round(size / 1e6 / (time.process_time() - began), 2)
    return rates


PLAIN, FILTERED = "ours, steps of the usual chain", "ours, steps of datatrove"
FILTERS = "gopher-quality,gopher-repetition,fineweb"


def compared(large: float, usually: float, small: float, tokenizer: str) -> dict[str, dict[str, Any]]:
    """Every way over the whole (MB) and over what the rivals get."""
    text, usuals, part, cores = str(WORK / "text"), str(WORK / "usual"), str(WORK / "peers"), str(os.cpu_count())
    for workers in ("0", cores):  # compiled code is cached from now on
        measured("ours", part, str(WORK / "warm"), FILTERS, workers, tokenizer)
    rounds: dict[str, list[dict[str, Any]]] = {}
    its_text = f"{PLAIN}, its text" if usually < large else PLAIN  # the usual chain gets all: it is one text
    for name, mb, *arguments in (
        *([(PLAIN, large, "ours", text, str(WORK / "out"), "", "0")] if usually < large else []),
        (its_text, usually, "ours", usuals, str(WORK / "out-usual"), "", "0"),
        ("usual chain, its text", usually, "usual", usuals, str(WORK / "usual.jsonl")),
        (its_text, usually, "ours", usuals, str(WORK / "out-usual"), "", "0"),
        (PLAIN, large, "ours", text, str(WORK / "out"), "", "0"),
        ("ours, all cores", large, "ours", text, str(WORK / "out-all"), "", cores),
        (FILTERED, large, "ours", text, str(WORK / "out-filtered"), FILTERS, "0"),
        (f"{FILTERED}, its text", small, "ours", part, str(WORK / "out-small"), FILTERS, "0"),
        ("datatrove, its text", small, "datatrove", part, str(WORK / "datatrove")),
        (f"{FILTERED}, its text", small, "ours", part, str(WORK / "out-small"), FILTERS, "0"),
        (FILTERED, large, "ours", text, str(WORK / "out-filtered"), FILTERS, "0"),
        (f"{PLAIN}, little text", small, "ours", part, str(WORK / "out-small"), "", "0"),
        ("ours, all cores, little text", small, "ours", part, str(WORK / "out-small"), "", cores),
    ):
        say(f"{name}, {mb:,.0f} MB ...")
        try:
            run = measured(*arguments, tokenizer) | {"mb": round(mb, 1)}
        except PartError as error:
            if arguments[0] == "ours":
                raise
            say(str(error))
            continue
        rounds.setdefault(name, []).append(run)
        with (WORK / "runs.jsonl").open("a") as log:
            log.write(json.dumps({"name": name} | run) + "\n")
        say(f"{name}: {run}")
    return {name: of[-1] | {"cpu_s": median([run["cpu_s"] for run in of]), "rounds": len(of),
                            "mb_per_s_core": round(median([run["mb"] / run["cpu_s"] for run in of]), 3)}
            for name, of in rounds.items()}  # fmt: skip


def main() -> None:
    check_ready()
    files, pages = collect()
    tokenizer = WORK / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    large = write_jsonl(files, WORK / "text", MB, 16)
    usually = write_jsonl(files, WORK / "usual", min(USUAL_MB, MB), 16)
    small = write_jsonl(files, WORK / "peers", min(PEER_MB, MB), 2)
    if not (tokenizer / "tokenizer.json").exists():
        from kernelm_contracts.data import Train
        from kernelm_data.corpus.training import train

        say("training a byte-level BPE of 32,000 tokens ...")
        train(Train("bpe", 32_000), lambda: (text for _, text in decoded(files[:3000]))).save(str(tokenizer / "tokenizer.json"))
    runs = compared(large, usually, small, str(tokenizer))
    say("recall, token ids, HTML ...")
    found, pairs = recall(tokenizer)
    documents, same = identical(WORK / "out" / "dataset", tokenizer)
    rates = html_rates(pages) if pages else {}

    def ratio(ours: str, rival: str) -> float:
        if ours not in runs or rival not in runs:
            return float("nan")
        return float(runs[ours]["mb_per_s_core"] / runs[rival]["mb_per_s_core"])

    goals = {
        "vs_usual_chain": ratio(PLAIN, "usual chain, its text"),
        "vs_datatrove": ratio(FILTERED, "datatrove, its text"),
        "dedup_recall": found,
    }
    same_text = {
        "vs_usual_chain": ratio(PLAIN if usually >= large else f"{PLAIN}, its text", "usual chain, its text"),
        "vs_datatrove": ratio(f"{FILTERED}, its text", "datatrove, its text"),
    }
    if PEAK_MB:
        write_jsonl(files, WORK / "peak", PEAK_MB, 32)
        arguments = (str(WORK / "peak"), str(WORK / "out-peak"), "", str(os.cpu_count()), str(tokenizer))
        say(f"ours, all cores, {PEAK_MB:,.0f} MB ...")
        try:
            runs["ours, peak"] = measured("ours", *arguments)
            goals["peak_gb"] = runs["ours, peak"]["peak_gb"]
        except PartError as error:  # killed for want of memory, say: the rest is measured
            say(str(error))
    sizes = {"mb": large, "usual_mb": usually, "datatrove_mb": small}
    where = conditions("datatrove", "datasketch", "tokenizers", "gigatoken", "numba", roots=[str(root) for root in ROOTS],
                       **{name: round(size, 1) for name, size in sizes.items()})  # fmt: skip
    details = {"runs": runs, "same_text": same_text, "pairs": pairs, "same_ids": f"{same} of {documents}", "html_mb_per_s": rates}
    finish("data", {name: value for name, value in goals.items() if value == value}, where, **details)  # without what failed


if __name__ == "__main__":
    if len(sys.argv) > 1:
        {"ours": ours, "usual": usual, "datatrove": datatrove}[sys.argv[1]](*sys.argv[2:])
        sys.stdout.flush()
        os._exit(0)  # of no part the time counts in which the interpreter takes itself down: a plugin serves on
    else:
        main()
