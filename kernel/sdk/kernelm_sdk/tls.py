"""TLS between members: certificates as files that the environment names, and what a failed handshake means.

    KERNELM_TLS_CA      whom we believe (PEM; several certificates while one replaces another)
    KERNELM_TLS_CERT    who we are, shown to whoever asks (PEM, the leaf first)
    KERNELM_TLS_KEY     its private key

The files are read anew for each context, so a renewed certificate is used from the next connection on.
"""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kernelm_sdk.errors import ClientFault, KernelFault

VARIABLES = ("KERNELM_TLS_CA", "KERNELM_TLS_CERT", "KERNELM_TLS_KEY")
ROTATE = "`kernelm deploy show` says which certificate is good until when, `kernelm deploy rotate` makes new ones"


class Files(NamedTuple):
    """The paths of one member's certificates."""

    ca: str
    certificate: str
    key: str


def files(environment: Mapping[str, str] = os.environ) -> Files | None:
    """Those that the environment names, None where it names none; ClientFault where it names some and not all."""
    given = [environment.get(name, "") for name in VARIABLES]
    if any(given) and not all(given):
        missing = ", ".join(name for name, value in zip(VARIABLES, given, strict=True) if not value)
        raise ClientFault("invalid", f"{missing} is not set, and the others are", f"set all of {', '.join(VARIABLES)}, or none")
    return Files(*given) if all(given) else None


def client_context() -> ssl.SSLContext:
    """For connecting: believes the CA alone, and shows our certificate. ClientFault "no_certificate", "bad_certificate"."""
    return refresh(_context(ssl.PROTOCOL_TLS_CLIENT))


def server_context(mutual: bool = False) -> ssl.SSLContext:
    """For listening; with `mutual` only those are let in who show a certificate of the same CA. Another certificate in the
    files is shown from the handshake after the next on."""
    context = refresh(_context(ssl.PROTOCOL_TLS_SERVER))
    context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
    shown = stamp()

    def on_hello(_: ssl.SSLObject | ssl.SSLSocket, __: str | None, ___: ssl.SSLContext) -> None:
        nonlocal shown
        if (now := stamp()) != shown:
            refresh(context)
            shown = now

    context.sni_callback = on_hello  # asked at every handshake, with a name or without
    return context


def refresh(context: ssl.SSLContext) -> ssl.SSLContext:
    """Have a context believe and show what lies in the files now; ClientFault if that is of no use."""
    given = needed()
    path = given.ca
    try:
        context.load_verify_locations(given.ca)
        path = given.certificate
        context.load_cert_chain(given.certificate, given.key)
    except OSError as error:  # SSLError among them
        reason = getattr(error, "reason", "") or error.strerror or str(error)
        raise ClientFault("bad_certificate", f"{path} can't be used: {reason}", ROTATE) from None
    return context


def stamp() -> int:
    """Another number when our certificate was replaced."""
    return Path(needed().certificate).stat().st_mtime_ns


def needed() -> Files:
    """The files; ClientFault "no_certificate" where the environment names none."""
    if (given := files()) is None:
        raise ClientFault("no_certificate", "TLS is asked for, and no certificates are named", f"set {', '.join(VARIABLES)}")
    return given


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def of_handshake(error: BaseException) -> bool:
    """Whether TLS itself has failed: what was on its way to us while the connection was closed has not."""
    return isinstance(error, ssl.SSLError) and error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"


def fault_of(error: BaseException, where: str) -> ClientFault | KernelFault:
    """What a failed handshake with `where` means: whose certificate is not accepted, and why."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ClientFault("bad_certificate", f"the certificate of {where} is not accepted: {error.verify_message}", ROTATE)
    reason = str(getattr(error, "reason", "") or error)
    if "ALERT" in reason.upper():  # the other side's word
        said = reason.upper().partition("ALERT_")[2].replace("_", " ").lower() or reason
        return ClientFault("bad_certificate", f"{where} does not accept our certificate: {said}", ROTATE)
    return KernelFault("no_tls", f"{where} does not speak TLS as we do: {reason}", "is the URL's scheme right?", retriable=True)
