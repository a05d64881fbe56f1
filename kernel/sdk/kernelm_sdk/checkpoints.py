"""What a checkpoint says of itself, so that whoever finds it knows whether it can go on from there before it reads the rest.

A job is found again by its key, also by another version of the plugin, or by another plugin of the same contract. Both would take
for damage what is only of another format. So `checkpoint.json` lies beside a checkpoint's files, and is compared first.
"""

import errno
from pathlib import Path

import msgspec

from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Manifest

FILE = "checkpoint.json"
FULL = (errno.ENOSPC, errno.EDQUOT)


class Mark(msgspec.Struct, frozen=True):
    """The content of checkpoint.json. Fields may be added: those that are not known are ignored."""

    plugin: str  # whose checkpoint it is, and its version then
    version: str
    format: int  # of the plugin's own numbering; only the same one is read


def mark(folder: Path, manifest: Manifest, format: int) -> None:
    """Write checkpoint.json into `folder`. KernelFault "disk_full" where there is no room for it."""
    try:
        (folder / FILE).write_bytes(msgspec.json.encode(Mark(manifest.name, manifest.version, format)))
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise KernelFault("disk_full", f"{folder.name}/{FILE}: {error.strerror}", "free some space there", retriable=True) from None


def why_anew(folder: Path, manifest: Manifest, format: int) -> str:
    """Why the plugin, whose checkpoints are of `format` now, can't go on from the one in `folder`; "" if it can.

    ClientFault "invalid_checkpoint" if checkpoint.json is there and can't be read."""
    wanted = f"{manifest.name} {manifest.version} goes on from format {format}: the work begins anew"
    if not (folder / FILE).exists():
        return f"the checkpoint does not say its format, as those of older versions don't, and {wanted}"
    try:
        found = msgspec.json.decode((folder / FILE).read_bytes(), type=Mark)
    except msgspec.DecodeError as error:
        raise invalid_checkpoint(FILE, error) from None
    if (found.plugin, found.format) == (manifest.name, format):
        return ""
    return f"the checkpoint is of format {found.format} of {found.plugin} {found.version}, and {wanted}"


def invalid_checkpoint(file: str, error: Exception) -> ClientFault:
    """That a checkpoint of the right format can't be read: `file` of it is damaged."""
    return ClientFault("invalid_checkpoint", f"checkpoint: {file}: not whole: {error!r}", "submit a new job")
