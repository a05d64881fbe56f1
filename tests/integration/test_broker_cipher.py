"""What the broker writes is encrypted where that is asked for: nothing readable on its disk, nothing to be had without the key."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernelm.testing.harness import System
from kernelm_authority.broker import Broker, new_cipher
from kernelm_authority.identity import init_home
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Empty, Kernel, KeyRequest

SECRET = "ada-lovelace-the-patient"


def stored(home: Path) -> bytes:
    return b"".join(p.read_bytes() for p in (home / "broker" / "jetstream").rglob("*") if p.is_file())


async def test_records_are_encrypted_on_disk_and_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cipher = tmp_path / "cipher.conf"
    new_cipher(cipher)
    assert cipher.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("KERNELM_BROKER_CIPHER", str(cipher))
    home = tmp_path / "home"
    async with System(home) as system:
        await system.admin.call(Kernel.create_key, KeyRequest(SECRET))
        assert SECRET.encode() not in stored(home)
    async with System(home) as system:
        keys = (await system.admin.call(Kernel.list_keys, Empty())).keys
        assert [k.name for k in keys] == [SECRET]
    monkeypatch.delenv("KERNELM_BROKER_CIPHER")
    plain = tmp_path / "plain"
    async with System(plain) as system:  # so that the search above can fail
        await system.admin.call(Kernel.create_key, KeyRequest(SECRET))
        assert SECRET.encode() in stored(plain)


async def test_a_broker_that_was_plain_is_encrypted_at_its_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    async with System(home) as system:
        await system.admin.call(Kernel.create_key, KeyRequest(SECRET))
        assert SECRET.encode() in stored(home)
    new_cipher(tmp_path / "cipher.conf")
    monkeypatch.setenv("KERNELM_BROKER_CIPHER", str(tmp_path / "cipher.conf"))
    async with System(home) as system:
        assert [k.name for k in (await system.admin.call(Kernel.list_keys, Empty())).keys] == [SECRET]
        assert SECRET.encode() not in stored(home)


async def test_the_wrong_key_or_none_is_refused_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, home = tmp_path / "right.conf", tmp_path / "wrong.conf", tmp_path / "home"
    new_cipher(right)
    new_cipher(wrong)
    monkeypatch.setenv("KERNELM_BROKER_CIPHER", str(right))
    async with System(home) as system:
        await system.admin.call(Kernel.create_key, KeyRequest(SECRET))
    monkeypatch.setenv("KERNELM_BROKER_CIPHER", str(wrong))
    with pytest.raises(ClientFault, match="is not the key"):
        Broker(home, system.authority).write_config()
    monkeypatch.delenv("KERNELM_BROKER_CIPHER")
    with pytest.raises(ClientFault, match="no key is given"):
        Broker(home, system.authority).write_config()
    monkeypatch.setenv("KERNELM_BROKER_CIPHER", str(right))
    async with System(home) as system:
        assert [k.name for k in (await system.admin.call(Kernel.list_keys, Empty())).keys] == [SECRET]


def test_a_file_that_is_not_there_is_named_and_none_is_overwritten(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, "-m", "kernelm_authority.broker", "new-cipher", str(tmp_path / "c")], check=True)
    assert made.returncode == 0
    again = subprocess.run([sys.executable, "-m", "kernelm_authority.broker", "new-cipher", str(tmp_path / "c")],
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert (again.returncode, "is there already" in again.stderr) == (1, True)
    broker = Broker(tmp_path / "h", init_home(tmp_path / "h"), cipher=tmp_path / "none")
    with pytest.raises(ClientFault, match="there is no file"):
        broker.write_config()
