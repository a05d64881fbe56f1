"""A linear classifier of texts by SGD, balanced over the labels; of all epochs it keeps the best on the validation split."""

import json

import numpy as np

from kernelm_contracts.bases import Logits, TextTrainer, Training


class SgdWords(TextTrainer):
    structures, algorithms = ("tfidf-linear",), ("sgd",)

    def fit(self, training: Training) -> Logits:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import SGDClassifier
        from sklearn.metrics import log_loss
        from sklearn.utils.class_weight import compute_sample_weight

        request, (texts, y), held_out = training.request, training.data.train, training.data.splits["validation"]
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, request.ngrams))
        x, held_out_x, fair = words.fit_transform(texts), words.transform(held_out.texts), compute_sample_weight("balanced", y)
        state, sgd = training.saved or {"epoch": np.array(0), "best": np.array(np.inf)}, SGDClassifier(
            loss="log_loss", alpha=1e-5 / request.regularization, learning_rate="invscaling", power_t=0.25,
            eta0=request.learning_rate or 30.0)  # fmt: skip
        if training.saved:  # what `partial_fit` depends on
            sgd.classes_, sgd.coef_, sgd.intercept_, sgd.t_ = (state[k] for k in ("classes", "weight", "bias", "t"))
        for epoch in range(int(state["epoch"]), request.epochs):
            training.progress(epoch / request.epochs, f"epoch {epoch + 1} of {request.epochs}", step=epoch, loss=state["best"])
            sgd.set_params(random_state=request.seed + epoch).partial_fit(x, y, np.unique(y), fair)
            loss = log_loss(held_out.labels, sgd.predict_proba(held_out_x), labels=sgd.classes_)
            better = {"best": np.array(loss), "best_weight": sgd.coef_.copy(), "best_bias": sgd.intercept_.copy()}
            state |= {"epoch": np.array(epoch + 1), "classes": sgd.classes_, "weight": sgd.coef_, "bias": sgd.intercept_,
                      "t": np.array(sgd.t_)} | (better if loss < state["best"] else {})  # fmt: skip
            training.save(**state)
        weight, bias = (v if len(v) > 1 else np.concatenate([-v, v]) / 2 for v in (state["best_weight"], state["best_bias"]))
        training.write("linear.safetensors", idf=words.idf_, weight=weight, bias=bias)
        (training.folder / "vocabulary.json").write_text(json.dumps({term: int(k) for term, k in words.vocabulary_.items()}))
        return lambda texts: words.transform(texts) @ weight.T + bias
