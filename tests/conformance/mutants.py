# ruff: noqa: E501
"""One defect each: (check that must catch it, kind of good plugin, code put behind the plugin's own). Of a name that begins
with `conformance.toml:` the rest is that file."""

HEAD = """
import asyncio, os, signal, sys, time
from msgspec import structs
from kernelm_sdk import serving, system
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, PluginFault
runner = sys.modules["__main__"]  # `python -m kernelm_sdk.runner`
Member = runner.Member
from kernelm_sdk.serving import Served
"""
REPLIES = """
_before = InOrder.decide
async def decide(self, request, call):
    reply = await _before(self, {request})
    return structs.replace(reply, decisions=tuple({decisions}))
InOrder.decide = decide
"""
ANSWER = """
_before = WordServer.classify
async def classify(self, request, call):
    reply = await _before(self, {request}, call)
    return structs.replace(reply, {change})
WordServer.classify = classify
"""
ACCEPT = """
_accept = Member._accept
def accept(self, method, handler):
    inner = _accept(self, method, handler)
    async def take(dispatch, call):
{body}
        return await inner(dispatch, call)
    return take
Member._accept = accept
"""


def _decide(request: str = "request, call", decisions: str = "reply.decisions") -> str:
    return REPLIES.format(request=request, decisions=decisions)


def _classify(change: str, request: str = "request") -> str:
    return ANSWER.format(request=request, change=change)


def _accept(*lines: str) -> str:
    return ACCEPT.format(body="\n".join(f"        {line}" for line in lines))


FIELDS = """
class Unlike(ClientFault):
    def __init__(self, code, *a, **k):
        super().__init__("not_found" if code == "unsupported_method" else code, *a, **k)
serving.ClientFault = Unlike
"""
SIZE = """
_answer = Served._answer
async def answer(self, msg):
    if len(msg.data) > 400_000:
        return await self._refuse(msg, MemoryError())
    await _answer(self, msg)
Served._answer = answer
"""
MUTANTS: tuple[tuple[str, str, str], ...] = (
    ("handshake.starts", "scheduler", "async def on_start(self): raise RuntimeError('no')\nInOrder.on_start = on_start"),
    ("handshake.contracts", "scheduler", "_H = runner.Hello\nrunner.Hello = lambda i, p, v, c: _H(i, p, '9', c)"),
    ("handshake.token", "scheduler", "async def on_start(self):\n    open(os.environ['KERNELM_TOKEN_FILE'], 'w').close()\nInOrder.on_start = on_start"),
    ("handshake.refused", "scheduler", "_r = Member.run\nasync def run(self, build):\n    try:\n        await _r(self, build)\n"
     "    except Fault:\n        os._exit(0)\nMember.run = run"),
    ("verbs.probe", "scheduler", "_p = Member.probe\nasync def probe(self, r, c):\n"
     "    return structs.replace(await _p(self, r, c), instance='x')\nMember.probe = probe"),
    ("calls.unknown-method", "scheduler", FIELDS),
    ("calls.valid", "data", "async def describe(self, request, call):\n    if not request.digest.startswith('sha256:'):\n"
     "        raise KeyError('x')\n    return await _d(self, request, call)\n_d = FolderData.describe\nFolderData.describe = describe"),
    ("calls.invalid", "scheduler", "serving.invalid = lambda what, error: PluginFault('invalid', str(error))"),
    ("calls.unknown-fields", "scheduler", "_a = Served._answer\nasync def answer(self, msg):\n    if b'newer' in msg.data:\n"
     "        return await self._refuse(msg, ClientFault('invalid', 'unknown field'))\n    await _a(self, msg)\nServed._answer = answer"),
    ("calls.together", "scheduler", "_m = Served.on_message\ndef on_message(self, msg):\n    _m(self, msg)\n"
     "    if len(self.tasks) > 21:\n        _m(self, msg)\nServed.on_message = on_message"),
    ("calls.pool", "scheduler", "_m = Served.on_message\ndef on_message(self, msg):\n"
     "    if not (msg.subject.startswith('impl.') and 'no-such' in msg.subject):\n        _m(self, msg)\nServed.on_message = on_message"),
    ("calls.poison", "scheduler", SIZE),
    ("calls.headers", "scheduler", "_s = serving._seconds\nserving._seconds = lambda t: 0.0 if t == 'soon' else _s(t)"),
    ("calls.late", "scheduler", "serving.LATEST_S = 0.0"),
    ("faults.well-formed", "scheduler", "Fault.http_status = property(lambda self: 200)"),
    ("faults.discreet", "scheduler", "serving.invalid = lambda w, e: ClientFault('invalid', 'Traceback (most recent call last)')"),
    ("subjects.declared", "scheduler", "async def on_start(self):\n    await self.context.bus._client.publish("
     "'svc.jobs.v1.submit.' + self.context.instance, b'{}')\nInOrder.on_start = on_start"),
    ("events.declared", "scheduler", "from kernelm_sdk.events import Event\nclass Odd(Event, frozen=True):\n    TYPE = 'odd.thing'\n"
     "async def on_start(self):\n    await self.context.publish(Odd())\nInOrder.on_start = on_start"),
    ("life.lease", "scheduler", "_ap = Bus.append\nasync def append(self, subject, body, headers=None, patience_s=0.0):\n"
     "    return await _ap(self, subject, body, {**(headers or {}), 'Nats-TTL': '9'} if '.leases.' in subject else headers, patience_s)\n"
     "Bus.append = append"),
    ("life.drain", "scheduler", "async def drain(self, r, c):\n    return await self.probe(system.Empty(), c)\nMember.drain = drain"),
    ("life.stop", "scheduler", "async def stop(self, r, c):\n    asyncio.get_running_loop().call_later(0.05, os._exit, 3)\n"
     "    return system.Empty()\nMember.stop = stop"),
    ("life.sigterm", "scheduler", "runner._stop_on_signals = lambda s, w: signal.signal(signal.SIGTERM, lambda *a: os._exit(4))"),
    ("samples.good", "scheduler", "conformance.toml:[requests]\n'scheduler/1.decline' = {}\n"),
    ("scheduler.every-job", "scheduler", _decide(decisions="d for d in reply.decisions if d.action != 'wait' or d.job != 'job-0'")),
    ("scheduler.assignment", "scheduler", _decide(decisions="structs.replace(d, plugin='zzz') for d in reply.decisions")),
    ("scheduler.room", "scheduler", _decide("structs.replace(request, nodes=tuple(structs.replace(n, free=n.capacity) for n in "
                                            "request.nodes)), call")),
    ("scheduler.quotas", "scheduler", _decide("structs.replace(request, quotas={}), call")),
    ("scheduler.deterministic", "scheduler", "_n = []\n" + _decide(
        decisions="structs.replace(d, score=float(len(_n))) for d in reply.decisions if not _n.append(1)")),
    ("scheduler.starvation", "scheduler", _decide("structs.replace(request, pending=tuple(structs.replace(p, priority=p.priority - 9 * "
                                                  "(p.request.cpu >= 4)) for p in request.pending)), call")),
    ("server.announced", "server", "WordServer.models = lambda self: (self.settings.model.name, 'extra')"),
    ("server.identity", "server", _classify("artifact=''")),
    ("server.results", "server", _classify("results=tuple(tuple(reversed(r)) for r in reply.results)")),
    ("server.usage", "server", _classify("tokens=1")),
    ("server.generation", "server", _classify("took_ms=1.0", "structs.replace(request, at_least=0)")),
    ("server.model", "server", _classify("took_ms=1.0", "structs.replace(request, model='')")),
    ("server.embeddings", "server", "from kernelm_contracts.server import EmbedReply\nasync def embed(self, request, call):\n"
     "    m = self.settings.model\n"
     "    return EmbedReply(m.name, m.generation, m.artifact, tuple((1.0, 1.0) for _ in request.input), 1, 1.0)\nWordServer.embed = embed"),
    ("data.digest", "data", "_w = FolderData.write\ndef write(self, source, out, request):\n    card = _w(self, source, out, request)\n"
     "    (out / 'made').write_text(str(time.time()))\n    return card\nFolderData.write = write"),
    ("data.account", "data", "_S = Step\nStep = lambda n, i, o, w: _S(n, i + 1, o, w)"),
    ("data.tables", "data", "_t = pa.Table.from_pylist\nclass pa:\n    schema, string, int32, list_ = pa.schema, pa.string, pa.int32, pa.list_\n"
     "    class Table:\n        from_pylist = staticmethod(lambda rows, schema: _t(rows, schema).rename_columns(\n"
     "            ['key', 'text', 'label', 'input_ids']))"),
    ("data.leakage", "data", "_w = FolderData.write\ndef write(self, source, out, request):\n"
     "    return _w(self, source, out, structs.replace(request, deduplicate=structs.replace(request.deduplicate, jaccard=2.0)))\n"
     "FolderData.write = write"),
    ("data.describe", "data", "_d = FolderData.describe\nasync def describe(self, request, call):\n"
     "    return structs.replace(await _d(self, request, call), name='x')\nFolderData.describe = describe"),
    ("data.labels", "data", "_w = FolderData.write\ndef write(self, source, out, request):\n"
     "    return _w(self, source, out, structs.replace(request, expect_labels=()))\nFolderData.write = write"),
    ("jobs.run", "data", "_q = FolderData.prepare\nasync def prepare(self, request, job):\n    job.latest = system.Progress(2.0)\n"
     "    job.changed.set()\n    await asyncio.sleep(0.05)\n    return await _q(self, request, job)\nFolderData.prepare = prepare"),
    ("jobs.caller", "data", _accept("call.caller = 'jobs'")),
    ("jobs.invalid", "data", _accept("try:", "    return await inner(dispatch, call)", "except ClientFault as f:",
                                     "    if f.code != 'invalid': raise", "    raise PluginFault('invalid', f.message) from None")),
    ("jobs.duplicate", "data", _accept("if self.over.get(dispatch.job) == dispatch.epoch:", "    del self.over[dispatch.job]")),
    ("jobs.stale", "data", _accept("if self.over.get(dispatch.job, 0) > dispatch.epoch:", "    del self.over[dispatch.job]")),
    ("jobs.busy", "data", _accept("self.max_jobs = 9")),
    ("jobs.repeat", "data", "_rp = Member._report\nasync def report(self, job, report, patience_s=0.0):\n"
     "    await _rp(self, job, report, patience_s=0.0)\nMember._report = report"),
    ("jobs.fenced", "data", "_rp = Member._report\nasync def report(self, job, report, patience_s=600.0):\n    for left in (3, 2, 1, 0):\n"
     "        try:\n            return await _rp(self, job, report, patience_s)\n        except ClientFault:\n"
     "            if not left: raise\nMember._report = report"),
    ("jobs.cancel", "data", "async def cancel(self, r, c):\n    return system.Empty()\nMember.cancel = cancel\n_q = FolderData.prepare\n"
     "async def prepare(self, request, job):\n    await asyncio.sleep(0.6)\n    return await _q(self, request, job)\n"
     "FolderData.prepare = prepare"),
    ("jobs.poison", "data", "_i = serving.invalid\nserving.invalid = lambda what, e: PluginFault('invalid', str(e)) "
     "if what.startswith('prepare') else _i(what, e)"),
)  # fmt: skip
