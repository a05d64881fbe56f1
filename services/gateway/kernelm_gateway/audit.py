"""A line for every call in `<home>/logs/audit.jsonl`: who, what, when, how it ended, and not what was said.

Lines are written by a thread, those of WRITE_S together, so that no call waits for a disk or wakes anybody; what was not yet
written when the process is killed is lost. The file is private, and set aside when it has its size.
"""

import logging
import os
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec

from kernelm_gateway.policy import AuditSettings
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Key

FILE = "audit.jsonl"
WRITE_S = 0.1
TOGETHER = 100  # lines; the size of the file is looked at before each such piece


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call."""

    at: float  # Unix seconds at which it came
    key: str  # id of the API key, or "oidc-" and a hash of the subject
    name: str  # of the key, or the subject
    tenant: str
    method: str  # "server/1.generate"
    model: str
    outcome: str  # "ok", the code of the fault, or "left" for a caller who was gone before the end
    took_ms: float
    input_tokens: int = 0
    output_tokens: int = 0
    trace: str = ""  # id of the trace, where there is one
    request: Any = None  # with `content` alone
    answer: Any = None


class _Private(RotatingFileHandler):
    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")


class Audit:
    """Writes lines below `home`."""

    def __init__(self, home: Path, settings: AuditSettings) -> None:
        self.content, self._enabled = settings.content, settings.enabled
        self._lines: list[bytes] = []
        self._closing = threading.Event()
        if not settings.enabled:
            return
        try:
            (home / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = _Private(home / "logs" / FILE, maxBytes=settings.megabytes * 2**20, backupCount=settings.files)
        except OSError as error:
            raise ClientFault("invalid", f"the audit can't be written: {error}",
                              "let the gateway write there, or set `enabled = false` under [audit] in gateway.toml") from None
        self._file.setFormatter(logging.Formatter("%(message)s"))
        self._writer = threading.Thread(target=self._write_for_ever, name="audit", daemon=True)
        self._writer.start()

    def note(self, key: Key, method: str, model: str, began: float, outcome: str, tokens: tuple[int, int] = (0, 0), trace: str = "",
             request: Any = None, answer: Any = None) -> None:  # fmt: skip
        """One call that came at `began` (Unix seconds) and is over now."""
        if not self._enabled:
            return
        took_ms = round((time.time() - began) * 1e3, 2)
        line = Line(round(began, 3), key.id, key.name, key.tenant, method, model, outcome, took_ms, *tokens, trace,
                    *((request, answer) if self.content else ()))  # fmt: skip
        self._lines.append(msgspec.json.encode(line))

    def close(self) -> None:
        """Write what waits."""
        if self._enabled and not self._closing.is_set():
            self._closing.set()
            self._writer.join()
            self._file.close()

    def _write_for_ever(self) -> None:
        while not self._closing.wait(WRITE_S):
            self._write()
        self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        for at in range(0, len(lines), TOGETHER):
            text = b"\n".join(lines[at : at + TOGETHER]).decode()
            self._file.handle(logging.LogRecord("kernelm.audit", logging.INFO, "", 0, text, (), None))
