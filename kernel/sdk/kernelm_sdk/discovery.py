"""NATS' own service discovery, so that `nats micro ls`, `info` and `stats` list the members of a system.

Source: NATS ADR-32 (services): `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, each also with `.<name>` and `.<name>.<id>` behind.
Calls are not made by these names: those are in the endpoints' subjects.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from kernelm_sdk.contract import Method
from kernelm_sdk.serving import Served

SUBJECT = "$SRV.>"
SEMVER = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?\Z")


class Discovery:
    """Answers for one member: `name` is its plugin or service, `id` the instance."""

    def __init__(self, bus: Any, name: str, id: str, version: str, pool: str, methods: Mapping[str, Method]) -> None:
        self._bus, self._pool, self._methods = bus, pool, methods
        version = version if SEMVER.match(version) else f"{version or '0'}.0.0"  # a manifest's "1" is no SemVer
        self._about = {"name": name, "id": id, "version": version if SEMVER.match(version) else "0.0.0", "metadata": {"pool": pool}}
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")

    async def answer(self, served: Served, models: tuple[str, ...]) -> None:
        """From now on answer who asks."""

        async def on_message(msg: Any) -> None:
            verb, *of = msg.subject.split(".")[1:]
            meant = msg.reply and of == [self._about["name"], self._about["id"]][: len(of)]
            if meant and (body := self._body(verb, served, models)) is not None:
                await self._bus._client.publish(msg.reply, msgspec.json.encode(body))

        await self._bus._subscribe(SUBJECT, on_message)

    def _body(self, verb: str, served: Served, models: tuple[str, ...]) -> dict[str, Any] | None:
        if verb == "PING":
            return {**self._about, "type": "io.nats.micro.v1.ping_response"}
        endpoints = [{"name": key.replace(".", "_"), "subject": subject, "queue_group": self._pool,
                      "metadata": {"kind": method.kind}}
                     for key, method in self._methods.items() for subject in self._subjects(method, models)]  # fmt: skip
        if verb == "INFO":
            return {**self._about, "type": "io.nats.micro.v1.info_response", "description": "", "endpoints": endpoints}
        if verb == "STATS":
            busy_ns = round(served.busy_s * 1e9)
            counted = {"num_requests": served.answered, "num_errors": served.failed, "last_error": "", "processing_time": busy_ns,
                       "average_processing_time": busy_ns // max(served.answered, 1)}  # fmt: skip
            none = dict.fromkeys(counted, 0) | {"last_error": ""}  # counted for the instance as a whole: told once, with the first
            told = [{**endpoint, **(none if k else counted)} for k, endpoint in enumerate(endpoints)]
            return {**self._about, "type": "io.nats.micro.v1.stats_response", "started": self._started, "endpoints": told}
        return None

    def _subjects(self, method: Method, models: tuple[str, ...]) -> list[str]:
        """Where the method is called; the last token is the caller's name."""
        if method.scope == "model":
            return [f"model.{model}.{method.name}.*" for model in models]
        return [f"svc.{method.contract.name}.v{method.contract.major}.{method.name}.*"]
