"""What an instance says that can't load, for people and for its node; and whether its machine is to blame."""

import errno

import pytest

from kernelm_sdk.endings import MARK, TEXT, heard, last_words, loading
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault


def caught(fault: Fault, cause: BaseException | None = None, shown: bool = True) -> Fault:
    """`fault` as it comes out of loading, raised from `cause`."""

    def load() -> None:
        try:
            if cause is not None:
                raise cause
        except BaseException as error:
            raise fault from (error if shown else None)
        raise fault

    with pytest.raises(Fault) as found, loading():
        load()
    return found.value


def test_the_fault_of_what_is_loaded_is_heard_as_it_was_said() -> None:
    fault = caught(ClientFault("invalid_model", "model.json: two\nlines", "store it again", place="left out"))
    lines = f"loading\n{last_words(fault)}\nleaked a semaphore".splitlines()
    for_people, body = heard(lines)
    assert body == FaultBody("client", "invalid_model", "model.json: two\nlines", "store it again")
    assert for_people == ["loading", "model.json: two", "lines (invalid_model)", "  remedy: store it again", "leaked a semaphore"]
    long = heard(last_words(caught(ClientFault("invalid", "x" * 100_000))).splitlines())[1]
    assert long is not None
    assert len(long.message) == TEXT


def test_others_are_for_people_alone() -> None:
    fault = ClientFault("no_token", "none came", "issue one")  # not raised while it loaded
    assert last_words(fault) == str(fault)
    assert heard(last_words(fault).splitlines())[1] is None
    assert heard([]) == ([], None)
    assert heard(["one", f"{MARK}{{not json", "two"]) == (["one", "two"], None)
    assert heard([f'{MARK}{{"code": "x"}}'])[1] is None, "it does not say whose"


@pytest.mark.parametrize("cause", [
    MemoryError(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), RuntimeError("std::bad_alloc"),
])  # fmt: skip
@pytest.mark.parametrize("shown", [True, False])
def test_a_machine_that_lacks_something_is_not_the_model_s_fault(cause: BaseException, shown: bool) -> None:
    fault = caught(ClientFault("invalid_model", "the model loads but can't run"), cause, shown)
    assert heard(last_words(fault).splitlines())[1] is None


@pytest.mark.parametrize("cause", [
    FileNotFoundError(errno.ENOENT, "No such file"), ValueError("the header is too short"), KernelFault("storage", "no answer"),
])  # fmt: skip
def test_what_is_missing_or_damaged_is_of_what_is_loaded(cause: BaseException) -> None:
    fault = caught(ClientFault("invalid_model", "linear.safetensors: damaged"), cause)
    assert heard(last_words(fault).splitlines())[1] == fault.body()
