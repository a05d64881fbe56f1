"""The gateway: HTTP and gRPC in, bus out. Started as `python -m kernelm_gateway`."""
