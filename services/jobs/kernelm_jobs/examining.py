"""What a new model knows, asked before it gets any call."""

from contextlib import aclosing

from kernelm_contracts.deployments import DeployRequest, KnownAnswer
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, GenerateRequest, Server
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, PluginFault

ANSWER_S = 60.0  # for one answer, or for its next piece
TOKENS = 64  # of an answer
SHOWN = 3  # wrong answers that the fault names


async def examine(bus: Bus, instance: str, request: DeployRequest) -> None:
    """Ask `instance` every one of `request.checks`; PluginFault "poor_quality" that shows wrong answers if too few come out
    as expected."""
    wrong = []
    for check in request.checks:
        said, right = await _answer(bus, instance, request.name, check)
        if not right:
            wrong.append(f"{check.text[:40]!r} is answered with {said!r:.60}, and {check.expect[:40]!r} was expected")
    count = len(request.checks)
    if 1 - len(wrong) / count < request.quality:
        raise PluginFault("poor_quality", f"{request.name} stays as it was: {count - len(wrong)} of {count} known answers came out "
                          f"right, and {request.quality:.0%} were wanted: {'; '.join(wrong[:SHOWN])}",
                          "deploy a better model, or ask for less `quality`")  # fmt: skip


async def _answer(bus: Bus, instance: str, model: str, check: KnownAnswer) -> tuple[str, bool]:
    """The best label, or the text of a model that generates; and whether it is right."""
    try:
        reply: ClassifyReply = await bus.call(Server.classify, ClassifyRequest((check.text,)), model=model, instance=instance,
                                              timeout_s=ANSWER_S)  # fmt: skip
        best = next((label.label for row in reply.results for label in row), "")
        return best, best == check.expect
    except ClientFault as fault:
        if fault.code != "unsupported_method":
            raise
    asked = GenerateRequest(prompt=check.text, temperature=0.0, max_tokens=TOKENS, stream=False)
    async with aclosing(bus.stream(Server.generate, asked, model=model, instance=instance, idle_s=ANSWER_S)) as frames:
        text = "".join([frame.text async for frame in frames])
    return text, check.expect in text
