// The jobs of this instance: each is accepted once, worked on, and reported on until that is heard. kernel/PROTOCOL.md, 'Jobs'.

import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';

import { Contract } from './contract.js';
import { Fault } from './faults.js';
import { insist, later } from './link.js';

const REPORT_EVERY_MS = 500;
const REPORT_FOR_MS = 600_000; // the job table may be starting again
const CANCEL_MS = 5000;
const REMEMBERED = 1000; // jobs that are over: their dispatch may come once more, late

export class Cancelled extends Error {}

/** One job in the hands of this instance. */
class Job {
  constructor(jobs, { job, epoch, name = '' }) {
    Object.assign(this, { jobs, id: job, epoch, name, cancelled: '', reported: 0 });
    this.scratch = join(jobs.instance.scratch, `${job}-${epoch}`);
    mkdirSync(this.scratch, { recursive: true });
  }

  /** Between two steps of the work: lets the lease be renewed, ends the work that nobody wants any more, tells how far it is. */
  async step(fraction, phase, message = '') {
    await setImmediate();
    if (this.cancelled) throw new Cancelled(this.cancelled);
    if (Date.now() - this.reported < REPORT_EVERY_MS) return;
    this.reported = Date.now();
    const progress = { fraction, phase, message, metrics: {}, deadline_s: 600 };
    this.report({ progress }, 0).catch(() => undefined); // the next one will tell; a stale epoch has cancelled it
  }

  async report(what, patienceMs) {
    try {
      const body = { job: this.id, epoch: this.epoch, ...what };
      await insist(() => {
        if (this.cancelled) throw new Cancelled(this.cancelled);
        return this.jobs.instance.call('work/1', 'report', body, 10_000);
      }, patienceMs);
    } catch (error) {
      if (['stale_epoch', 'not_found'].includes(error.code)) this.cancelled ||= error.message; // somebody else has it
      throw error;
    }
  }
}

export class Jobs {
  constructor(instance, most) {
    Object.assign(this, { instance, most, working: new Map(), over: new Map() });
  }

  get size() {
    return this.working.size;
  }

  names() {
    return [...this.working.values()].map(({ job }) => `${job.id}/${job.epoch}`);
  }

  /** Take a job: `{}` at once, and its result as a report. */
  async accept(contract, method, data) {
    const dispatch = Contract.parse(data);
    const { job: id, epoch, attempt, request } = dispatch;
    const numbered = Number.isInteger(epoch) && Number.isInteger(attempt);
    if (typeof id !== 'string' || !/^[\w-][\w.-]{0,199}$/.test(id) || !numbered || request === undefined) {
      throw Fault.client('invalid', 'a dispatch is {"job", "epoch", "attempt", "request", ...}');
    }
    if (this.working.size >= this.most) await setImmediate(); // one whose last report was just answered ends in this turn
    for (let before = this.working.get(id); before || this.over.get(id) >= epoch; before = this.working.get(id)) {
      if (!before || before.job.epoch >= epoch) return {}; // handed over twice
      await this.cancel(id, epoch, `epoch ${epoch} has it now`);
      if (this.working.get(id) === before) this.working.delete(id); // it did not end in time; nothing of it counts any more
    }
    if (this.working.size >= this.most) {
      throw Fault.client('busy', `${this.working.size} of ${this.most} jobs are at work`, 'try again later', { retriable: true });
    }
    const wanted = contract.request(method, request);
    const job = new Job(this, dispatch);
    const done = this.#work(job, () => contract.methods[method].run(wanted, job));
    this.working.set(id, { job, done });
    return {};
  }

  async #work(job, run) {
    let outcome = null;
    try {
      await setImmediate(); // the dispatch is answered first
      outcome = { result: await run() };
    } catch (error) {
      if (error instanceof Cancelled) console.log(`job ${job.id}/${job.epoch} was taken away: ${error.message}`);
      else outcome = { fault: Fault.from(error, `job ${job.name || job.id}`).body };
    }
    if (outcome && !job.cancelled) {
      await job.report(outcome, REPORT_FOR_MS).catch((error) => console.error(`report of ${job.id}: ${error.message}`));
    }
    rmSync(job.scratch, { recursive: true, force: true });
    if (this.working.get(job.id)?.job === job) this.working.delete(job.id);
    this.over.set(job.id, job.epoch);
    if (this.over.size > REMEMBERED) this.over.delete(this.over.keys().next().value);
  }

  /** End a job, if it is of that epoch or an older one; returns when it has ended, or after a time. */
  async cancel(id, epoch, reason) {
    const found = this.working.get(id);
    if (!found || found.job.epoch > epoch) return;
    found.job.cancelled = reason;
    await Promise.race([found.done, later(CANCEL_MS)]);
  }

  async cancelAll(reason) {
    await Promise.all([...this.working.values()].map(({ job }) => this.cancel(job.id, job.epoch, reason)));
  }
}
