"""What lies beside the weights: `model.json`, `evaluation.json`, `card.md`, `confusion.png`."""

from pathlib import Path

import msgspec

from kernelm_contracts.trainer import ModelCard, Scores
from kernelm_sdk.errors import ClientFault, invalid
from kernelm_trainer.evaluation import draw

PROCEDURES = {
    "encoder": "All parameters of the encoder were fine-tuned; the mean of the last hidden states goes through a linear head.",
    "frozen-linear": "The encoder was left as it is; a linear classifier was fitted on the mean of its last hidden states.",
    "tfidf-linear": "A linear classifier on TF-IDF weights of word n-grams; there is no neural network in it.",
}
PURPOSES = {
    "causal-lm": "Goes on with a text, token by token.",
    "seq2seq-lm": "Writes a text to a text, such as its translation or summary.",
    "token-classification": "Gives each word of a text a label.",
    "sentence-embedding": "Turns a text into a vector; texts that mean the same are near each other.",
}


def write(folder: Path, card: ModelCard) -> None:
    """Write these files to `folder`; the picture only of a classifier of texts."""
    (folder / "model.json").write_bytes(msgspec.json.format(msgspec.json.encode(card)))
    (folder / "evaluation.json").write_bytes(msgspec.json.format(msgspec.json.encode(card.scores)))
    (folder / "card.md").write_text(_text(card))
    if _drawn(card):
        draw(list(card.scores.values()), card.labels, card.name, folder / "confusion.png")


def read(folder: Path) -> ModelCard:
    """The card of the model in `folder`; ClientFault if there is none, or none that is valid."""
    path = folder / "model.json"
    if not path.is_file():
        raise ClientFault("invalid", f"{path.name} is missing: the artifact is no model", "give the digest of a model")
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelCard)
    except msgspec.DecodeError as error:
        raise invalid(path.name, error, "train the model again") from None


def _drawn(card: ModelCard) -> bool:
    return card.task == "text-classification" and all(scores.confusion for scores in card.scores.values())


def _text(card: ModelCard) -> str:
    settings = "\n".join(f"| {name} | {value} |" for name, value in card.request.items())
    said = "".join(f"\n\n**Warning:** {warning}." for warning in card.warnings) + "".join(f"\n\n{note}." for note in card.notes)
    if card.epsilon:
        said += f"\n\nDifferential privacy: epsilon {card.epsilon:.3g} at delta {card.delta:g} was spent on each training example."
    adapter = f" An adapter (LoRA): it answers only on top of the base `{card.base}`." if card.adapter else ""
    picture = "\n![Confusion matrices](confusion.png)\n" if _drawn(card) else ""
    return f"""# {card.name}

{_purpose(card)}{adapter}{said}

{_scores(card)}
{picture}{_by_label(card)}
## Training
{card.parameters:,} parameters, stored as {card.precision} in {card.format}; {card.trained_s:.0f} s.
Dataset `{card.dataset}`{f", base `{card.base}`" if card.base else ""}.

| setting | value |
|---|---|
{settings}

## Limits
{_limits(card)}
"""


def _purpose(card: ModelCard) -> str:
    if card.structure in PURPOSES:
        return PURPOSES[card.structure]
    how = "any of" if card.problem == "multi-label" else "one of"
    return f"Classifies a text as {how}: {', '.join(card.labels)}. {PROCEDURES[card.structure]}"


def _limits(card: ModelCard) -> str:
    limits = "The figures hold for texts like those of the dataset."
    if card.task == "text-classification":
        limits += " A text of another topic still gets one of these labels."
    if card.structure in PROCEDURES and card.structure != "tfidf-linear":
        limits += f" Of a longer text only the first {card.max_tokens} tokens are read."
    elif card.max_tokens:
        limits += f" The model takes {card.max_tokens} tokens at most."
    return limits


def _scores(card: ModelCard) -> str:
    """A table of the splits; an interval in brackets holds in 95% of the resamples."""
    perplexity = any(s.perplexity for s in card.scores.values())
    names = ("documents", "perplexity", "accuracy of the next token") if perplexity else (
        "documents", "accuracy", "macro recall", "macro F1", "calibration error")  # fmt: skip
    rows = []
    for s in card.scores.values():
        figures = ([_figure(s, "perplexity", s.perplexity), _figure(s, "accuracy", s.accuracy)] if perplexity else
                   [_figure(s, "accuracy", s.accuracy), f"{s.macro_recall:.4f}", _figure(s, "macro_f1", s.macro_f1),
                    f"{s.calibration:.4f}" if s.calibration >= 0 else ""])  # fmt: skip
        rows.append(f"| {s.split} | {s.documents} | {' | '.join(figures)} | {s.loss:.4f} |")
    return "\n".join([f"| split | {' | '.join(names)} | loss (nats) |", "|---" * (len(names) + 2) + "|", *rows])


def _figure(scores: Scores, name: str, value: float) -> str:
    bounds = scores.intervals.get(name)
    return f"{value:.4f}" + (f" [{bounds.low:.4f}, {bounds.high:.4f}]" if bounds else "")


def _by_label(card: ModelCard) -> str:
    last = list(card.scores.values())[-1]
    if not last.per_label:
        return ""
    return f"""
On the {last.split} split, by label:

| label | precision | recall | F1 | documents |
|---|---|---|---|---|
{_per_label(last)}
"""


def _per_label(scores: Scores) -> str:
    return "\n".join(f"| {label} | {v['precision']:.4f} | {v['recall']:.4f} | {v['f1']:.4f} | {v['support']:.0f} |"
                     for label, v in scores.per_label.items())  # fmt: skip
