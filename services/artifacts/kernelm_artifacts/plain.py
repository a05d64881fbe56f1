"""Readable copies of sealed artifacts, in memory alone.

    <root>/<hex>/files/...          as in the store: read-only
    <root>/<hex>/by/<instance>      who opened it; empty
    <root>/incoming/<random>/       being decrypted, or handed in (inbox.py); emptied at the start

`root` has to lie on a file system that is memory (tmpfs): what is decrypted never comes to a disk. A copy stays while one of
those who opened it is there; the others go when their time is over, or sooner when room is needed.
"""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import tink

from kernelm_artifacts.tree import difference, remove
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Artifact

MEMORY = ("tmpfs", "ramfs")
Restore = Callable[[str, Path], None]  # (path in the tree, new file) -> decrypts it, or fetches it


class Plain:
    """The copies in `root`, together at most `most_bytes`. Thread-safe."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o711)
        if (kind := _file_system(root)) not in MEMORY:
            raise ClientFault("invalid", f"KERNELM_ARTIFACTS_PLAIN={root} lies on {kind}: what is decrypted would be on a disk",
                              "name a folder on a tmpfs, below /dev/shm for example")  # fmt: skip
        self.root, self.most_bytes = root, most_bytes
        self.incoming = root / "incoming"
        if self.incoming.exists():
            remove(self.incoming)
        self.incoming.mkdir()
        self._guard = threading.Lock()

    def copy(self, artifact: Artifact, restore: Restore, by: str = "") -> tuple[Path, str, str]:
        """The folder with the decrypted files, which the instance `by` has from now on; or the first file that can't be decrypted
        to what it was, and what is wrong with it.

        KernelFault "no_room" when it does not fit beside what is in use.
        """
        with self._guard:
            home = self.root / artifact.digest.removeprefix("sha256:")
            files = home / "files"
            if files.exists():
                path, _ = difference(files, artifact.files)
                if not path:
                    _note(home, by)
                    return files, "", ""
                remove(home)
            self._require_room(artifact)
            incoming = self.incoming / secrets.token_hex(8)
            (incoming / "by").mkdir(parents=True)
            try:
                path, what = self._restore(artifact, restore, incoming / "files")
                if not path:
                    incoming.rename(home)
                    _note(home, by)
            finally:
                if incoming.exists():
                    remove(incoming)
            return files, path, what

    def present(self, digest: str) -> Path | None:
        """The folder with the files of a copy that is there, opened anew in that; None if there is none. It is not checked."""
        with self._guard:
            home = self.root / digest.removeprefix("sha256:")
            if not (home / "files").exists():
                return None
            _note(home, "")
            return home / "files"

    def sweep(self, living: Iterable[str], older_s: float) -> int:
        """Drop copies that were last opened more than `older_s` ago and by nobody of the `living`; how many."""
        living, gone = set(living), 0
        with self._guard:
            for home in self._copies():
                holders = {entry.name for entry in (home / "by").iterdir()}
                if not holders & living and time.time() - home.stat().st_mtime > older_s:
                    remove(home)
                    gone += 1
        return gone

    def drop(self, digest: str) -> None:
        """Drop the copy of `digest`, in use or not."""
        with self._guard:
            home = self.root / digest.removeprefix("sha256:")
            if home.exists():
                remove(home)

    def _copies(self) -> list[Path]:
        return [home for home in self.root.iterdir() if home != self.incoming]

    def _restore(self, artifact: Artifact, restore: Restore, files: Path) -> tuple[str, str]:
        for file in artifact.files:
            target = files / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                restore(file.path, target)
            except (OSError, tink.TinkError) as error:
                return file.path, f"can't be restored: {error}"
        for where, _, _ in os.walk(files):
            Path(where).chmod(0o555)
        return difference(files, artifact.files)

    def _require_room(self, artifact: Artifact) -> None:
        used = sum(file.stat().st_size for home in self._copies() for file in (home / "files").rglob("*") if file.is_file())
        free = min(self.most_bytes - used, shutil.disk_usage(self.root).free)
        if free < artifact.bytes:
            raise KernelFault("no_room", f"{self.root}: artifact {artifact.digest} needs {artifact.bytes} bytes of memory, and "
                              f"{free} are free", "raise KERNELM_ARTIFACTS_PLAIN_MB, or wait until others have ended",
                              retriable=True, needed_bytes=artifact.bytes, free_bytes=free)  # fmt: skip


def _note(home: Path, by: str) -> None:
    """Opened now, by the instance `by`."""
    os.utime(home)
    if by:
        (home / "by" / by).touch()


def _file_system(folder: Path) -> str:
    """The type of the file system that `folder` lies on."""
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    real = folder.resolve()
    return next((mounts[place] for place in (real, *real.parents) if place in mounts), "an unknown file system")
