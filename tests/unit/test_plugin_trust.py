"""Signatures of plugins and the policy of a node, on folders: all that somebody might change after the signature was made."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import MANIFEST, read_manifest
from kernelm_sdk.system import TrustVerdict
from kernelm_trust import SBOM, SIGNATURE
from kernelm_trust.keys import generate, load_public, load_signer
from kernelm_trust.policy import Policy, read_policy
from kernelm_trust.signature import Named, sign

TEXT = 'name = "greet"\nversion = "1.0"\nsummary = ""\ncontracts = ["greet/1"]\nentry = "greet:Greet"\n'
BILL = {"bomFormat": "CycloneDX", "specVersion": "1.6", "metadata": {"component": {"name": "greet", "version": "1.0"}}}


class Desk(NamedTuple):
    plugin: Path
    key: Path
    listed: Path
    fingerprint: str

    def judge(self, policy: Policy | None = None, **more: Any) -> TrustVerdict:
        return (policy or Policy(self.listed)).judge(self.plugin, read_manifest(self.plugin / MANIFEST), **more)

    def sign(self, name: str = "greet", version: str = "1.0", image: str = "", key: Path | None = None) -> None:
        signature = sign(self.plugin, Named(name, version, image), load_signer(key or self.key))
        (self.plugin / SIGNATURE).write_bytes(signature)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    plugin, listed = tmp_path / "plugin", tmp_path / "listed"
    (plugin / "deep").mkdir(parents=True)
    listed.mkdir()
    for name, text in {MANIFEST: TEXT, "greet.py": "1 / 0", "deep/words.txt": "hello", SBOM: json.dumps(BILL)}.items():
        (plugin / name).write_text(text)
    fingerprint = generate(tmp_path / "key")
    shutil.copy(tmp_path / "key.pub", listed)
    made = Desk(plugin, tmp_path / "key", listed, fingerprint)
    made.sign()
    return made


def test_what_a_listed_key_signed_runs_and_its_owner_is_named(desk: Desk) -> None:
    verdict = desk.judge()
    assert verdict == TrustVerdict(True, f"greet 1.0 is signed by listed key {desk.fingerprint}", "admin", desk.fingerprint)
    assert desk.judge(Policy(desk.listed, "refuse")).allowed
    assert desk.judge(Policy(desk.listed / "key.pub")).allowed, "a file of keys does as well as a folder"


def bundle(desk: Desk) -> dict[str, Any]:
    return json.loads((desk.plugin / SIGNATURE).read_bytes())


def rewrite(desk: Desk, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the statement and keep the signature that is over the old one."""
    whole = bundle(desk)
    statement = json.loads(base64.b64decode(whole["dsseEnvelope"]["payload"]))
    change(statement)
    whole["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (desk.plugin / SIGNATURE).write_text(json.dumps(whole))


def forge_digest(desk: Desk) -> None:
    """The attacker's file, with its right digest in the statement."""
    (desk.plugin / "greet.py").write_text("import os")
    desk.sign()
    stolen = bundle(desk)["dsseEnvelope"]["payload"]
    (desk.plugin / "greet.py").write_text("1 / 0")
    desk.sign()
    whole = bundle(desk)
    whole["dsseEnvelope"]["payload"] = stolen
    (desk.plugin / "greet.py").write_text("import os")
    (desk.plugin / SIGNATURE).write_text(json.dumps(whole))


def by_another_key(desk: Desk) -> None:
    """Signed by a stranger who writes the listed key's fingerprint where his own belongs."""
    other = desk.key.with_name("other")
    stranger = generate(other)
    desk.sign(key=other)
    text = (desk.plugin / SIGNATURE).read_text().replace(stranger, desk.fingerprint)
    (desk.plugin / SIGNATURE).write_text(text)


def no_signatures(desk: Desk) -> None:
    whole = bundle(desk)
    whole["dsseEnvelope"]["signatures"] = []
    (desk.plugin / SIGNATURE).write_text(json.dumps(whole))


def another_sbom(desk: Desk) -> None:
    other = {"component": {"name": "greet", "version": "0.9"}}
    (desk.plugin / SBOM).write_text(json.dumps(BILL | {"metadata": other}))
    desk.sign()


def without_sbom(desk: Desk) -> None:
    (desk.plugin / SBOM).unlink()
    desk.sign()


def linked(desk: Desk) -> None:
    (desk.plugin / "greet.py").unlink()
    (desk.plugin / "greet.py").symlink_to(desk.plugin / "deep" / "words.txt")


ATTACKS: dict[str, tuple[Callable[[Desk], Any], str]] = {
    "a file changed": (lambda d: (d.plugin / "greet.py").write_text("1"),
                       r"file greet\.py of greet 1\.0 is not the one that was signed"),
    "a file added": (lambda d: (d.plugin / "deep/new.py").write_text("1"), r"file deep/new\.py of greet 1\.0 was not signed"),
    "a file removed": (lambda d: (d.plugin / "deep/words.txt").unlink(), r"file deep/words\.txt of greet 1\.0 is missing"),
    "a hidden file added": (lambda d: (d.plugin / ".gitignore").write_text("x"), r"file \.gitignore of greet 1\.0 was not signed"),
    "a file became a link": (linked, r"greet\.py is neither a file nor a folder"),
    "the manifest changed": (lambda d: (d.plugin / MANIFEST).write_text(TEXT + "network = true\n"),
                             r"file kernelm-plugin\.toml of"),
    "the manifest of another version": (lambda d: (d.plugin / MANIFEST).write_text(TEXT.replace("1.0", "1.1")),
                                        r"the signature is of greet 1\.0, not of greet 1\.1"),
    "signed for another plugin": (lambda d: d.sign(name="other"), r"the signature is of other 1\.0, not of greet 1\.0"),
    "signed for another version": (lambda d: d.sign(version="0.9"), r"the signature is of greet 0\.9, not of greet 1\.0"),
    "the statement changed": (lambda d: rewrite(d, lambda s: s["predicate"].update(more=1)),
                              "is not by key [0-9a-f]{64}, which it names"),
    "file and statement changed": (forge_digest, "is not by key [0-9a-f]{64}, which it names"),
    "a stranger under the listed key's name": (by_another_key, r"no signature|is not by key"),
    "no signature in it": (no_signatures, "is no signature of a plugin"),
    "no JSON": (lambda d: (d.plugin / SIGNATURE).write_text("trust me"), "is no signature"),
    "an empty file": (lambda d: (d.plugin / SIGNATURE).write_bytes(b""), "is no signature"),
    "a huge file": (lambda d: (d.plugin / SIGNATURE).write_bytes(b" " * (9 << 20)), "9,437,184 bytes"),
    "another kind of statement": (lambda d: rewrite(d, lambda s: s.update(predicateType="x")), "says x"),
    "another digest algorithm": (lambda d: rewrite(d, lambda s: s["predicate"]["resources"][0].update(algorithm="md5")),
                                 "was not signed"),
    "no SBOM": (without_sbom, r"has no SBOM \(kernelm-plugin\.cdx\.json\)"),
    "the SBOM of another version": (another_sbom, r"the SBOM of greet 1\.0 is of greet 0\.9"),
}  # fmt: skip
NEEDS_KEYS = {"the statement changed", "file and statement changed", "a stranger under the listed key's name", "no SBOM",
              "the SBOM of another version"}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_changed_is_refused_by_name(desk: Desk, attack: str) -> None:
    change, reason = ATTACKS[attack]
    change(desk)
    verdict = desk.judge()
    assert not verdict.allowed
    assert re.search(reason, verdict.reason), verdict.reason
    assert verdict.remedy
    assert desk.judge(Policy()).allowed == (attack in NEEDS_KEYS), "what can be told without a key is refused everywhere"


def test_unsigned_is_the_administrators_choice_unless_the_owner_leaves_none(desk: Desk) -> None:
    (desk.plugin / SIGNATURE).unlink()
    assert desk.judge(Policy()).reason.startswith("greet 1.0 is not signed; this node lists no keys")
    refused = desk.judge()
    assert not refused.allowed
    assert refused.reason == "greet 1.0 is not signed"
    assert "--allow-unsigned" in refused.remedy
    assert desk.judge(allowed_by="admin").reason == "greet 1.0 is not signed; admin allowed these files"
    never = desk.judge(Policy(desk.listed, "refuse"), allowed_by="admin")
    assert not never.allowed
    assert "--allow-unsigned" not in never.remedy


def test_an_unlisted_key_is_named_and_counts_as_no_signature(desk: Desk) -> None:
    (desk.listed / "key.pub").unlink()
    refused = desk.judge()
    assert not refused.allowed
    assert refused.reason == f"greet 1.0 is signed with key {desk.fingerprint}, which is not listed"
    assert refused.signer == desk.fingerprint
    assert desk.judge(allowed_by="admin").allowed
    (desk.plugin / "greet.py").write_text("import os")
    assert not desk.judge(allowed_by="admin").allowed, "what was changed after it was signed can't be allowed"


def test_an_image_must_be_the_one_that_was_signed(desk: Desk) -> None:
    ours, other = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    assert f"image {ours} was not signed with greet 1.0, which names none" in desk.judge(image=ours).reason
    desk.sign(image=ours)
    assert desk.judge(image=ours).allowed
    assert desk.judge().allowed, "the node's own image is the owner's"
    assert f"image {other} was not signed with greet 1.0, which names {ours}" in desk.judge(image=other).reason


def test_signing_twice_gives_the_same_bytes(desk: Desk) -> None:
    first = (desk.plugin / SIGNATURE).read_bytes()
    desk.sign()
    assert (desk.plugin / SIGNATURE).read_bytes() == first


def test_a_private_key_is_for_its_owner_alone(desk: Desk) -> None:
    assert desk.key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ClientFault, match="is there already"):
        generate(desk.key)
    desk.key.chmod(0o640)
    with pytest.raises(ClientFault, match=r"can be read by others \(mode 0640\)") as caught:
        load_signer(desk.key)
    assert caught.value.remedy == f"chmod 600 {desk.key}"
    public = desk.key.with_name("key.pub")
    public.chmod(0o600)
    with pytest.raises(ClientFault, match="no private key"):
        load_signer(public)
    with pytest.raises(ClientFault, match="No such file"):
        load_signer(desk.key.with_name("none"))


def test_a_list_of_keys_is_read_whole_or_not_at_all(desk: Desk, tmp_path: Path) -> None:
    second = generate(tmp_path / "second")
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "key.pub").read_bytes() + (tmp_path / "second.pub").read_bytes())
    assert set(load_public(both)) == {desk.fingerprint, second}
    shutil.copy(tmp_path / "second", desk.listed / "second.pem")
    with pytest.raises(ClientFault, match="holds a private key"):
        load_public(desk.listed)
    refused = desk.judge()
    assert not refused.allowed, "a list that can't be read lists nobody"
    assert "second.pem" in refused.reason


@pytest.mark.parametrize(("environment", "said"), [
    ({"KERNELM_TRUST": "keys"}, "a relative path"),
    ({"KERNELM_TRUST": "/nowhere/keys"}, "No such file"),
    ({"KERNELM_TRUST_UNSIGNED": "refuse"}, "and KERNELM_TRUST is not"),
    ({"KERNELM_TRUST_UNSIGNED": "maybe", "KERNELM_TRUST": "/"}, "is 'maybe'"),
])  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ClientFault, match=said):
        read_policy(environment)


def test_the_policy_in_the_environment(desk: Desk) -> None:
    assert read_policy({}) == Policy()
    assert read_policy({"KERNELM_TRUST": str(desk.listed)}) == Policy(desk.listed)
    assert read_policy({"KERNELM_TRUST": str(desk.listed), "KERNELM_TRUST_UNSIGNED": "refuse"}) == Policy(desk.listed, "refuse")
