"""The gateway keeps to its own OpenAPI document: schemathesis makes requests from it, good and bad, and checks the answers."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from kernelm_gateway.service import GatewayService, bind
from kernelm_gateway.settings import GatewaySettings

pytestmark = pytest.mark.slow
load_all_checks()
CHECKED = [CHECKS.get_one(name) for name in ("not_a_server_error", "status_code_conformance", "content_type_conformance",
                                             "response_schema_conformance", "unsupported_method")]  # fmt: skip
EVENTS = "/v1/events"  # goes on for ever
KEY = {"Authorization": "Bearer km_k1_s3cret_with-all_sorts-of-signs"}


@pytest.fixture(scope="module")
def url(make_bus: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway on a bus in memory, in a thread of its own."""
    home: Path = tmp_path_factory.mktemp("openapi")
    listening, stopping, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    service = GatewayService(make_bus(), home, GatewaySettings(http_port=0, grpc_port=0), bind("127.0.0.1", 0, "X"))

    async def live() -> None:
        await service.on_start()
        listening.set()
        await stopping.wait()
        await service.on_stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    assert listening.wait(20)
    yield service.announcement.http
    loop.call_soon_threadsafe(stopping.set)
    thread.join(20)


def test_what_the_document_says(url: str) -> None:
    document = schemathesis.openapi.from_dict(httpx.get(f"{url}/docs/openapi.json").json())
    for found in document.exclude(path=EVENTS).get_all_operations():
        keeps_to_it(url, found.ok(), GenerationMode.POSITIVE)
        with contextlib.suppress(Unsatisfiable):  # what takes nothing can't be asked wrongly
            keeps_to_it(url, found.ok(), GenerationMode.NEGATIVE)


def keeps_to_it(url: str, operation: Any, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        response = case.call(base_url=url, headers=KEY)
        if response.status_code not in (501, 503, 504):  # which a server behind may well say
            case.validate_response(response, checks=CHECKED)

    check()
