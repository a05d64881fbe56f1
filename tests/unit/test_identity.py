"""Tokens, claims and the allow lists that are compiled from a grant."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernelm_authority.identity import Authority, Grant, admin, init_home, permissions, read
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import parse_manifest


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return init_home(tmp_path / "home")


def test_keys_are_made_once_and_only_their_owner_can_read_them(authority: Authority) -> None:
    again = init_home(authority.home)
    assert again.operator == authority.operator
    for path in [*(authority.home / "identity").iterdir(), authority.home / "admin.creds"]:
        assert path.stat().st_mode & 0o077 == 0
    assert admin(authority.home).user == "admin"


def test_what_was_issued_can_be_verified_and_what_was_touched_can_not(authority: Authority) -> None:
    grant = Grant("plugin", "data-1", "data", "data", calls=("jobs/1.submit",))
    jwt, expires = authority.issue(grant, public_key(new_seed()))
    assert authority.verify(jwt, "grant") [:2] == ("data-1", grant)
    assert expires > time.time()
    head, claims, signature = jwt.split(".")
    for forged in (f"{head}.{claims[:-4]}AAAA.{signature}", "nonsense", authority.account_jwt()):
        with pytest.raises(ClientFault, match="not valid"):
            authority.verify(forged, "grant")


def test_an_expired_token_is_refused(authority: Authority) -> None:
    jwt, _ = authority.issue(Grant("client", "acme"), public_key(new_seed()), -1)
    with pytest.raises(ClientFault, match="not valid"):
        authority.verify(jwt, "grant")


def test_a_stranger_may_do_one_thing() -> None:
    publish, subscribe = permissions(Grant("join", "join-1"))
    assert publish == ["svc.kernel.v1.enroll.join-1", "impl.*.kernel.v1.enroll.join-1"]
    assert subscribe == ["_INBOX.join-1.>"]


def test_nobody_may_speak_for_another_or_listen_to_another() -> None:
    for role in ("join", "client", "plugin", "service", "admin"):
        grant = Grant(role, "me", "pool", "plugin", ("jobs/1.submit", "data/1"), ("news",), ("classify",))
        publish, subscribe = permissions(grant)
        assert all(s.endswith(".me") for s in publish if s.startswith(("svc.", "impl.", "inst.", "model.", "evt.")))
        assert ">" not in subscribe
        assert not any(s.startswith("_INBOX") and s != "_INBOX.me.>" for s in subscribe)


def test_a_client_gets_its_models_and_nothing_else() -> None:
    publish, _ = permissions(Grant("client", "acme", models=("news",), methods=("classify",)))
    assert publish == ["_INBOX.*.>", "model.news.classify.acme", "impl.*.model.news.classify.acme"]


def test_account_claims_carry_the_table(authority: Authority) -> None:
    mappings = {"svc.data.v1.*.*": [{"subject": "impl.p.data.v1.{{wildcard(1)}}.{{wildcard(2)}}", "weight": 100}]}
    claims = read(authority.account_jwt(mappings=mappings, iat=12), authority.operator)
    assert (claims["iat"], claims["nats"]["mappings"]) == (12, mappings)


def test_a_folder_that_is_no_home(tmp_path: Path) -> None:
    with pytest.raises(ClientFault, match="no kernelm home"):
        admin(tmp_path)


def test_a_plugin_publishes_the_events_that_its_manifest_lists_and_never_the_systems() -> None:
    wanted = ("dataset.prepared", "swap.phase", "model.deployed", "model.trained", "a.b.c", "*.x", ">")
    publish, _ = permissions(Grant("plugin", "me", "pool", "p", events=wanted))
    assert [s for s in publish if s.startswith("evt")] == ["evt.dataset.prepared.me", "evt.model.trained.me"]


@pytest.mark.parametrize("event", ["swap.phase", "job.state", "model.deployed", "flat", "a.b.c", "*.x", "A.b"])
def test_a_manifest_that_wants_to_speak_for_the_system_is_refused_by_name(event: str) -> None:
    text = f'name="p"\nversion="1"\nsummary="s"\ncontracts=["p/1"]\nentry="p:P"\nevents=["model.trained", "{event}"]\n'
    with pytest.raises(ClientFault, match=re.escape(f"there: plugin 'p' wants to publish {event}:")):
        parse_manifest(text, "there")


@pytest.mark.parametrize(("given", "said"), [("7", "7"), ("", "5"), ("1", "KERNELM_LEASE_S is '1': give whole seconds, 2 or more"),
                                             ("2.5", "KERNELM_LEASE_S is '2.5': give")])  # fmt: skip
def test_the_lease_is_a_setting(given: str, said: str) -> None:
    code = "from kernelm import kernel; print(kernel.api.Welcome('p', (), kernel.LEASE_S, {}).lease_ttl_s)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"KERNELM_LEASE_S": given}, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.stdout + done.stderr).startswith(said)
    assert (done.returncode == 0) == said.isdecimal()
