"""Keys of one's own, and turning a one-time join token into credentials."""

import base64
import os

import msgspec
import nkeys

from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import EnrollRequest, Kernel


def new_seed(prefix: int = nkeys.PREFIX_BYTE_USER) -> str:
    """A fresh ed25519 nkey seed."""
    return str(nkeys.encode_seed(os.urandom(32), prefix).decode())


def public_key(seed: str) -> str:
    """The public nkey that belongs to a seed."""
    return str(nkeys.from_seed(seed.encode()).public_key.decode())


async def join(url: str, token: str, patience_s: float = 60.0) -> Credentials:
    """Turn a one-time join token into credentials of one's own: the seed is made here and never leaves."""
    try:
        ticket = msgspec.json.decode(base64.urlsafe_b64decode(token.strip() + "==="), type=Credentials)
    except (ValueError, msgspec.DecodeError):
        raise ClientFault("unauthorized", "the join token is damaged", "issue a new one") from None
    seed = new_seed()
    bus = await Bus.connect(url, ticket)
    try:
        enrolled = await bus.call(Kernel.enroll, EnrollRequest(ticket.jwt, public_key(seed)), timeout_s=5.0, patience_s=patience_s)
    finally:
        await bus.close()
    return Credentials(enrolled.user, enrolled.jwt, seed, enrolled.expires)
