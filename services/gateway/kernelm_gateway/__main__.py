"""`python -m kernelm_gateway`: exit code 2 if the environment or a port won't do, and what to change is on stderr."""

import functools
import os
import sys

from kernelm_gateway.service import GatewayService, bind
from kernelm_gateway.settings import from_environment
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.runner import run_service


def main() -> None:
    try:
        settings = from_environment(os.environ)
        listener = bind(settings.http_host, settings.http_port, "KERNELM_HTTP_PORT")
        if settings.grpc_port:  # gRPC binds for itself, later: find out now
            bind(settings.http_host, settings.grpc_port, "KERNELM_GRPC_PORT").close()
    except ClientFault as fault:
        print(fault, file=sys.stderr)
        sys.exit(2)
    run_service("gateway", (), functools.partial(GatewayService, settings=settings, listener=listener))


if __name__ == "__main__":
    main()
