"""The last words of an instance that can't load what it is to serve: the fault as it is, in one line of its log that its node reads
and hands on. A log is there in every runtime and in every language, and outlives the node."""

import contextlib
import errno
import re
from collections.abc import Iterator, Sequence

import msgspec

from kernelm_sdk.errors import Fault, FaultBody

MARK = "kernelm-fault: "  # before the fault as JSON, at the beginning of a line
TEXT = 2000  # characters of message and remedy that are handed on
SCARCE = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EACCES,
                    errno.EPERM, errno.ESTALE})  # fmt: skip
SHORTAGE = re.compile(r"(?i)out ?of ?memory|(?:can't|cannot) allocate memory|std::bad_alloc")  # libraries have no other sign of it


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """A fault from here is one of what is loaded, unless the machine is to blame."""
    try:
        yield
    except Fault as fault:
        fault.loading = not of_the_machine(fault)
        raise


def of_the_machine(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, is about this machine: no memory, a full or failing disk, no right to read.
    Another one, or the same later, may do better."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in SCARCE):
            return True
        if SHORTAGE.search(f"{type(cause).__name__}: {cause}"):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def last_words(fault: Fault) -> str:
    """The fault for the log of an instance that ends by it: for people, and where it could not load, for its node."""
    if not fault.loading:
        return str(fault)
    body = FaultBody(fault.whose, fault.code, fault.message[:TEXT], fault.remedy[:TEXT], fault.retriable)
    return f"{fault}\n{MARK}{msgspec.json.encode(body).decode()}"


def heard(lines: Sequence[str]) -> tuple[list[str], FaultBody | None]:
    """The lines of a log for people, and the fault of the last one for its node; None where there is none that can be read."""
    told = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    fault = None
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        fault = msgspec.json.decode(told[-1], type=FaultBody) if told else None
    return [line for line in lines if not line.startswith(MARK)], fault
