"""`kernelm backup`, `kernelm restore`, `kernelm backup-key`: all that a system knows, as one encrypted file."""

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any

import pyrage
from cyclopts import Parameter

from kernelm_authority.broker import Broker
from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority
from kernelm_cli.backup_archive import Manifest, Writer, chunks, spool, unpack
from kernelm_cli.session import Common, running, stdout
from kernelm_sdk import snapshots
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault

AGE = b"age-encryption.org/v1\n"  # with which a file in age's format begins
BROKER_S = 20.0  # so long a restoring broker may take to start


def backup_key(path: Annotated[Path, Parameter(name="FILE")], /) -> int:
    """Make a key pair for backups: the secret into FILE, the recipient for `kernelm backup --to` on stdout. Keep FILE elsewhere."""
    if path.exists():
        raise ClientFault("exists", f"{path} is there already", "what it opens can't be opened without it: name a new file")
    identity = pyrage.x25519.Identity.generate()
    write_secret(path, f"{identity}\n")
    stdout().print(str(identity.to_public()))
    return 0


def backup(path: Annotated[Path, Parameter(name="FILE")], /, *, common: Common = Common(),
           to: Annotated[tuple[str, ...], Parameter(negative="")] = (),
           unencrypted: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Save streams, records, keys and artifacts of a running system to a new file.

    Parameters
    ----------
    to
        Who can read it: age recipients ("age1...", from `kernelm backup-key` or `age-keygen`); repeat the option for several.
    unencrypted
        Write it readable to all who get hold of the file. It holds the system's keys.
    """
    if bool(to) == unencrypted:
        raise ClientFault("invalid", "a backup holds the system's keys: for whom is it encrypted?",
                          "--to age1... (`kernelm backup-key FILE` makes a key), or --unencrypted")  # fmt: skip
    recipients = [_recipient(text) for text in to]
    if path.exists():
        raise ClientFault("exists", f"{path} is there already", "name a new file: nothing is overwritten")
    began, part = time.monotonic(), path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with tempfile.TemporaryDirectory(prefix=".kernelm-", dir=path.absolute().parent) as folder:
            described = asyncio.run(_spool(common.folder, Path(folder)))
            manifest = _write(part, recipients, lambda sink: _archive(sink, common.folder, Path(folder), described))
        part.rename(path)
    except OSError as error:
        raise KernelFault("storage", f"{path}: {error.strerror or error}", "is there room, may you write there?") from None
    finally:
        part.unlink(missing_ok=True)
    stdout().print(f"{path}: {_summary(manifest)}, {path.stat().st_size / 2**20:,.1f} MB, in {time.monotonic() - began:.1f} s")
    return 0


def restore(path: Annotated[Path, Parameter(name="FILE")], /, *, common: Common = Common(), key: Path | None = None,
            check: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Make a new home from a backup, every byte of it verified. `kernelm up` goes on from there.

    Parameters
    ----------
    key
        The file with the secret key, where the backup is encrypted.
    check
        Only verify the backup; no home is touched.
    """
    if check:
        with tempfile.TemporaryDirectory(prefix=".kernelm-") as folder:
            say(_read(path, key, Path(folder)), "is whole")
        return 0
    say(restored(path, common.folder, key), f"is restored to {common.folder}: kernelm up --home {common.folder}")
    return 0


def restored(path: Path, home: Path, key: Path | None, cipher: Path | None = None) -> Manifest:
    """Make the new home `home` from the backup `path`; the broker's files are encrypted with `cipher`, if that is given."""
    if home.exists() and any(home.iterdir()):
        raise ClientFault("exists", f"{home} is not empty", "give a new one, or move the old one away: nothing is overwritten")
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kernelm-", dir=home.parent) as folder:
        manifest = _read(path, key, Path(folder))
        asyncio.run(_restore_streams(Path(folder), manifest, cipher))
        _settle(Path(folder) / "home", manifest)
        home.exists() and home.rmdir()
        (Path(folder) / "home").rename(home)
    return manifest


def say(manifest: Manifest, then: str) -> None:
    """Tell what was saved, and what became of it."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
    stdout().print(f"{_summary(manifest)}, saved {when}: {then}")


async def _spool(home: Path, folder: Path) -> dict[str, Any]:
    try:
        authority = Authority(home)
    except OSError as error:
        raise ClientFault("no_home", f"{error.filename}: {error.strerror}", "a backup is made where the keys lie") from None
    bus = await Bus.connect(running(home).url, authority.credentials("backup"))
    try:
        return await spool(bus, folder)
    finally:
        await bus.close()


def _archive(sink: IO[bytes], home: Path, folder: Path, described: dict[str, Any]) -> Manifest:
    writer = Writer(sink)
    for stream in sorted(described):
        writer.add(f"streams/{stream}", folder / stream)
    return writer.finish(described, writer.add_home(home))


def _write(part: Path, recipients: list[Any], archive: Callable[[IO[bytes]], Manifest]) -> Manifest:
    """The file `part`, durable, with what `archive` writes, encrypted for `recipients` if there are any."""
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        if recipients:
            manifest, _ = _piped(archive, lambda source: pyrage.encrypt_io(source, file, recipients))
        else:
            manifest = archive(file)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _read(path: Path, key: Path | None, target: Path) -> Manifest:
    """The backup unpacked into `target`."""
    try:
        with path.open("rb") as file:
            if file.read(len(AGE)) != AGE:
                file.seek(0)
                return unpack(file, target)
            if key is None:
                raise ClientFault("invalid", f"{path} is encrypted", "--key FILE, as `kernelm backup-key` wrote it")
            identity = pyrage.x25519.Identity.from_str(key.read_bytes().decode(errors="replace").strip().splitlines()[-1])
            file.seek(0)
            return _piped(lambda sink: pyrage.decrypt_io(file, sink, [identity]), lambda source: unpack(source, target))[1]
    except OSError as error:
        raise ClientFault("invalid", f"{error.filename or path}: {error.strerror or error}", "name a backup and its key") from None
    except (pyrage.IdentityError, IndexError) as error:
        raise ClientFault("invalid", f"{key} holds no secret key: {error}", "it begins with AGE-SECRET-KEY-") from None
    except pyrage.DecryptError as error:
        raise ClientFault("wrong_key", f"{key} does not open {path}, or the file is damaged: {error}",
                          "give the key of one of its recipients, or another copy") from None  # fmt: skip


def _piped(produce: Callable[[IO[bytes]], Any], consume: Callable[[IO[bytes]], Any]) -> tuple[Any, Any]:
    """What both gave, `consume` reading what `produce` writes meanwhile. The producer's failure counts first: it is the cause."""
    reading, writing = (os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    results: dict[str, Any] = {}

    def run(name: str, work: Callable[[IO[bytes]], Any], end: IO[bytes]) -> None:
        try:
            with end:
                results[name] = work(end)
        except BaseException as error:  # raised again below, in the thread that waits
            results[f"{name} failed"] = error

    thread = threading.Thread(target=run, args=("produce", produce, writing), name="backup")
    thread.start()
    run("consume", consume, reading)
    thread.join()
    failures = [results[f] for f in ("produce failed", "consume failed") if f in results]
    for error in sorted(failures, key=lambda e: isinstance(e, BrokenPipeError)):  # that one only tells of the other
        raise error
    return results["produce"], results["consume"]


async def _restore_streams(folder: Path, manifest: Manifest, cipher: Path | None) -> None:
    """Give the streams to a broker of the new home, which ends when it has them."""
    authority = Authority(folder / "home")
    broker = Broker(folder / "home", authority, cipher=cipher)
    broker.write_config()
    log = folder / "broker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(broker.command(), stdout=output, stderr=output)
    try:
        bus = await _connect(broker, authority)
        for stream, described in manifest.streams.items():
            await snapshots.restore(bus, stream, described, chunks(folder / "streams" / stream))
        await bus.close()
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


async def _connect(broker: Broker, authority: Authority) -> Bus:
    until = time.monotonic() + BROKER_S
    while True:
        try:
            return await Bus.connect(broker.url, authority.credentials("restore"), timeout_s=1.0)
        except Fault as fault:
            if time.monotonic() > until:
                raise KernelFault("not_ready", f"the broker of the new home: {fault.message}", "kernelm doctor") from None
            await asyncio.sleep(0.1)


def _settle(home: Path, manifest: Manifest) -> None:
    """As the services left it: no tree that is half erased, folders of the store read-only."""
    trees = home / "artifacts" / "trees"
    for name in manifest.erased:
        shutil.rmtree(trees / name, ignore_errors=True)
    for where, _, _ in os.walk(trees, topdown=False):
        if {"files", "sealed"} & set(Path(where).relative_to(trees).parts[1:2]):
            Path(where).chmod(0o555)
    home.chmod(0o700)


def _recipient(text: str) -> Any:
    try:
        return pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        raise ClientFault("invalid", f"--to {text!r}: {error}", "`kernelm backup-key FILE` prints one (age1...)") from None


def _summary(manifest: Manifest) -> str:
    trees = {m.split("/")[3] for m in manifest.members if m.startswith("home/artifacts/trees/")} - set(manifest.erased)
    messages = sum(s["state"]["messages"] for s in manifest.streams.values())
    return f"{len(manifest.streams)} streams with {messages:,} messages, {len(trees):,} artifacts"
