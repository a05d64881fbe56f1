"""What the nodes think of a plugin that is about to be loaded: shown, and decided early. The node enforces it, at each start."""

from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import AllowUnsigned, ArtifactName, Empty, Kernel, Node, SystemState, TrustVerdict

JUDGE_S = 60.0
OLDER = ("unsupported_method", "no_responders")  # a node of the release before this one has no policy


async def verdicts(bus: Bus, digest: str, allow: bool, why: str) -> dict[str, TrustVerdict]:
    """The verdict of each node that is ready on the plugin in an artifact; with `allow`, after it was allowed to those that refused
    it. ClientFault "untrusted" with the reason if one refuses it still: nothing was started then."""
    state: SystemState = await bus.call(Kernel.state, Empty())
    found = {}
    for name in sorted(i.id for i in state.instances if "node/1" in i.contracts and i.state == "ready"):
        try:
            verdict: TrustVerdict = await bus.call(Node.trust, ArtifactName(digest), instance=name, timeout_s=JUDGE_S)
            if allow and not verdict.allowed:
                verdict = await bus.call(Node.allow_unsigned, AllowUnsigned(digest, why), instance=name, timeout_s=JUDGE_S)
        except Fault as fault:
            if fault.code in OLDER:
                continue
            raise
        if not verdict.allowed:
            raise ClientFault("untrusted", f"{name}: {verdict.reason}", verdict.remedy)
        found[name] = verdict
    return found


def summary(found: dict[str, TrustVerdict]) -> str:
    """One line for people: nodes usually agree."""
    reasons = dict.fromkeys(v.reason for v in found.values())
    return "; ".join(reasons) or "no node was asked"
