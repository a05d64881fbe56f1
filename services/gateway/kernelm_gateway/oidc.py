"""Tokens of an OpenID Connect issuer in place of API keys.

Source: OpenID Connect Core 1.0, section 3.1.3.7 (what is checked), and Discovery 1.0, section 4 (where the keys are). Keys are
fetched when they are first needed and again when a token names one that is not known, at most every REFETCH_S: an issuer may
change its keys at any time, and whoever sends nonsense must not make us ask it each time.
"""

import asyncio
import hashlib
import time
from typing import Any

import httpx
import jwt

from kernelm_gateway.policy import Oidc
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Key

REFETCH_S = 30.0
FETCH_TIMEOUT_S = 5.0
LEEWAY_S = 30  # that clocks may differ


class Issuer:
    """Checks tokens of one issuer."""

    def __init__(self, settings: Oidc) -> None:
        self._settings = settings
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = float("-inf")
        self._fetching = asyncio.Lock()

    @staticmethod
    def looks_like_one(credential: str) -> bool:
        """Whether it has the form of a JWT."""
        return credential.count(".") == 2 and credential.startswith("ey")

    async def check(self, token: str) -> Key:
        """What the bearer of the token may do, as if it were a key. ClientFault "unauthorized" or "permission_denied"; KernelFault
        "issuer_unreachable"."""
        try:
            head = jwt.get_unverified_header(token)
            key = await self._key(str(head.get("kid", "")))
            claims = jwt.decode(token, key, algorithms=list(self._settings.algorithms), audience=self._settings.audience,
                                issuer=self._settings.issuer, leeway=LEEWAY_S,
                                options={"require": ["exp", "iat", "sub", "aud", "iss"]})  # fmt: skip
        except jwt.PyJWTError as error:
            remedy = f"get a new one from {self._settings.issuer}"
            raise ClientFault("unauthorized", f"the token is not valid: {error}", remedy) from None
        return self._as_key(claims)

    def _as_key(self, claims: dict[str, Any]) -> Key:
        given = claims.get(self._settings.claim, [])
        roles = [self._settings.roles[r] for r in ([given] if isinstance(given, str) else given) if r in self._settings.roles]
        if not roles:
            raise ClientFault("permission_denied", f"the token's {self._settings.claim!r} names no role that is known here",
                              f"ask for one of: {', '.join(sorted(self._settings.roles))}")  # fmt: skip
        if len(tenants := {role.tenant for role in roles}) > 1:
            raise ClientFault("permission_denied", f"the token's roles belong to several tenants: {', '.join(sorted(tenants))}",
                              "use a token for one of them")  # fmt: skip
        subject = str(claims["sub"])
        return Key(f"oidc-{hashlib.sha256(subject.encode()).hexdigest()[:12]}", subject, "",
                   tuple(sorted({m for role in roles for m in role.models})),
                   tuple(sorted({m for role in roles for m in role.methods})), tenants.pop(), int(claims["iat"]),
                   int(claims["exp"]), admin=any(role.admin for role in roles))  # fmt: skip

    async def _key(self, identifier: str) -> jwt.PyJWK:
        """The issuer's key of that name; its only one for a token that names none (Core, section 10.1)."""
        if identifier not in self._keys and (identifier or not self._keys):
            async with self._fetching:
                if identifier not in self._keys and time.monotonic() - self._fetched > REFETCH_S:
                    await self._fetch()
        if not identifier and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if (key := self._keys.get(identifier)) is None:
            raise jwt.InvalidTokenError("the issuer has no key of that name")
        return key

    async def _fetch(self) -> None:
        where = f"{self._settings.issuer.rstrip('/')}/.well-known/openid-configuration"
        try:
            async with httpx.AsyncClient(timeout=FETCH_TIMEOUT_S, trust_env=False) as client:
                found = (await client.get(where)).raise_for_status().json()
                if found.get("issuer") != self._settings.issuer:
                    raise ValueError(f"it says that it is {found.get('issuer')!r}")
                keys = jwt.PyJWKSet.from_dict((await client.get(found["jwks_uri"])).raise_for_status().json()).keys
        except (httpx.HTTPError, ValueError, KeyError, jwt.PyJWTError) as error:
            why = str(error) or type(error).__name__
            raise KernelFault("issuer_unreachable", f"the keys of {self._settings.issuer} can't be had: {why}",
                              "is `oidc.issuer` in gateway.toml right, and is it up? API keys go on working",
                              retriable=True) from None  # fmt: skip
        self._keys = {key.key_id or "": key for key in keys}
        self._fetched = time.monotonic()
