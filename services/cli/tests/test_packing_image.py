"""`kernelm plugin pack --image` on a real Docker engine: the image has what the plugin requires, and its id is signed with it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException

from kernelm.testing.parts import absent
from kernelm_cli import staging
from kernelm_cli.app import execute
from kernelm_sdk.plugin import MANIFEST, read_manifest
from kernelm_trust.keys import generate
from kernelm_trust.policy import Policy

IMAGES = Path(__file__).parents[3] / "deploy" / "images" / "docker.sh"
FILES = {
    MANIFEST: 'name = "greet"\nversion = "1"\nsummary = ""\ncontracts = ["greet/1"]\nentry = "greet:Greet"\n'
              'runtimes = ["container"]\n',
    "greet.py": "import idna\n",
    "pyproject.toml": '[project]\nname = "greet"\nversion = "1"\ndependencies = ["idna>=3"]\n',
}


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    """An engine that answers. Without one: skipped, or with KERNELM_REQUIRE_ALL=1 failed."""
    try:
        engine = docker.from_env(timeout=60)
        engine.ping()
    except DockerException as error:
        absent(f"no Docker engine ({error}): {IMAGES.name} engine starts one")
    yield engine
    engine.close()


@pytest.mark.slow
def test_the_image_holds_the_requirements_and_is_signed(engine: docker.DockerClient, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    built = subprocess.run([IMAGES, "runner"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    base, folder, key = built.stdout.strip(), tmp_path / "greet", tmp_path / "key"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    generate(key)
    arguments = ["--key", str(key), "--image", "--base", base, "--output", str(tmp_path / "dist")]
    code = execute(["plugin", "pack", str(folder), *arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    line = next(line for line in said.out.splitlines() if line.startswith("image"))
    id = line.split()[1].rstrip(",")
    try:
        ran = engine.containers.run(id, ["-c", "import idna, kernelm_sdk; print('there')"], entrypoint="python", remove=True,
                                    network_mode="none")  # fmt: skip
        assert ran.decode().strip() == "there"
        assert (tmp_path / "dist" / "greet-1.image.tar").stat().st_size > 1_000_000
        for name in ("given", "tree"):
            (tmp_path / name).mkdir()
        staging.stage(staging.find(staging.unpack(tmp_path / "dist" / "greet-1.zip", tmp_path / "given")), tmp_path / "tree")
        manifest, policy = read_manifest(tmp_path / "tree" / MANIFEST), Policy(tmp_path / "key.pub")
        assert policy.judge(tmp_path / "tree", manifest, image=id).allowed
        assert not policy.judge(tmp_path / "tree", manifest, image=base).allowed, "another image than the one that was signed"
    finally:
        engine.images.remove(id, force=True)
