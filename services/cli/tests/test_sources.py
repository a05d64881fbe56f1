"""Where the artifacts service sees a folder or a file that a command names."""

from pathlib import Path

from kernelm_cli.home import UpFile, write_up
from kernelm_cli.sources import visible


def test_a_model_is_where_containers_see_it(tmp_path: Path) -> None:
    """Of a home that an engine runs, a folder is copied below scratch/, and a file is alone in a folder there."""
    write_up(tmp_path, UpFile(0, 0.0, "tls://nats:4222", "", "", 0.0))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.gguf").write_bytes(b"GGUF")
    (model / "notes.txt").touch()
    for path, names in ((model, ["model.gguf", "notes.txt"]), (model / "model.gguf", ["model.gguf"])):
        with visible(path, tmp_path) as folder:
            assert folder.is_relative_to(tmp_path / "scratch")
            assert sorted(file.name for file in folder.iterdir()) == names
            assert (folder / "model.gguf").read_bytes() == b"GGUF"
        assert not list((tmp_path / "scratch").iterdir())
