"""Settings of a data plugin's pool."""

from pathlib import Path

from msgspec import Struct

from kernelm_sdk.errors import ClientFault

MIN_KEY_BYTES = 16


class DataSettings(Struct, frozen=True, forbid_unknown_fields=True):
    private_key_file: str = ""  # path of a file with a secret of 16 bytes or more, under which private data are hashed
    ray_address: str = ""  # of the Ray cluster for requests whose engine is "ray", such as "10.0.0.1:6379"; "": there is none
    shared_folder: str = ""  # for the work of those: a folder that all of Ray's nodes see under this path
    urls: tuple[str, ...] = ()  # prefixes of local paths and URLs that requests may name as inputs


def read_key(settings: DataSettings) -> bytes:
    """The secret of `private_key_file`; ClientFault "no_key", without the path's content, if there is none that is usable."""
    try:
        key = Path(settings.private_key_file).read_bytes().strip() if settings.private_key_file else b""
    except OSError as error:
        raise ClientFault("no_key", f"private_key_file: {error.strerror}", "let the data plugin's user read the file") from None
    if len(key) < MIN_KEY_BYTES:
        raise ClientFault("no_key", f'private.style "hash" needs a secret of {MIN_KEY_BYTES} bytes, and there are {len(key)}',
                          "set private_key_file in the settings of the data plugin, or take another style")  # fmt: skip
    return key
