"""A plugin's folder or wheel as it is stored: what goes in, what stays out, what is refused by name."""

import zipfile
from pathlib import Path

import pytest

from kernelm_cli import amounts, staging
from kernelm_sdk.errors import ClientFault

MANIFEST = 'name = "echo"\nversion = "1"\nsummary = "s"\ncontracts = ["data/1"]\nentry = "echo_plugin:Echo"\n'


def write(folder: Path, *names: str, **texts: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(MANIFEST if name.endswith("kernelm-plugin.toml") else texts.get(name, name))
    return folder


def staged(path: Path, into: Path) -> list[str]:
    into.mkdir()
    count = staging.stage(staging.find(path), into)
    found = sorted(str(p.relative_to(into)) for p in into.rglob("*") if p.is_file())
    assert count == len(found)
    return found


FLAT = ["kernelm-plugin.toml", "pyproject.toml", "echo_plugin.py", "labels.txt", "inner/data.json"]
PROJECT = ["pyproject.toml", "README.md", "tests/test_it.py"]
PACKAGE = ["echo_plugin/__init__.py", "echo_plugin/kernelm-plugin.toml", "helper.py"]


def test_a_folder_with_the_manifest_at_its_root_goes_in_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "p", *FLAT)
    assert staged(tmp_path / "p", tmp_path / "out") == sorted(FLAT)


@pytest.mark.parametrize("source", ["", "src/"])
def test_of_a_project_go_in_manifest_pyproject_and_what_is_imported(source: str, tmp_path: Path) -> None:
    write(tmp_path / "p", *PROJECT, *(source + name for name in PACKAGE))
    assert staged(tmp_path / "p", tmp_path / "out") == [*PACKAGE, "kernelm-plugin.toml", "pyproject.toml"]


def test_the_package_itself_may_be_named(tmp_path: Path) -> None:
    write(tmp_path / "p", *PROJECT, *PACKAGE)
    assert staged(tmp_path / "p" / "echo_plugin", tmp_path / "out") == [
        "echo_plugin/__init__.py", "echo_plugin/kernelm-plugin.toml", "kernelm-plugin.toml"]  # fmt: skip


def test_what_tools_leave_behind_and_what_git_ignores_stays_out(tmp_path: Path) -> None:
    write(tmp_path / "p", *FLAT, ".git/config", "__pycache__/a.pyc", "inner/__pycache__/a.pyc", ".venv/x", "build/x", "dist/x.whl",
          "echo.egg-info/PKG-INFO", "big.data", "secret/key")  # fmt: skip
    (tmp_path / "p" / ".gitignore").write_text("*.data\n/secret/\nkernelm-plugin.toml\n")
    assert staged(tmp_path / "p", tmp_path / "out") == sorted([*FLAT, ".gitignore"])


def test_the_same_files_at_another_place_are_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, *FLAT)
    assert staged(tmp_path / "a", tmp_path / "out-a") == staged(tmp_path / "b", tmp_path / "out-b")


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "p", *FLAT)
    (tmp_path / "p" / "other.txt").symlink_to("labels.txt")
    assert "other.txt" in staged(tmp_path / "p", tmp_path / "out")
    assert (tmp_path / "out" / "other.txt").read_text() == "labels.txt"
    assert not (tmp_path / "out" / "other.txt").is_symlink()


@pytest.mark.parametrize(("target", "says"), [
    ("../../outside", "leaves the folder"), ("/etc/passwd", "leaves the folder"), ("nowhere", "a symbolic link to nothing"),
    (".", "lies in")])  # fmt: skip
def test_links_that_lead_elsewhere_are_refused_by_name(target: str, says: str, tmp_path: Path) -> None:
    write(tmp_path / "p", *FLAT)
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "p" / "inner" / "link").symlink_to(target)
    with pytest.raises(ClientFault, match=says) as caught:
        staged(tmp_path / "p", tmp_path / "out")
    assert "inner/link" in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(("names", "says"), [
    ([], "does not exist"), (["a.txt"], "holds no kernelm-plugin.toml"),
    (["a/kernelm-plugin.toml", "b/kernelm-plugin.toml"], "2 manifests: a/kernelm-plugin.toml, b/kernelm-plugin.toml"),
    (["kernelm-plugin.toml"], "neither echo_plugin/ nor echo_plugin.py")])  # fmt: skip
def test_what_is_no_plugin_is_told(names: list[str], says: str, tmp_path: Path) -> None:
    write(tmp_path / "p", *names)
    with pytest.raises(ClientFault) as caught:
        staging.find(tmp_path / "p")
    assert says in caught.value.message
    assert caught.value.remedy


def test_a_bad_manifest_is_told_with_file_and_field(tmp_path: Path) -> None:
    write(tmp_path / "p", *FLAT)
    (tmp_path / "p" / "kernelm-plugin.toml").write_text(MANIFEST + "max_jobs = 'two'\n")
    with pytest.raises(ClientFault) as caught:
        staging.find(tmp_path / "p")
    assert "p/kernelm-plugin.toml" in caught.value.message
    assert "max_jobs" in caught.value.message


def test_of_a_plugin_with_a_command_goes_in_what_was_built_and_installed(tmp_path: Path) -> None:
    files = ["kernelm-plugin.toml", "main.js", "build/tool", "dist/a.js", "node_modules/nats/index.js"]
    write(tmp_path / "p", *files, ".git/config", "secret.key")
    manifest = tmp_path / "p" / "kernelm-plugin.toml"
    manifest.write_text(MANIFEST.replace('entry = "echo_plugin:Echo"', 'command = ["node", "main.js"]'))
    (tmp_path / "p" / ".gitignore").write_text("*.key\n/dist/\n")
    assert staged(tmp_path / "p", tmp_path / "out") == sorted([".gitignore", *(f for f in files if f != "dist/a.js")])
    (tmp_path / "q").mkdir()
    (tmp_path / "p").rename(tmp_path / "q" / "p")
    with pytest.raises(ClientFault, match="root of its folder") as caught:
        staging.find(tmp_path / "q")
    assert str(tmp_path / "q" / "p") in caught.value.remedy


def test_no_code_is_run(tmp_path: Path) -> None:
    write(tmp_path / "p", *FLAT)
    (tmp_path / "p" / "echo_plugin.py").write_text("raise SystemExit('it ran')")
    staged(tmp_path / "p", tmp_path / "out")


def make_wheel(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("echo_plugin/__init__.py", "x")
        archive.writestr("echo_plugin/kernelm-plugin.toml", MANIFEST)
        archive.writestr("echo-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: echo\nVersion: 1\nRequires-Dist: tinydb>=4\n"
                         "Requires-Dist: pytest; extra == 'test'\n\nA text.\n")  # fmt: skip
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_wheel_is_unpacked_with_its_requirements(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    folder = staging.unpack(make_wheel(tmp_path / "echo-1-py3-none-any.whl"), tmp_path / "w")
    assert staged(folder, tmp_path / "out") == [
        "echo-1.dist-info/METADATA", "echo_plugin/__init__.py", "echo_plugin/kernelm-plugin.toml", "kernelm-plugin.toml",
        "pyproject.toml"]  # fmt: skip
    assert 'dependencies = ["tinydb>=4"]' in (tmp_path / "out" / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "a/../../evil.py", "a\\..\\evil.py"])
def test_a_wheel_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    with pytest.raises(ClientFault, match="leads out"):
        staging.unpack(make_wheel(tmp_path / "e.whl", **{name: "x"}), tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    wheel = make_wheel(tmp_path / "e.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("echo_plugin/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ClientFault, match="echo_plugin/link"):
        staging.unpack(wheel, tmp_path / "w")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all"])
def test_a_damaged_wheel_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.whl").write_bytes(content)
    with pytest.raises(ClientFault, match="no intact wheel"):
        staging.unpack(tmp_path / "e.whl", tmp_path / "w")


def test_a_name_is_no_path_and_a_path_is_no_name() -> None:
    assert [p for p in ("scheduler", "./scheduler", "a/b", "..", "~/p", "p.whl", "my-plugin") if staging.is_path(p)] == [
        "./scheduler", "a/b", "..", "~/p", "p.whl"]  # fmt: skip


# ---- amounts ----


def test_amounts() -> None:
    assert amounts.percent("--canary", "5%") == 5
    assert amounts.percent("--canary", "") == 0
    assert amounts.share("--max-errors", "0.5%") == 0.005
    assert amounts.ratio("--max-latency", "1.5x") == 1.5
    assert [amounts.seconds("--watch", t) for t in ("30s", "500ms", "2m", "0")] == [30.0, 0.5, 120.0, 0.0]


@pytest.mark.parametrize(("kind", "text"), [
    ("percent", "150%"), ("percent", "100%"), ("percent", "0%"), ("percent", "5"), ("percent", "2.5%"), ("percent", "-5%"),
    ("share", "101%"), ("share", "0.01"), ("ratio", "2"), ("ratio", "0.5x"), ("ratio", "fast"), ("seconds", "30"),
    ("seconds", "-1s"), ("seconds", "soon")])  # fmt: skip
def test_bad_amounts_name_option_and_remedy(kind: str, text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        getattr(amounts, kind)("--option", text)
    assert f"--option {text!r}" in caught.value.message
    assert "e.g." in caught.value.remedy or "%" in caught.value.remedy or "x" in caught.value.remedy


def test_settings_from_pairs_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('threads = 1\nname = "a"\n')
    (tmp_path / "b.json").write_text('{"threads": 2}')
    given = (str(tmp_path / "a.toml"), str(tmp_path / "b.json"), "threads=4", "text=plain words", "deep.er=true", 'list=[1, 2]')
    assert amounts.settings(given) == {"threads": 4, "name": "a", "text": "plain words", "deep": {"er": True}, "list": [1, 2]}
    assert amounts.settings(()) is None


@pytest.mark.parametrize("text", ["absent.toml", "=4", "a b=4", "a..b=1"])
def test_bad_settings_are_named(text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        amounts.settings((text,))
    assert text in caught.value.message


def test_a_bad_settings_file_is_named(tmp_path: Path) -> None:
    for name, text in (("a.toml", "x ="), ("b.json", "[1]"), ("c.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ClientFault, match=name):
            amounts.settings((str(tmp_path / name),))
