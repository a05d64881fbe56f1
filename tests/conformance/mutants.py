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
Member, JobsInHand = runner.Member, runner.JobsInHand
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
SEARCH = """
_o = MostAccurate.optimize
async def optimize(self, request, job):
    found = await _o(self, request, job)
    rows = found.rows
    return structs.replace(found, rows=tuple({row} for r in rows {which}))
MostAccurate.optimize = optimize
"""
ACCEPT = """
_accept = JobsInHand.accepting
def accept(self, context, method, handler):
    inner = _accept(self, context, method, handler)
    async def take(dispatch, call):
{body}
        return await inner(dispatch, call)
    return take
JobsInHand.accepting = accept
"""


# a server that also generates: it repeats the prompt's words, one every 10 ms, for two callers at a time
GENERATOR = """
from kernelm_contracts.server import GenerateFrame, ServerInfo, Usage
MOST = 60
slots, seen = asyncio.Semaphore(2), []

async def speak(words, most):
    async with slots:
        for k in range(most):
            await asyncio.sleep(0.01)
            yield f" {words[k % len(words)]}{k}"

def admit(self, request, call):
    model, asked = self.settings.model, call.model or request.model
    if asked and asked != model.name:
        raise ClientFault("unknown_model", "another is served here")
    if request.at_least > model.generation:
        raise ClientFault("stale_generation", "older", retriable=True)
    return model

def check(request):
    if bool(request.messages) == bool(request.prompt) or not 0 <= request.max_tokens <= MOST or request.temperature < 0 \\
            or not 0 < request.top_p <= 1 or not all(request.stop):
        raise ClientFault("invalid", "out of range")

def count(words, made):
    return Usage(len(words), made)

async def generate(self, request, call):
    model, began = admit(self, request, call), time.perf_counter()
    check(request)
    words = (request.prompt or " ".join(m.content for m in request.messages)).split() or ["nothing"]
    most, text, sent, made = request.max_tokens or MOST, "", 0, 0
    async for word in speak(words, most):
        text, made = text + word, made + 1
        cut = min((text.index(s) for s in request.stop if s in text), default=-1)
        whole = text if cut < 0 else text[:cut]
        hold = max(map(len, request.stop), default=1) - 1 if cut < 0 else 0  # what may be the beginning of a stop string
        if len(whole) - hold > sent:
            yield GenerateFrame(whole[sent:len(whole) - hold])
            sent = len(whole) - hold
        if cut >= 0:
            break
    else:
        yield GenerateFrame(text[sent:])
    reason = "stop" if cut >= 0 and made < most else "length"
    yield GenerateFrame("", reason, count(words, made), model.name, model.generation, model.artifact, 1.0, 2.0)
WordServer.generate = generate

async def info(self, request, call):
    model = admit(self, request, call)
    return ServerInfo(model.name, model.generation, model.artifact, ("classify", "generate"), 0, MOST)
WordServer.info = info
"""


def _generate(defect: str) -> str:
    return GENERATOR + defect


LAST = """
_g = WordServer.generate
async def generate(self, request, call):
    async for frame in _g(self, request, call):
        yield {frame}
WordServer.generate = generate
"""


def _decide(request: str = "request, call", decisions: str = "reply.decisions") -> str:
    return REPLIES.format(request=request, decisions=decisions)


def _classify(change: str, request: str = "request") -> str:
    return ANSWER.format(request=request, change=change)


def _optimize(row: str, which: str = "") -> str:
    return SEARCH.format(row=row, which=which)


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
    ("life.lease", "scheduler", "_ap = Bus.append\nasync def append(self, subject, body, headers=None, **more):\n"
     "    return await _ap(self, subject, body, {**(headers or {}), 'Nats-TTL': '9'} if '.leases.' in subject else headers, **more)\n"
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
    ("server.stream", "server", _generate(LAST.format(frame="structs.replace(frame, first_ms=9.0) if frame.finish_reason else frame"))),
    ("server.counts", "server", _generate("count = lambda words, made: Usage(7, made)")),
    ("server.greedy", "server", _generate(LAST.format(frame="structs.replace(frame, text=frame.text + str(len(seen))) "
                                                            "if frame.finish_reason and not (request.stop or seen.append(1)) else frame"))),
    ("server.stops", "server", _generate("_g = WordServer.generate\nasync def generate(self, request, call):\n"
     "    async for frame in _g(self, structs.replace(request, stop=()) if all(request.stop) else request, call):\n"
     "        yield frame\nWordServer.generate = generate")),
    ("server.refusals", "server", _generate("_c = check\ncheck = lambda r: _c(structs.replace(r, top_p=1.0))")),
    ("server.info", "server", _generate("_i = WordServer.info\nasync def info(self, request, call):\n"
     "    return structs.replace(await _i(self, request, call), methods=('classify', 'embed'))\nWordServer.info = info")),
    ("server.gone", "server", _generate("_s = speak\nasync def speak(words, most):\n    queue = asyncio.Queue()\n"
     "    async def work():\n        async for word in _s(words, most):\n            queue.put_nowait(word)\n"
     "        queue.put_nowait(None)\n    asyncio.create_task(work())\n    while (word := await queue.get()) is not None:\n"
     "        yield word\n")),
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
    ("data.discreet", "data", "_w = FolderData.write\ndef write(self, source, out, request):\n    card = _w(self, source, out, request)\n"
     "    dropped = tuple(t for t in (f.read_text() for f in sorted(source.glob('*/*.txt'))) if len(t) < 21)\n"
     "    card = structs.replace(card, steps=(structs.replace(card.steps[0], examples=dropped),))\n"
     "    (out / 'dataset.json').write_bytes(msgspec.json.encode(card))\n    return card\nFolderData.write = write"),
    ("data.private", "data", "_q = FolderData.prepare\nasync def prepare(self, request, job):\n"
     "    return await _q(self, structs.replace(request, private=None), job)\nFolderData.prepare = prepare"),
    ("optimizer.measured", "optimizer", _optimize("structs.replace(r, measurement=rows[0].measurement) if r.name == 'broken' else r")),
    ("optimizer.rows", "optimizer", _optimize("r", "if r.measurement")),
    ("optimizer.winner", "optimizer", "max = min"),
    ("optimizer.test", "optimizer", "_m = MostAccurate.measured\nasync def measured(self, models, dataset, split, job):\n"
     "    await _m(self, models, dataset, 'test', job)\n    return await _m(self, models, dataset, split, job)\n"
     "MostAccurate.measured = measured"),
    ("optimizer.children", "optimizer", "_J = JobSpec\nJobSpec = lambda *a, **k: _J(*a, **{**k, 'parent': ''})"),
    ("jobs.run", "data", "_q = FolderData.prepare\nasync def prepare(self, request, job):\n    job.latest = system.Progress(2.0)\n"
     "    job.changed.set()\n    await asyncio.sleep(0.05)\n    return await _q(self, request, job)\nFolderData.prepare = prepare"),
    ("jobs.caller", "data", _accept("call.caller = 'jobs'")),
    ("jobs.invalid", "data", _accept("try:", "    return await inner(dispatch, call)", "except ClientFault as f:",
                                     "    if f.code != 'invalid': raise", "    raise PluginFault('invalid', f.message) from None")),
    ("jobs.duplicate", "data", _accept("if self.over.get(dispatch.job) == dispatch.epoch:", "    del self.over[dispatch.job]")),
    ("jobs.stale", "data", _accept("if self.over.get(dispatch.job, 0) > dispatch.epoch:", "    del self.over[dispatch.job]")),
    ("jobs.busy", "data", _accept("self.most = 9")),
    ("jobs.repeat", "data", "_rp = JobsInHand._report\nasync def report(self, job, report, patience_s=0.0):\n"
     "    await _rp(self, job, report, patience_s=0.0)\nJobsInHand._report = report"),
    ("jobs.fenced", "data", "_rp = JobsInHand._report\nasync def report(self, job, report, patience_s=600.0):\n    for left in (3, 2, 1, 0):\n"
     "        try:\n            return await _rp(self, job, report, patience_s)\n        except ClientFault:\n"
     "            if not left: raise\nJobsInHand._report = report"),
    ("jobs.cancel", "data", "async def cancel(self, r, c):\n    return system.Empty()\nMember.cancel = cancel\n_q = FolderData.prepare\n"
     "async def prepare(self, request, job):\n    await asyncio.sleep(0.6)\n    return await _q(self, request, job)\n"
     "FolderData.prepare = prepare"),
    ("jobs.poison", "data", "_i = serving.invalid\nserving.invalid = lambda what, e: PluginFault('invalid', str(e)) "
     "if what.startswith('prepare') else _i(what, e)"),
    ("trainer.resumed", "trainer", "_f = WordTrainer.fit\ndef fit(self, training):\n    training.saved.pop('weight', None)\n"
     "    return _f(self, training)\nWordTrainer.fit = fit"),
    ("trainer.progress", "trainer", "_p = Training.progress\ndef progress(self, fraction, message='', **metrics):\n"
     "    _p(self, fraction, message, step=-metrics['step'])\nTraining.progress = progress"),
    ("trainer.scores", "trainer", "from kernelm_contracts import bases\n_sc = bases.score\ndef score(*given):\n    scores = _sc(*given)\n"
     "    return structs.replace(scores, documents=scores.documents - 1)\nbases.score = score"),
    ("trainer.model", "trainer", "_d = WordTrainer.describe\nasync def describe(self, request, call):\n"
     "    return structs.replace(await _d(self, request, call), name='x')\nWordTrainer.describe = describe"),
)  # fmt: skip
