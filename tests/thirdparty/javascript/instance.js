// One instance and its life: enroll, hello, lease, serve, ready, renew, drain, stop. kernel/PROTOCOL.md says what each is.

import { readFileSync, unlinkSync } from 'node:fs';

import { blake2b } from '@noble/hashes/blake2.js';
import { bytesToHex } from '@noble/hashes/utils.js';

import { Contract } from './contract.js';
import { Fault } from './faults.js';
import { Jobs } from './jobs.js';
import { insist, later, Link, newKey, random } from './link.js';

const PATIENCE_MS = 60_000; // with a kernel that is starting itself
const OVERLAP_S = 60; // for which the old key is good after a renewal
const ORPHAN_MS = 60_000; // without a broker for so long, it ends
const BUCKETS = 24;
const LATEST_S = 120; // a deadline that passed longer ago than a message can wait tells of a wrong clock

export class Instance {
  static async join(environment, { name, version, maxJobs }) {
    const self = new Instance();
    const { KERNELM_URL: url, KERNELM_INSTANCE: user, KERNELM_SCRATCH: scratch, KERNELM_TOKEN_FILE: file } = environment;
    Object.assign(self, { url, user, scratch, name, version, boot: random(8), events: 0, begun: Date.now() });
    Object.assign(self, { subscriptions: [], contracts: new Map(), under: new Set(), answered: 0, failed: 0, draining: null });
    self.latency = new Array(BUCKETS).fill(0);
    self.stopped = new Promise((resolve) => (self.stop = resolve));
    self.jobs = new Jobs(self, maxJobs);
    const token = JSON.parse(Buffer.from(readFileSync(file, 'utf8').trim(), 'base64url').toString());
    unlinkSync(file);
    const key = newKey();
    const joining = await Link.open(url, token.user, token.jwt, Buffer.from(token.seed));
    const enrolled = await insist(async () => {
      const body = { token: token.jwt, public_key: key.publicKey };
      return answerOf(await joining.request(`svc.kernel.v1.enroll.${token.user}`, body, 5000));
    }, PATIENCE_MS);
    await joining.connection.close();
    await self.#connect(enrolled, key);
    return self;
  }

  async #connect({ jwt, expires }, key) {
    this.link = await Link.open(this.url, this.user, jwt, key.seed);
    this.seen = Date.now(); // the last sign of the broker
    this.renewAt = expires ? Date.now() + ((expires * 1000 - Date.now()) * 2) / 3 : Infinity;
    const { connection } = this.link;
    connection.closed().then((error) => {
      if (connection === this.link.connection && !this.draining) this.stop(new Error(`shut out: ${error?.message ?? 'closed'}`));
    });
  }

  /** Serve the contract that `schema` describes with `methods`: an object with a function for each of its methods. */
  offer(schema, methods) {
    const contract = new Contract(schema, methods);
    this.contracts.set(contract.key, contract);
  }

  /** From hello to the end; the exit code. */
  async live() {
    const offered = [...this.contracts.values()].map((c) => ({ id: c.id, schema_hash: c.schemaHash }));
    const hello = { instance: this.user, plugin: this.name, version: this.version, contracts: offered };
    const welcome = await insist(() => this.call('kernel/1', 'hello', hello, 5000), PATIENCE_MS);
    this.pool = welcome.pool;
    const renewing = this.#renew(welcome.lease_ttl_s);
    this.#serve(this.link);
    await this.link.connection.flush();
    const ready = insist(() => this.call('kernel/1', 'ready', { instance: this.user, models: [] }, 5000), PATIENCE_MS);
    await Promise.race([ready, this.stopped]);
    const failure = await Promise.race([this.stopped, renewing]);
    if (failure instanceof Error) {
      console.error(failure.message);
      return 3;
    }
    await this.drain(10_000);
    await this.link.connection.close();
    return 0;
  }

  // ---- calling ----

  /** Call a method of the system or of another plugin; its reply. */
  async call(contract, method, request, timeoutMs = 30_000) {
    const subject = `svc.${contract.replace('/', '.v')}.${method}.${this.user}`;
    return answerOf(await this.link.request(subject, request, timeoutMs));
  }

  /** Publish a fact; it is on disk when this returns. */
  async publish(type, body) {
    const data = new TextEncoder().encode(JSON.stringify(body));
    const n = ++this.events;
    const id = `${this.user}.${this.boot}.${n}`;
    const head = {
      'Nats-Msg-Id': id, 'ce-id': id, 'ce-specversion': '1.0', 'ce-type': type, 'ce-source': this.user,
      'ce-time': new Date().toISOString(), 'ce-datacontenttype': 'application/json', 'ce-boot': this.boot, 'ce-sequence': n,
      'ce-digest': bytesToHex(blake2b(data, { dkLen: 16 })),
    };
    await insist(() => this.link.request(`evt.${type}.${this.user}`, data, 5000, head), PATIENCE_MS);
  }

  // ---- lease and key ----

  async #renew(ttl) {
    const pause = (ttl * 1000) / 3; // no answer is waited for longer, so that the lease outlives one that never comes
    let key = newKey();
    for (;;) {
      const begun = Date.now();
      try {
        const body = { instance: this.user, renewed: Date.now() / 1000 };
        await this.link.request(`$KV.leases.${this.user}`, body, pause, { 'Nats-TTL': ttl });
        this.seen = Date.now();
        if (Date.now() > this.renewAt) {
          await this.#renewKey(key, pause); // the same key until it is done: an answer may be lost
          key = newKey();
        }
      } catch (error) {
        console.error(`lease: ${error.message}`);
      }
      if (Date.now() - this.seen > ORPHAN_MS) return new Error(`no broker for ${ORPHAN_MS / 1000} s`);
      await later(Math.max(Math.min(begun + pause - Date.now(), Math.max(this.renewAt - Date.now(), 200)), 0));
    }
  }

  /** Move to a new key and a second connection, without losing a message. */
  async #renewKey(key, timeout) {
    const enrolled = await this.call('kernel/1', 'renew', { public_key: key.publicKey, overlap_s: OVERLAP_S }, timeout);
    const [old, left] = [this.link, this.subscriptions];
    await this.#connect(enrolled, key);
    if (!this.draining) this.#serve(this.link);
    await this.link.connection.flush();
    await Promise.all(left.map((s) => s.drain())); // unsubscribes, flushes, and hands over what had been delivered
    old.retire(OVERLAP_S * 1000 - 5000).catch((error) => console.error(`closing the old connection: ${error.message}`));
  }

  // ---- serving ----

  #serve(link) {
    const callback = (error, message) => (error ? console.error(error.message) : this.#take(message));
    const subscribe = (subject, queue) => link.connection.subscribe(subject, { queue, callback });
    this.own = subscribe(`inst.${this.user}.>`, random(8));
    this.shared = subscribe(`impl.${this.pool}.>`, this.pool);
    this.subscriptions = [this.own, this.shared];
  }

  #take(message) {
    const work = this.#answer(message).finally(() => this.under.delete(work));
    this.under.add(work);
  }

  async #answer(message) {
    const begun = performance.now();
    const [kind, , name, version, method, caller] = message.subject.split('.');
    const verb = kind === 'inst' && name === 'plugin';
    try {
      const reply = verb ? await this.#verb(method, message) : await this.#method(name, version, method, caller, message);
      if (message.reply) this.link.publish(message.reply, reply);
    } catch (error) {
      const fault = Fault.from(error, message.subject);
      this.failed += !verb && fault.whose !== 'client';
      const line = fault.message.replace(/[^\x20-\x7e]/g, '?').slice(0, 200);
      const head = { 'Nats-Service-Error': line, 'Nats-Service-Error-Code': fault.status };
      if (message.reply) this.link.publish(message.reply, fault.body, head);
    }
    if (verb) return; // the verbs are no work
    this.answered += 1;
    this.latency[Math.min(32 - Math.clz32(Math.floor((performance.now() - begun) * 16)), BUCKETS - 1)] += 1;
  }

  async #method(name, version, method, caller, message) {
    const contract = this.contracts.get(`${name}.${version}`);
    const known = contract?.methods[method];
    if (!known) throw Fault.client('unsupported_method', `${name}.${version}.${method} is not served here`);
    refuseIfLate(message.headers?.get('Kernelm-Deadline'));
    if (known.kind !== 'job') return known.run(contract.request(method, message.data), { caller });
    if (caller !== 'jobs') throw Fault.client('permission_denied', `${method} is a job`, 'submit it with jobs/1.submit');
    return this.jobs.accept(contract, method, message.data);
  }

  // ---- verbs ----

  async #verb(method, message) {
    const request = Contract.parse(message.data);
    if (method === 'probe') return this.probe();
    if (method === 'stop') {
      setTimeout(() => this.stop(), 20); // once the answer is out
      return {};
    }
    if (method === 'cancel') {
      if (typeof request.job !== 'string' || !Number.isInteger(request.epoch)) {
        throw Fault.client('invalid', 'cancel: `job` is a string, and `epoch` an integer');
      }
      await this.jobs.cancel(request.job, request.epoch, request.reason || 'cancelled');
      return {};
    }
    if (method === 'drain') {
      const deadline = typeof request.deadline_s === 'number' ? request.deadline_s : 30;
      await this.drain(deadline * 1000, 1);
      return this.probe();
    }
    throw Fault.client('unsupported_method', `plugin.v1.${method} is no verb`);
  }

  probe() {
    const { user, begun, under, answered, failed, latency } = this;
    return {
      instance: user, uptime_s: (Date.now() - begun) / 1000, jobs: this.jobs.names(), in_flight: under.size, answered, failed,
      rss_mb: Math.round(process.memoryUsage.rss() / 2 ** 20), latency,
    };
  }

  /** Leave the pool, answer what was delivered, and finish the jobs that end in time. `asking`: calls that wait for this one. */
  async drain(deadlineMs, asking = 0) {
    const end = Date.now() + deadlineMs;
    this.draining ??= this.shared?.drain();
    await this.draining;
    while ((this.under.size > asking || this.jobs.size) && Date.now() < end) await later(20);
    await this.jobs.cancelAll('the instance stops');
    await this.link.connection.flush();
  }
}

function answerOf(message) {
  const fault = Fault.of(message);
  if (fault) throw fault;
  return JSON.parse(new TextDecoder().decode(message.data));
}

function refuseIfLate(deadline) {
  if (!deadline) return;
  const late = Date.now() / 1000 - Number(deadline);
  if (Number.isNaN(late)) throw Fault.client('invalid', 'Kernelm-Deadline is no number', 'give Unix seconds');
  if (late > 0 && late < LATEST_S) throw new Fault('kernel', 'timeout', "the caller's deadline has passed", '', { retriable: true });
}
