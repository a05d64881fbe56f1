"""`jobs.toml`: absent, right, and wrong."""

from pathlib import Path

import pytest

from kernelm_jobs.settings import Settings, read_settings
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Resources


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "jobs.toml"
    assert read_settings(path) == Settings()
    path.write_text("watch_every_s = 0.5\n[quotas.acme]\ncpu = 1.5\nmemory_mb = 100\n")
    assert read_settings(path).quotas == {"acme": Resources(1.5, 100)}
    for bad in ("quota = 1", "[quotas.acme]\ncpus = 1", "not toml"):
        path.write_text(bad)
        with pytest.raises(ClientFault, match=r"jobs\.toml: "):
            read_settings(path)
