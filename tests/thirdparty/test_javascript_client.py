"""The JavaScript client of deploy/examples against a real broker: an answer, a fault, and what a key does not grant."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.harness import System
from kernelm.testing.parts import absent
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label, Server
from kernelm_sdk.credentials import from_file, to_file
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.links import Credentials
from kernelm_sdk.plugin import Manifest, Plugin
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

ROOT = Path(__file__).parents[2]


class Oracle(Plugin, Server):
    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        if not request.input[0]:
            raise ClientFault("invalid", "`input[0]` is blank", "leave it out")
        return ClassifyReply(call.model, 3, "sha256:0", ((Label("sports", 0.9871),),), 5, 0.1)

    def models(self) -> tuple[str, ...]:
        return ("news",)


@pytest.fixture(scope="module")
def client() -> Path:
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        absent(f"needs {' and '.join(missing)}: apt-get install nodejs npm")
    folder = ROOT / "build" / "thirdparty" / "javascript-client"
    shutil.copytree(ROOT / "deploy" / "examples", folder, dirs_exist_ok=True)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(install, cwd=folder, check=True, timeout=240)
    return folder / "client.mjs"


async def test_a_model_is_called_from_javascript(client: Path, tmp_path: Path) -> None:
    async with System() as system:
        await system.plugin(Oracle, Manifest("oracle", "1.0.0", "", ("server/1",), "x:Y"))
        await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("oracle", 100),), 3, "sha256:0"))
        await system.admin.call(Kernel.set_route, Route("spam", "model", (Destination("oracle", 100),), 3, "sha256:0"))
        seed = new_seed()
        made = await system.admin.call(Kernel.create_key, KeyRequest("acme", ("news",), ("classify",), public_key=public_key(seed)))
        file = tmp_path / "acme.creds"
        file.write_text(to_file(Credentials(f"key-{made.key.id}", made.jwt, seed)))
        assert from_file(file) == Credentials(f"key-{made.key.id}", made.jwt, seed, from_file(file).expires)

        async def run(model: str, text: str) -> subprocess.CompletedProcess[str]:
            command = ["node", str(client), system.broker.url, str(file), model, text]
            return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)

        answered = await run("news", "The striker scored twice.")
        assert (answered.returncode, answered.stdout) == (0, "sports 0.9871 (news, generation 3)\n"), answered.stderr
        refused = await run("news", "")
        assert (refused.returncode, refused.stderr) == (1, "invalid: `input[0]` is blank; leave it out\n")
        denied = await run("spam", "The striker scored twice.")
        assert denied.returncode == 1
        assert "Permissions Violation" in denied.stderr


@pytest.mark.parametrize("text", ["", "-----BEGIN NATS USER JWT-----\nabc\n------END NATS USER JWT------\n"])
def test_a_file_that_holds_no_credentials_is_named(tmp_path: Path, text: str) -> None:
    for file in (tmp_path / "none", tmp_path / "bad"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ClientFault, match=str(file)):
            from_file(file)
