"""What is compared before a checkpoint is read."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kernelm.testing.shapes import shape
from kernelm_sdk import checkpoints
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import Manifest

MINE = Manifest("mine", "2.1.0", "", ("trainer/1",), "mine:Mine")


class Shelf(SimpleNamespace):
    """The part of a context that keeps one checkpoint."""

    log = logging.getLogger("test")

    async def artifact(self, digest: str) -> Path:
        return self.folder  # type: ignore[no-any-return]

    async def store(self, folder: Path, kind: str, metadata: Any, **lineage: str) -> str:
        self.metadata = metadata
        return "sha256:1"


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    (tmp_path / "checkpoint").mkdir()
    return Shelf(scratch=tmp_path, folder=tmp_path / "checkpoint", manifest=MINE)


def a_job(shelf: Any, checkpoint: str = "sha256:1") -> tuple[Job, list[tuple[str, str, str]]]:
    job, reports = Job(shelf, "jobs", "j", 1, checkpoint=checkpoint), []

    async def report(checkpoint: str, address: str = "", note: str = "", left: str = "") -> None:
        reports.append((checkpoint, note, left))

    job.report = report
    return job, reports


async def test_what_this_version_has_saved_is_gone_on_from(shelf: Shelf) -> None:
    job, reports = a_job(shelf, "")
    assert await job.resume(3) is None, "there is none yet"
    await job.save(shelf.folder, format=3, step=7)
    assert shelf.metadata == {"step": 7}
    assert await job.resume(3) == shelf.folder
    assert reports == [("sha256:1", "", "")], "and nothing is said of it"


@pytest.mark.parametrize(("found", "said"), [
    (None, "does not say its format"),
    (checkpoints.Mark("mine", "1.9.0", 2), "format 2 of mine 1.9.0"),
    (checkpoints.Mark("other", "2.1.0", 3), "format 3 of other 2.1.0"),
])  # fmt: skip
async def test_another_format_or_plugin_begins_anew_and_says_why(shelf: Shelf, found: Any, said: str) -> None:
    if found:
        (shelf.folder / checkpoints.FILE).write_bytes(msgspec.json.encode(found))
    job, reports = a_job(shelf)
    assert await job.resume(3) is None
    (report,) = reports
    assert (report[0], report[2]) == ("", "sha256:1")
    assert said in report[1]
    assert "mine 2.1.0 goes on from format 3: the work begins anew" in report[1]
    assert job.latest.message == report[1]
    assert job.checkpoint == "sha256:1", "it goes when the next one is on record, as ever"


async def test_a_mark_that_can_t_be_read_is_damage(shelf: Shelf) -> None:
    (shelf.folder / checkpoints.FILE).write_text('{"plugin": "mi')
    with pytest.raises(ClientFault, match=r"checkpoint\.json: not whole") as caught:
        await a_job(shelf)[0].resume(3)
    assert caught.value.code == "invalid_checkpoint"


async def test_without_room_for_the_mark_the_disk_is_full(shelf: Shelf, tmp_path: Path) -> None:
    (shelf.folder / checkpoints.FILE).symlink_to("/dev/full")  # which answers every write with ENOSPC
    with pytest.raises(KernelFault, match="No space left") as caught:
        await a_job(shelf)[0].save(shelf.folder, format=3)
    assert caught.value.code == "disk_full"


def test_a_shape_changes_with_fields_and_not_with_words() -> None:
    def made(doc: str, **fields: Any) -> Any:
        return msgspec.defstruct("Made", list(fields.items()), namespace={"__doc__": doc})

    assert shape(made("one", a=int)) == shape(made("another", a=int))
    assert len({shape(made("", **fields)) for fields in ({"a": int}, {"a": float}, {"b": int}, {"a": int, "b": int})}) == 4
