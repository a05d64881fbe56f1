"""The hook of `data/1`: a filter of documents, as a function of an installed distribution (kernelm_sdk.hooks).

    [project.entry-points."kernelm.hooks.data"]
    no-shouting = "my_filters"

It sees a text after it was cleaned and after private data were dealt with, and runs in this plugin's process. A filter that raises
on any document is left out with all that it said of the others, so that a dataset is never filtered in part; the card names it.
"""

from kernelm_contracts.data import Step
from kernelm_data.account import Document, Dropped, Tally
from kernelm_sdk.hooks import Hooks, hookspec

GROUP = "kernelm.hooks.data"


class Filters:
    """What a distribution implements."""

    @hookspec(firstresult=True)
    def reason_against(self, text: str, label: str) -> str | None:
        """Why the document shall not be in the dataset, in a few words that name no part of it (they are counted in the card);
        "" or None to keep it. The same for the same text, whatever came before: nothing says in which order they come."""
        raise NotImplementedError


def filtered(documents: list[Document]) -> tuple[list[Document], list[Step], list[Dropped]]:
    """The documents that no filter has a reason against; a step of the account for each filter, and what they dropped."""
    hooks = Hooks(GROUP, Filters)
    against: dict[str, dict[str, str]] = {name: {} for name in hooks.names}
    for document in documents if hooks else ():
        for name, reason in hooks.call("reason_against", text=document.text, label=document.label):
            if isinstance(reason, str) and reason:
                against[name][document.id] = reason
            elif reason not in ("", None):
                hooks.quarantine(name, f"reason_against answered {reason!r}, and neither a text nor None")
    steps: list[Step] = []
    dropped: list[Dropped] = []
    for name in sorted({*hooks.names, *hooks.quarantined}):
        tally, before = Tally(f"filter {name}"), len(documents)
        if why := hooks.quarantined.get(name):
            tally.changed[f"left out: {why}"] = 0
        else:
            for document in documents:
                if reason := against[name].get(document.id):
                    tally.drop(document.id, reason)
            documents = [d for d in documents if d.id not in against[name]]
        steps.append(tally.step(before, len(documents)))
        dropped += tally.dropped
    return documents, steps, dropped
