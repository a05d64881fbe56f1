"""What the generator is asked: an instruction, the passages with their numbers, the question."""

from collections.abc import Sequence

from kernelm_contracts.retriever import Source
from kernelm_contracts.server import GenerateRequest, Message
from kernelm_retriever.settings import Settings


def ask(question: str, sources: Sequence[Source], settings: Settings, max_tokens: int) -> GenerateRequest:
    """For the likeliest answer: the same question has the same. All is one turn, since many templates know no system's."""
    passages = "\n\n".join(f"[{number}] {source.title}\n{source.passage}" for number, source in enumerate(sources, 1))
    text = f"{settings.instruction}\n\n{passages}\n\nQuestion: {question.strip()}"
    limit = max_tokens or settings.max_tokens
    if settings.chat:
        return GenerateRequest(messages=(Message("user", text),), max_tokens=limit, temperature=0.0)
    # a model that only goes on with a text would go on with a question of its own
    return GenerateRequest(prompt=f"{text}\nAnswer:", max_tokens=limit, temperature=0.0, stop=("\nQuestion:", "\n\n"))
