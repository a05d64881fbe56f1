"""Where the policy of this node (kernelm_trust) is enforced: before an instance is started, which is the one place at which a
plugin's code begins to run, whoever asked for it and by whatever way.

A plugin that is installed on the node (no artifact) was put there by the owner of the machine, and is not judged.
"""

import asyncio
import base64
import logging
import re
import time
from pathlib import Path

import msgspec

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST, Manifest, read_manifest
from kernelm_sdk.system import AllowUnsigned, StartInstance, TrustVerdict
from kernelm_trust.policy import Policy

ADMINISTRATOR = "admin"  # the last token of a subject, which the broker has checked
DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
log = logging.getLogger("kernelm.node")


class Allowed(msgspec.Struct, frozen=True):
    """What an administrator allowed: one artifact, not a plugin's name, so that its next version is asked about again."""

    digest: str
    by: str
    when: float  # Unix seconds
    why: str = ""


class Trust:
    """The policy, and what was allowed beside it: `<home>/trust/allowed/<hex>.json`."""

    def __init__(self, home: Path, policy: Policy) -> None:
        self.policy, self._folder = policy, home / "trust" / "allowed"

    async def judge(self, folder: Path, manifest: Manifest, digest: str, image: str = "") -> TrustVerdict:
        """Of the plugin in the artifact `digest`, whose verified files lie in `folder`."""
        return await asyncio.to_thread(self.policy.judge, folder, manifest, self._allowed(digest), image)

    async def of_artifact(self, folder: Path, digest: str) -> TrustVerdict:
        """The same, for who asks before anything is started."""
        return await self.judge(folder, await asyncio.to_thread(read_manifest, folder / MANIFEST), digest)

    async def require(self, request: StartInstance, manifest: Manifest, folder: Path) -> None:
        """ClientFault "untrusted" with the reason if the plugin must not run here: not a matter of time, so the kernel does not try
        again. Where keys are listed, the kernel must also ask for what was signed, and for no more."""
        verdict = await self.judge(folder, manifest, request.source, request.image)
        if not verdict.allowed:
            raise ClientFault("untrusted", verdict.reason, verdict.remedy)
        if self.policy.keys is not None and (more := beyond(request, manifest)):
            what = f"{manifest.name} {manifest.version} would get {more}, which its signed manifest does not say"
            raise ClientFault("untrusted", what, "load it with the manifest that is in its files")
        log.info("%s: %s", request.instance, verdict.reason)

    def _allowed(self, digest: str) -> str:
        """Who allowed it; "" for nobody."""
        try:
            return msgspec.json.decode(self._file(digest).read_bytes(), type=Allowed).by
        except FileNotFoundError:
            return ""

    def allow(self, request: AllowUnsigned, caller: str) -> None:
        """Note it. ClientFault "permission_denied" unless the administrator asks, and where the policy leaves nobody the choice."""
        if not DIGEST.match(request.digest):
            raise ClientFault("invalid", f"digest: {request.digest!r} is none", "sha256: and 64 hex digits in lower case")
        if caller != ADMINISTRATOR:
            raise ClientFault("permission_denied", f"{caller!r} can't allow what is not signed", "ask the home's administrator")
        if self.policy.name == "refuse":
            raise ClientFault("permission_denied", "this node runs nothing that no listed key signed, whoever asks",
                              "have it signed, or ask who owns the machine (KERNELM_TRUST_UNSIGNED)")  # fmt: skip
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(request.digest)
        temporary = file.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(Allowed(request.digest, caller, time.time(), request.why)))
        temporary.replace(file)
        log.warning("%s allowed %s to run without a listed signature: %s", caller, request.digest, request.why or "no reason given")

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.json"


def beyond(request: StartInstance, manifest: Manifest) -> str:
    """What the request gives an instance beyond what its manifest asks for; "" for nothing."""
    granted = grant_in(request.token)
    if calls := sorted(set(granted.calls) - set(manifest.calls)):
        return f"the right to call {', '.join(calls)}"
    if events := sorted(set(granted.events) - set(manifest.events)):
        return f"the right to publish {', '.join(events)}"
    if request.network and not manifest.network:
        return "network = true"
    if manifest.isolated and not request.isolated:
        return "isolated = false"
    return f"limits of {request.limits}" if request.limits != manifest.limits else ""


class _Ticket(msgspec.Struct, frozen=True):
    jwt: str


class _Nats(msgspec.Struct, frozen=True):
    tags: tuple[str, ...] = ()


class _Claims(msgspec.Struct, frozen=True):
    nats: _Nats


class Granted(msgspec.Struct, frozen=True):
    calls: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


def grant_in(token: str) -> Granted:
    """What the holder of a join token of the kernel's will be allowed (kernelm_authority.identity.Authority.token)."""
    try:
        ticket = msgspec.json.decode(base64.urlsafe_b64decode(token + "==="), type=_Ticket)
        claims = msgspec.json.decode(base64.urlsafe_b64decode(ticket.jwt.split(".")[1] + "==="), type=_Claims)
        tag = next(t for t in claims.nats.tags if t.lower().startswith("join:"))
        return msgspec.json.decode(base64.b32decode(tag[5:].upper()), type=Granted)
    except (ValueError, IndexError, StopIteration) as error:
        what = f"the join token does not say what it grants: {error}"
        raise ClientFault("untrusted", what, "it must come from the kernel") from None
