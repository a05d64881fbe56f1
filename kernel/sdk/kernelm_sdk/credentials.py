"""A NATS client's credentials as a file, in the form that the `nats` tool and every client library read (JWT and seed between
markers)."""

import base64
import binascii
import re
from pathlib import Path

import msgspec

from kernelm_sdk.errors import ClientFault, invalid
from kernelm_sdk.links import Credentials

FORM = """-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

************************* IMPORTANT *************************
NKEY Seed printed below can be used to sign and prove identity.
NKEYs are sensitive and should be treated as secrets.

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""
PARTS = re.compile(r"-+BEGIN [A-Z ]+-+\s*([A-Za-z0-9_.=-]+?)\s*-+END [A-Z ]+-+")


class _Claims(msgspec.Struct):
    name: str
    exp: int = 0


def to_file(credentials: Credentials) -> str:
    """The text of the file."""
    return FORM.format(jwt=credentials.jwt, seed=credentials.seed)


def from_file(path: Path) -> Credentials:
    """The credentials in a file that `kernelm key create --nats` wrote. ClientFault "invalid" that names it."""
    try:
        jwt, seed = PARTS.findall(path.read_text())
        payload = jwt.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)), type=_Claims)
    except OSError as error:
        raise ClientFault("invalid", f"{path}: {error.strerror}", "`kernelm key create NAME --nats FILE` writes one") from None
    except (ValueError, IndexError, binascii.Error, msgspec.DecodeError) as error:
        raise invalid(str(path), error, "`kernelm key create NAME --nats FILE` writes one") from None
    return Credentials(claims.name, jwt, seed, claims.exp)
