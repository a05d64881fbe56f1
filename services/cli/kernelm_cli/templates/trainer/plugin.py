"""Trains models of the structure "tfidf-linear" (kernelm_contracts/trainer.py): logistic regression on words, by SGD."""

import json

import numpy as np

from kernelm_contracts.bases import Logits, TextTrainer, Training


class WordTrainer(TextTrainer):
    structures, algorithms = ("tfidf-linear",), ("sgd",)

    def fit(self, training: Training) -> Logits:
        from sklearn.feature_extraction.text import TfidfVectorizer  # here, so that a start and a save don't wait for it
        from sklearn.linear_model import SGDClassifier
        request, (texts, y), state = training.request, training.data.train, training.saved
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, request.ngrams))
        x = words.fit_transform(texts)
        for epoch in range(int(state.get("epochs", 0)), request.epochs):
            training.progress(epoch / request.epochs, f"epoch {epoch + 1} of {request.epochs}", step=epoch)
            rate = (request.learning_rate or 8.0) * (1 - epoch / request.epochs)
            sgd = SGDClassifier(loss="log_loss", alpha=1e-5 / request.regularization, max_iter=1, tol=None,
                                learning_rate="constant", eta0=rate, random_state=request.seed + epoch)  # fmt: skip
            sgd.fit(x, y, coef_init=state.get("weight"), intercept_init=state.get("bias"))
            state = {"epochs": np.array(epoch + 1), "weight": sgd.coef_, "bias": sgd.intercept_}
            training.save(**state)
        weight, bias = (v if len(v) > 1 else np.concatenate([-v, v]) / 2 for v in (state["weight"], state["bias"]))
        training.write("linear.safetensors", idf=words.idf_, weight=weight, bias=bias)
        (training.folder / "vocabulary.json").write_text(json.dumps({term: int(k) for term, k in words.vocabulary_.items()}))
        return lambda texts: words.transform(texts) @ weight.T + bias
