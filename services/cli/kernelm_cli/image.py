"""A container image with what a plugin requires, upon the runner image: its files come from the artifact, as in every runtime.

The packages are got outside, in the versions of the bill of materials, by the pip that this machine has set up; the build has no
network, so nothing of a machine's settings is in a layer (deploy/images).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kernelm_cli.sbom import Part, names_of
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Manifest

BASE, RUNNER = "KERNELM_NODE_IMAGE", "kernelm-runner:latest"
IN_BASE = frozenset({"kernelm-sdk", "kernelm-contracts"})
DOCKERFILE = """FROM {base}
USER 0
COPY wheels /wheels
RUN python -m pip install --quiet --no-index --no-cache-dir --find-links /wheels {names} && rm -r /wheels
USER 64321:64321
"""
PIP_S, ENGINE_S = 1800, 600.0


class Made(NamedTuple):
    id: str  # "sha256:..."
    file: Path  # `docker load --input` brings it to another machine


def make(manifest: Manifest, requirements: list[str], parts: dict[str, Part], base: str, output: Path) -> Made:
    """Build and save it. ClientFault "unsupported_runtime" for a plugin that can't run in a container, KernelFault where there is
    no engine, no base, or a package can't be had."""
    if "container" not in manifest.runtimes:
        raise ClientFault("unsupported_runtime", f"{manifest.name} does not run as 'container'",
                          f"its manifest says runtimes = {', '.join(manifest.runtimes)}")  # fmt: skip
    import docker
    from docker.errors import APIError, BuildError, DockerException, ImageNotFound

    wanted = [line for name, line in _pinned(requirements, parts).items() if name not in IN_BASE]
    base = base or os.environ.get(BASE, RUNNER)
    label = f"kernelm-plugin/{manifest.name}:{manifest.version}"
    with tempfile.TemporaryDirectory(prefix="kernelm-image-") as context:
        folder = Path(context)
        (folder / "wheels").mkdir()
        if wanted:
            _download(wanted, folder / "wheels")
        text = DOCKERFILE.format(base=base, names=" ".join(f"'{line}'" for line in wanted)) if wanted else f"FROM {base}\n"
        (folder / "Dockerfile").write_text(text)
        try:
            engine = docker.from_env(timeout=int(ENGINE_S))
            engine.images.get(base)
            labels = {"kernelm.plugin": manifest.name, "kernelm.version": manifest.version}
            built, _ = engine.images.build(path=context, tag=label, network_mode="none", rm=True, forcerm=True, labels=labels)
            file = output / f"{manifest.name}-{manifest.version}.image.tar"
            return Made(str(built.id), _save(engine, str(built.id), file))
        except ImageNotFound:
            remedy = "deploy/images/docker.sh makes the runner image; --base names another"
            raise ClientFault("not_found", f"there is no image {base}", remedy) from None
        except BuildError as error:
            log = "".join(str(line.get("stream", "")) for line in error.build_log)
            raise KernelFault("image_failed", f"the image can't be built: {error}", "see the log", log=log) from error
        except (APIError, DockerException) as error:
            raise KernelFault("image_failed", f"the Docker engine: {error}", "deploy/images/docker.sh engine starts one") from error


def _pinned(requirements: list[str], parts: dict[str, Part]) -> dict[str, str]:
    """The plugin's own requirements by name, in the versions of the bill of materials."""
    own = {name: parts[name] for name in names_of(requirements) if name in parts}
    return {name: f"{name}=={part.version}" if part.version else part.asked for name, part in own.items()}


def _download(wanted: list[str], into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", str(into), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_S)
    if done.returncode:
        raise KernelFault("image_failed", f"pip can't get {', '.join(wanted)}", "the log is pip's", log=done.stderr)


def _save(engine: Any, id: str, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as archive:
        for chunk in engine.images.get(id).save():
            archive.write(chunk)
    return file
