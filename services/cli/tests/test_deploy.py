"""`kernelm deploy`: what is made, what is never made twice, and what is told about bad input. No engine is needed here; the
whole is in tests/compose."""

import asyncio
import ssl
import time
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from kernelm.testing.harness import System
from kernelm_artifacts.sealing import Sealing
from kernelm_artifacts.settings import Settings as ArtifactSettings
from kernelm_artifacts.store import Store
from kernelm_artifacts.vault import new_master
from kernelm_authority.broker import Broker
from kernelm_authority.identity import Authority, admin
from kernelm_cli.app import execute
from kernelm_cli.certificates import CertificateAuthority, read_certificate
from kernelm_cli.deployment import IMAGES, PLUGINS, Deployment, Settings, read_settings
from kernelm_cli.home import UpFile, read_up, write_up
from kernelm_cli.machine import hand_out, join
from kernelm_node.runtimes.containers import read_containers
from kernelm_sdk.enrollment import join as enrolled
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.machine import Keeper
from kernelm_sdk.ports import free_port

FAKE = {name: f"sha256:{name:0>64}" for name in (*IMAGES, *PLUGINS)}


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    made = Deployment(tmp_path, Settings(names=("models.example.org", "192.0.2.7")))
    made.init(FAKE, 105)
    return made


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_that_containers_need_is_there(deployment: Deployment) -> None:
    home = deployment.home
    assert Authority(home).account
    assert admin(home).user == "admin"
    assert read_containers(home).only
    assert read_containers(home).images == {name: FAKE[name] for name in PLUGINS}
    assert read_containers(home).volumes == {"kernelm-plain": str(home / "plain")}
    for name in ("broker/cipher.conf", "artifacts/master.json", "observability/grafana-password", "observability/metrics-key"):
        assert (deployment.secrets / name).stat().st_mode & 0o777 == 0o600
    up = read_up(home)
    assert up is not None
    assert up.alive()
    assert up.url == "tls://nats:4222"
    assert "verify: true" in (home / "broker" / "nats.conf").read_text()
    environment = (deployment.folder / ".env").read_text()
    assert f"KERNELM_HOME='{home}'" in environment
    assert read_settings(deployment.folder, {}) == deployment.settings
    for member in deployment.members():
        assert (deployment.tls(member) / "tls.pem").stat().st_mode & 0o077 == 0
    secret = (home / "identity" / "operator.seed").read_text().strip()
    readable = [path for path, content in files(deployment.folder).items() if secret.encode() in content]
    assert readable == [home / "identity" / "operator.seed"]


def test_again_touches_no_key(deployment: Deployment) -> None:
    before, secrets = files(deployment.home), files(deployment.secrets)
    Deployment(deployment.folder, msgspec.structs.replace(deployment.settings, http_port=9000)).init(FAKE, 105)
    after = files(deployment.home)
    assert files(deployment.secrets) == secrets
    kept = ("identity", "ca", "tls", "admin.creds")
    assert all(after[path] == content for path, content in before.items() if path.relative_to(deployment.home).parts[0] in kept)
    assert "KERNELM_HTTP_PORT='9000'" in (deployment.folder / ".env").read_text()


def test_certificates_name_who_serves(deployment: Deployment) -> None:
    gateway = read_certificate(deployment.tls("gateway") / "tls.pem")
    names = gateway.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "models.example.org" in str(list(names))
    assert "192.0.2.7" in str(list(names))
    context = ssl.create_default_context(cafile=str(deployment.home / "ca" / "ca.pem"))
    context.load_cert_chain(deployment.tls("jobs") / "tls.pem")


def test_rotation_renews_all_and_keeps_the_ca(deployment: Deployment) -> None:
    before, ca = files(deployment.home / "tls"), (deployment.home / "ca" / "ca.pem").read_text()
    deployment.rotate(new_ca=False)
    after = files(deployment.home / "tls")
    assert all(after[path] != content for path, content in before.items() if path.name == "tls.pem")
    assert (deployment.home / "ca" / "ca.pem").read_text() == ca
    deployment.rotate(new_ca=True)
    both = (deployment.tls("nats") / "ca.pem").read_text()
    assert both.count("BEGIN CERTIFICATE") == 2
    assert ca in both
    assert (deployment.home / "ca" / "ca.pem").read_text() != ca


def test_expiry_is_shown(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["deploy", "show", str(deployment.folder)]) == 0
    CertificateAuthority(deployment.home / "ca").issue("jobs", [], deployment.tls("jobs"), days=3)
    assert min(deployment.expiries().values()) < time.time() + 4 * 86400
    assert execute(["deploy", "show", str(deployment.folder)]) == 1
    assert "jobs" in capsys.readouterr().out


def seal(deployment: Deployment, text: str) -> None:
    """An artifact in the deployment's store, encrypted."""
    folder = deployment.folder / "documents"
    folder.mkdir()
    (folder / "notes.txt").write_text(text)
    settings = ArtifactSettings(master=str(deployment.master), plain=f"/dev/shm/{deployment.folder.name}")
    store = Store(deployment.home / "artifacts", Sealing.of(settings, deployment.home))
    store.put(folder, "dataset")
    store.close()


def test_the_key_of_what_is_encrypted_is_neither_replaced_nor_confused(deployment: Deployment) -> None:
    seal(deployment, "something to keep")
    good = deployment.master.read_bytes()
    deployment.init(FAKE, 105)
    deployment.master.unlink()
    with pytest.raises(ClientFault, match=r"master\.json is not there"):
        deployment.init(FAKE, 105)
    new_master(deployment.master)
    with pytest.raises(KernelFault, match="does not open"):
        deployment.init(FAKE, 105)
    deployment.master.write_bytes(good)
    deployment.rotate_master()
    assert deployment.master.read_bytes() != good
    deployment.init(FAKE, 105)


@pytest.mark.parametrize(("text", "named"), [
    ("http_port = 0", "http_port"), ("htp_port = 1", "htp_port"), ("http_port = 8444", "both 8444"), ("listen = ", "deploy.toml"),
    ('project = "Not A Name"', "project"), ('traces_to = "tempo"', "traces_to"), ("certificate_days = 3000", "certificate_days"),
    ("lease_s = 1", "lease_s"),
])  # fmt: skip
def test_a_mistake_in_the_settings_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "deploy.toml").write_text(text)
    with pytest.raises(ClientFault, match=named):
        read_settings(tmp_path, {})


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "deploy.toml").write_text("http_port = 9000\ngrpc_port = 9001\n")
    settings = read_settings(tmp_path, {"KERNELM_DEPLOY_HTTP_PORT": "443", "KERNELM_DEPLOY_NAMES": "a.example,b.example"})
    assert (settings.http_port, settings.grpc_port, settings.names) == (443, 9001, ("a.example", "b.example"))
    with pytest.raises(ClientFault, match="HTTP_PORT"):
        read_settings(tmp_path, {"KERNELM_DEPLOY_HTTP_PORT": "many"})


def test_without_an_engine_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    assert execute(["deploy", "init", str(tmp_path / "d")]) == 1
    assert "no Docker engine" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d").exists()
    assert execute(["deploy", "rotate", str(tmp_path / "d")]) == 2


def test_a_launcher_leaves_a_deployment_alone(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["up", "--home", str(deployment.home)]) == 2
    assert execute(["down", "--home", str(deployment.home)]) == 2
    assert "as containers" in " ".join(capsys.readouterr().err.split())
    assert not list((deployment.home / "broker" / "jetstream").iterdir())


def test_a_further_machine_gets_what_it_needs_and_no_key_of_the_system(deployment: Deployment, tmp_path: Path) -> None:
    there = tmp_path / "there"
    with pytest.raises(ClientFault, match="has no machine 'two'"):
        hand_out(deployment, "two", "192.0.2.1", there)
    settings = msgspec.structs.replace(deployment.settings, machines=("two",), broker_port=4333)
    deployment = Deployment(deployment.folder, settings)
    deployment.init(FAKE, 105)
    hand_out(deployment, "two", "192.0.2.1", there)
    context = ssl.create_default_context(cafile=str(deployment.home / "ca" / "ca.pem"))
    context.load_cert_chain(there / "home" / "tls" / "tls.pem")
    tokens = {member: (there / "home" / "join" / member / "token").read_text() for member in ("node", "artifacts")}
    secret = (deployment.home / "identity" / "account.seed").read_bytes().strip()
    assert not [path for path, content in files(there).items() if secret in content or path.suffix == ".seed"]

    join(there, FAKE, 107)
    environment = (there / ".env").read_text()
    for line in ("KERNELM_ADDRESS='192.0.2.1'", "KERNELM_PORT_BROKER='4333'", "COMPOSE_PROJECT_NAME='kernelm-two'",
                 "KERNELM_DOCKER_GID='107'", f"KERNELM_HOME='{there / 'home'}'"):  # fmt: skip
        assert f"{line}\n" in environment
    read = read_containers(there / "home")
    assert (read.images["trainer"], read.volumes) == (FAKE["trainer"], {"kernelm-two-plain": str(there / "home" / "plain")})

    (there / "machine.toml").write_text((there / "machine.toml").read_text().replace("node_cpu = 0.0", "node_cpu = 3.5"))
    hand_out(deployment, "two", "192.0.2.1", there)  # new tokens, for its next start; what was changed there stays
    join(there, FAKE, 107)
    assert "KERNELM_NODE_CPU='3.5'" in (there / ".env").read_text()
    assert all((there / "home" / "join" / member / "token").read_text() != token for member, token in tokens.items())
    (there / "machine.toml").write_text("nodes = 1\n")
    with pytest.raises(ClientFault, match=r"machine\.toml.*nodes"):
        join(there, FAKE, 107)


async def test_a_machine_is_forgotten_from_the_command_line(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    deployment = Deployment(deployment.folder, Settings(machines=("two",), broker_port=free_port()))
    deployment.init(FAKE, 105)
    (deployment.folder / "deploy.toml").write_text(f'machines = ["two"]\nbroker_port = {deployment.settings.broker_port}\n')
    hand_out(deployment, "two", "127.0.0.1", there)

    def wear(folder: Path) -> None:
        for name, file in (("CA", "ca.pem"), ("CERT", "tls.pem"), ("KEY", "tls.pem")):
            monkeypatch.setenv(f"KERNELM_TLS_{name}", str(folder / file))

    def said(*words: str) -> tuple[int, str]:
        code = execute(["deploy", "forget", *words])
        printed = capsys.readouterr()
        return code, " ".join(f"{printed.out} {printed.err}".split())

    code, words = await asyncio.to_thread(said, "two", str(deployment.folder))
    assert code == 1
    assert "run --rm cli deploy forget" in words
    wear(deployment.tls("kernel"))
    system = System(deployment.home)
    system.broker = Broker(deployment.home, system.authority, deployment.settings.broker_port, tls=deployment.tls("nats"),
                           cipher=deployment.cipher)  # fmt: skip
    async with system:
        wear(there / "home" / "tls")
        keepers = [Keeper(system.broker.url, there / "home" / "join" / member / "token") for member in ("node", "artifacts")]
        node, mirror = [await enrolled(system.broker.url, (await keeper.ticket()).read_text()) for keeper in keepers]
        assert (node.user, mirror.user) == ("node-two", "artifacts-two")
        for name in ("CA", "CERT", "KEY"):
            monkeypatch.delenv(f"KERNELM_TLS_{name}")
        code, words = await asyncio.to_thread(said, "two", str(deployment.folder))
        assert (code, "the machine two is forgotten" in words) == (0, True)
        code, words = await asyncio.to_thread(said, "two", str(deployment.folder))
        assert (code, "no machine 'two' has joined" in words) == (2, True)
        wear(there / "home" / "tls")
        for keeper in keepers:
            with pytest.raises(ClientFault, match="this machine was forgotten"):
                await keeper.ticket()
        hand_out(deployment, "two", "127.0.0.1", there)
        for keeper in keepers:
            await keeper.ticket()
        wear(deployment.tls("cli"))  # as in the container `cli`, which is told where the broker is
        write_up(deployment.home, UpFile(0, 0.0, system.broker.url, "", "", 0.0))
        monkeypatch.setenv("KERNELM_HOME", str(deployment.home))
        code, words = await asyncio.to_thread(said, "two")
        assert (code, "the machine two is forgotten" in words) == (0, True)


@pytest.mark.parametrize("name", ["local", "Two", "a.b"])
def test_machines_have_names_of_their_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(ClientFault, match="machines"):
        read_settings(tmp_path, {"KERNELM_DEPLOY_MACHINES": f"two,{name}"})
