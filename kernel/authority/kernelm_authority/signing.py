"""The account's signing keys: what members' JWTs are signed with, so that it can be replaced while they work.

    <home>/identity/signing/next.seed       the broker shall know it; nothing is signed with it yet
    <home>/identity/signing/<since>.seed    in use since then (Unix seconds), until there is a later one

A key that was replaced stays in the account's claims for as long as a JWT that it signed may live. The account's own key
always counts, and signs what never expires; so it is better kept for that alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nkeys

from kernelm_authority.files import write_secret
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import ClientFault


class SigningKey(NamedTuple):
    public: str
    seed: str
    since: int  # Unix seconds; 0: not in use yet
    until: int  # Unix seconds: when the last JWT that it signed has expired; 0 for the one in use and the next

    def __repr__(self) -> str:  # a seed must not come into a log by accident
        return f"SigningKey({self.public}, since {self.since}, until {self.until})"


class SigningKeys:
    """Those of one home, read anew with every question: another process rotates them."""

    def __init__(self, folder: Path, lifetime_s: int, clock: Callable[[], float]) -> None:
        self._folder, self._lifetime_s, self._clock = folder, lifetime_s, clock

    def all(self) -> list[SigningKey]:
        """The one in use first, then those before it, and the next one at the end; without those that have run out."""
        found: list[SigningKey] = []
        successor = 0
        for path in sorted(self._folder.glob("[0-9]*.seed"), key=lambda p: -int(p.stem)):
            until = successor + self._lifetime_s if successor else 0
            if not until or until > self._clock():
                found.append(_read(path, int(path.stem), until))
            successor = int(path.stem)
        if self._next.exists():
            found.append(_read(self._next, 0, 0))
        return found

    @property
    def _next(self) -> Path:
        return self._folder / "next.seed"

    def in_use(self) -> str:
        """The seed to sign with; "" where there is none, and the account's own key has to do."""
        return next((key.seed for key in self.all() if key.since), "")

    def public(self) -> list[str]:
        """As the account's claims list them."""
        return sorted(key.public for key in self.all())

    def prepare(self) -> str:
        """Lay down a next key, or find the one that an earlier try has laid down; its public part."""
        if not self._next.exists():
            write_secret(self._next, new_seed(nkeys.PREFIX_BYTE_ACCOUNT))
        return _read(self._next, 0, 0).public

    def use_next(self, drop_others: bool = False) -> None:
        """Sign with the next key from now on. With `drop_others` nothing that another has signed counts any more."""
        earlier = list(self._folder.glob("[0-9]*.seed"))
        since = max([int(self._clock()), *(int(p.stem) + 1 for p in earlier)])
        self._next.rename(self._folder / f"{since}.seed")
        kept = set() if drop_others else {key.since for key in self.all()}
        for path in earlier:
            if int(path.stem) not in kept:
                path.unlink()


def _read(path: Path, since: int, until: int) -> SigningKey:
    seed = path.read_text().strip()
    try:
        return SigningKey(public_key(seed), seed, since, until)
    except Exception as error:
        raise ClientFault("invalid_key", f"{path} holds no seed: {type(error).__name__}", "restore it, or delete it") from None
