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


def write(folder: Path, card: ModelCard) -> None:
    """Write all four files to `folder`."""
    (folder / "model.json").write_bytes(msgspec.json.format(msgspec.json.encode(card)))
    (folder / "evaluation.json").write_bytes(msgspec.json.format(msgspec.json.encode(card.scores)))
    (folder / "card.md").write_text(_text(card))
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


def _text(card: ModelCard) -> str:
    settings = "\n".join(f"| {name} | {value} |" for name, value in card.request.items())
    scores = "\n".join(f"| {s.split} | {s.documents} | {s.accuracy:.4f} | {s.macro_recall:.4f} | {s.macro_f1:.4f} | {s.loss:.4f} |"
                       for s in card.scores.values())  # fmt: skip
    last = list(card.scores.values())[-1]
    warnings = "".join(f"\n\n**Warning:** {warning}." for warning in card.warnings)
    return f"""# {card.name}

Classifies a text as one of: {", ".join(card.labels)}. {PROCEDURES[card.structure]}{warnings}

| split | documents | accuracy | macro recall | macro F1 | cross-entropy (nats) |
|---|---|---|---|---|---|
{scores}

![Confusion matrices](confusion.png)

On the {last.split} split, by label:

| label | precision | recall | F1 | documents |
|---|---|---|---|---|
{_per_label(last)}

## Training
{card.parameters:,} parameters, stored as {card.precision} in {card.format}; {card.trained_s:.0f} s.
Dataset `{card.dataset}`{f", base `{card.base}`" if card.base else ""}.

| setting | value |
|---|---|
{settings}

## Limits
The figures hold for texts like those of the dataset. A text of another topic still gets one of these labels{
    f", and of a longer text only the first {card.max_tokens} tokens are read" if card.structure != "tfidf-linear" else ""}.
"""


def _per_label(scores: Scores) -> str:
    return "\n".join(f"| {label} | {v['precision']:.4f} | {v['recall']:.4f} | {v['f1']:.4f} | {v['support']:.0f} |"
                     for label, v in scores.per_label.items())  # fmt: skip
