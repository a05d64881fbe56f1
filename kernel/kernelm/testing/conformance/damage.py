"""Chaos of the disk: an input with a flipped bit, and no room left. What is damaged is damaged for real.

They are made on instances of their own, and need a stand of their own: an artifact that is damaged is so for everybody.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.driver import Attempt
from kernelm.testing.conformance.jobs import finished, job_methods
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.conformance.stand import Instance
from kernelm.testing.faults import flip
from kernelm_sdk.system import Artifact, ArtifactName, Artifacts, OpenArtifact, PutArtifact

checks = Checks()
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PUTS = "impl.artifacts.artifacts.v1.put."
DISK_KB = 256
NAMES_IT = re.compile(r"no space|space left|no room|(disk|storage).{0,20}full|full.{0,20}disk|ENOSPC|EDQUOT|quota", re.IGNORECASE)


def digests(value: Any) -> list[str]:
    """All that occur in it, each once."""
    return list(dict.fromkeys(DIGEST.findall(str(value))))


def sampled(case: Case) -> list[tuple[str, str, Any]]:
    """(contract, method, request) of the job methods with a request that ends with a result; Skipped if there is none."""
    found = [(c, m, case.sample(c, m)) for c, m, _, _ in job_methods(case) if case.sample(c, m) is not None]
    if not found:
        raise Skipped("no sample of a job that ends with a result: give one in conformance.toml")
    return found


async def attempted(case: Case, instance: Instance, contract: str, method: str, request: Any) -> Attempt:
    """The job on this instance, at its end; a fault that answers the dispatch is one as well."""
    attempt = await case.stand.driver.hand(instance.wire, contract, method, request)
    if attempt.dispatched is None or attempt.dispatched.fault is None:
        await finished(attempt)
    return attempt


@checks.add(
    "chaos.corrupt-input",
    "fails a job whose input has a flipped bit: names what is damaged, reports no result, stores nothing; does it when mended",
    "open each input anew through artifacts/1.open, which verifies every byte, and pass its fault on",
)
async def corrupt_input(case: Case) -> None:
    refused = 0
    for contract, method, request in sampled(case):
        whole = await attempted(case, case.main, contract, method, request)
        for digest in digests(request):
            async with damaged(case, digest) as file:
                instance = case.spares["corrupt"] = await case.start()
                await instance.ready()
                attempt = await attempted(case, instance, contract, method, request)
                refused += _refused(attempt, whole, instance, digest, file)
            again = await attempted(case, instance, contract, method, request)
            if again.final is None or again.final.result is None:
                raise Failed("it does not do the job when the input is mended", again.text)
            await instance.end()
    if not refused:
        raise Skipped("no job of the samples reads an artifact that its request names")


def _refused(attempt: Attempt, whole: Attempt, instance: Instance, digest: str, file: str) -> bool:
    """Whether it refused the job; not where it has not read the artifact, but passes its digest on."""
    if attempt.final is not None and (result := attempt.final.result) is not None:
        if whole.final is None or digests(result) != digests(whole.final.result):
            raise Failed(f"it reported a result, and a bit of {file} in its input {digest[:19]} is flipped", attempt.text)
        return False
    fault = (attempt.dispatched and attempt.dispatched.fault) or (attempt.final and attempt.final.fault)
    assert fault
    named = f"{fault.message} {fault.remedy} {fault.details}"
    if fault.code != "corrupt_artifact" and digest[7:19] not in named and file not in named:
        raise Failed(f"the fault {fault.code!r} names neither the artifact nor the file that is damaged ({file})", attempt.text)
    if stored := instance.tap.of(PUTS):
        raise Failed(f"it stored {len(stored)} artifacts in a job whose input is damaged", attempt.text)
    return True


@checks.add(
    "chaos.corrupt-settings",
    "does not become ready with an artifact of its settings in which a bit is flipped: ends with a failure, and its log names it",
    "open what the settings name through artifacts/1.open before `ready`, and let its fault end the instance",
)
async def corrupt_settings(case: Case) -> None:
    named = digests(case.settings)
    if not named:
        raise Skipped("its settings name no artifact")
    for digest in named:
        async with damaged(case, digest) as file:
            instance = case.spares["damaged"] = await case.start()
            with contextlib.suppress(Failed):  # it ended
                await instance.ready()
            if instance.code is None:
                raise Failed(f"it runs, and a bit of {file} in {digest[:19]} of its settings is flipped", instance.last_lines())
            if instance.code == 0:
                raise Failed("it exits with 0 where it can't start: the node would take that for success", instance.last_lines())
            if digest[7:19] not in (text := instance.last_lines()) and "corrupt_artifact" not in text:
                raise Failed(f"its log does not say that {digest[:19]} of its settings is damaged", text)
            await instance.end()


@contextlib.asynccontextmanager
async def damaged(case: Case, digest: str) -> AsyncIterator[str]:
    """A bit of the largest file of a stored artifact is flipped; its name. Stored again, intact, at the end."""
    bus = case.stand.bus()
    opened: OpenArtifact = await bus.call(Artifacts.open, ArtifactName(digest), timeout_s=60.0)
    file = max((f for f in opened.artifact.files if f.bytes), key=lambda f: f.bytes, default=None)
    if file is None:
        raise Skipped(f"artifact {digest[:19]} has no file that could be damaged")
    copy = case.stand.system.home / "scratch" / f"intact-{digest[7:19]}"
    shutil.copytree(opened.path, copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    copy.chmod(0o755)
    try:
        flip(Path(opened.path) / file.path, file.bytes // 2)
        yield file.path
    finally:
        put = PutArtifact(str(copy), opened.artifact.kind, opened.artifact.lineage, opened.artifact.metadata)
        mended: Artifact = await bus.call(Artifacts.put, put, timeout_s=60.0)
        shutil.rmtree(copy)
        assert mended.digest == digest


@checks.add(
    "chaos.storage-full",
    "fails a job for lack of room on its disk, and says so, reports no half of a result; does it when there is room again",
    "let the error of the write (ENOSPC) end the job; it is no fault of the client, whose job would not be tried elsewhere",
)
async def storage_full(case: Case) -> None:
    for contract, method, request in sampled(case):
        whole = await attempted(case, case.main, contract, method, request)
        with small_disk() as (mount, fill, free):
            instance = case.spares["full"] = await case.start(before=lambda i, mount=mount: mount(i.scratch))  # type: ignore[misc]
            try:
                await instance.ready()
                fill()
                _failed(await attempted(case, instance, contract, method, request), whole)
                if instance.code is not None:
                    raise Failed(f"it ended with code {instance.code} when its disk was full", instance.last_lines())
                free()
                again = await attempted(case, instance, contract, method, request)
                if again.final is None or again.final.result is None:
                    raise Failed("it does not do the job when there is room again", again.text)
            finally:
                await instance.end()


def _failed(attempt: Attempt, whole: Attempt) -> None:
    if attempt.final is not None and (result := attempt.final.result) is not None:
        if whole.final is None or digests(result) != digests(whole.final.result):
            raise Failed("it reported another result on a full disk than with room", f"{attempt.text}\n{whole.text}")
        return  # it had no need of the disk
    fault = (attempt.dispatched and attempt.dispatched.fault) or (attempt.final and attempt.final.fault)
    assert fault
    if fault.whose == "client":
        raise Failed("it blames the client for its full disk", attempt.text)
    if not NAMES_IT.search(f"{fault.code} {fault.message} {fault.remedy}"):
        raise Failed(f"the fault {fault.code!r} does not say that there is no room on the disk", attempt.text)


@contextlib.contextmanager
def small_disk() -> Iterator[tuple[Any, Any, Any]]:
    """(mount it at a folder, fill it to the last byte, make room again): a file system of its own. Skipped where this user may
    not mount one."""
    places = list[Path]()

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KB}k,mode=0700", "tmpfs", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise Skipped(f"a small file system can't be mounted here: {made.stderr.strip()}")
        places.append(folder)

    def fill() -> None:
        with (places[0] / "filler").open("ab", buffering=0) as file:
            for block in (4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * block)

    def free() -> None:
        (places[0] / "filler").unlink()
        command = ["mount", "-o", f"remount,size={64 * DISK_KB}k", str(places[0])]
        subprocess.run(command, capture_output=True, check=True)

    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise Skipped("only root can mount a small file system, and fill it up")
    try:
        yield mount, fill, free
    finally:
        for folder in places:
            subprocess.run(["umount", "-l", str(folder)], check=True)
