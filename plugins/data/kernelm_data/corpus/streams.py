"""Bytes of a file, local or remote, unpacked on the way, never more of them than the limits allow."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import zstandard

from kernelm_contracts.data import Limits
from kernelm_data.corpus.remote import Remote, input_changed

PACKINGS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz", ".tgz": "gz", ".tbz2": "bz2", ".txz": "xz"}
FREE = 16_000_000  # bytes that anything may unpack to
BUFFER = 1 << 20


class Broken(ValueError):
    """A record or file that can't be read; `reason` is short and countable, `detail` for a person."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# what the unpackers raise for bytes that are not what they should be, or end too early
UNPACK_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, OSError)


class Zstandard:
    """The frames of a Zstandard file. zstandard's own reader takes a frame that breaks off for the end."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._frame: Any = None
        self._data = b""

    def read1(self, most: int) -> bytes:
        """Some bytes, at most so many; none at the end. EOFError where the file breaks off."""
        while not self._data:
            packed = self._packed.read(1 << 16)
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return b""
            parts = []
            while packed:
                if self._frame is None:
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                parts.append(self._frame.decompress(packed))
                packed = b""
                if self._frame.eof:
                    packed, self._frame = self._frame.unused_data, None
            self._data = b"".join(parts)
        data, self._data = self._data[:most], self._data[most:]
        return data


class Guarded(io.RawIOBase):
    """An unpacked stream that stops with `Broken` where it is a bomb, cut off or not what it claims to be."""

    def __init__(self, unpacked: IO[bytes], packed: IO[bytes], packing: str, limits: Limits) -> None:
        self._unpacked, self._packed, self._packing, self._limits = unpacked, packed, packing, limits
        self.total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._unpacked.read1(len(buffer))  # type: ignore[attr-defined] # `read` loses what came before an error
        except EOFError:
            raise Broken(f"truncated {self._packing}", f"after {self.total:,} bytes") from None
        except UNPACK_ERRORS as error:
            raise Broken(f"broken {self._packing}", f"after {self.total:,} bytes: {error}") from None
        self.total += len(data)
        if self.total > FREE and self.total > self._limits.expansion * max(self._packed.tell(), 1):
            raise Broken("unpacks to more than limits.expansion", f"{self.total:,} bytes of {self._packed.tell():,}")
        buffer[: len(data)] = data
        return len(data)


def unpack(packed: IO[bytes], packing: str, limits: Limits) -> IO[bytes]:
    """The bytes of a packed stream. Raises `Broken` from reads."""
    if not packing:
        return packed
    if packing == "gz":
        inner: Any = gzip.GzipFile(fileobj=packed, mode="rb")
    elif packing == "bz2":
        inner = bz2.BZ2File(packed)
    elif packing == "xz":
        inner = lzma.LZMAFile(packed)  # noqa: SIM115 - closed with what it reads
    else:
        inner = Zstandard(packed)
    return cast(IO[bytes], io.BufferedReader(Guarded(inner, packed, packing, limits), BUFFER))


@contextmanager
def opened(path: str, packing: str, limits: Limits, start: int = 0, stamp: str = "") -> Iterator[IO[bytes]]:
    """A file from byte `start` on: a local path, or a URL of fsspec. Raises `Broken` if it can't be opened, and PluginFault
    `connection_lost` for one whose server is gone, `input_changed` for a local one whose state is not that of `stamp`, if given,
    before it is read and afterwards, and for one elsewhere that is another one afterwards."""
    try:
        remote = Remote(path) if "://" in path else None
        file: Any = io.BufferedReader(remote, BUFFER) if remote else open(path, "rb", BUFFER)  # noqa: PTH123, SIM115
    except OSError as error:
        raise Broken("unreadable", error.strerror or str(error)) from None
    with file:
        if start:
            file.seek(start)

        def check() -> None:
            if remote:
                remote.check_unchanged()
            elif stamp:
                check_unchanged(file, path, stamp)

        if not remote:
            check()
        try:
            yield unpack(file, packing, limits)
        except (Broken, *UNPACK_ERRORS):
            check()  # no wonder then
            raise
        check()


def stamp_of(state: os.stat_result) -> str:
    """What tells whether a local file has been written to."""
    return str(state.st_mtime_ns)


def check_unchanged(file: IO[bytes], path: str, stamp: str) -> None:
    """PluginFault `input_changed` if the open file has another stamp."""
    if stamp_of(os.fstat(file.fileno())) != stamp:
        raise input_changed(path)


def read_all(stream: IO[bytes], limits: Limits) -> bytes:
    """All bytes, if they are no more than a document may have."""
    most = int(limits.document_mb * 1e6)
    data = stream.read(most + 1)
    if len(data) > most:
        raise Broken("larger than limits.document_mb", f"more than {most:,} bytes")
    return data


def lines(stream: IO[bytes], limits: Limits) -> Iterator[bytes | Broken]:
    """The lines of a stream, without their ends; `Broken` in place of one that is too long or where the stream breaks off."""
    most = int(limits.document_mb * 1e6)
    while True:
        try:
            line = stream.readline(most + 1)
            if not line:
                return
            if len(line) > most and not line.endswith(b"\n"):
                length = len(line)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(BUFFER)
                    length += len(line)
                yield Broken("larger than limits.document_mb", f"a line of {length:,} bytes")
                continue
        except Broken as error:
            yield error
            return
        yield line.rstrip(b"\r\n")
