"""Secrets stay where they belong: no seed, no JWT of a user and no API secret in any log, record, event, environment or
command line of a real system that was used and misused."""

import asyncio
import base64
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from kernelm.journal import BUCKETS
from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant, init_home
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import join, new_seed, public_key, renew
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel, KeyName, KeyRequest, PoolName, PoolSpec, RotateKey

SEED = re.compile(rb"S[UAO][A-Z2-7]{56}(?![A-Z2-7])")
JWT = re.compile(rb"eyJ[\w-]{20,}\.([\w-]{20,})\.[\w-]{20,}")
API = re.compile(rb"km_[a-z0-9]+_[\w-]{20,}")
TOKEN = re.compile(rb"[\w-]{200,}")  # a join token is base64 of credentials


def decoded(text: bytes) -> bytes:
    with contextlib.suppress(ValueError):
        return base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    return b""


def secrets_in(data: bytes) -> list[str]:
    """What in `data` would open something. Claims of accounts and operators are public."""
    found = [m[0] for pattern in (SEED, API) for m in pattern.finditer(data)]
    found += [m[0] for m in JWT.finditer(data) if b'"type":"user"' in decoded(m[1])]
    found += [m[0] for m in TOKEN.finditer(data) if b'"seed":"' in decoded(m[0])]
    return [f[:16].decode() + "..." for f in found]


def test_the_search_finds_what_it_is_for(tmp_path: Path) -> None:
    authority = init_home(tmp_path)
    jwt, _ = authority.user_jwt("a", public_key(new_seed()), [], [])
    for secret in (new_seed(), jwt, "km_k1_" + "x" * 43, authority.token("jobs")):
        assert secrets_in(f"x {secret} y".encode())
    assert not secrets_in(authority.account_jwt().encode() + authority.operator_jwt().encode())
    assert not secrets_in(public_key(new_seed()).encode())


def may_hold_secrets(path: Path, home: Path) -> bool:
    inside = path.relative_to(home)
    return inside.parts[0] == "identity" or path.suffix == ".creds" or inside.parts[:2] == ("run", "tokens")


async def misuse(system: System) -> dict[str, Any]:
    """Keys, joins, renewals, and every failure of theirs that a stranger or a fool can bring about; the secrets in use."""
    seed, broken = new_seed(), system.home / "run" / "tokens" / "broken"
    made = await system.admin.call(Kernel.create_key, KeyRequest("acme", public_key=public_key(seed), admin=True))
    credentials = Credentials(f"key-{made.key.id}", made.jwt, seed)
    client = await system.track(Bus.connect(system.broker.url, credentials))
    with pytest.raises(Fault) as told:
        await client.request(f"svc.kernel.v1.state.{client.user}", b"{}", 5.0)
    faults = [str(told.value), repr(told.value), repr(credentials)]
    rotated = await system.admin.call(Kernel.rotate_key, RotateKey(made.key.id, 60, public_key(new := new_seed())))
    member = await system.connect("member", Grant("plugin", "member", "member", "member"))
    await renew(member, new_seed())
    gateway = json.loads((system.home / "run" / "gateway.json").read_text())
    async with httpx.AsyncClient(base_url=gateway["http"], timeout=20) as http:
        for secret in (made.secret, rotated.secret, made.secret[:-1] + "!", "km_nobody_" + "y" * 43, system.authority.token("x")):
            answer = await http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"})
            faults.append(answer.text)
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    for wrong in (credentials, Credentials("admin", made.jwt, new), Credentials("jobs", made.jwt[:-9] + "AAAAAAAAA", seed)):
        with pytest.raises(Fault) as refused:
            await Bus.connect(system.broker.url, wrong, timeout_s=3)
        faults.append(f"{refused.value!s} {refused.value!r} {refused.value.body()}")
    for token in (system.authority.token("x")[:-40], system.authority.token("x")):
        await asyncio.to_thread(broken.write_text, token)
        with contextlib.suppress(Fault):
            await join(system.broker.url, token)
        with pytest.raises(Fault) as late:
            await join(system.broker.url, token)
        faults.append(f"{late.value!s} {late.value!r} {late.value.body()}")
    broken.unlink()
    await system.admin.call(Kernel.start_pool, PoolSpec("bad", "scheduler", settings={"no-such": 1}))

    async def failed() -> bool:
        return any(i.pool == "bad" and i.state == "exited" for i in (await system.state()).instances)

    await until(failed, 60, "a plugin that fails at its start")
    await system.admin.call(Kernel.stop_pool, PoolName("bad"))
    return {"faults": "\n".join(faults), "state": msgspec.json.encode(await system.admin.call(Kernel.state, Empty())).decode()}


async def test_no_secret_leaves_its_place() -> None:
    async with System(kernel="process") as system:
        for service in ("artifacts", "jobs", "gateway", "node"):
            await system.service(service, KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0")

        async def running() -> bool:
            return any(i.plugin == "scheduler" and i.state == "ready" for i in (await system.state()).instances)

        await until(running, 60, "a plugin in a process of its own")
        places = dict(await misuse(system))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if str(system.home) in " ".join([*process.cmdline(), environment.get("KERNELM_HOME", ""),
                                                 environment.get("KERNELM_SCRATCH", "")]):  # fmt: skip
                    places[f"pid {process.pid}"] = "\0".join([*process.cmdline(), *(f"{k}={v}" for k, v in environment.items())])
        assert len([p for p in places if p.startswith("pid")]) >= 7, "broker, kernel, four services and a plugin"
        kernel = await system.track(Bus.connect(system.broker.url, system.authority.credentials("auditor")))
        for stream in ("EVT", "AUDIT", "DLQ", *(f"KV_{b}" for b in (*BUCKETS, "leases"))):
            messages = [f"{subject} {headers} {body.decode()}" async for _, subject, body, headers in kernel.read(stream)]
            places[stream] = "\n".join(messages)
        assert len(places["EVT"]) > 1000
        leaks = {name: found for name, text in places.items() if (found := secrets_in(text.encode()))}
        for path in await asyncio.to_thread(lambda: [p for p in system.home.rglob("*") if p.is_file() and not p.is_symlink()]):
            if may_hold_secrets(path, system.home):
                assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
            elif found := secrets_in(await asyncio.to_thread(path.read_bytes)):
                leaks[str(path.relative_to(system.home))] = found
        assert not leaks
        for folder in (system.home / "identity", system.home / "run" / "tokens"):
            assert folder.stat().st_mode & 0o077 == 0, folder
        assert not list((system.home / "run" / "tokens").iterdir()), "join tokens are deleted once they are used"
