"""Private data in text: `detect` finds it, `redact` puts typed placeholders in its place, `Redactor` does both to a stream.

Pure and offline: no bus, no network, no state but what a `Redactor` holds back. Nothing here logs; a span says where and what
kind, never what. See README.md for what is found, how well, and how fast.
"""

from kernelm_data.private.detect import RULED, Detector, detect
from kernelm_data.private.redact import Placeholders, Style, count, redact
from kernelm_data.private.spans import TYPES, Span
from kernelm_data.private.stream import Redactor

__all__ = ["RULED", "TYPES", "Detector", "Placeholders", "Redactor", "Span", "Style", "count", "detect", "redact"]
