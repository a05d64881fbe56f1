"""A member's health, asked of itself, and tokens that are laid down for its next start."""

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernelm.testing.harness import System
from kernelm_authority.tokens import Tokens, services
from kernelm_sdk.enrollment import join
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.health import VARIABLE, answer, ask


def asked(path: Path) -> tuple[int, str]:
    """The exit code and the words of the health check."""
    done = subprocess.run([sys.executable, "-m", "kernelm_sdk.health"], env={VARIABLE: str(path)}, capture_output=True, text=True,
                          check=False, timeout=60)  # fmt: skip
    return done.returncode, done.stdout.strip()


async def test_a_member_says_how_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await answer(lambda: "") is None  # nobody will ask
    path, state = tmp_path / "health.sock", "starting"
    monkeypatch.setenv(VARIABLE, str(path))
    code, said = await asyncio.to_thread(asked, path)
    assert code == 1
    assert "nobody answers" in said
    server = await answer(lambda: state)
    assert server is not None
    assert await asyncio.to_thread(asked, path) == (1, "starting")
    state = ""
    assert await asyncio.to_thread(asked, path) == (0, "ready")
    server.close()


async def test_one_that_hangs_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "health.sock"
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr("kernelm_sdk.health.ANSWER_S", 0.3)
    server = await answer(lambda: "")
    assert server is not None
    said: list[str] = []

    def question() -> None:
        try:
            said.append(ask(str(path)))
        except TimeoutError:
            said.append("timeout")

    asking = threading.Thread(target=question)
    asking.start()
    time.sleep(1)  # noqa: ASYNC251 - the event loop hangs
    asking.join()
    assert said == ["timeout"]
    server.close()


async def test_tokens_are_laid_down_where_one_was_taken_and_work_once() -> None:
    async with System() as system:
        tokens = Tokens(system.home, ("jobs", "gateway"))
        tokens.lay_down()
        path = tokens.files["jobs"]
        assert path.stat().st_mode & 0o777 == 0o600
        first = path.read_text()
        tokens.lay_down()
        assert path.read_text() == first
        assert (await join(system.broker.url, first)).user == "jobs"
        with pytest.raises(ClientFault, match="used already"):
            await join(system.broker.url, first)
        path.unlink()
        tokens.lay_down()
        second = path.read_text()
        assert second != first
        assert (await join(system.broker.url, second)).user == "jobs"
        assert not tokens.trouble


def test_services_have_to_be_named() -> None:
    assert services({"KERNELM_SERVICES": "jobs, gateway"}) == ("jobs", "gateway")
    with pytest.raises(ClientFault, match="names no service"):
        services({})
