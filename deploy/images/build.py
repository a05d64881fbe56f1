"""`make images`: builds the image of every member, by images.toml and member.Dockerfile, and writes a bill of materials of each.

    python deploy/images/build.py [NAME...]     these, with what they lie on; all by default

The wheels are got by this Python's pip, outside, as docker.sh does it, into build/images/wheels; builds have no network. An image
whose inputs have not changed is not built again. Written: build/images/NAME.cdx.json.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import docker
import msgspec
from bill import Piece, bill_of_materials
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "images"
WHEELS = BUILD / "wheels"
PREFIX = "kernelm-"
INPUTS = "kernelm.inputs"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
CONSTRAINTS = ["--constraint", str(ROOT / "deploy" / "constraints.txt")]
OURS = ("kernel/sdk[tracing]", "plugins/contracts")  # of every image; `python`, on which all lie, has what these require
OWN = "kernelm"  # so begin our wheels, which change often: they come last
console = Console(stderr=True)


class Image(msgspec.Struct, forbid_unknown_fields=True):
    """One table of images.toml."""

    requires: list[str]
    parent: str = "python"
    layer: str = "member"
    without: list[str] = []
    bare: list[str] = []


def read() -> dict[str, Image]:
    return msgspec.convert(tomllib.loads((HERE / "images.toml").read_text()), dict[str, Image])


def run(*command: str) -> str:
    """What a command prints; its own words and the end of everything if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        console.print(f"{' '.join(command[:6])} ...\n{(done.stderr or done.stdout)[-4000:]}", markup=False)
        raise SystemExit(1)
    return done.stdout


def gather(images: dict[str, Image]) -> None:
    """All wheels: ours are made anew, those of others are kept as long as nobody asks for others."""
    projects = [*sorted(ROOT.glob("*/*/pyproject.toml")), ROOT / "pyproject.toml"]
    changed = [p.parent for p in projects if not _stamp(p.parent).exists()]
    with console.status(f"making {len(changed)} wheels of ours"):
        for folder in changed:
            for old in WHEELS.glob(f"{_by_name(str(folder)).replace('-', '_')}-*"):
                old.unlink()
        if changed:
            run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(WHEELS), *map(str, changed))
        for folder in changed:
            _stamp(folder).touch()
    asked = sorted({_by_name(r) for image in images.values() for r in (*image.requires, *image.bare)} | {_by_name(r) for r in OURS})
    told = [*(p.read_bytes() for p in projects), (ROOT / "deploy" / "constraints.txt").read_bytes(), *(r.encode() for r in asked)]
    stamp = WHEELS / hashlib.sha256(b"".join(told)).hexdigest()
    if not stamp.exists():
        with console.status("getting the wheels of others (minutes, once)"):
            run(*PIP, "wheel", "--wheel-dir", str(WHEELS), "--find-links", str(WHEELS), *CONSTRAINTS, *asked)
        stamp.touch()


def _stamp(folder: Path) -> Path:
    """A file that is there when the wheel of a distribution was made of what its folder holds now."""
    name = _by_name(str(folder)).replace("-", "_")
    code = folder / "kernel" if folder == ROOT else folder  # the root's distribution is the kernel
    files = sorted(p for p in code.rglob("*") if p.is_file() and "__pycache__" not in p.parts and "tests" not in p.parts)
    told = hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in [folder / "pyproject.toml", *files]))
    return WHEELS / f"{name}-{told.hexdigest()[:16]}.made"


def closure(image: Image) -> set[Path]:
    """The wheels that an image needs, all told, by what each says that it requires."""
    index = {canonicalize_name(w.name.partition("-")[0]): w for w in WHEELS.glob("*.whl")}
    waiting = [Requirement(_by_name(r)) for r in image.requires]
    seen: set[tuple[str, str]] = set()
    found = {index[canonicalize_name(name)] for name in image.bare}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} if name not in image.without else ():
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found.add(index[name])
            below = [Requirement(line) for line in Piece.of(index[name]).requires]
            waiting += [r for r in below if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def _by_name(requirement: str) -> str:
    """A distribution of this tree by its name and extras, so that its wheel is taken."""
    path, bracket, extras = requirement.partition("[")
    file = ROOT / path / "pyproject.toml"
    return tomllib.loads(file.read_text())["project"]["name"] + bracket + extras if file.exists() else requirement


class Builder:
    """Builds images in the order in which they lie upon each other."""

    def __init__(self, images: dict[str, Image], base: str) -> None:
        self.base = base
        self.images, self.engine = images, docker.from_env(timeout=600)
        self.ids: dict[str, str] = {}
        self.wheels: dict[str, set[Path]] = {}

    def build(self, name: str) -> str:
        """The id of the image `name`, which is built if it is not there as it should be."""
        if name in self.ids:
            return self.ids[name]
        if name == "python":
            self.wheels[name] = {w for w in closure(Image(list(OURS))) if not w.name.startswith(OWN)}
            self.ids[name] = self._made(name, "runner.Dockerfile", sorted(self.wheels[name]), BASE=self.base)
            return self.ids[name]
        image, parent = self.images[name], self.build(self.images[name].parent)
        self.wheels[name] = closure(image) | self.wheels[image.parent]
        added = sorted(self.wheels[name] - self.wheels[image.parent])
        self.ids[name] = self._made(name, "member.Dockerfile", added, PARENT=parent, LAYER=image.layer)
        return self.ids[name]

    def _made(self, name: str, dockerfile: str, wheels: list[Path], **arguments: str) -> str:
        """The id of an image, which is built unless there is one of the same inputs. Wheels count by their files' content: ours
        differ in nothing but times when nothing was changed."""
        parts = [repr(arguments), (HERE / dockerfile).read_text(), *(Piece.of(w).content for w in wheels)]
        inputs, tag = hashlib.sha256("\n".join(parts).encode()).hexdigest(), f"{PREFIX}{name}:latest"
        try:
            found = self.engine.images.get(tag)
        except docker.errors.ImageNotFound:
            found = None
        if found is None or found.labels.get(INPUTS) != inputs:
            with console.status(f"building {tag}"), tempfile.TemporaryDirectory(dir=BUILD) as context:
                shutil.copy(HERE / dockerfile, Path(context) / "Dockerfile")
                (Path(context) / "wheels").mkdir()
                for wheel in wheels:
                    (Path(context) / "wheels" / wheel.name).hardlink_to(wheel)
                given = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
                told = ("--label", f"{INPUTS}={inputs}", "--tag", tag)
                run("docker", "build", "--quiet", "--network", "none", *given, *told, context)
            found = self.engine.images.get(tag)
        return str(found.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = read()
    parser.add_argument("names", nargs="*", choices=[*images, []], metavar="NAME")
    names = parser.parse_args().names or list(images)
    BUILD.mkdir(parents=True, exist_ok=True)
    gather(images)
    base = run(str(HERE / "docker.sh"), "base").split()[-1]
    builder = Builder(images, base)
    packages = run("docker", "run", "--rm", "--network", "none", base, "dpkg-query", "-W", "-f", "${Package} ${Version}\n")
    table = Table("image", "id", "size MB", "of its own MB", "packages")
    for name in ["python", *names]:
        identifier = builder.build(name)
        size, parent = (builder.engine.images.get(i).attrs["Size"] for i in
                        (identifier, base if name == "python" else builder.ids[images[name].parent]))  # fmt: skip
        pieces = [Piece.of(wheel) for wheel in sorted(builder.wheels[name])]
        (BUILD / f"{name}.cdx.json").write_bytes(bill_of_materials(PREFIX + name, identifier, pieces, packages))
        table.add_row(PREFIX + name, identifier[7:19], f"{size / 1e6:.0f}", f"{(size - parent) / 1e6:.0f}", str(len(pieces)))
    Console().print(table)


if __name__ == "__main__":
    main()
