"""A certificate authority of a deployment's own: X.509 certificates for TLS among its members and at its gateway.

    <folder>/ca.pem, ca.key     the CA; its key is needed to issue, and by nobody that runs
    <member>/tls.pem            certificate and key of a member in one file, so that they are replaced as one
    <member>/ca.pem             whom it believes; two CAs while one takes the place of another

Source: RFC 5280; CA/Browser Forum, Baseline Requirements (names in subjectAltName, at most 398 days).
"""

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kernelm_authority.files import write_secret
from kernelm_sdk.errors import ClientFault

CA_DAYS, DAYS = 3650, 397
EARLIER = timedelta(hours=2)  # valid from, before now: clocks differ


class CertificateAuthority:
    """The CA in `folder`: read, or made where there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._certificate_file, self._key_file = folder, folder / "ca.pem", folder / "ca.key"
        if not self._key_file.exists():
            self._make()
        try:
            key = serialization.load_pem_private_key(self._key_file.read_bytes(), None)
            self.certificate = x509.load_pem_x509_certificate(self._certificate_file.read_bytes())
        except (OSError, ValueError) as error:
            raise ClientFault("bad_certificate", f"{folder}: the CA can't be read: {error}", "restore it from a backup") from None
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kernelm CA {serial:x}"[:60])])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        built = _builder(name, name, key, CA_DAYS, serial).add_extension(x509.BasicConstraints(True, 0), True)
        certificate = built.add_extension(usage, True).sign(key, hashes.SHA256())
        write_secret(self._key_file, _pem(key))
        write_secret(self._certificate_file, certificate.public_bytes(serialization.Encoding.PEM).decode())

    def issue(self, member: str, hosts: Iterable[str], into: Path, days: float = DAYS, believed: str = "") -> None:
        """Write a member's `tls.pem` and `ca.pem` into a folder. `hosts`: names and addresses that it serves under, none for a
        client. `believed`: PEM of another CA that it accepts as well."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
        names = [*hosts]
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if names else [])]
        built = _builder(subject, self.certificate.subject, key, days).add_extension(x509.BasicConstraints(False, None), True)
        built = built.add_extension(x509.ExtendedKeyUsage(uses), False)
        built = built.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        if names:
            built = built.add_extension(x509.SubjectAlternativeName([_host(n) for n in names]), False)
        certificate = built.sign(self._key, hashes.SHA256())
        write_secret(into / "ca.pem", self._certificate_file.read_text() + believed)
        write_secret(into / "tls.pem", certificate.public_bytes(serialization.Encoding.PEM).decode() + _pem(key))


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file; ClientFault if there is none."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise ClientFault("bad_certificate", f"{path} holds no certificate: {error}", "`kernelm deploy rotate` makes one") from None


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float,
             serial: int = 0) -> x509.CertificateBuilder:  # fmt: skip
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(issuer, subject, key.public_key(), serial or x509.random_serial_number())
    made = made.not_valid_before(now - EARLIER).not_valid_after(now + timedelta(days=days))
    return made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
