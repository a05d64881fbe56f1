"""The test stand: a real broker, a real kernel, the artifact store where it is installed, a job table that the checks steer, and
the plugin, in a process of its own or as the node runs it (places.py). One stand serves any number of plugins at a time."""

import base64
import contextlib
import importlib
import importlib.util
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.conformance.driver import JobDriver
from kernelm.testing.conformance.places import Body, OwnProcess, Place
from kernelm.testing.conformance.results import Failed
from kernelm.testing.conformance.subject import Subject
from kernelm.testing.conformance.wire import Wire
from kernelm.testing.harness import System, within
from kernelm_authority.files import write_secret
from kernelm_authority.identity import Grant
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.runner import Member
from kernelm_sdk.system import Artifact, Artifacts, PoolSpec, PutArtifact

START_S = 60.0  # from its start to ready
VENV_S = 240.0  # the same, where an environment is built before it
LOG_LINES = 25


def own_frames(lines: list[str], folder: Path) -> list[str]:
    """The lines of a log without the frames above the first one of a file in `folder`: an author looks for their own."""
    first = own = next((n for n, line in enumerate(lines) if line.startswith(f'  File "{folder}/')), 0)
    while first and lines[first - 1].startswith("  "):  # a frame, with its line of code
        first -= 1
    return lines[:first] + lines[own:]


class Observed(System):
    """A system whose broker writes down what it denied."""

    def start_broker(self) -> None:
        """As before, with a log."""
        command = [*self.broker.command(), "-l", str(self.home / "broker.log")]
        self.processes["broker"] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Tap:
    """What one instance published to the system: subject, body, headers, time (monotonic, s)."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes, dict[str, str], float]] = []

    def of(self, prefix: str) -> list[tuple[str, bytes, dict[str, str], float]]:
        """Those whose subject begins with `prefix`."""
        return [m for m in self.messages if m[0].startswith(prefix)]


class Instance:
    """One running copy of the plugin."""

    def __init__(self, stand: "Stand", subject: Subject, pool: str, name: str, place: Place) -> None:
        self.stand, self.subject, self.pool, self.name, self.place = stand, subject, pool, name, place
        self.tap = Tap()
        self.wire = Wire(stand.system.admin, name, pool)
        self.keys: set[str] = set()  # public nkeys that it has used
        self.body: Body | None = None  # None until it is started
        self.token = stand.system.home / "run" / "tokens" / name
        self.log = stand.system.home / "logs" / f"{name}.log"
        self.scratch = stand.system.home / "scratch" / name

    async def begin(self) -> None:
        """Start it, with a token of its own."""
        manifest, stand = self.subject.manifest, self.stand
        grant = Grant("plugin", self.name, self.pool, manifest.name, calls=manifest.calls, events=manifest.events)
        token = stand.system.authority.token(self.name, grant)
        ticket = msgspec.json.decode(base64.urlsafe_b64decode(token + "==="), type=Credentials)
        stand.joining[ticket.user] = self
        write_secret(self.token, token)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(exist_ok=True)
        environment = {
            "KERNELM_URL": stand.system.broker.url, "KERNELM_INSTANCE": self.name, "KERNELM_PLUGIN": manifest.name,
            "KERNELM_POOL": self.pool, "KERNELM_SCRATCH": str(self.scratch), "KERNELM_TOKEN_FILE": str(self.token),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.body = await self.place.start(self.subject, environment, self.scratch, self.log)

    @property
    def code(self) -> int | None:
        """Its exit code, None as long as it runs."""
        return self.body.code if self.body else None

    async def ready(self) -> None:
        """Wait until it is, or Failed with the end of its log."""
        state = self.stand.system.kernel
        assert state is not None
        patience_s = self.subject.samples.start_s or (START_S if self.place.runtime != "venv" else VENV_S)

        def there() -> bool:
            known = state.registry.instances.get(self.name)
            return self.code is not None or (known is not None and known.state == "ready")

        try:
            await within(there, patience_s)
        except AssertionError:
            raise Failed(f"it is not ready {patience_s:g} s after its start", self.last_lines(),
                         "say hello, serve and say ready: kernel/PROTOCOL.md, 'The life of an instance'") from None  # fmt: skip
        if (code := self.code) is not None:
            raise Failed(f"it ended with code {code} before it was ready", self.last_lines(), "see the end of its log")

    def last_lines(self) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(own_frames(text.splitlines(), self.subject.folder)[-LOG_LINES:])

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.body:
            self.body.signal(number)

    async def ended(self, timeout_s: float) -> int | None:
        """Its exit code, or None if it has not ended in time."""
        return await self.body.ended(timeout_s) if self.body else None

    async def end(self) -> None:
        """Whatever it does."""
        if self.body:
            await self.body.end()


class Stand:
    """`async with Stand() as stand:` then `await stand.start(subject, settings)`."""

    def __init__(self) -> None:
        self.own = OwnProcess()
        self.system = Observed()
        self.driver = JobDriver()
        self.joining: dict[str, Instance] = {}  # the user of a join token -> who it is for
        self.instances: dict[str, Instance] = {}
        self.refused: dict[str, int] = {}  # instances whose hello is refused -> how often that has happened
        self.has_store = importlib.util.find_spec("kernelm_artifacts") is not None

    async def __aenter__(self) -> "Stand":
        await self.system.__aenter__()
        try:
            await self._prepare()
        except BaseException:
            await self.system.__aexit__()
            raise
        return self

    async def _prepare(self) -> None:
        kernel = self.system.kernel
        assert kernel is not None
        hello = kernel.registry.hello

        async def maybe(request: Any, grant: Any, node: str) -> Any:
            if request.instance in self.refused:
                self.refused[request.instance] += 1
                raise ClientFault("version_mismatch", f"{request.plugin} offers another schema than the kernel has",
                                  "install matching versions")  # fmt: skip
            return await hello(request, grant, node)

        kernel.registry.hello = maybe  # type: ignore[method-assign, assignment]
        self.driver.bus = await self.system.connect("jobs")

        async def build(_: dict[str, Any]) -> JobDriver:
            return self.driver

        if importlib.util.find_spec("kernelm_contracts") is not None:
            importlib.import_module("kernelm_contracts")
        offered = [CONTRACTS[c] for c in ("jobs/1",) if c in CONTRACTS]
        for contract in offered:
            self.driver.offer(contract)
        contracts = ("work/1", *(c.id() for c in offered))
        await self.system.member(Member(self.driver.bus, "jobs", "jobs", "", contracts), build)
        if self.has_store:
            await self.system.service("artifacts")
        for pattern in ("evt.>", "$KV.leases.>", "impl.kernel.>", "impl.jobs.>", "impl.artifacts.>"):
            await kernel.bus._subscribe(pattern, None, "", self._seen)

    def _seen(self, msg: Any) -> None:
        who = msg.subject.rpartition(".")[2]
        instance = self.joining.get(who) or self.instances.get(who)
        if instance is None:
            return
        instance.tap.messages.append((msg.subject, msg.data, dict(msg.headers or {}), time.monotonic()))
        if ".kernel.v1.enroll." in msg.subject or ".kernel.v1.renew." in msg.subject:
            with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
                instance.keys.add(msgspec.json.decode(msg.data)["public_key"])

    async def start(self, subject: Subject, settings: dict[str, Any], refuse: bool = False, place: Place | None = None,
                    before: Callable[[Instance], None] = lambda _: None) -> Instance:  # fmt: skip
        """Start an instance in a pool of its own; `await instance.ready()` waits for it. `before` sees it when all but its
        process is there. With `refuse` its hello is refused."""
        kernel = self.system.kernel
        assert kernel is not None
        name = f"{subject.manifest.name}-{secrets.token_hex(3)}"
        pool = f"pool-{name}"
        kernel.supervisor.pools[pool] = PoolSpec(pool, subject.manifest.name, settings=settings, contracts=False, parked=True)
        instance = self.instances[name] = Instance(self, subject, pool, name, place or self.own)
        if refuse:
            self.refused[name] = 0
        before(instance)
        await instance.begin()
        return instance

    async def store(self, folder: Path, kind: str) -> str:
        """Put a folder into the store; its digest."""
        stored: Artifact = await self.system.admin.call(Artifacts.put, PutArtifact(str(folder), kind), timeout_s=60.0)
        return stored.digest

    def denials(self, instance: Instance) -> list[str]:
        """Lines of the broker's log about what it denied to this instance."""
        file = self.system.home / "broker.log"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        return [line for line in lines if "Violation" in line and any(key in line for key in instance.keys)]

    def bus(self) -> Bus:
        """The checks' own identity: the administrator."""
        return self.system.admin

    async def __aexit__(self, *_: object) -> None:
        for instance in self.instances.values():
            await instance.end()
        await self.system.__aexit__()
