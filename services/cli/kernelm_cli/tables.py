"""Tables for people, all of one look."""

from collections.abc import Collection

from rich.table import Table


def columns(*names: str, right: Collection[str] = (), title: str = "") -> Table:
    """A table with these columns, those in `right` with their values at the right. What is too wide is folded, not cut."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def pairs() -> Table:
    """What is known of one thing, a name and its value a row."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    return rows
