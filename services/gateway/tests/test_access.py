"""Who may, and how much: tokens of a real issuer over HTTP, limits, budgets, and the audit."""

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import httpx
import jwt
import oidc_provider_mock
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from kernelm.testing.harness import until
from kernelm_contracts.usage import Budget, BudgetState, UsageReport
from kernelm_gateway.audit import FILE, Audit
from kernelm_gateway.limits import Limits
from kernelm_gateway.oidc import Issuer
from kernelm_gateway.policy import AuditSettings, Limit, Oidc, Role, read_policy
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Key

ROLES = {"analysts": Role("acme", ("news",), ("classify",)), "admins": Role("acme", admin=True), "guests": Role("initech")}
USERS = {"ada": ["analysts"], "grace": ["analysts", "admins"], "eve": ["nobody"], "mallory": ["analysts", "guests"]}
KEY = Key("k1", "acme's", "", ("*",), ("*",), "acme", 0)


class Provider:
    """An OpenID Connect issuer on a real socket."""

    def __init__(self, port: int) -> None:
        self.url = f"http://localhost:{port}"

    def token(self, user: str, audience: str = "kernelm") -> str:
        """An ID token, by the authorization code flow."""
        asked = {"client_id": audience, "redirect_uri": "http://client/cb", "response_type": "code", "scope": "openid"}
        with httpx.Client(trust_env=False) as client:
            at = client.post(f"{self.url}/oauth2/authorize", params=asked, data={"sub": user}).headers["location"]
            code = parse_qs(urlparse(at).query)["code"][0]
            given = {"grant_type": "authorization_code", "code": code, "redirect_uri": "http://client/cb"}
            answer = client.post(f"{self.url}/oauth2/token", data=given, auth=(audience, "secret"))
            return answer.raise_for_status().json()["id_token"]

    def settings(self, **more) -> Oidc:
        return Oidc(self.url, "kernelm", ROLES, **more)


@pytest.fixture
def provider() -> Iterator[Provider]:
    users = [oidc_provider_mock.User(sub=name, claims={"roles": roles}) for name, roles in USERS.items()]
    with oidc_provider_mock.run_server_in_thread(user_claims=users) as server:
        yield Provider(server.server_port)


async def test_a_token_gives_what_its_roles_give(provider: Provider) -> None:
    issuer = Issuer(provider.settings())
    key = await issuer.check(provider.token("ada"))
    assert (key.name, key.tenant, key.models, key.methods, key.admin) == ("ada", "acme", ("news",), ("classify",), False)
    assert key.expires > time.time()
    both = await issuer.check(provider.token("grace"))
    assert (both.admin, both.models, both.methods) == (True, ("*", "news"), ("*", "classify"))
    assert key.id != both.id


@pytest.mark.parametrize(("user", "code", "says"), [("eve", "permission_denied", "names no role"),
                                                    ("mallory", "permission_denied", "several tenants")])  # fmt: skip
async def test_a_role_that_is_not_known_or_two_tenants_are_refused(provider: Provider, user: str, code: str, says: str) -> None:
    with pytest.raises(ClientFault, match=says) as caught:
        await Issuer(provider.settings()).check(provider.token(user))
    assert caught.value.code == code


async def test_forged_expired_and_foreign_tokens_are_refused(provider: Provider) -> None:
    issuer = Issuer(provider.settings())
    good = provider.token("ada")
    claims = jwt.decode(good, options={"verify_signature": False})
    head = jwt.get_unverified_header(good)
    stranger = rsa.generate_private_key(65537, 2048)
    public = stranger.public_key()
    bad = {
        "another audience": provider.token("ada", "elsewhere"),
        "another key": jwt.encode(claims, stranger, "RS256", head),
        "a key that is not known": jwt.encode(claims, stranger, "RS256", {"kid": "mine"}),
        "no signature": jwt.encode(claims, None, "none"),
        "the public key as a secret": jwt.encode(claims, str(public.public_numbers().n), "HS256"),
        "a changed claim": ".".join([good.split(".")[0], good.split(".")[1][:-4] + "AAAA", good.split(".")[2]]),
        "nonsense": "ey.ey.ey",
    }  # fmt: skip
    for what, token in bad.items():
        with pytest.raises(ClientFault) as caught:
            await issuer.check(token)
        assert caught.value.code == "unauthorized", what
    assert (await issuer.check(good)).name == "ada"
    with oidc_provider_mock.run_server_in_thread(access_token_max_age=timedelta(seconds=-60)) as late:
        old = Provider(late.server_port)
        with pytest.raises(ClientFault, match="expired"):
            await Issuer(old.settings()).check(old.token("ada"))


async def test_an_issuer_that_is_away_is_said_to_be(provider: Provider) -> None:
    with pytest.raises(KernelFault) as caught:
        await Issuer(Oidc("http://localhost:9", "kernelm", ROLES)).check(provider.token("ada"))
    assert (caught.value.code, caught.value.retriable) == ("issuer_unreachable", True)
    assert "localhost:9" in caught.value.message


class Table:
    """Stands in for the job table's usage."""

    def __init__(self, *budgets: BudgetState) -> None:
        self.report = UsageReport((), budgets)

    async def call(self, method, request) -> UsageReport:
        return self.report


def test_requests_and_tokens_are_limited_by_tenant() -> None:
    limits = Limits(Table(), (Limit("acme", requests_per_minute=3), Limit("*", tokens_per_minute=100)))
    for _ in range(3):
        limits.admit("acme")
    with pytest.raises(ClientFault, match="3 requests a minute") as caught:
        limits.admit("acme")
    assert (caught.value.http_status, 1 <= caught.value.details["retry_after_s"] <= 60) == (429, True)
    for tenant in ("initech", "hooli"):
        limits.admit(tenant)
        limits.spend(tenant, 60)
    limits.admit("initech")
    limits.spend("initech", 5000)  # what is known only afterwards counts against the next
    with pytest.raises(ClientFault, match="100 tokens a minute"):
        limits.admit("initech")
    limits.admit("hooli")
    limits.spend("acme", 10**9)  # no limit of tokens
    Limits(Table(), ()).admit("anybody")


async def test_a_budget_of_tokens_that_is_spent_refuses_until_its_end() -> None:
    spent = BudgetState(Budget("acme", "day", tokens=10), 12, 0.0, 0.0, time.time() + 1000, ("tokens",))
    limits = Limits(Table(spent), ())
    watching = asyncio.create_task(limits.watch_budgets())
    await until(lambda: limits._budgets, 5, "the first look")
    with pytest.raises(ClientFault, match="10 tokens of this day") as caught:
        limits.admit("acme")
    assert caught.value.code == "budget_spent"
    assert 990 < caught.value.details["retry_after_s"] <= 1000
    limits.admit("initech")
    watching.cancel()


def lines(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "logs" / FILE).read_text().splitlines()]


@pytest.mark.parametrize("content", [False, True])
def test_the_audit_says_who_did_what_and_not_what_was_said(tmp_path: Path, content: bool) -> None:
    audit = Audit(tmp_path, AuditSettings(content=content))
    audit.note(KEY, "server/1.classify", "news", time.time() - 0.5, "ok", (7, 3), "t1", {"input": ["Ada\nL."]}, {"results": []})
    audit.note(KEY, "server/1.generate", "chat", time.time(), "busy")
    audit.close()
    first, second = lines(tmp_path)
    said = {"key": "k1", "tenant": "acme", "method": "server/1.classify", "model": "news", "outcome": "ok"}
    assert first.items() >= said.items()
    assert (first["input_tokens"], first["output_tokens"], first["trace"]) == (7, 3, "t1")
    assert 400 < first["took_ms"] < 5000
    assert second["outcome"] == "busy"
    assert ("Ada" in (tmp_path / "logs" / FILE).read_text()) is content
    assert (tmp_path / "logs" / FILE).stat().st_mode & 0o777 == 0o600


def test_the_audit_is_set_aside_at_its_size_and_can_be_off(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "a", AuditSettings(megabytes=1, files=2))
    for _ in range(12_000):
        audit.note(KEY, "server/1.classify", "n" * 200, time.time(), "ok")
    audit.close()
    assert sorted(p.name for p in (tmp_path / "a" / "logs").iterdir()) == [FILE, f"{FILE}.1", f"{FILE}.2"]
    off = Audit(tmp_path / "b", AuditSettings(enabled=False))
    off.note(KEY, "server/1.classify", "news", time.time(), "ok")
    off.close()
    assert not (tmp_path / "b").exists()


def test_an_audit_that_can_not_be_written_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in its place")
    with pytest.raises(ClientFault, match="audit can't be written") as caught:
        Audit(tmp_path, AuditSettings())
    assert "enabled = false" in caught.value.remedy


@pytest.mark.parametrize(("text", "says"), [
    ("[oidc]\nissuer = 'x'", "audience"), ("[[limits]]\ntenant = 'a'\nrequests = 3", "requests"),
    ("[[limits]]\ntenant = 'a'\n[[limits]]\ntenant = 'a'", "twice"), ("[audit", "gateway.toml"),
])  # fmt: skip
def test_a_policy_that_is_none_names_file_and_field(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "gateway.toml").write_text(text)
    with pytest.raises(ClientFault) as caught:
        read_policy(tmp_path)
    assert says in caught.value.message
    assert str(tmp_path) in caught.value.message
