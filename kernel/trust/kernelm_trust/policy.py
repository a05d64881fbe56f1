"""The policy of a node: whose plugins it runs. It is set by whoever owns the machine, in the environment of the node:

    KERNELM_TRUST            a file or folder of public keys; without it nothing is demanded
    KERNELM_TRUST_UNSIGNED   of what no listed key signed: "refuse", or "admin" (default): refuse it unless an administrator allows
                             these very bytes; neither a client nor the request that loads it can

A signature that is there must fit in any case: what was changed after it was signed runs nowhere.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Manifest, TrustVerdict
from kernelm_trust import SBOM, SIGNATURE

if TYPE_CHECKING:
    from kernelm_trust.signature import Signed

Unsigned = Literal["admin", "refuse"]


class _Component(msgspec.Struct, frozen=True):
    name: str
    version: str = ""


class _Metadata(msgspec.Struct, frozen=True):
    component: _Component


class _Sbom(msgspec.Struct, frozen=True):
    format: Literal["CycloneDX"] = msgspec.field(name="bomFormat")
    metadata: _Metadata


class Policy(msgspec.Struct, frozen=True):
    """What a node demands. Keys are read anew for each plugin, so that one that is taken off the list counts from then on."""

    keys: Path | None = None
    unsigned: Unsigned = "admin"

    def judge(self, folder: Path, manifest: Manifest, allowed_by: str = "", image: str = "") -> TrustVerdict:
        """Whether the plugin whose files lie in `folder` may run. `allowed_by`: the administrator who allowed these very files
        without a listed signature; `image`: what it shall run in, "" for the node's own. Never raises for what a plugin brings."""
        called = f"{manifest.name} {manifest.version}"
        signer = ""
        try:
            if not (folder / SIGNATURE).is_file():
                return self._stranger(f"{called} is not signed", "", allowed_by)
            from kernelm_trust.keys import load_public  # here, for most nodes never need cryptography
            from kernelm_trust.signature import read

            signed = read(folder / SIGNATURE)
            signer = signed.signer
            signed.check_files(folder, manifest.name, manifest.version)
            listed = load_public(self.keys) if self.keys else {}
            if signer not in listed:
                how = f"with key {signer}, which is not listed" if self.keys else f"with key {signer}, as it says itself"
                return self._stranger(f"{called} is signed {how}", signer, allowed_by)
            signed.check_key(listed[signer])
            check_sbom(folder, manifest)
            check_image(signed, called, image)
        except ClientFault as fault:
            return TrustVerdict(False, fault.message, self.name, signer, fault.remedy)
        return TrustVerdict(True, f"{called} is signed by listed key {signer}", self.name, signer)

    @property
    def name(self) -> str:
        """"none", "admin" or "refuse"."""
        return self.unsigned if self.keys else "none"

    def _stranger(self, what: str, signer: str, allowed_by: str) -> TrustVerdict:
        """Of what no listed key signed."""
        if self.keys is None:
            return TrustVerdict(True, f"{what}; this node lists no keys (KERNELM_TRUST), and runs what is loaded", "none", signer)
        if self.unsigned == "refuse":
            return TrustVerdict(False, f"{what}, and this node allows no exception (KERNELM_TRUST_UNSIGNED)", self.name, signer,
                                "have it signed with a key that is listed there: kernelm plugin pack PATH --key FILE")  # fmt: skip
        if allowed_by:
            return TrustVerdict(True, f"{what}; {allowed_by} allowed these files", self.name, signer)
        return TrustVerdict(False, what, self.name, signer, "have it signed with a key that KERNELM_TRUST of the node lists "
                            "(kernelm plugin pack PATH --key FILE), or as administrator load it with --allow-unsigned")  # fmt: skip


def check_sbom(folder: Path, manifest: Manifest) -> None:
    """ClientFault "untrusted" without one bill of materials that is of this plugin and version."""
    called, remedy = f"{manifest.name} {manifest.version}", "kernelm plugin pack writes one: have it packed by that"
    found = [p for p in (folder / SBOM, *folder.glob(f"*.dist-info/sboms/{SBOM}")) if p.is_file()]
    if len(found) != 1:
        raise ClientFault("untrusted", f"{called} has {f'{len(found)} SBOMs' if found else 'no SBOM'} ({SBOM})", remedy)
    try:
        component = msgspec.json.decode(found[0].read_bytes(), type=_Sbom).metadata.component
    except msgspec.MsgspecError as error:
        raise ClientFault("untrusted", f"the SBOM of {called} ({SBOM}) is no CycloneDX document: {error}", remedy) from None
    if (component.name, component.version) != (manifest.name, manifest.version):
        raise ClientFault("untrusted", f"the SBOM of {called} is of {component.name} {component.version}", remedy)


def check_image(signature: "Signed", called: str, image: str) -> None:
    """ClientFault "untrusted" if it shall run in another image than the one that was signed with it."""
    signed = signature.statement.predicate.plugin.image
    if image and image != signed:
        what = f"image {image} was not signed with {called}, which " + (f"names {signed}" if signed else "names none")
        raise ClientFault("untrusted", what, "kernelm plugin pack PATH --key FILE --image makes and signs one")


def read_policy(environment: Mapping[str, str] = os.environ) -> Policy:
    """The policy in the environment; ClientFault that names the variable, or the file in it that is no public key."""
    place, unsigned = environment.get("KERNELM_TRUST", ""), environment.get("KERNELM_TRUST_UNSIGNED", "admin")
    if unsigned not in get_args(Unsigned):
        raise ClientFault("invalid", f"KERNELM_TRUST_UNSIGNED is {unsigned!r}", f"it is one of {', '.join(get_args(Unsigned))}")
    if not place:
        if "KERNELM_TRUST_UNSIGNED" in environment:
            raise ClientFault("invalid", "KERNELM_TRUST_UNSIGNED is set, and KERNELM_TRUST is not",
                              "name a file or folder of public keys; an empty folder trusts nobody")  # fmt: skip
        return Policy()
    path = Path(place)
    if not path.is_absolute():
        raise ClientFault("invalid", f"KERNELM_TRUST is {place!r}, a relative path", "give an absolute one")
    from kernelm_trust.keys import load_public

    load_public(path)
    return Policy(path, unsigned)  # type: ignore[arg-type] # checked above
