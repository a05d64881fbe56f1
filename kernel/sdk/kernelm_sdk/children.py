"""Child processes that do not outlive who started them."""

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec nothing may be imported


def die_with(parent: int) -> Callable[[], None]:
    """For `preexec_fn`: the kernel sends SIGTERM to the child when the thread that forked it ends, even by SIGKILL. `parent` is
    the process that forks."""

    def before_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec
