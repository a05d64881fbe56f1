"""Serves models of the structure "tfidf-linear" (kernelm_contracts/trainer.py): words, and their weights."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from kernelm_contracts.bases import Array, TextServer


class WordServer(TextServer):
    structures = ("tfidf-linear",)

    def load(self, folder: Path) -> None:
        self.columns = json.loads((folder / "vocabulary.json").read_text())
        found = load_file(folder / "linear.safetensors")
        self.idf, self.bias, self.weight = found["idf"], found["bias"], found["weight"].T * found.get("scale", np.float32(1))

    def answer(self, texts: tuple[str, ...]) -> tuple[Array, int]:
        words = [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]
        return np.stack([self.features(w) for w in words]) @ self.weight + self.bias, sum(map(len, words))

    def features(self, words: list[str]) -> Array:
        lengths, x = range(1, self.card.request["ngrams"] + 1), np.zeros(len(self.idf), np.float32)
        terms = (" ".join(words[k : k + n]) for n in lengths for k in range(len(words) - n + 1))
        columns, counts = np.unique(np.array([self.columns[t] for t in terms if t in self.columns], int), return_counts=True)
        x[columns] = (1 + np.log(counts)) * self.idf[columns]
        return x / (np.linalg.norm(x) or 1)
