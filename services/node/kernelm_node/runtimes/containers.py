"""`<home>/containers.toml`: what this node's containers are made of, where its owner says so. `kernelm deploy init` writes one."""

import tomllib
from pathlib import Path

import msgspec

from kernelm_sdk.errors import ClientFault


class Containers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read at each start of an instance, so that a new image needs no new node."""

    only: bool = False  # whatever runtime is asked for, it is a container
    images: dict[str, str] = {}  # plugin -> id of the image that holds it and all that it imports
    readable: tuple[str, ...] = ()  # folders that every instance may read, at their own paths: a store's
    volumes: dict[str, str] = {}  # the engine's volumes that every instance may read -> where it sees them


def read_containers(home: Path) -> Containers:
    """The file's content, the defaults where there is none; ClientFault that names the file and the field."""
    path = home / "containers.toml"
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Containers)
    except FileNotFoundError:
        return Containers()
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ClientFault("invalid", f"{path}: {error}", "correct it; known are only, images, readable and volumes") from None
