"""A distribution with a hook or a plugin, made for a test: the folder it is installed in goes onto the path
(`monkeypatch.syspath_prepend`, or PYTHONPATH for a process)."""

from pathlib import Path

from kernelm_sdk.plugin import GROUP, Manifest, read_manifest


def install(folder: Path, group: str, name: str, code: str, value: str = "") -> None:
    """Install a distribution in `folder` whose entry point `name` in `group` is the module with `code`, or `value`."""
    module = f"hooked_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(f"from kernelm_sdk.hooks import hookimpl\n{code}")
    about = folder / f"{module}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value or module}\n")


def install_plugin(folder: Path, name: str, manifest: str, code: str) -> Manifest:
    """A distribution `kernelm-<name>` with one plugin, as pip would lay it out in `folder`: its kernelm-plugin.toml, and `code` as
    the module kernelm_<name>.plugin."""
    package, about = folder / f"kernelm_{name}", folder / f"kernelm_{name}-0.0.1.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").touch()
    (package / "kernelm-plugin.toml").write_text(manifest)
    (package / "plugin.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernelm-{name}\nVersion: 0.0.1\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = kernelm_{name}\n")
    return read_manifest(package / "kernelm-plugin.toml")
