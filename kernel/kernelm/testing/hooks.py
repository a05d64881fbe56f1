"""A distribution with a hook, made for a test: the folder it is installed in goes onto the path (`monkeypatch.syspath_prepend`)."""

from pathlib import Path


def install(folder: Path, group: str, name: str, code: str, value: str = "") -> None:
    """Install a distribution in `folder` whose entry point `name` in `group` is the module with `code`, or `value`."""
    module = f"hooked_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(f"from kernelm_sdk.hooks import hookimpl\n{code}")
    about = folder / f"{module}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value or module}\n")
