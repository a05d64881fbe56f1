"""The rules that every good plugin of its contract keeps."""

from pathlib import Path

from kernelm.testing.conformance.suite import ConformanceSuite


class TestConformance(ConformanceSuite):
    PATH = Path(__file__).parents[1]
