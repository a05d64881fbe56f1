"""`containers.toml`: what the owner of a node decides about its containers."""

from pathlib import Path
from typing import Any

import pytest

from kernelm_node.runtimes import Runtimes
from kernelm_node.runtimes.containers import Containers, read_containers
from kernelm_node.runtimes.runtime import Launch
from kernelm_node.runtimes.template import container
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Manifest, StartInstance

ENGINE = {"MemTotal": 8 << 30, "NCPU": 4}
MANIFEST = Manifest("tidy", "1", "for tests", ("tidy/1",), "kernelm_tidy:Tidy")


def launch(home: Path, **more: Any) -> Launch:
    environment = {"KERNELM_TOKEN_FILE": str(home / "token"), "KERNELM_INSTANCE": "tidy-1", "KERNELM_CPU": "1", "SECRET": "x"}
    return Launch("tidy-1", "tidy", "tidy", environment, home / "scratch" / "tidy-1", home / "log", MANIFEST, **more)


def targets(made: dict[str, Any]) -> dict[str, bool]:
    """Where something is mounted, and whether read-only."""
    return {mount["Target"]: mount["ReadOnly"] for mount in made["mounts"]}


def test_without_the_file_nothing_changes(tmp_path: Path) -> None:
    assert read_containers(tmp_path) == Containers()
    request = StartInstance("tidy-1", "tidy", "tidy", "process", "token")
    assert Runtimes(tmp_path).ours(request) is request


def test_all_runs_in_containers_where_the_owner_says_so(tmp_path: Path) -> None:
    (tmp_path / "containers.toml").write_text("only = true\n")
    assert Runtimes(tmp_path).ours(StartInstance("tidy-1", "tidy", "tidy", "inproc", "token")).runtime == "container"


@pytest.mark.parametrize("text", ["only = 3", "imges = {}", "only ="])
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "containers.toml").write_text(text)
    with pytest.raises(ClientFault, match=r"containers\.toml") as caught:
        read_containers(tmp_path)
    assert "only, images, readable and volumes" in caught.value.remedy


def test_of_a_plugin_in_its_own_image_no_file_is_mounted(tmp_path: Path) -> None:
    made = container(launch(tmp_path), tmp_path, "sha256:1", ENGINE, own=True, readable=(str(tmp_path / "artifacts"),))
    assert targets(made) == {
        "/run/kernelm": True, "/run/secrets/kernelm-token": True, str(tmp_path / "artifacts"): True,
        str(tmp_path / "scratch" / "tidy-1"): False,
    }  # fmt: skip
    assert made["environment"]["KERNELM_CPU"] == "1"
    assert not {"KERNELM_MANIFEST", "PYTHONPATH", "SECRET"} & made["environment"].keys()
    assert made["network_mode"] == "none"


def test_what_lies_in_a_readable_folder_is_not_mounted_once_more(tmp_path: Path) -> None:
    store = tmp_path / "artifacts"
    source = store / "trees" / "ab" / "files"
    made = container(launch(tmp_path, source=source, artifacts=(store / "trees" / "cd",)), tmp_path, "sha256:1", ENGINE,
                     readable=(str(store),))  # fmt: skip
    assert [t for t in targets(made) if t.startswith(str(store))] == [str(store)]
    assert made["environment"]["PYTHONPATH"] == str(source)


def test_volumes_are_read_only_and_what_lies_in_one_is_mounted_with_it(tmp_path: Path) -> None:
    (tmp_path / "containers.toml").write_text(f'[volumes]\nplain = "{tmp_path}/plain"\n')
    volumes = read_containers(tmp_path).volumes
    opened = launch(tmp_path, artifacts=(tmp_path / "plain" / "ab" / "files", tmp_path / "store" / "cd" / "files"))
    made = container(opened, tmp_path, "sha256:1", ENGINE, own=True, volumes=volumes)
    volume = next(mount for mount in made["mounts"] if mount["Type"] == "volume")
    assert (volume["Source"], volume["Target"], volume["ReadOnly"]) == ("plain", f"{tmp_path}/plain", True)
    assert str(tmp_path / "plain" / "ab" / "files") not in targets(made)
    assert targets(made)[str(tmp_path / "store" / "cd" / "files")]
