"""`python -m kernelm_node`: the node service."""

from kernelm_node.service import NodeService
from kernelm_sdk.runner import run_service

if __name__ == "__main__":
    run_service("node", ("node/1",), NodeService)
