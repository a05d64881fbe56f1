"""What a check found, for people, for programs and for CI."""

import json
import xml.etree.ElementTree as ElementTree
from typing import Any, Literal

import msgspec
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Status = Literal["passed", "failed", "skipped"]
NOT_STARTED = "it did not start"  # why each of the others is skipped
MARKS = {"passed": ("✓", "green"), "failed": ("✗", "bold red"), "skipped": ("-", "dim")}


class Failed(Exception):
    """A check caught the plugin; `exchange` is the message and its answer, `remedy` what its author can do."""

    def __init__(self, message: str, exchange: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.exchange, self.remedy = message, exchange, remedy


class Skipped(Exception):
    """The check does not apply, or can't be made here; the text says why."""


class Result(msgspec.Struct, frozen=True):
    """One check."""

    check: str  # "calls.invalid"
    rule: str  # what holds of a good plugin
    status: Status
    message: str = ""  # what was found, or why it was skipped
    exchange: str = ""  # the message that was sent and what came back
    remedy: str = ""
    took_s: float = 0.0


class Report(msgspec.Struct, frozen=True):
    """All checks of one plugin in one runtime."""

    plugin: str
    version: str
    runtime: str
    contracts: tuple[str, ...]
    results: tuple[Result, ...]
    took_s: float
    log: str = ""  # the last lines of the instance's log, where something failed

    @property
    def good(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(r.check for r in self.results if r.status == "failed")


def render(report: Report) -> RenderableType:
    """One line a check, and a panel for each that failed."""
    table = Table(box=None, padding=(0, 1), title=f"{report.plugin} {report.version}: {', '.join(report.contracts)} "
                  f"({report.runtime})", title_justify="left", show_header=False)  # fmt: skip
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    parts: list[RenderableType] = [table]
    tried = [r for r in report.results if r.message != NOT_STARTED]
    for r in tried:
        mark, style = MARKS[r.status]
        rule = Text(r.rule) if r.status != "skipped" else Text(f"{r.rule}: {r.message}", "dim")
        table.add_row(Text(mark, style), Text(r.check, style if r.status != "passed" else "bold"), rule, f"{r.took_s:.2f} s")
        if r.status == "failed":
            lines = Text.assemble(r.message)
            if r.exchange:
                lines.append("\n\n" + r.exchange, "cyan")
            if r.remedy:
                lines.append("\n\nremedy: " + r.remedy, "bold")
            parts.append(Panel(lines, title=r.check, title_align="left", border_style="red"))
    if untried := len(report.results) - len(tried):
        table.add_row(Text("-", "dim"), Text(f"{untried} more", "dim"), Text(f"were not tried: {NOT_STARTED}", "dim"), "")
    if report.failed and report.log and all(report.log not in r.exchange for r in report.results):
        parts.append(Panel(Text(report.log), title="the end of its log", title_align="left", border_style="dim"))
    counts = {s: sum(r.status == s for r in report.results) for s in MARKS}
    verdict = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped in {report.took_s:.1f} s"
    return Group(*parts, Text(verdict, "bold red" if report.failed else "bold green"))


def show(report: Report, console: Console) -> None:
    """Print it."""
    console.print(render(report))


def as_json(reports: list[Report]) -> str:
    """A JSON array of the reports."""
    values: list[dict[str, Any]] = [{**msgspec.to_builtins(r), "passed": r.good} for r in reports]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def as_junit(reports: list[Report]) -> str:
    """JUnit XML: one suite a runtime, one case a check."""
    root = ElementTree.Element("testsuites")
    for report in reports:
        skipped = sum(r.status == "skipped" for r in report.results)
        counts = {"tests": str(len(report.results)), "failures": str(len(report.failed)), "skipped": str(skipped)}
        name, took = f"{report.plugin}.{report.runtime}", f"{report.took_s:.3f}"
        suite = ElementTree.SubElement(root, "testsuite", counts, name=name, time=took)
        for r in report.results:
            case = ElementTree.SubElement(suite, "testcase", classname=f"{report.plugin}.{report.runtime}", name=r.check,
                                          time=f"{r.took_s:.3f}")  # fmt: skip
            if r.status == "failed":
                failure = ElementTree.SubElement(case, "failure", message=_printable(r.message))
                failure.text = _printable(f"{r.rule}\n\n{r.exchange}\n\nremedy: {r.remedy}")
            elif r.status == "skipped":
                ElementTree.SubElement(case, "skipped", message=_printable(r.message))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Without the characters that XML has no way to say."""
    return "".join(c if c in "\n\t" or (c.isprintable() and ord(c) < 0xD800) or 0xE000 <= ord(c) < 0xFFFE else "?" for c in text)
