"""Settings of the artifacts service, from environment variables `KERNELM_ARTIFACTS_<FIELD>`."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from kernelm_sdk.errors import invalid

PREFIX = "KERNELM_ARTIFACTS_"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the files are served, and for how long a grant lasts."""

    listen: str = "127.0.0.1"  # address of the HTTP server; another than loopback only behind TLS
    port: int = 0  # TCP port; 0 for a free one
    url: str = ""  # how other nodes reach it, without "/artifacts"; "" for http://<listen>:<port>
    grant_max_s: int = 3600  # longest life of a token, seconds
    master: str = ""  # encryption at rest: the master key's file, or its URI in a KMS; "" for none
    plain: str = ""  # folder on a tmpfs for readable copies of encrypted artifacts; "" for one below /dev/shm
    plain_mb: int = 4096  # of such copies together, at most
    plain_keep_s: int = 600  # seconds after its last opening at which a copy that nobody has any more is dropped


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`; ClientFault "invalid" that names the variable."""
    given = {k.removeprefix(PREFIX).lower(): v for k, v in environment.items() if k.startswith(PREFIX)}
    try:
        return msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(PREFIX + field.upper() for field in Settings.__struct_fields__)
        raise invalid(f"{PREFIX}*", error, f"known are {known}") from None


def memory_of(settings: Settings, home: Path) -> Path:
    """Where readable copies lie; if the settings don't say, in a folder of each home's own below /dev/shm."""
    own = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    return Path(settings.plain or f"/dev/shm/kernelm-{os.getuid()}-{own}")
