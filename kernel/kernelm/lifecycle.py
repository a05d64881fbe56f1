"""The states of an instance, as ONE table. `python -m kernelm.lifecycle` prints it as a Mermaid diagram."""

from kernelm_sdk import transitions

# (state, what happens) -> next state. What is not in the table can't happen: `step` raises and changes nothing.
TRANSITIONS: dict[tuple[str, str], str] = {
    ("", "start"): "starting",          # the node was asked to start it; its join token is issued
    ("", "hello"): "joined",            # a service, or an instance that somebody else started with a token
    ("starting", "hello"): "joined",    # enrolled, contracts agreed on
    ("joined", "hello"): "joined",      # said twice, since the first answer was lost
    ("joined", "ready"): "ready",       # loaded and subscribed: calls may be routed to it
    ("ready", "ready"): "ready",        # said twice, or with other models than before
    ("ready", "hello"): "joined",       # the same service under the same name after a restart
    ("ready", "drain"): "draining",     # unsubscribed, still answering what it has
    ("exited", "hello"): "joined",      # a service is back under its own name
    ("lost", "hello"): "joined",
    ("starting", "exit"): "exited",
    ("joined", "exit"): "exited",
    ("ready", "exit"): "exited",
    ("draining", "exit"): "exited",
    ("lost", "exit"): "exited",
    ("joined", "silence"): "lost",      # its lease ran out: dead, frozen, or cut off. It does not come back as it was:
    ("ready", "silence"): "lost",       # its key is revoked, so that a thawed one is shut out
    ("draining", "silence"): "lost",
    ("starting", "silence"): "lost",    # it never said hello
}  # fmt: skip
LIVE = frozenset({"starting", "joined", "ready", "draining"})


def step(state: str, happening: str) -> str:
    """The next state; ClientFault "illegal_transition" where the table has none."""
    return transitions.step(TRANSITIONS, state, happening, f"an instance that is {state or 'unknown'!r}")


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    return transitions.diagram(TRANSITIONS)


if __name__ == "__main__":
    print(diagram())
