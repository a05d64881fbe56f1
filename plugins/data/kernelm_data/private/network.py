"""E-mail and IP addresses."""

import ipaddress
import re
from collections.abc import Iterator

import re2

from kernelm_data.private.spans import LEFT, WIDEST, Span, near

# RFC 5321 4.5.3.1: a local part of at most 64, a domain of at most 255 characters; quoted local parts are not looked for
EMAIL = re2.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}")
LONGEST_DOMAIN = 255
BEFORE_EMAIL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-@")
AFTER_EMAIL = re.compile(r"[A-Za-z0-9_]|[-.][A-Za-z0-9]|:[A-Za-z0-9_.-]{1,64}/")  # more of a word; the path of git@host:path/
SOFTWARE = ("git", "hg", "svn")  # git@host: the user of a version control system's server
FILES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".css", ".js", ".py")  # icon@2x.png

HINT = r"\d\.\d{1,3}\.\d{1,3}\.\d|[23][0-9a-fA-F]{3}:[0-9a-fA-F]{0,4}:"
ADDRESS_HINT = re2.compile(HINT)
V4 = re.compile(r"(?<![0-9A-Za-z_])(?<![0-9A-Za-z][-.=])(?=((?:\d{1,3}\.){3}\d{1,3})(?![0-9A-Za-z_])(?![.-][0-9A-Za-z]))")
V6 = re.compile(r"(?<![0-9A-Za-z_:.])([23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}[0-9a-fA-F:])(?![0-9A-Za-z_:])(?!\.\d)")
ADDRESS = near("ip", "ips", "address", "host", "hostname", "ping", "dns", "server", "client", "from", "remote", "地址")
VERSION = re.compile(r"(?i)(?:\b(?:version|versions|ver|v|release|released|build|firmware|driver|upgrade to|section|chapter|figure"
                     r"|table|python|chrome|windows)|[vV=<>~^§]|版本|版)[\s:.=v]{0,3}\Z")  # fmt: skip


def find_email(text: str) -> Iterator[Span]:
    for match in EMAIL.finditer(text):
        start, end = match.span()
        local, _, domain = match[0].partition("@")
        if (start and text[start - 1] in BEFORE_EMAIL) or AFTER_EMAIL.match(text, end) or len(domain) > LONGEST_DOMAIN:
            continue
        if ".." in local or local.endswith(".") or local.lower() in SOFTWARE or domain.lower().endswith(FILES):
            continue
        yield Span(start, end, "email", 0.99, "email")


def find_ip(text: str) -> Iterator[Span]:
    """Addresses that are routed on the Internet: a private or loopback address says nothing about a person."""
    for hint in ADDRESS_HINT.finditer(text):
        start = hint.start()
        pattern = V6 if ":" in hint[0] else V4
        match = pattern.search(text, max(start - 2, 0), min(start + WIDEST, len(text)))  # the hint may start within a number
        if match is None or match.start(1) > start or not _is_global(match[1]):
            continue
        if pattern is V6 or not _numbered(match[1], text[max(match.start(1) - LEFT, 0) : match.start(1)]):
            yield Span(*match.span(1), "ip", 0.95, "IPv6" if pattern is V6 else "IPv4")


def _is_global(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _numbered(number: str, left: str) -> bool:
    """Is it the number of a version, a section or an object identifier? Few addresses have fewer than 7 digits."""
    return VERSION.search(left) is not None or (len(number) < 7 + 3 and ADDRESS.search(left) is None)
