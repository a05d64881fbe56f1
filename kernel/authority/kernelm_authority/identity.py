"""Keys and claims: who is who, and what each may do, in the form that the broker enforces (NATS JWT v2, nkeys).

The operator key signs the account's claims, a signing key of the account (signing.py) signs its users; they stay in
`<home>/identity` (0700) with the kernel and the launcher. Everyone else makes its own key, proves a one-time join token,
and gets a JWT whose allow lists are compiled here, deny by default. The last token of a subject is the user's name, so
nobody can speak for another.
"""

import base64
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import nkeys
from nacl.signing import VerifyKey

from kernelm_authority.clock import Clock
from kernelm_authority.files import write_secret
from kernelm_authority.signing import SigningKeys
from kernelm_sdk.bus import Credentials
from kernelm_sdk.contract import token as subject_token
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system.common import PLUGIN_EVENT


def _seconds(name: str, default: int, least: int) -> int:
    """Whole seconds from the environment; ends the process if they are none."""
    given = os.environ.get(name, "")
    if given and not (given.isdecimal() and int(given) >= least):
        raise SystemExit(f"{name} is {given!r}: give whole seconds, {least} or more")
    return int(given or default)


LIFETIME_S = _seconds("KERNELM_JWT_LIFETIME_S", 24 * 3600, 1)  # of a user's JWT; renewed at two thirds
LEASE_S = _seconds("KERNELM_LEASE_S", 5, 2)  # without a sign of life, and a member is taken for dead; the broker cuts fractions
ROLES = {"operator": nkeys.PREFIX_BYTE_OPERATOR, "account": nkeys.PREFIX_BYTE_ACCOUNT, "system": nkeys.PREFIX_BYTE_ACCOUNT}
# Of the system's own services: the buckets they write, the buckets they only read, and what they call ("*" for everything
# but what is denied below).
SERVICES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "jobs": (("jobs", "runs", "results", "deployments", "usage"), ("registry",), ("*",)),
    "artifacts": (("datasets", "models"), (), ("kernel/1.state", "artifacts/1")),
    "gateway": ((), ("keys", "deployments", "jobs", "runs"), ("*",)),
    "node": ((), (), ("kernel/1.exited", "kernel/1.state", "artifacts/1")),
}
# Of kernel/1, to all services: only an administrator gives rights away, or takes them.
DENIED = ("create-key", "rotate-key", "revoke-key", "forget-machine")


class Grant(msgspec.Struct, frozen=True):
    """Who a token or JWT is for: compiled to allow lists by `permissions`, carried in the JWT's tags by the signer."""

    role: str  # "admin", "service", "plugin", "client", "join", "machine"
    name: str
    pool: str = ""  # of a "machine": the member of it that comes back
    plugin: str = ""
    calls: tuple[str, ...] = ()  # "contract/major" or "contract/major.method"
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    events: tuple[str, ...] = ()  # "domain.name" that a plugin may publish


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(claims: dict[str, Any], seed: str) -> str:
    """A NATS JWT (v2, ed25519-nkey) of `claims`, signed with `seed`."""
    claims = {"jti": "", "iat": int(time.time()), "iss": public_key(seed), **claims}
    claims["jti"] = base64.b32encode(hashlib.sha256(msgspec.json.encode(claims)).digest()).rstrip(b"=").decode()
    head = _b64(b'{"typ":"JWT","alg":"ed25519-nkey"}') + "." + _b64(msgspec.json.encode(claims))
    return f"{head}.{_b64(nkeys.from_seed(seed.encode()).sign(head.encode()))}"


def _tag(kind: str, grant: Grant) -> str:
    """A grant as a JWT's tag: tags are lower-cased by some tools, and base32 survives that."""
    return f"{kind}:{base64.b32encode(msgspec.json.encode(grant)).decode()}"


def read(jwt: str, *issuers: str, now: float = 0.0) -> dict[str, Any]:
    """The claims of a JWT; with `issuers`, ClientFault "unauthorized" unless one of them signed it and it has not expired `now`
    (Unix seconds; 0: by this machine's clock)."""
    try:
        head, _, signature = jwt.strip().rpartition(".")
        claims: dict[str, Any] = msgspec.json.decode(base64.urlsafe_b64decode(head.partition(".")[2] + "==="))
        if issuers:
            if (issuer := claims["iss"]) not in issuers or 0 < claims.get("exp", 0) < (now or time.time()):
                raise ValueError("another issuer, or expired")
            raw = base64.b32decode(issuer + "=" * (-len(issuer) % 8))[1:-2]  # prefix byte, key, CRC16
            VerifyKey(raw).verify(head.encode(), base64.urlsafe_b64decode(signature + "==="))
    except Exception as error:
        raise ClientFault("unauthorized", f"the token is not valid: {error}", "get a new one") from None
    return claims


def permissions(grant: Grant) -> tuple[list[str], list[str]]:
    """(publish, subscribe) allow lists. Publish permission is checked on the mapped subject, so both forms are listed:
    `svc.x` lets an unrouted call come back as "no responders" instead of as a denial. Replies go to the inbox that the
    caller named: its name holds 128 random bits, and only its owner may listen on it."""
    me = grant.name
    publish, subscribe = ["_INBOX.*.>"], [f"_INBOX.{me}.>"]

    def may_call(*tails: str) -> None:
        for tail in tails:
            publish.extend([f"svc.{tail}.{me}" if not tail.startswith("model.") else f"{tail}.{me}", f"impl.*.{tail}.{me}"])

    if grant.role in ("join", "machine"):
        may_call("kernel.v1.enroll")
        return publish[1:], subscribe  # it answers nobody
    if grant.role == "client":
        may_call(*(f"model.{model}.{method}" for model in grant.models for method in grant.methods))
        return publish, subscribe
    if grant.role == "plugin":  # under its own name alone, and nothing that would be taken for the system's word
        publish.extend(f"evt.{event}.{me}" for event in grant.events if PLUGIN_EVENT.fullmatch(event))
    else:
        publish.append(f"evt.*.*.{me}")
    writes, reads, calls = SERVICES.get(me.partition("-")[0], ((), (), ())) if grant.role == "service" else ((), (), grant.calls)
    if grant.role == "admin" or "*" in calls:
        may_call("*.*.*", "model.*.*")
        publish.append(f"inst.*.*.*.*.{me}")
    else:
        may_call("kernel.v1.hello", "kernel.v1.ready", "kernel.v1.renew")
        for call in calls:
            contract, _, method = call.partition(".")
            may_call(f"{contract.replace('/', '.v')}.{method or '*'}")
    if grant.role == "plugin":
        may_call("work.v1.report", "work.v1.used", "artifacts.v1.put", "artifacts.v1.open", "artifacts.v1.describe")
    else:
        subscribe.append("evt.>")
    if grant.role == "admin":
        publish.extend(["$JS.API.DIRECT.GET.>", "$SRV.>"])
        return publish, subscribe
    if grant.role == "service":
        publish.extend(f"$KV.{bucket}.>" for bucket in writes)
        publish.extend(f"$JS.API.DIRECT.GET.KV_{bucket}{end}" for bucket in writes + reads for end in ("", ".>"))
        publish.extend(["$JS.API.DIRECT.GET.EVT", f"dlq.{me}.>"])
    publish.append(f"$KV.leases.{me}")
    publish.extend(f"inst.*.artifacts.v1.{method}.{me}" for method in ("open", "put"))  # of the mirror on its machine
    subscribe.extend([f"impl.{grant.pool or me}.>", f"inst.{me}.>", "$SRV.>"])
    return publish, subscribe


class Authority:
    """The keys of one home. `init_home` makes them; only the kernel and the launcher read them. `clock` dates what they sign: the
    kernel's follows the broker; the others run on the broker's machine, by its clock."""

    def __init__(self, home: Path) -> None:
        self.home = home
        folder = home / "identity"
        self._seeds = {role: (folder / f"{role}.seed").read_text().strip() for role in ROLES}
        self.operator, self.account, self.system = (public_key(self._seeds[r]) for r in ("operator", "account", "system"))
        self.lookup = f"$SYS.REQ.ACCOUNT.{self.account}.CLAIMS.LOOKUP"  # subject that answers with the account's claims in force
        self.clock = Clock()
        self.signing = SigningKeys(folder / "signing", LIFETIME_S, self.clock)

    def operator_jwt(self) -> str:
        nats = {"type": "operator", "version": 2, "system_account": self.system}
        return sign({"name": "kernelm", "sub": self.operator, "nats": nats}, self._seeds["operator"])

    def account_jwt(self, which: str = "account", mappings: dict[str, Any] | None = None,
                    revocations: dict[str, int] | None = None, iat: int = 0) -> str:  # fmt: skip
        """Claims of the kernelm account (or "system"): the routing table and the revocations in force."""
        limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
        if which == "account":
            limits |= {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        nats = {"type": "account", "version": 2, "limits": limits, "default_permissions": {"pub": {}, "sub": {}}}
        signing = self.signing.public() if which == "account" else []
        nats |= {k: v for k, v in (("mappings", mappings), ("revocations", revocations), ("signing_keys", signing)) if v}
        claims = {"name": f"kernelm-{which}", "sub": getattr(self, which), "nats": nats, "iat": iat or int(self.clock())}
        return sign(claims, self._seeds["operator"])

    def user_jwt(self, name: str, key: str, publish: Iterable[str], subscribe: Iterable[str], lifetime_s: int = LIFETIME_S,
                 account: str = "account", tags: Iterable[str] = (), deny: Iterable[str] = ()) -> tuple[str, int]:  # fmt: skip
        """(JWT, expiry in Unix seconds; 0 with `lifetime_s` 0 for never) for the user `name` who holds `key`."""
        nats = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "tags": list(tags),
                "pub": {"allow": list(publish), "deny": list(deny)}, "sub": {"allow": list(subscribe)}}  # fmt: skip
        claims: dict[str, Any] = {"name": name, "sub": key, "nats": nats, "iat": int(self.clock())}
        seed = self._seeds[account]
        if lifetime_s:
            claims["exp"] = claims["iat"] + lifetime_s
            if account == "account" and lifetime_s <= LIFETIME_S and (signing := self.signing.in_use()):  # else it would outlive it
                seed, nats["issuer_account"] = signing, self.account
        return sign(claims, seed), claims.get("exp", 0)

    def credentials(self, name: str, account: str = "account") -> Credentials:
        """The kernel's own, all-mighty in the account; with account "system" for pushing claims."""
        seed = new_seed()
        jwt, _ = self.user_jwt(name, public_key(seed), [">"], [">"], 0, account)
        return Credentials(name, jwt, seed)

    def issue(self, grant: Grant, key: str, lifetime_s: int = LIFETIME_S) -> tuple[str, int]:
        """A JWT for `grant`, with the allow lists compiled in. That of a further machine's member lets its holder enroll as that
        member, any number of times, until it is forgotten: so it has no end."""
        publish, subscribe = permissions(grant)
        tag = _tag("grant", grant)
        if grant.role == "machine":
            tag, lifetime_s = _tag("join", Grant("service", grant.pool, pool=grant.pool)), 0
        deny = [f"{to}.kernel.v1.{m}.{grant.name}" for m in DENIED for to in ("svc", "impl.*", "inst.*")]
        return self.user_jwt(grant.name, key, publish, subscribe, lifetime_s, tags=[tag],
                             deny=deny if grant.role == "service" else ())  # fmt: skip

    def token(self, name: str, grant: Grant | None = None, ttl_s: int = 600) -> str:
        """A one-time join token for the service `name`, or for what `grant` says. It can do one thing: enroll."""
        grant = grant or Grant("service", subject_token(name), pool=name)
        seed, identifier = new_seed(), f"join-{secrets.token_hex(8)}"
        publish, subscribe = permissions(Grant("join", identifier))
        jwt, expires = self.user_jwt(identifier, public_key(seed), publish, subscribe, ttl_s, tags=[_tag("join", grant)])
        return _b64(msgspec.json.encode(Credentials(identifier, jwt, seed, expires)))

    def verify(self, jwt: str, kind: str) -> tuple[str, Grant, int]:
        """(name, grant, seconds that it is still good for, 0 for ever) of a JWT of ours, `kind` being "join" or "grant";
        ClientFault "unauthorized" otherwise."""
        now = self.clock()
        claims = read(jwt, self.account, *self.signing.public(), now=now)
        for tag in claims["nats"].get("tags", []):
            if tag.lower().startswith(f"{kind}:"):
                grant = msgspec.json.decode(base64.b32decode(tag[len(kind) + 1 :].upper()), type=Grant)
                return claims["name"], grant, max(int(claims["exp"] - now), 1) if claims.get("exp") else 0
        raise ClientFault("unauthorized", f"not a {kind} token", "get one from `kernelm`")


def init_home(home: Path) -> Authority:
    """Make the folders and keys of a home where there are none; the authority over it."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = not (home / "identity").exists()
    for role, prefix in ROLES.items():
        path = home / "identity" / f"{role}.seed"
        if not path.exists():
            write_secret(path, new_seed(prefix))
    authority = Authority(home)
    if new:  # an older home gets its first one from `kernelm identity rotate`, once its broker knows it
        authority.signing.prepare()
        authority.signing.use_next()
    if not (home / "admin.creds").exists():
        seed = new_seed()
        jwt, _ = authority.issue(Grant("admin", "admin"), public_key(seed), 0)
        write_secret(home / "admin.creds", msgspec.json.encode(Credentials("admin", jwt, seed)).decode())
    return authority


def admin(home: Path) -> Credentials:
    """The administrator's credentials of a home; ClientFault if it has none."""
    with contextlib.suppress(OSError):
        return msgspec.json.decode((home / "admin.creds").read_bytes(), type=Credentials)
    raise ClientFault("no_home", f"{home} is no kernelm home that you may read", "run `kernelm up`, or give --home")
