"""Files that fsspec reaches: listed and read as often as it takes, from where a broken connection left off.

Credentials come from the environment of the plugin's process, as each file system's own tools take them (AWS_ACCESS_KEY_ID and its
like, SSH_AUTH_SOCK and ~/.ssh), and never from an address: addresses stand in requests, manifests, accounts and logs.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec

from kernelm_sdk.errors import ClientFault, PluginFault

T = TypeVar("T")
TRIES = 6
PAUSE_S = 0.1  # before the second try; twice as long before each further one
BLOCK = 8 << 20  # bytes that are asked for at a time
STAMPS = ("ETag", "mtime", "LastModified", "Last-Modified", "modified", "created")  # s3, sftp and local, http, memory and others
# asking again changes nothing about these
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, ValueError, TypeError)
# exceptions of the file systems' libraries (botocore, asyncssh), which need not be installed, and what has to be done about them
AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
AWS = f"set {' and '.join(AWS_KEYS)}, or AWS_PROFILE, in the environment of the data plugin, and start it anew"
REFUSED = {
    "NoCredentialsError": ("no_credentials", AWS),
    "PartialCredentialsError": ("no_credentials", AWS),
    "CredentialRetrievalError": ("no_credentials", AWS),
    "ProfileNotFound": ("no_credentials", "correct AWS_PROFILE, or add the profile to ~/.aws/credentials"),
    "PermissionDenied": ("no_credentials", "put a key that the server accepts into the agent at SSH_AUTH_SOCK, or into ~/.ssh"),
    "HostKeyNotVerifiable": ("unknown_host", "add the host's key to ~/.ssh/known_hosts, if it is the host's"),
}


def refusal(url: str, error: BaseException) -> ClientFault | None:
    """ClientFault for what speaks of credentials that are missing, or of a host that nobody knows; it names the setting."""
    for kind in type(error).__mro__:
        if kind.__module__.startswith(("botocore.", "asyncssh.")) and kind.__name__ in REFUSED:
            code, remedy = REFUSED[kind.__name__]
            absent = [name for name in AWS_KEYS if not os.environ.get(name)] if remedy is AWS else []
            detail = f" ({', '.join(absent)} not set)" if absent else ""
            return ClientFault(code, f"inputs: {url}: {str(error).rstrip('.')}{detail}", remedy)
    return refusal(url, error.__cause__) if error.__cause__ is not None else None


def input_changed(name: str) -> PluginFault:
    """The fault of an input that is another one by now: a part of what was and a part of what is must not make a dataset."""
    return PluginFault("input_changed", f"{name} was written to while the job read its inputs",
                       "the next attempt reads all inputs anew; copy what is still being written, or store it as an artifact",
                       retriable=True)  # fmt: skip


def check_address(url: str, field: str) -> None:
    """ClientFault `credentials_in_url` for an address with a password in it."""
    if "://" in url and urlsplit(url).password is not None:
        raise ClientFault("credentials_in_url", f"{field}: the address of {urlsplit(url).hostname} has a password in it",
                          "take it out; credentials are read from the environment of the data plugin")  # fmt: skip


def _final(error: Exception) -> bool:
    status = getattr(error, "status", 0)  # of an answer over HTTP
    return isinstance(error, FINAL) or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _options(url: str) -> dict[str, Any]:
    # sshfs talks to any host by default; (): to those that ~/.ssh/known_hosts has a key of
    return {"known_hosts": ()} if urlsplit(url).scheme in ("ssh", "sftp") else {}


def _again(url: str, call: Callable[[], T], renew: Callable[[], None] = lambda: None) -> T:
    """The answer of `call`, tried up to TRIES times, over a new connection and after `renew` from the second time on. OSError for
    what asking again does not change, ClientFault for missing credentials; PluginFault `connection_lost`, which may be retried,
    for all else, and what `call` raises of its own accord."""
    pause, last = PAUSE_S, ""
    for attempt in range(TRIES):
        try:
            if attempt:
                time.sleep(pause)
                pause *= 2
                fsspec.get_filesystem_class(urlsplit(url).scheme).clear_instance_cache()  # those there are keep their connections
                renew()
            return call()
        except PluginFault:
            raise
        except Exception as error:  # file systems raise what they like
            if (fault := refusal(url, error)) is not None:
                raise fault from None
            last = f"{type(error).__name__}: {error}".rstrip(": ")
            if _final(error):
                raise OSError(last) from None
    raise PluginFault("connection_lost", f"{url}: {TRIES} times in a row: {last}",
                      "see that the server can be reached; the job goes on from its finished shards", retriable=True)  # fmt: skip


def _file_system(url: str) -> tuple[Any, str]:
    found: tuple[Any, str] = fsspec.core.url_to_fs(url, **_options(url))
    return found


class Found(NamedTuple):
    """A file that was found."""

    name: str  # path within the folder or URL
    path: str  # where it lies: a local path or URL
    size: int  # bytes
    skipped: str = ""  # why it is not read
    stamp: str = ""  # is another one when the file has changed


def listed(url: str) -> Iterator[Found]:
    """The files under a URL; sorted. ClientFault if there is none."""

    def find() -> tuple[Any, str, dict[str, Any], str]:
        fs, root = _file_system(url)
        fs.invalidate_cache()  # of what was listed in this process before
        found = fs.find(root, detail=True)
        return fs, root, found, _stamp(fs.info(root)) if found == {root: {}} else ""  # of a file over HTTP `find` tells nothing

    try:
        fs, root, found, single = _again(url, find)
    except OSError as error:
        raise ClientFault("unreadable", f"inputs: {url}: {error}", "check the address, and what fsspec needs for it") from None
    if not found:
        raise ClientFault("empty_source", f"inputs: {url}: no files", "check the address")
    for path, entry in sorted(found.items()):
        name = PurePosixPath(path).name if path == root else path.removeprefix(root).lstrip("/")
        yield Found(name, _address(fs, url, path), int(entry.get("size") or 0), stamp=single or _stamp(entry))


def _stamp(entry: dict[str, Any]) -> str:
    """The size and the first of STAMPS that a file system gives."""
    return f"{entry.get('size')} {next((f'{name} {entry[name]}' for name in STAMPS if entry.get(name) is not None), '')}"


def _address(fs: Any, url: str, path: str) -> str:
    """The URL of a file that was found under `url`; SFTP's paths are without their host."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{path}" if parts.scheme in ("ssh", "sftp") else str(fs.unstrip_protocol(path))


class Remote(io.RawIOBase):
    """A file, read in order or, where its server knows ranges, anywhere. Where a connection breaks, the file is opened anew and
    read on from there; PluginFault `input_changed` if it is another one by then, as its size and its ETag or time tell. fsspec's
    buffered files take no size for a line, so wrap this one."""

    def __init__(self, url: str) -> None:
        self._url, self._at, self._size = url, 0, -1
        self._file: Any = _again(url, self._open)
        self._size, self._stamp = self._length(), self._state()

    def _open(self) -> Any:
        fs, path = _file_system(self._url)
        return fs.open(path, "rb", block_size=BLOCK)

    def _length(self) -> int:
        """Bytes of the file; -1 where the server does not say."""
        size = getattr(self._file, "size", None)
        if not isinstance(size, int) and hasattr(self._file, "fs"):
            with suppress(Exception):  # it only serves to notice an end that comes too early
                size = self._file.fs.info(getattr(self._file, "path", self._url)).get("size")
        return size if isinstance(size, int) else -1

    def _state(self) -> str:
        """The stamp of the file; "" where the server says nothing. S3 has told it already, HTTP has to be asked."""
        with suppress(Exception):
            entry = getattr(self._file, "details", None) or {}
            return _stamp(entry if any(entry.get(name) is not None for name in STAMPS) else self._ask())
        return ""

    def _ask(self) -> dict[str, Any]:
        fs, path = _file_system(self._url)
        fs.invalidate_cache()
        entry: dict[str, Any] = fs.info(path)
        return entry

    def check_unchanged(self) -> None:
        """PluginFault `input_changed` if the server has another file by now than when this one was opened, or none. Servers that
        say nothing of their files are not asked, nor for one that came as one answer: no part of that is newer than another."""
        if not self._stamp or 0 <= self._size <= BLOCK:
            return
        try:
            now = _again(self._url, lambda: _stamp(self._ask()))
        except OSError:  # it is gone
            now = ""
        if now != self._stamp:
            raise input_changed(self._url)

    def _drop(self) -> None:
        file, self._file = self.__dict__.get("_file"), None
        if file is not None:
            with suppress(Exception):  # its connection is gone
                file.close()

    def _renew(self) -> None:
        self._drop()
        self._file = self._open()
        if self._length() != self._size or self._state() != self._stamp:
            raise input_changed(self._url)
        self._go(self._at)

    def _go(self, at: int) -> None:
        """Bring the file to a position; without ranges by reading up to it."""
        if self._file.seekable():
            self._file.seek(at)
            return
        while at > 0:
            if not (data := self._file.read(min(at, BLOCK))):
                raise EOFError("it ends before where it was read to")
            at -= len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size < 0:
            raise OSError("the server does not tell the size of the file")
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        _again(self._url, lambda: self._file.seek(at), self._renew)
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            data: bytes = self._file.read(len(buffer))
            if not data and self._at < self._size:
                raise EOFError(f"it breaks off after {self._at:,} of {self._size:,} bytes")
            return data

        data = _again(self._url, read, self._renew)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()
