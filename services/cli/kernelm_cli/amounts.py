"""Amounts as people type them: 5%, 30s, 2x, KEY=VALUE. Each fault names the option."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from kernelm_sdk.errors import ClientFault

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def share(option: str, text: str) -> float:
    """"1%" or "0.5%" as a part of 1."""
    number = _number(option, text, "%", "e.g. 1%, 0.5%, 100%")
    if number > 100:
        raise ClientFault("invalid", f"{option} {text!r} is more than 100%", "0% to 100%")
    return number / 100


def percent(option: str, text: str) -> int:
    """"5%" as 5; whole percents below 100, as the broker weighs routes; "" is 0."""
    if not text:
        return 0
    remedy = "1% to 99%, in whole percents, e.g. 5%; leave it out for all the calls at once"
    number = _number(option, text, "%", remedy)
    if not 1 <= number < 100 or number != int(number):
        raise ClientFault("invalid", f"{option} {text!r} is no share of the calls", remedy)
    return int(number)


def ratio(option: str, text: str) -> float:
    """"2x" as 2.0."""
    number = _number(option, text, "x", "e.g. 2x, 1.5x: that many times the p99 of the pool that is replaced")
    if number < 1:
        raise ClientFault("invalid", f"{option} {text!r} is less than 1x", "1x or more: that many times the p99 of the old pool")
    return number


def seconds(option: str, text: str) -> float:
    """"30s", "500ms", "2m" in seconds; "0" is 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", "0s" if text == "0" else text)
    if match is None:
        raise ClientFault("invalid", f"{option} {text!r} is no duration", "e.g. 30s, 500ms, 2m, or 0 for none")
    return float(match[1]) * UNITS[match[2]]


def _number(option: str, text: str, unit: str, remedy: str) -> float:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?){unit}", text)
    if match is None:
        raise ClientFault("invalid", f"{option} {text!r} is no number with {unit}", remedy)
    return float(match[1])


def settings(given: tuple[str, ...]) -> dict[str, Any] | None:
    """KEY=VALUE pairs and TOML or JSON files, the later ones over the earlier; None if there are none. A value is JSON where it
    is valid JSON, else text; a dotted key reaches into a table."""
    if not given:
        return None
    result: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or Path(text).is_file():
            result |= _file(Path(text).expanduser())
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
            raise ClientFault("invalid", f"--settings {text!r}: {key!r} is no key", "KEY=VALUE, or table.KEY=VALUE")
        *tables, last = key.split(".")
        place = result
        for name in tables:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ClientFault("invalid", f"--settings {text!r}: {name!r} is a value already", "give one or the other")
        place[last] = _value(value)
    return result


def _file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ClientFault("invalid", f"--settings {str(path)!r} is neither KEY=VALUE nor a file",
                          "e.g. --settings threads=4, or --settings plugin.toml")  # fmt: skip
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except ValueError as error:  # of both parsers, and of text that is no UTF-8
        raise ClientFault("invalid", f"--settings {path}: {error}", "a .toml or .json file with the plugin's settings") from None
    if not isinstance(content, dict):
        raise ClientFault("invalid", f"--settings {path}: it holds no object", 'settings are an object: {"threads": 4}')
    return content


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
