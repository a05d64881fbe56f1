"""What members write to their logs: lines for people, or with KERNELM_LOG_FORMAT=json an object a line, for programs.

An object has `time` (RFC 3339, UTC), `level`, `logger`, `message`, `member`, where it is known `trace_id` and `span_id`, and of an
exception `error`.
"""

import logging
import os
import sys
from datetime import UTC, datetime

import msgspec

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Lines(logging.Formatter):
    """Each record as one line of JSON."""

    def __init__(self, member: str) -> None:
        super().__init__()
        self._member = member

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), "level": record.levelname,
                "logger": record.name, "message": record.getMessage(), "member": self._member} | _place()  # fmt: skip
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(member: str = "") -> None:
    """Log to stderr from KERNELM_LOG (INFO) on, as KERNELM_LOG_FORMAT says. What was set up before is replaced: in a forked
    instance the plugin's import came first."""
    handler = logging.StreamHandler()
    as_json = os.environ.get("KERNELM_LOG_FORMAT", "text") == "json"
    handler.setFormatter(Lines(member or os.environ.get("KERNELM_INSTANCE", "")) if as_json else logging.Formatter(TEXT))
    logging.basicConfig(level=os.environ.get("KERNELM_LOG", "INFO"), handlers=[handler], force=True)


def _place() -> dict[str, str]:
    """The trace and span in which something is logged, if there are any; nothing is imported to find out."""
    if (trace := sys.modules.get("opentelemetry.trace")) is None:
        return {}
    context = trace.get_current_span().get_span_context()
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"} if context.is_valid else {}
