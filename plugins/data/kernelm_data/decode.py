"""Bytes to text: UTF-8, else what a byte order mark or chardet says; what can't be decoded with confidence is refused."""

import codecs

# UTF-32's marks begin with UTF-16's, so they come first
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
CONTROL = bytes(c for c in range(32) if c not in b"\t\n\v\f\r\x1b")
MAX_CONTROL = 0.02  # share of such bytes above which a file is no text
MIN_CONFIDENCE = 0.05  # of chardet: real text of a few words has 0.08 or more, random bytes 0.01 or less


class Undecodable(ValueError):
    """The bytes are no text that can be trusted; `reason` is short and countable, `detail` is for a person."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes) -> tuple[str, str]:
    """The text and its encoding as Python names it ("utf-8", "cp1252", ...).

    Raises Undecodable for binary data, for UTF-8 with broken bytes among it (any other encoding would turn all its
    letters to mojibake), and for bytes that no encoding explains.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _strict(data, encoding), encoding.removesuffix("-sig")
    if b"\0" not in data:
        if len(data) - len(data.translate(None, CONTROL)) > MAX_CONTROL * len(data):
            raise Undecodable("binary", "control characters among the bytes")
        try:
            return data.decode("utf-8"), "utf-8"
        except UnicodeDecodeError as error:
            if _is_mostly_utf8(data):
                raise Undecodable("broken utf-8", f"byte {error.start}: {error.reason}") from None
    encoding = _detect(data)
    return _strict(data, encoding), encoding


def _strict(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Undecodable(f"broken {encoding}", f"byte {error.start}: {error.reason}") from None


def _is_mostly_utf8(data: bytes) -> bool:
    # text in another encoding hardly ever holds valid multi-byte sequences of UTF-8
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return sum(not c.isascii() for c in text) - broken >= broken


def _detect(data: bytes) -> str:
    import chardet  # only few documents need it

    era = chardet.EncodingEra.MODERN_WEB | chardet.EncodingEra.LEGACY_ISO  # without mainframes, DOS and old Macintoshes
    found = chardet.detect(data, encoding_era=era)
    name = found["encoding"]
    if name is None:
        raise Undecodable("binary", found["mime_type"] or "")
    if found["confidence"] < MIN_CONFIDENCE:
        raise Undecodable("unknown encoding", f"{name} at confidence {found['confidence']:.3f}")
    codec = codecs.lookup(name).name
    return "cp1252" if codec in ("iso8859-1", "ascii") else codec  # as the WHATWG Encoding Standard, section 4.2, has it
