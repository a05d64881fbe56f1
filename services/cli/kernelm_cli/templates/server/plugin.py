"""Serves models of the structure "tfidf-linear" (kernelm_contracts/trainer.py): words, their weights, a softmax."""

import json
import re
import time
from collections import Counter
from itertools import pairwise

import numpy as np
from msgspec import Struct
from safetensors.numpy import load_file

from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label, ServedModel, Server
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Plugin


class WordServer(Plugin, Server):
    class Settings(Struct, forbid_unknown_fields=True):
        model: ServedModel

    async def on_start(self) -> None:
        folder = await self.context.artifact(self.settings.model.artifact)
        self.labels = json.loads((folder / "model.json").read_text())["labels"]
        self.columns = json.loads((folder / "vocabulary.json").read_text())
        self.idf, self.weight, self.bias = map(load_file(folder / "linear.safetensors").get, ("idf", "weight", "bias"))

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,)

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        began, model = time.perf_counter(), self.settings.model
        if (call.model or request.model or model.name) != model.name:
            raise ClientFault("unknown_model", f"{model.name!r} is served here", "kernelm model list")
        if request.at_least > model.generation:
            raise ClientFault("stale_generation", f"this is generation {model.generation}", "call again", retriable=True)
        words = [re.findall(r"\b\w\w+\b", text.lower()) for text in request.input]
        rows = tuple(self.row(w)[: max(request.top, 0) or None] for w in words)
        took_ms = (time.perf_counter() - began) * 1e3
        return ClassifyReply(model.name, model.generation, model.artifact, rows, sum(map(len, words)), took_ms)

    def row(self, words: list[str]) -> tuple[Label, ...]:
        terms, x = words + [" ".join(pair) for pair in pairwise(words)], np.zeros(len(self.idf))
        for term, count in Counter(t for t in terms if t in self.columns).items():
            x[self.columns[term]] = (1 + np.log(count)) * self.idf[self.columns[term]]
        logits = self.weight @ (x / (np.linalg.norm(x) or 1.0)) + self.bias
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        return tuple(Label(self.labels[k], float(scores[k])) for k in np.argsort(-scores))
