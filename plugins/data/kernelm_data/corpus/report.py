"""The pages of a corpus: the card in Markdown, and a report in HTML of what each step removed and changed, with examples."""

import html
from collections.abc import Sequence

import numpy as np

from kernelm_contracts.data import DatasetCard, Manifest
from kernelm_data.corpus.books import StepBook

INK, KEPT, LOST = "#1f2933", "#2f6f9f", "#d1495b"
STYLE = """:root{--ink:#1f2933;--muted:#52606d;--grid:#e4e7eb;--kept:#2f6f9f;--lost:#d1495b;--bg:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--muted:#9aa5b1;--grid:#323f4b;--kept:#62a0cf;--lost:#ef7d8c;--bg:#12181f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--bg);max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}td.n,th.n{text-align:right}
.bar{display:flex;height:1.1rem;min-width:14rem;background:var(--grid)}.bar i{background:var(--kept)}.bar b{background:var(--lost)}
pre{white-space:pre-wrap;word-break:break-word;font-size:12.5px;margin:.2rem 0;padding:.5rem;border-left:3px solid var(--grid)}
summary{cursor:pointer;margin:.3rem 0}small{color:var(--muted)}.after{border-color:var(--kept)}.before{border-color:var(--lost)}
a{color:var(--kept)}svg{display:block}svg text{fill:var(--muted);font-size:11px}svg rect{fill:var(--kept)}"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def card_page(card: DatasetCard, manifest: Manifest) -> str:
    """The card as a person reads it."""
    documents = sum(s.documents for s in card.splits.values())
    tokens = sum(s.tokens for s in card.splits.values())
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"# {_cell(card.name)}, version {card.version}",
        "",
        f"{documents:,} documents" + (f", {tokens:,} tokens" if tokens else "") + f" in {len(manifest.shards)} files of "
        f"{size / 1e6:,.1f} MB, from {card.bytes_in / 1e6:,.1f} MB of input"
        + (f"; the version before is `{card.parent}`" if card.parent else "")
        + ".",
        "",
        "![documents in and out of each step](account.svg)",
        "",
        "| step | in | out | dropped | changed |",
        "|---|--:|--:|---|---|",
    ]
    for step in card.steps:
        lines.append(
            f"| {step.name} | {step.documents_in:,} | {step.documents_out:,} | {_counts(step.reasons)} | {_counts(step.changed)} |"
        )
    lines += ["", "Each dropped document is a line of `dropped.jsonl`; `report.html` shows examples.", "",
              "| split | documents | tokens |", "|---|--:|--:|"]  # fmt: skip
    lines += [f"| {name} | {split.documents:,} | {split.tokens:,} |" for name, split in card.splits.items()]
    private = card.private
    if private is None:
        lines += ["", "**Private data:** nobody looked for any."]
    else:
        left = _counts(private.left)
        lines += ["", f"**Private data** ({', '.join(private.types)}; action: {private.action}): {private.affected:,} of "
                      f"{private.documents:,} documents held some; found: {_counts(private.found) or 'none'}; "
                      + (f"**left in the dataset: {left}**" if left else "none of it is left in the dataset")
                      + ". What rules and models miss is still there."]  # fmt: skip
    lines += [
        "",
        f"Read: {_counts(card.sources)}." + (f" Languages: {_counts(card.languages)}." if card.languages else ""),
        "",
        "Made with " + ", ".join(f"{name} {number}" for name, number in manifest.libraries.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def account_picture(steps: Sequence[StepBook]) -> str:
    """Documents in and out of each step, as SVG: matplotlib would take longer to load than some corpora to prepare."""
    widest = max((step.documents_in for step in steps), default=1) or 1
    bars = []
    for i, step in enumerate(steps):
        y, kept, came = 34 + 30 * i, 460 * step.documents_out / widest, 460 * step.documents_in / widest
        why = ""
        if step.reasons:
            what, count = _ordered(step.reasons)[0]
            what = what if len(what) <= 56 else f"{what[:55]}\N{HORIZONTAL ELLIPSIS}"
            why = f"\N{MINUS SIGN}{count:,} {what}" + (f" (+ {len(step.reasons) - 1})" if len(step.reasons) > 1 else "")
        bars.append(f'<text x="168" y="{y + 15}" text-anchor="end" fill="{INK}">{html.escape(step.name)}</text>'
                    f'<rect x="176" y="{y}" width="{kept:.1f}" height="22" fill="{KEPT}"/>'
                    f'<rect x="{176 + kept:.1f}" y="{y}" width="{came - kept:.1f}" height="22" fill="{LOST}"/>'
                    f'<text x="{182 + came:.1f}" y="{y + 15}" fill="{INK}">{step.documents_out:,}'
                    f'<tspan dx="8" fill="{LOST}">{html.escape(why)}</tspan></text>')  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 {46 + 30 * len(steps)}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/><text x="176" y="20" fill="{INK}" font-weight="bold">'
        f"Documents out of each step, and what it dropped</text>{''.join(bars)}</svg>\n"
    )


def _ordered(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {_cell(what)}" for what, count in _ordered(counts))


def report_page(
    card: DatasetCard, manifest: Manifest, steps: Sequence[StepBook], tokens: Sequence[int], characters: Sequence[int]
) -> str:
    """A page that needs nothing but a browser. Examples begin at the text's beginning or at the first change, without private
    data."""
    name = html.escape(card.name)
    widest = max((step.documents_in for step in steps), default=1) or 1
    rows = []
    for step in steps:
        lost = step.documents_in - step.documents_out
        kept, gone = 100 * step.documents_out / widest, 100 * lost / widest
        bar = f'<div class="bar"><i style="width:{kept:.2f}%"></i><b style="width:{gone:.2f}%"></b></div>'
        rows.append(
            f'<tr><td><a href="#{html.escape(step.name)}">{html.escape(step.name)}</a></td><td class="n">{step.documents_in:,}</td>'
            f'<td class="n">{step.documents_out:,}</td><td class="n">{lost:,}</td><td>{bar}</td></tr>'
        )
    documents = sum(s.documents for s in card.splits.values())
    body = [
        f"<h1>{name}, version {card.version}</h1>",
        f"<p>{documents:,} documents from {card.bytes_in / 1e6:,.1f} MB of input; "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB in {len(manifest.shards)} files.</p>",
        '<table><tr><th>step</th><th class="n">in</th><th class="n">out</th><th class="n">dropped</th><th></th></tr>',
        *rows,
        "</table>",
    ]
    body += ["<h2>Lengths</h2>", _histogram(characters, "bytes of text")]
    if tokens:
        body.append(_histogram(tokens, "tokens"))
    for step in steps:
        body += _step(step)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _step(step: StepBook) -> list[str]:
    lines = [f'<h2 id="{html.escape(step.name)}">{html.escape(step.name)}</h2>']
    if not step.reasons and not step.changed:
        return [*lines, "<p><small>nothing dropped or changed</small></p>"]
    for counts, verb in ((step.reasons, "dropped"), (step.changed, "changed")):
        for what, count in _ordered(counts):
            lines.append(f"<details><summary>{count:,} {verb}: {html.escape(what)}</summary>")
            for example in step.examples.get(what, []):
                lines.append(f"<small>{html.escape(example.id)}</small>")
                if example.after:
                    lines.append(
                        f'<pre class="before">{html.escape(example.before)}</pre>'
                        f'<pre class="after">{html.escape(example.after)}</pre>'
                    )
                else:
                    lines.append(f"<pre>{html.escape(example.before) or '<small>no text</small>'}</pre>")
            lines.append("</details>")
    return lines


def _histogram(values: Sequence[int], what: str) -> str:
    """Bars over powers of two."""
    if not values:
        return ""
    counts = np.bincount(np.maximum(np.log2(np.maximum(np.asarray(values), 1)).astype(int), 0))
    least = int(np.flatnonzero(counts)[0])
    highest, bars = int(counts.max()), []
    for i, count in enumerate(counts[least:].tolist()):
        height = 90 * count / highest
        bars.append(f'<rect x="{i * 34}" y="{100 - height:.1f}" width="30" height="{height:.1f}"><title>{count:,}</title></rect>'
                    f'<text x="{i * 34 + 15}" y="115" text-anchor="middle">{_power(least + i)}</text>')  # fmt: skip
    width = 34 * len(counts[least:])
    picture = f'<svg viewBox="0 0 {width} 122" style="max-width:{width}px">{"".join(bars)}</svg>'
    return f"{picture}<p><small>documents by {what}; a bar reaches from the number below it to twice as many</small></p>"


def _power(i: int) -> str:
    return f"{2**i}" if i < 10 else f"{2 ** (i - 10)}k" if i < 20 else f"{2 ** (i - 20)}M"
