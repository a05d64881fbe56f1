"""Trains models of the structure "tfidf-linear" (kernelm_contracts/trainer.py) with scikit-learn."""

import json
from pathlib import Path

import msgspec
import numpy as np
from pyarrow import parquet
from safetensors.numpy import save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score, log_loss, recall_score

from kernelm_contracts.trainer import ModelCard, ModelTrained, Scores, Trained, Trainer, TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Job, Plugin


class WordTrainer(Plugin, Trainer):
    async def train(self, request: TrainRequest, job: Job) -> Trained:
        if request.structure != "tfidf-linear":
            raise ClientFault("invalid", f"`structure` is {request.structure!r}", 'this plugin trains "tfidf-linear"')
        out = job.scratch / "model"
        out.mkdir()
        card = await job.in_thread(self.fit, await self.context.artifact(request.dataset), out, request, job)
        model = await self.context.store(out, "model", job=job.id, dataset=request.dataset)
        await self.context.publish(ModelTrained(model=model, structure=card.structure, accuracy=card.scores["validation"].accuracy))
        return Trained(model, card.structure, card.algorithm, card.parameters, card.scores["validation"], card.scores.get("test"))

    def fit(self, dataset: Path, out: Path, request: TrainRequest, job: Job) -> ModelCard:
        rows = {
            s: parquet.read_table(dataset / f"{s}.parquet").to_pydict()
            for s in ("train", "validation", "test")[: 2 + request.report_test]
        }
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, request.ngrams), token_pattern=r"(?u)\b\w\w+\b")
        x, labels = words.fit_transform(rows["train"]["text"]), json.loads((dataset / "labels.json").read_text())
        job.progress(0.3, "fit", f"{x.shape[0]} documents, {x.shape[1]} terms")
        linear = LogisticRegression(C=request.regularization, max_iter=1000).fit(x, rows["train"]["label"])
        weight, bias = (np.vstack([-v, v]) / 2 if len(labels) == 2 else v for v in (linear.coef_, linear.intercept_[:, None]))
        scores = {s: self.score(s, np.array(r["label"]), linear.predict_proba(words.transform(r["text"]))) for s, r in rows.items()}
        card = ModelCard("words", "text-classification", "tfidf-linear", tuple(labels), 0, algorithm="lbfgs",
                         parameters=weight.size, dataset=request.dataset,
                         request=msgspec.to_builtins(request), scores=scores)  # fmt: skip
        tensors = {"idf": words.idf_, "weight": weight, "bias": bias[:, 0]}
        save_file({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()}, out / "linear.safetensors")
        for name, value in (
            ("vocabulary", {t: int(c) for t, c in words.vocabulary_.items()}),
            ("model", card),
            ("evaluation", scores),
        ):
            (out / f"{name}.json").write_bytes(msgspec.json.encode(value))
        return card

    def score(self, split: str, true: np.ndarray, found: np.ndarray) -> Scores:
        best = found.argmax(axis=1)
        matrix = tuple(tuple(map(int, row)) for row in confusion_matrix(true, best, labels=range(found.shape[1])))
        return Scores(split, len(true), float((best == true).mean()), float(recall_score(true, best, average="macro")),
                      float(f1_score(true, best, average="macro")), float(log_loss(true, found, labels=range(found.shape[1]))),
                      confusion=matrix)  # fmt: skip
