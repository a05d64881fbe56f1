"""Logs for programs: one object a line, whatever is logged."""

import json
import os
import subprocess
import sys

PROGRAM = """
import logging
from kernelm_sdk import logs
logs.configure("jobs")
log = logging.getLogger("kernelm.jobs")
log.info("two\\nlines, %s and \\u00fc", {"a": 1})
log.debug("not asked for")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
from opentelemetry.sdk.trace import TracerProvider
with TracerProvider().get_tracer("t").start_as_current_span("s"):
    log.warning("in a span")
"""


def said(**environment: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_")} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_each_record_is_an_object_with_all_that_is_known() -> None:
    first, failed, spanned = map(json.loads, said(KERNELM_LOG_FORMAT="json"))
    assert first["message"] == "two\nlines, {'a': 1} and ü"
    assert {first["level"], first["logger"], first["member"]} == {"INFO", "kernelm.jobs", "jobs"}
    assert first["time"].endswith("+00:00")
    assert "ZeroDivisionError" in failed["error"]
    assert (len(spanned["trace_id"]), len(spanned["span_id"])) == (32, 16)
    assert "trace_id" not in first


def test_people_get_lines_by_default() -> None:
    lines = said()
    assert "INFO kernelm.jobs: two" in lines[0]
    assert lines[1] == "lines, {'a': 1} and ü"
