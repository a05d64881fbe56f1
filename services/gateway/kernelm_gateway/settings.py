"""The gateway's settings: each has an environment variable `KERNELM_<NAME>`."""

from collections.abc import Mapping

import msgspec

from kernelm_sdk.errors import invalid

PREFIX = "KERNELM_"


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the gateway listens, and what it puts up with."""

    http_host: str = "127.0.0.1"  # the address that HTTP and gRPC listen on; TLS ends in front of it
    http_port: int = 8080  # 0 for a free one
    grpc_port: int = 8081  # 0 for a free one
    max_body_bytes: int = 10_000_000  # of one request, over HTTP and gRPC alike
    call_timeout_s: float = 30.0  # of a call on the bus, where the client gives no deadline of its own
    answer_s: float = 600.0  # of an answer over HTTP, from its request to its last byte; "Kernelm-Timeout" asks for another time
    start_wait_s: float = 25.0  # for a model without an instance that is being started for a call; then 503 with Retry-After
    most_calls: int = 2000  # of models over HTTP, under way at a time; one more is refused with 429
    balance: bool = True  # choose among a deployment's instances (balance.py); False: the broker's queue group alone does
    key_cache_s: float = 1.0  # how long a revoked key may still be answered; at most 1


def from_environment(environment: Mapping[str, str]) -> GatewaySettings:
    """The settings that the environment gives; ClientFault "invalid" that names the variable of a bad one."""
    given = {name: environment[PREFIX + name.upper()] for name in GatewaySettings.__struct_fields__
             if PREFIX + name.upper() in environment}  # fmt: skip
    try:
        settings = msgspec.convert(given, GatewaySettings, strict=False)
    except msgspec.ValidationError as error:
        variables = ", ".join(PREFIX + name.upper() for name in given)
        raise invalid(f"environment ({variables})", error, "correct the variable or unset it") from None
    for name, low, high in (("http_port", 0, 65535), ("grpc_port", 0, 65535), ("max_body_bytes", 1, 1 << 30),
                            ("most_calls", 1, 1_000_000), ("call_timeout_s", 0.001, 3600), ("answer_s", 1, 86400),
                            ("start_wait_s", 0, 3600),
                            ("key_cache_s", 0, 1)):  # fmt: skip
        if not low <= getattr(settings, name) <= high:
            outside = ValueError(f"{getattr(settings, name)!r} is not between {low} and {high}")
            raise invalid(f"environment variable {PREFIX}{name.upper()}", outside, "correct the variable or unset it")
    return settings
