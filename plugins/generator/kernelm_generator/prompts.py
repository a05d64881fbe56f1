"""A request becomes tokens and the way to choose more of them; what has no meaning or can't be had is refused here."""

from typing import Any

import jinja2

from kernelm_contracts.admission import require_meaning
from kernelm_contracts.server import GenerateRequest
from kernelm_generator.engine import Asked
from kernelm_generator.memory import Plan
from kernelm_generator.model import Model
from kernelm_generator.sampling import Sampling
from kernelm_sdk.errors import ClientFault

NOT_HERE = ("schema", "tools", "tool_choice", "adapter")


def check(request: GenerateRequest, plan: Plan) -> None:
    """ClientFault "unsupported_parameter" or "invalid" that names the field."""
    given = [name for name in NOT_HERE if getattr(request, name)]
    given += [name for message in request.messages for name in ("tool_calls", "tool_call_id") if getattr(message, name)]
    if given:
        raise ClientFault("unsupported_parameter", f"`{given[0]}` is given, which this server does not have",
                          "leave it out, or deploy the model with a plugin that has it")  # fmt: skip
    require_meaning(request, plan.max_tokens)


def read(request: GenerateRequest, model: Model, plan: Plan, owner: str) -> Asked:
    """Tokenize a request that was checked; ClientFault "too_large" if prompt and answer don't fit into the context."""
    letters = sum(len(message.content) for message in request.messages) + len(request.prompt)
    if letters > plan.context * model.longest:
        raise _too_large(f"at least {letters // model.longest}", model, plan)
    if request.messages:
        prompt = model.tokens.encode(_chat(request, model.tokenizer), add_special_tokens=False).ids
    else:
        prompt = model.tokens.encode(request.prompt).ids
    room = plan.max_tokens if model.encodes and len(prompt) <= plan.context else plan.context - len(prompt)
    if not prompt:
        raise ClientFault("invalid", "the prompt has no tokens", "send some text")
    if room < max(request.max_tokens, 1):
        raise _too_large(str(len(prompt)), model, plan, request.max_tokens)
    sampling = Sampling(request.temperature, request.top_p, request.top_k, request.presence_penalty, request.frequency_penalty,
                        request.seed)  # fmt: skip
    return Asked(prompt, request.max_tokens or min(plan.max_tokens, room), sampling, request.stop, owner)


def _too_large(tokens: str, model: Model, plan: Plan, wanted: int = 0) -> ClientFault:
    if model.encodes:  # the answer has room of its own
        return ClientFault("too_large", f"the text has {tokens} tokens, and the encoder reads {plan.context}",
                           "send less, or deploy the model with a larger `context`")  # fmt: skip
    return ClientFault("too_large", f"the prompt has {tokens} tokens, {wanted or 'some'} more are asked for, and the context has "
                       f"{plan.context}", "send less, or ask for less")  # fmt: skip


def _chat(request: GenerateRequest, tokenizer: Any) -> str:
    """The chat as the model's own template writes it, which transformers runs in Jinja's sandbox."""
    if not tokenizer.chat_template:
        raise ClientFault("unsupported_parameter", "`messages` is given, and the model has no chat template", "send `prompt`")
    turns = [{"role": message.role, "content": message.content} for message in request.messages]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise ClientFault("invalid", f"the model's chat template refuses `messages`: {error}", "see its model card") from None
    return text
