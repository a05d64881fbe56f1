"""Keys of one's own: turning a one-time join token into credentials, and credentials into the next ones."""

import asyncio
import base64
import os
import time

import msgspec
import nkeys

from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import EnrollRequest, Kernel, RenewRequest


def new_seed(prefix: int = nkeys.PREFIX_BYTE_USER) -> str:
    """A fresh ed25519 nkey seed."""
    return str(nkeys.encode_seed(os.urandom(32), prefix).decode())


def public_key(seed: str) -> str:
    """The public nkey that belongs to a seed."""
    return str(nkeys.from_seed(seed.encode()).public_key.decode())


async def join(url: str, token: str, patience_s: float = 60.0) -> Credentials:
    """Turn a join token into credentials of one's own: the seed is made here and never leaves."""
    return await enroll(url, ticket_of(token), new_seed(), patience_s)


def ticket_of(token: str) -> Credentials:
    """The credentials that a join token is; ClientFault "unauthorized" where it is none."""
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(token.strip() + "==="), type=Credentials)
    except (ValueError, msgspec.DecodeError):
        raise ClientFault("unauthorized", "the join token is damaged", "issue a new one") from None


def token_of(ticket: Credentials) -> str:
    """The join token that a ticket is, as text."""
    return base64.urlsafe_b64encode(msgspec.json.encode(ticket)).rstrip(b"=").decode()


async def enroll(url: str, ticket: Credentials, seed: str, patience_s: float = 60.0) -> Credentials:
    """Credentials for the key of `seed`, by the right that `ticket` gives. With the same seed it may be said again."""
    bus = await Bus.connect(url, ticket)
    request, until = EnrollRequest(ticket.jwt, public_key(seed)), time.monotonic() + patience_s
    try:
        while True:  # at an even pace: the kernel may be starting beside us, and everything waits for whoever joins last
            try:
                enrolled = await bus.call(Kernel.enroll, request, timeout_s=5.0)
                break
            except KernelFault as fault:
                if not fault.retriable or time.monotonic() > until:
                    raise
            await asyncio.sleep(0.05)
    finally:
        await bus.close()
    return Credentials(enrolled.user, enrolled.jwt, seed, enrolled.expires)


async def renew(bus: Bus, seed: str, overlap_s: int = 60, timeout_s: float = 5.0) -> None:
    """Go on under the new key `seed` and a JWT for it; the old key is revoked after `overlap_s`. Nothing in flight is lost.
    When this fails it may be tried again with the same seed."""
    enrolled = await bus.call(Kernel.renew, RenewRequest(public_key(seed), overlap_s), timeout_s=timeout_s)
    await bus.renewed(Credentials(enrolled.user, enrolled.jwt, seed, enrolled.expires), overlap_s)
