"""`python -m kernelm_artifacts`: the artifacts service."""

from kernelm_artifacts.service import ArtifactsService
from kernelm_sdk.runner import run_service

if __name__ == "__main__":
    run_service("artifacts", ("artifacts/1",), ArtifactsService)
