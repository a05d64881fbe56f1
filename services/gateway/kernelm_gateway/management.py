"""`/v1/kernel/...`: managing plugins, pools and routes over HTTP with an administrator's key. A request's body and its answer
are the structs of `kernel/1`, so there is one route for each of the gate's MANAGEABLE methods, made from its declaration."""

from typing import Any

import msgspec
from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody

from kernelm_gateway.gate import MANAGEABLE
from kernelm_sdk.contract import Method
from kernelm_sdk.system import Empty


def handlers() -> list[HTTPRouteHandler]:
    """GET where a method takes nothing, else POST."""
    return [_handler(method) for method in MANAGEABLE]


def _handler(method: Method) -> HTTPRouteHandler:
    async def ask(request: Request[Any, Any, Any]) -> Any:
        return await request.app.state.gate.call(request.state.key, method, Empty())

    async def change(request: Request[Any, Any, Any], data: Any) -> Any:
        return await request.app.state.gate.call(request.state.key, method, data)

    takes: type[msgspec.Struct] = method.request
    function: Any = ask if takes is Empty else change
    function.__name__ = function.__qualname__ = f"kernel_{method.attribute}"
    function.__doc__ = method.doc or f"`kernel/1.{method.name}`."
    function.__annotations__["return"] = method.reply
    if takes is not Empty:
        function.__annotations__["data"] = JSONBody[takes]  # type: ignore[misc, valid-type]
    path = f"/kernel/{method.name}"
    return get(path)(function) if takes is Empty else post(path, status_code=200)(function)
