"""`server/1`: every answer says who gave it, is complete and in order, and is refused where a newer model was asked for.

What holds of servers that generate text is in generation.py.
"""

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.conformance.wire import Exchange
from kernelm_contracts.conformance import generation

checks = Checks()
TEXTS = ("The striker scored two goals in the final match.", "Shares fell after the profit warning of the bank.")
CLASSIFY, EMBED, GENERATE = "classify", "embed", "generate"
WORDS = {"goals": 0, "match": 1, "striker": 2, "bank": 3, "profit": 4, "shares": 5}


def write_model(folder: Path) -> None:
    """A tiny "tfidf-linear" model (kernelm_contracts.trainer): six words, two labels."""
    weights = [0.0] * 12
    for word, column in WORDS.items():
        weights[(0 if column < 3 else 1) * 6 + column] = 2.0 + len(word) / 10
    tensors = {"idf": ([6], [1.0] * 6), "weight": ([2, 6], weights), "bias": ([2], [0.1, -0.1])}
    head, data = {}, b""
    for name, (shape, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(head).encode()
    (folder / "linear.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "vocabulary.json").write_text(json.dumps(WORDS))
    (folder / "evaluation.json").write_text("{}")
    (folder / "model.json").write_text(json.dumps({
        "name": "checked", "task": "text-classification", "structure": "tfidf-linear", "labels": ["sport", "business"],
        "max_tokens": 0, "request": {"ngrams": 1}}))  # fmt: skip


async def prepare(case: Case) -> None:
    """A model for it to serve, where the author gives none (`[settings.model]` in conformance.toml)."""
    model = dict(case.settings.get("model") or {})
    if "artifact" not in model and "model" not in case.artifacts:
        scratch = case.stand.system.home / "scratch"
        scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            write_model(Path(folder))
            case.artifacts["model"] = await case.stand.store(Path(folder), "model")
    case.settings["model"] = {"name": "checked", "artifact": "@model", "generation": 3, **model}
    if "server/1.generate" not in case.requests:
        case.requests.setdefault("server/1.classify", {"input": list(TEXTS)})


def request_for(case: Case, method: str) -> dict[str, Any]:
    """Two texts, or a prompt for one token."""
    return {**generation.sample(case), "max_tokens": 1} if method == GENERATE else {"input": list(TEXTS)}


async def ask(case: Case, method: str, **request: Any) -> Exchange:
    """Call a method with `request_for` it; Skipped where the plugin does not have it."""
    exchange = await case.call("server/1", method, {**request_for(case, method), **request})
    if exchange.fault is not None and exchange.fault.code == "unsupported_method":
        raise Skipped(f"it has no `{method}`")
    return exchange


async def methods(case: Case) -> list[str]:
    """Of `classify` and `generate` those that the plugin has; Skipped if it has neither."""
    found = []
    for method in (CLASSIFY, GENERATE):
        exchange = await case.call("server/1", method, request_for(case, method))
        if exchange.fault is None or exchange.fault.code != "unsupported_method":
            found.append(method)
    if not found:
        raise Skipped(f"it has neither `{CLASSIFY}` nor `{GENERATE}`")
    return found


async def answer(case: Case, method: str, **request: Any) -> tuple[dict[str, Any], str]:
    """(reply, the exchange for people)."""
    exchange = await ask(case, method, **request)
    if not exchange.answered:
        raise Failed(f"`{method}` is not answered", exchange.text)
    if method == GENERATE:  # its last frame, before the empty end of the stream
        return json.loads(exchange.replies[-2].body) if len(exchange.replies) > 1 else {}, exchange.text
    return exchange.body, exchange.text


@checks.add("server.announced", "says at ready which deployment it serves", "`models`: the name in settings.model")
async def announced(case: Case) -> None:
    ready = case.main.tap.of("impl.kernel.kernel.v1.ready.")
    models = json.loads(ready[-1][1]).get("models", []) if ready else []
    if models != [case.settings["model"]["name"]]:
        raise Failed(f"ready names the models {models}, and its settings {case.settings['model']['name']!r}")


@checks.add(
    "server.identity",
    "says in each answer which model, generation and artifact gave it",
    "`model`, `generation` and `artifact` are those of settings.model",
)
async def identity(case: Case) -> None:
    model = case.settings["model"]
    for method in await methods(case):
        reply, text = await answer(case, method)
        for field, wanted in (("model", model["name"]), ("generation", model["generation"]), ("artifact", model["artifact"])):
            if reply.get(field) != wanted:
                raise Failed(f"`{field}` is {reply.get(field)!r}, and should be {wanted!r}", text)


@checks.add(
    "server.results",
    "answers each text in its row, best label first, with probabilities; `top` cuts the row",
    "softmax over the labels; sort by score; a row a text, in the order of the input",
)
async def results(case: Case) -> None:
    reply, text = await answer(case, CLASSIFY)
    if len(reply["results"]) != len(TEXTS):
        raise Failed(f"{len(reply['results'])} rows for {len(TEXTS)} texts", text)
    for row in reply["results"]:
        scores = [label["score"] for label in row]
        if scores != sorted(scores, reverse=True):
            raise Failed("a row is not sorted, best first", text)
        if any(not 0 <= s <= 1 for s in scores) or abs(sum(scores) - 1) > 0.01:
            raise Failed(f"the scores of a row are no probabilities: they sum to {sum(scores):.3f}", text)
    cut, text = await answer(case, CLASSIFY, top=1)
    if [[r["label"] for r in row] for row in cut["results"]] != [[row[0]["label"]] for row in reply["results"]]:
        raise Failed("with `top` 1 a row is not the best label alone", text)
    turned, text = await answer(case, CLASSIFY, input=list(reversed(TEXTS)))
    if [row[0]["label"] for row in turned["results"]] != [row[0]["label"] for row in reversed(reply["results"])]:
        raise Failed("the rows do not follow the order of the input", text)


@checks.add("server.usage", "counts the tokens that it has read", "`tokens` is the sum over the texts, after truncation")
async def usage(case: Case) -> None:
    both, text = await answer(case, CLASSIFY)
    each = [(await answer(case, CLASSIFY, input=[t]))[0]["tokens"] for t in TEXTS]
    if both["tokens"] != sum(each) or min(each) < 1:
        raise Failed(f"`tokens` of two texts is {both['tokens']}, and of each alone {each}", text)
    if not 0 < both["took_ms"] < 60_000:
        raise Failed(f"`took_ms` is {both['took_ms']}", text)


@checks.add(
    "server.generation",
    "refuses with `stale_generation` (retriable) where `at_least` is newer than its model",
    "compare `at_least` with the generation in settings.model before answering",
)
async def young_enough(case: Case) -> None:
    mine = case.settings["model"]["generation"]
    for method in await methods(case):
        await answer(case, method, at_least=mine)
        exchange = await ask(case, method, at_least=mine + 1)
        fault = exchange.fault
        if fault is None or (fault.whose, fault.code, fault.retriable) != ("client", "stale_generation", True):
            raise Failed(f"`at_least` {mine + 1} is not refused by generation {mine} with the client's retriable fault "
                         "`stale_generation`", exchange.text)  # fmt: skip


@checks.add("server.model", "answers for its deployment alone", "refuse another name with the client's fault `unknown_model`")
async def other_model(case: Case) -> None:
    name, wire = case.settings["model"]["name"], case.main.wire
    for method in await methods(case):
        request = request_for(case, method)
        mine = await wire.ask(wire.subject("server/1", method, model=name), request)
        if not mine.answered:
            raise Failed(f"it does not answer on model.{name}", mine.text)
        others = [await wire.ask(wire.subject("server/1", method, model="another"), request),
                  await ask(case, method, model="another")]  # fmt: skip
        for exchange in others:
            if exchange.fault is None or exchange.fault.code != "unknown_model":
                raise Failed("another model's name is not refused with `unknown_model`", exchange.text)


@checks.add(
    "server.embeddings",
    "gives a vector of unit length for each text, if the model has embeddings",
    "divide by the L2 norm; refuse with `unsupported_method` where the model has none",
)
async def embeddings(case: Case) -> None:
    reply, text = await answer(case, EMBED)
    if len(reply["embeddings"]) != len(TEXTS):
        raise Failed(f"{len(reply['embeddings'])} vectors for {len(TEXTS)} texts", text)
    for vector in reply["embeddings"]:
        if abs(math.hypot(*vector) - 1) > 1e-3:
            raise Failed(f"a vector has the length {math.hypot(*vector):.4f}", text)


checks.all.extend(generation.checks.all)
