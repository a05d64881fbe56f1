"""The service: what it lets out over the bus and over HTTP."""

import asyncio
import base64
import hashlib
import json
import socket
import time
from pathlib import Path

import httpx
import pytest

from kernelm_artifacts.http import Tokens
from kernelm_artifacts.service import ArtifactsService
from kernelm_artifacts.settings import read_settings
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Call
from kernelm_sdk.system import ArtifactName, ArtifactQuery, ArtifactStored, GrantArtifact, PutArtifact

CONTENT = bytes(range(256)) * 1000


class Recorder:
    """Stands in for the bus: keeps what is published."""

    def __init__(self) -> None:
        self.events = []

    async def publish(self, event) -> int:
        self.events.append(event)
        return len(self.events)


@pytest.fixture
async def service(tmp_path: Path):
    service = ArtifactsService(Recorder(), tmp_path / "home")
    await service.on_start()
    yield service
    await service.on_stop()


async def stored(service: ArtifactsService, tmp_path: Path) -> str:
    folder = tmp_path / "in"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "räume %2e.bytes").write_bytes(CONTENT)
    (folder / "model.json").write_text("{}")
    return (await service.put(PutArtifact(str(folder), "model", {"job": "j"}, {"n": 1}), None)).digest


async def test_put_open_describe_find_and_the_event(service: ArtifactsService, tmp_path: Path) -> None:
    digest = await stored(service, tmp_path)
    opened = await service.open(ArtifactName(digest), Call("cli"))
    assert Path(opened.path, "model.json").read_text() == "{}"
    assert await service.describe(ArtifactName(digest), None) == opened.artifact
    assert (await service.find(ArtifactQuery("model"), None)).artifacts == (opened.artifact,)
    assert service._bus.events == [ArtifactStored(digest=digest, kind="model", bytes=len(CONTENT) + 2)]


async def test_keys_and_records_of_the_system_are_not_copied_out(service: ArtifactsService, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("identity", "scratch/i1"):
        (home / name).mkdir(parents=True)
        (home / name / "operator.seed").write_text("SO...")
    (tmp_path / "innocent").symlink_to(home, target_is_directory=True)
    for folder in (home / "identity", home, tmp_path, tmp_path / "innocent" / "identity", home / "scratch" / ".." / "identity"):
        with pytest.raises(ClientFault) as caught:
            await service.put(PutArtifact(str(folder), "model"), None)
        assert caught.value.code == "permission_denied", folder
    with pytest.raises(ClientFault, match="relative"):
        await service.put(PutArtifact("in", "model"), None)
    own = await service.put(PutArtifact(str(home / "scratch" / "i1"), "model"), None)
    opened = await service.open(ArtifactName(own.digest), Call("cli"))
    assert (await service.put(PutArtifact(opened.path, "dataset"), None)).digest == own.digest


async def test_another_machine_reads_with_a_grant(service: ArtifactsService, tmp_path: Path) -> None:
    digest = await stored(service, tmp_path)
    grant = await service.grant(GrantArtifact(digest), None)
    assert json.loads((tmp_path / "home" / "run" / "artifacts.json").read_text())["url"] in grant.url
    assert 590 < grant.expires - time.time() <= 600
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {grant.token}"}, trust_env=False) as client:
        description = (await client.get(grant.url)).json()
        file = next(f for f in description["files"] if f["path"].startswith("data/"))
        url = grant.url + "/data/r%C3%A4ume%20%252e.bytes"
        whole = await client.get(url)
        assert (whole.status_code, whole.content) == (200, CONTENT)
        sha256 = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
        assert whole.headers["repr-digest"] == f"sha-256=:{sha256}:"
        assert whole.headers["etag"] == f'"{file["sha256"]}"'
        part = await client.get(url, headers={"range": "bytes=1000-1999", "if-range": whole.headers["etag"]})
        assert (part.status_code, part.content) == (206, CONTENT[1000:2000])
        assert part.headers["content-range"] == f"bytes 1000-1999/{len(CONTENT)}"
        assert (await client.get(url, headers={"range": "bytes=-10"})).content == CONTENT[-10:]
        assert (await client.get(url, headers={"range": f"bytes={len(CONTENT)}-"})).status_code == 416
        changed = await client.get(url, headers={"range": "bytes=0-9", "if-range": '"another"'})
        assert (changed.status_code, len(changed.content)) == (200, len(CONTENT))
        head = await client.head(url)
        assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(CONTENT)), b"")
        assert (await client.post(url)).status_code == 405


@pytest.mark.parametrize("path", ["/nothing", "/../../../identity/operator.seed", "/..%2f..%2fabout%2fmodel.json", "/%00",
                                  "/data", "/"])  # fmt: skip
async def test_no_path_leads_out_of_the_tree(service: ArtifactsService, tmp_path: Path, path: str) -> None:
    digest = await stored(service, tmp_path)
    grant = await service.grant(GrantArtifact(digest), None)
    host, _, port = grant.url.split("/")[2].partition(":")
    with socket.create_connection((host, int(port))) as raw:  # no client tidies the path up
        raw.sendall(f"GET /artifacts/{digest}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {grant.token}\r\n"
                    "Connection: close\r\n\r\n".encode())  # fmt: skip
        answer = await asyncio.to_thread(raw.makefile("rb").read)
    assert answer.startswith(b"HTTP/1.1 404")


async def test_without_the_right_token_nothing_is_read(service: ArtifactsService, tmp_path: Path) -> None:
    digest = await stored(service, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a").write_text("a")
    foreign = await service.put(PutArtifact(str(other), "model"), None)
    grant = await service.grant(GrantArtifact(digest), None)
    elsewhere = await service.grant(GrantArtifact(foreign.digest), None)
    expired, _ = service._tokens.issue(digest, -1)
    forged, _ = Tokens().issue(digest, 600)
    later = f"{grant.expires + 1000}.{grant.token.partition('.')[2]}"
    async with httpx.AsyncClient(trust_env=False) as client:
        for token in ("x", expired, forged, later, elsewhere.token, "٣." + "0" * 64, "é"):
            answer = await client.get(grant.url + "/model.json", headers={"authorization": f"Bearer {token}".encode()})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), token
            assert answer.headers["www-authenticate"] == "Bearer"
        for headers in ({}, {"authorization": "Bearer"}):
            assert (await client.get(grant.url + "/model.json", headers=headers)).status_code == 401
        basic = {"authorization": f"Basic {grant.token}"}
        assert (await client.get(grant.url + "/model.json", headers=basic)).status_code == 401


async def test_a_grant_is_short_and_only_for_what_is_intact(service: ArtifactsService, tmp_path: Path) -> None:
    digest = await stored(service, tmp_path)
    for ttl_s in (0, -1, 3601):
        with pytest.raises(ClientFault, match="ttl_s"):
            await service.grant(GrantArtifact(digest, ttl_s), None)
    victim = service._store.file(digest, "model.json")
    victim.chmod(0o644)
    victim.write_text("[]")
    with pytest.raises(KernelFault) as caught:
        await service.grant(GrantArtifact(digest), None)
    assert caught.value.code == "corrupt_artifact"


async def test_a_taken_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("KERNELM_ARTIFACTS_PORT", str(taken.getsockname()[1]))
        with pytest.raises(KernelFault) as caught:
            await ArtifactsService(Recorder(), tmp_path).on_start()
    assert caught.value.code == "port_taken"


def test_an_unknown_or_wrong_setting_is_refused() -> None:
    assert read_settings({"KERNELM_ARTIFACTS_PORT": "8080", "HOME": "/"}).port == 8080
    for environment in ({"KERNELM_ARTIFACTS_PROT": "1"}, {"KERNELM_ARTIFACTS_PORT": "http"}):
        with pytest.raises(ClientFault) as caught:
            read_settings(environment)
        assert "KERNELM_ARTIFACTS_" in caught.value.message + caught.value.remedy
