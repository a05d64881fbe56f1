"""Who may, and how much: `<home>/gateway.toml`, read at the start.

    [oidc]                            # tokens of an OpenID Connect issuer are accepted beside API keys
    issuer = "https://login.acme.example"
    audience = "kernelm"
    [oidc.roles.analysts]             # the claim `roles` of the token says which of these its bearer has
    tenant = "acme"
    models = ["news"]
    methods = ["classify"]

    [[limits]]                        # of a tenant; "*" for each tenant that has no entry of its own
    tenant = "acme"
    requests_per_minute = 600
    tokens_per_minute = 100_000

    [private]                         # what is always redacted, of a tenant; "*" for those without an entry
    acme = "both"                     # or "prompt", "answer"

    [audit]
    content = false                   # whether requests and answers are written down as well
"""

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from kernelm_sdk.errors import ClientFault

FILE = "gateway.toml"


class Role(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bearer of a token may do, as `kernelm_sdk.system.Key` says it of a key."""

    tenant: str = "default"
    models: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)
    admin: bool = False


class Oidc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issuer: str  # its URL; below it lies /.well-known/openid-configuration
    audience: str  # for whom its tokens are made: another audience's are refused
    roles: dict[str, Role]
    claim: str = "roles"  # of the token: a role, or a list of roles
    algorithms: tuple[str, ...] = ("RS256", "PS256", "ES256", "EdDSA")


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one gateway; 0 for no limit."""

    tenant: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # read and made, counted when they are known: what is over counts against the next calls


class AuditSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool = True
    content: bool = False
    megabytes: int = 100  # of `logs/audit.jsonl`; then it is set aside as audit.jsonl.1, and so on
    files: int = 10  # that are kept


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    oidc: Oidc | None = None
    limits: tuple[Limit, ...] = ()
    private: dict[str, Literal["", "prompt", "answer", "both"]] = {}
    audit: AuditSettings = AuditSettings()


def read_policy(home: Path) -> Policy:
    """The policy of a home, the defaults where it has no file; ClientFault that names file and field."""
    path = home / FILE
    try:
        policy = msgspec.convert(tomllib.loads(path.read_text()), Policy) if path.exists() else Policy()
    except (OSError, ValueError) as error:  # ValidationError is one
        raise ClientFault("invalid", f"{path}: {error}", "see services/gateway/README.md, 'Access'") from None
    twice = {limit.tenant for limit in policy.limits if sum(other.tenant == limit.tenant for other in policy.limits) > 1}
    if twice:
        raise ClientFault("invalid", f"{path}: `limits` has tenant {min(twice)!r} twice", "leave one entry")
    return policy
